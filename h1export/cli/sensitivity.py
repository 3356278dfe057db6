"""`h1export sensitivity`."""

from __future__ import annotations

from pathlib import Path

import click
import cloup

from h1export.cli.build_request import DEVICE
from h1export.cli.common import adapter_folders, adapter_option, answer, common
from h1export.cli.output import say_text
from h1export.cli.ranges import THREADS
from h1export.quantize.budget import Budget, steps
from h1export.quantize.choices import BEST, GROUP_SIZES


@cloup.command(short_help="Measure which tensors need more bits.")
@click.argument("model", required=False)
@click.option(
    "--group-size",
    type=click.Choice([str(size) for size in GROUP_SIZES]),
    default="32",
    show_default=True,
    help="Columns that share an int4 scale, as in build.",
)
@click.option("--calibration", type=click.Path(path_type=Path), help="Text, as in build [default: shipped].")
@click.option(
    "--budget-bits", type=float, help="Keep the most sensitive tensors at int8, up to so many bits a weight on average."
)
@click.option(
    "--budget-kl",
    type=float,
    help="Keep the most sensitive tensors at int8, until the others' divergences add up to this at most.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File for the plan, to be edited and given to build --precisions.",
)
@DEVICE
@click.option("--jobs", default=0, show_default=True, type=THREADS, help="Threads; 0: one a core.")
@adapter_option
@common
def sensitivity(
    model: str | None,
    group_size: str,
    calibration: Path | None,
    budget_bits: float | None,
    budget_kl: float | None,
    out: Path | None,
    device: str,
    jobs: int,
    adapters: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> int:
    """Measure which tensors of MODEL need more than int4, and choose precisions within a budget.

    A tensor's figure is the divergence (KL, nats) of MODEL's predictions when this tensor alone is int4. Tensors come
    in the order in which a budget raises them to int8, with the bits a weight that each step makes and the divergence
    that it leaves.

    \b
    Examples:
      h1export sensitivity --budget-bits 5.0 --out plan.yaml
      h1export build --target ort --precisions plan.yaml
      h1export sensitivity --json > measured.json
      h1export plan --target ort --sensitivity measured.json
    """
    from h1export.checkpoint import resolve
    from h1export.cli.tables import ProgressBars
    from h1export.commands.sensitivity import measure_sensitivity
    from h1export.quantize.calibration import Calibration
    from h1export.quantize.precision_plan import plan_text
    from h1export.quantize.scheme import QuantScheme
    from h1export.writing import write_file

    if budget_bits is not None and budget_kl is not None:
        raise click.UsageError("give one of --budget-bits and --budget-kl")
    budget = Budget(budget_bits, budget_kl)
    with ProgressBars(quiet or as_json) as bars:
        found = measure_sensitivity(
            resolve.resolve(model),
            QuantScheme("int4", int(group_size), BEST["int4"]),
            Calibration(calibration, device=device),
            progress=bars,
            jobs=jobs,
            adapters=adapter_folders(adapters),
        )
    raised = {} if budget_bits is None and budget_kl is None else budget.raised(found)
    text = plan_text(found, raised)
    if out is not None:
        write_file(out, text.encode())
    if as_json:
        bought = {step.tensor: {"bits": step.bits, "left": step.kl} for step in steps(found)}
        answer(
            {
                name: {"kl": tensor.kl, "shape": tensor.shape, "int8": name in raised, **bought[name]}
                for name, tensor in found.items()
            }
        )
    else:
        say_text(text.rstrip(), quiet)
    return 0
