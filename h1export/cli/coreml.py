"""`h1export coreml`: commands for CoreML packages of any maker, on any machine."""

from __future__ import annotations

import io
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import cloup

from h1export import forms
from h1export.cli.common import answer, common, say
from h1export.errors import H1ExportError, reason

MOST_INPUTS = 128 << 20  # bytes of all arrays
SAVEZ = "write it with numpy.savez"
FAULTY = 1  # exit code of lint where it finds something


@cloup.group(short_help="Run and check CoreML packages anywhere.")
def coreml() -> None:
    """Run, inspect and lint CoreML packages (mlProgram, iOS 18), without a Mac.

    PACKAGE is an .mlpackage, or an artifact of h1export that holds one.
    """


def _open(path: Path) -> Any:
    from h1export.targets.coreml.evaluator import Package
    from h1export.targets.coreml.program.layout import PACKAGE

    return Package.open(path / PACKAGE if (path / PACKAGE).is_dir() else path)


package = click.argument("package", type=click.Path(path_type=Path))


@coreml.command(short_help="List the functions of a package.")
@package
@common
def inspect(package: Path, quiet: bool, as_json: bool) -> int:
    """List the functions of PACKAGE: their inputs, outputs and states, and the number of each op."""
    from collections import Counter

    from h1export.cli.tables import pairs_table

    found = {
        name: {
            "inputs": {port: str(kind) for port, kind in function.inputs.items()},
            "outputs": {port: str(kind) for port, kind in function.outputs.items()},
            "states": {port: str(kind) for port, kind in function.states.items()},
            "operations": dict(Counter(operation.type for operation in function.block.walk()).most_common()),
        }
        for name, function in _open(package).functions.items()
    }
    if as_json:
        answer(found)
    else:
        for name, parts in found.items():
            rows = [(f"{what[:-1]} {key}", value) for what, items in parts.items() for key, value in items.items()]
            say(pairs_table(f"function {name}", rows), quiet)
    return 0


@coreml.command(short_help="Find what is wrong with a package.")
@package
@click.option("--neural-engine", is_flag=True, help="Also report what only the Neural Engine does not take.")
@common
def lint(package: Path, neural_engine: bool, quiet: bool, as_json: bool) -> int:
    """Find what is wrong with PACKAGE: ops, types, constants, shapes, states, positions.

    coremltools' own validation is part of it. The exit code is 1 where something is wrong.
    """
    from h1export.targets.coreml.package.lint import lint as run

    findings = run(_open(package), neural_engine)
    if as_json:
        answer([{"rule": finding.rule, "where": finding.where, "what": finding.what} for finding in findings])
    for finding in findings:
        say(f"{finding.rule}: {finding.where} {finding.what}", quiet or as_json)
    say("clean" if not findings else f"{len(findings)} faults", quiet or as_json)
    return FAULTY if findings else 0


@coreml.command(short_help="Call a function of a package.")
@package
@click.option("--function", help="Function to call [default: the package's own].")
@click.option(
    "--inputs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help=".npz: an array for each input.",
)
@click.option(
    "--states", type=click.Path(exists=True, dir_okay=False, path_type=Path), help=".npz of states [default: zeros]."
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help=".npz to write: outputs, and states as the call left them.",
)
@common
def run(
    package: Path, function: str | None, inputs: Path, states: Path | None, out: Path | None, quiet: bool, as_json: bool
) -> int:
    """Call a function of PACKAGE once in the evaluator.

    The outputs are printed, and how near the largest fp16 number (65504) the values of each op came.

    \b
    Examples:
      h1export coreml run model.mlpackage --function decode --inputs in.npz --out after.npz
      h1export coreml run model.mlpackage --function decode --inputs next.npz --states after.npz
    """
    import numpy as np

    from h1export.cli.tables import pairs_table
    from h1export.targets.coreml.evaluator import Evaluator
    from h1export.writing import write_file

    evaluator = Evaluator(_open(package), function)
    held = evaluator.initial_states()
    if states is not None:
        given = _arrays(states)
        held = {name: given[name] for name in held if name in given}
    outputs = evaluator.run(_arrays(inputs), held)
    if out is not None:
        content = BytesIO()
        np.savez(content, **outputs, **held)  # type: ignore[arg-type]
        write_file(out if out.suffix == ".npz" else out.with_name(f"{out.name}.npz"), content.getvalue())
    described = {
        name: f"{array.dtype} {list(array.shape)}, {array.min():g} to {array.max():g}"
        for name, array in outputs.items()
    }
    if as_json:
        answer({"outputs": described, "maxima": evaluator.maxima_by_op()})
    say(pairs_table("outputs", described.items()), quiet or as_json)
    say(pairs_table("largest fp16 magnitude", sorted(evaluator.maxima_by_op().items())), quiet or as_json)
    return 0


def _arrays(file: Path) -> dict[str, Any]:
    """Return the arrays of a .npz file.

    Raises:
        H1ExportError: it is none, has more than ``MOST_INPUTS`` bytes, packed or not, or holds objects.
    """
    import numpy as np

    data = io.BytesIO(forms.content(file, SAVEZ, MOST_INPUTS))
    try:
        with zipfile.ZipFile(data) as members:
            nbytes = sum(member.file_size for member in members.infolist())
        if nbytes <= MOST_INPUTS:
            with np.load(data, allow_pickle=False) as arrays:
                return {name: np.asarray(arrays[name]) for name in arrays.files}
    except Exception as error:  # numpy parses headers as Python, and does not document what it raises
        raise H1ExportError(file, f"is no .npz of arrays ({reason(error)})", SAVEZ) from None
    raise H1ExportError(file, f"unpacks to {nbytes} bytes, and at most {MOST_INPUTS} are read", "give fewer tokens")
