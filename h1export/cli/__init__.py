"""The command line. Data goes to standard output, everything else to standard error.

Exit codes: 0 done (validate and gate: every check passed); 1 a check failed; 2 bad input, or it could not run; 3 gate could not decide.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class
from rich.console import Console

from h1export import __version__
from h1export.artifact.artifact import REPORT
from h1export.cli.bench import bench
from h1export.cli.common import F, answer, common, kernels_option, say
from h1export.cli.coreml import coreml
from h1export.cli.evaluate import evaluate
from h1export.cli.export import BuildRequest, export_options
from h1export.cli.finish import finish
from h1export.cli.gate import gate
from h1export.cli.plan import plan
from h1export.cli.report import report
from h1export.cli.sensitivity import sensitivity
from h1export.cli.trace import trace
from h1export.errors import H1ExportError
from h1export.targets import Kernels


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def cli() -> None:
    """Export Falcon-H1 models to the runtimes people deploy on, and check the result.

    MODEL is a checkpoint folder in Hugging Face layout or a Hub id; without it, the small trained model inside the package.

    \b
    Examples:
      h1export build --target ort --quant int4 --validate
      h1export build ./Falcon-H1-0.5B --target ort --quant int4 --out falcon-int4
      h1export validate falcon-int4 ./Falcon-H1-0.5B
      h1export generate falcon-int4 "def fibonacci(n):"

    Exit codes: 0 done, 1 a check of validate or gate failed, 2 bad input or could not run, 3 gate could not decide.
    """


VALIDATE_OPTIONS = (
    click.option(
        "--tolerance",
        "tolerances",
        multiple=True,
        metavar="METRIC=VALUE",
        help="Override a tolerance, e.g. stored.logits=1e-4. Repeatable.",
    ),
    click.option(
        "--text",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Text for bits per byte [default: shipped].",
    ),
    click.option("--text-bytes", default=32768, show_default=True, help="How much of the text; 0: all of it."),
    click.option("--latency-pairs", default=7, show_default=True, help="Paired runs for latency; 0: none."),
    click.option(
        "--threads", default=0, show_default=True, help="Threads for artifact and reference; 0: their own choice."
    ),
    click.option(
        "--prompts", default=8, show_default=True, type=click.IntRange(min=0), help="Greedy texts to compare; 0: none."
    ),
    click.option(
        "--context",
        "contexts",
        multiple=True,
        type=click.IntRange(min=16),
        help="Compare states after N tokens in chunks, and time tokens there. Repeatable.",
    ),
    click.option("--bisect", is_flag=True, help="Name the first layer and op that go wrong."),
    kernels_option,
)


def validate_options(command: F) -> F:
    for option in reversed(VALIDATE_OPTIONS):
        command = option(command)
    return command


@cli.command()
@export_options
@click.option("--force", is_flag=True, help="Replace an artifact at OUT.")
@click.option("--validate", "check", is_flag=True, help="Validate what was built.")
@validate_options
@common
def build(request: BuildRequest, force: bool, check: bool, quiet: bool, as_json: bool, **checks: Any) -> int:
    """Export MODEL to one or more targets.

    \b
    Examples:
      h1export build --target ort --quant int4 --validate
      h1export build tiiuae/Falcon-H1-0.5B-Instruct --target ort --quant int4 --out falcon
      h1export build ./Falcon-H1-0.5B --target ort --opset-only --out falcon-onnx
      h1export build ./Falcon-H1-0.5B --target trt --max-context 4096 --out falcon-trt
    """
    from rich.filesize import decimal

    from h1export.cli.tables import ProgressBars
    from h1export.commands import pipeline

    built = []
    code = 0
    for target, place in request.places():
        with ProgressBars(quiet or as_json) as bars:
            artifact = pipeline.build(
                request.checkpoint,
                target,
                place,
                request.scheme,
                request.options,
                force,
                bars,
                request.jobs,
                request.calibration,
            )
        size = sum(size for _, size in artifact.manifest.files.values())
        say(f"built {place}  {decimal(size)}  source sha256 {artifact.manifest.source[:12]}", quiet or as_json)
        built.append(
            {
                "target": target,
                "out": str(place),
                "bytes": size,
                "files": {k: v[1] for k, v in artifact.manifest.files.items()},
            }
        )
        if check:
            report = _validate(place, request.checkpoint, quiet, as_json=as_json, **checks)
            built[-1]["report"] = report
            code = max(code, 0 if report["passed"] else 1)
    if as_json:
        answer(built)
    return code


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("model", required=False)
@validate_options
@common
def validate(out: Path, model: str | None, quiet: bool, as_json: bool, **checks: Any) -> int:
    """Compare the artifact OUT with PyTorch on MODEL, the checkpoint it was built from; write OUT/report.json.

    \b
    Examples:
      h1export validate tiny-ort-int4
      h1export validate falcon-int4 ./Falcon-H1-0.5B --tolerance text.ratio=1.03 --latency-pairs 0
    """
    from h1export.checkpoint import resolve

    report = _validate(out, resolve.resolve(model), quiet, as_json=as_json, **checks)
    if as_json:
        answer(report)
    return 0 if report["passed"] else 1


def _validate(
    out: Path,
    checkpoint: Path,
    quiet: bool,
    *,
    as_json: bool,
    tolerances: tuple[str, ...],
    text: Path | None,
    text_bytes: int,
    latency_pairs: int,
    threads: int,
    **others: Any,
) -> dict[str, Any]:
    from h1export.cli.tables import ProgressBars, report_tables
    from h1export.commands import pipeline

    with ProgressBars(quiet or as_json) as bars:
        report = pipeline.validate(
            out, checkpoint, _parse_tolerances(tolerances), text, text_bytes, latency_pairs, threads, bars, **others
        )
    for table in report_tables(report):
        say(table, quiet or as_json)
    say(f"{'PASSED' if report.passed else 'FAILED'}  {out / REPORT}", quiet or as_json)
    return dict(json.loads(report.to_json()))


def _parse_tolerances(items: tuple[str, ...]) -> dict[str, float]:
    parsed = {}
    for item in items:
        metric, _, value = item.partition("=")
        try:
            parsed[metric] = float(value)
        except ValueError:
            raise H1ExportError(
                "--tolerance", f"{item!r} is not METRIC=VALUE", "for example --tolerance stored.logits=1e-4"
            ) from None
    return parsed


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(min=1), help="New tokens at most.")
@click.option("--temperature", default=0.0, show_default=True, help="0: greedy.")
@click.option("--top-k", default=0, show_default=True, help="Sample among the k likeliest tokens; 0: all.")
@click.option(
    "--top-p", default=1.0, show_default=True, help="Sample among the likeliest tokens up to this probability."
)
@click.option("--seed", default=0, show_default=True, help="Of the sampling.")
@click.option("--chat", is_flag=True, help="PROMPT is a user's turn, framed by the chat template.")
@click.option("--threads", default=0, show_default=True, help="0: the runtime's choice.")
@kernels_option
@common
def generate(
    out: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    chat: bool,
    threads: int,
    kernels: Kernels,
    quiet: bool,
    as_json: bool,
) -> int:
    """Continue PROMPT with the artifact OUT; the text streams to standard output.

    \b
    Examples:
      h1export generate tiny-ort-int4 "import os"
      h1export generate falcon-int4 "Who are you?" --chat --temperature 0.7 --top-p 0.9 --seed 1
    """
    from h1export.commands import pipeline
    from h1export.runtime.generation import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed=seed)
    text = ""
    for subgraph in pipeline.generate_text(
        out,
        prompt,
        max_tokens,
        sampling=sampling,
        chat=chat,
        threads=threads,
        kernels=kernels,
        tell=partial(say, quiet=quiet),
    ):
        text += subgraph
        if not as_json:
            click.echo(subgraph, nl=False)
    if as_json:
        answer({"prompt": prompt, "text": text})
    else:
        click.echo()
    return 0


@cli.command()
@click.argument("folder", required=False, metavar="MODEL|OUT")
@common
def inspect(folder: str | None, quiet: bool, as_json: bool) -> int:
    """Say what a checkpoint or an artifact is, and check that it is whole."""
    from h1export.artifact.inspection import describe
    from h1export.checkpoint import resolve
    from h1export.cli.tables import pairs_table

    path = resolve.resolve(folder)
    found = describe(path)
    if as_json:
        answer(found)
    elif not quiet:
        config = found.pop("config")
        console = Console()
        console.print(pairs_table(f"{found.pop('kind')} {path}", found.items()))
        console.print(pairs_table("architecture", config.items()))
    return 0


@cli.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion(shell: str) -> int:
    """Print the completion script of SHELL, e.g. for: eval "$(h1export completion bash)"."""
    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(cli, {}, "h1export", "_H1EXPORT_COMPLETE").source())
    return 0


cli.add_command(bench)
cli.add_command(coreml)
cli.add_command(evaluate)
cli.add_command(finish)
cli.add_command(gate)
cli.add_command(plan)
cli.add_command(report)
cli.add_command(sensitivity)
cli.add_command(trace)


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code; an error becomes one line on standard error."""
    debug = "--debug" in arguments
    if not debug:
        warnings.simplefilter("ignore")  # libraries' warnings are for developers
    try:
        return int(cli.main(arguments, "h1export", standalone_mode=False) or 0)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
    except BrokenPipeError:
        sys.stdout = None  # nobody listens; the interpreter must not flush it
    except (Exception, click.Abort) as error:
        if debug:
            traceback.print_exc()
        click.echo(f"h1export: {_message(error)}", err=True)
    return 2


def _message(error: BaseException) -> str:
    """What to tell the user: what is wrong, where, and the next step."""
    if isinstance(error, H1ExportError):
        return str(error)
    if isinstance(error, click.Abort):
        return "interrupted"
    if isinstance(error, OSError):
        return f"{error.filename or 'disk'}: {error.strerror or error}; free some space or choose another place, and run again"
    if isinstance(error, MemoryError):
        return "memory: not enough of it; close other programs or export a smaller model"
    return f"internal error: {type(error).__name__}: {error}; run again with --debug and report it"
