"""The command line. Data goes to standard output, everything else to standard error.

Exit codes: 0 done (validate, doctor and gate: every check passed); 1 a check failed; 2 bad input, or it could not run;
3 gate could not decide.
"""

from __future__ import annotations

import sys
import traceback
import warnings

import click
import cloup

from h1export import __version__
from h1export.cli.bench import bench
from h1export.cli.build import build
from h1export.cli.completion import completion
from h1export.cli.coreml import coreml
from h1export.cli.doctor import doctor
from h1export.cli.evaluate import evaluate
from h1export.cli.gate import gate
from h1export.cli.generate import generate
from h1export.cli.inspect import inspect
from h1export.cli.plan import plan
from h1export.cli.report import report
from h1export.cli.sensitivity import sensitivity
from h1export.cli.signature import sign, verify
from h1export.cli.trace import trace
from h1export.cli.trt import trt
from h1export.cli.validate import validate
from h1export.errors import H1ExportError


@cloup.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def cli() -> None:
    """Export Falcon-H1 models to the runtimes people deploy on, and check the result.

    MODEL is a checkpoint folder in Hugging Face layout or a Hub id. Without it, the small trained model inside the
    package is used.

    \b
    Examples:
      h1export build --target ort --quant int4 --validate
      h1export build ./Falcon-H1-0.5B --target ort --quant int4 --out falcon-int4
      h1export validate falcon-int4 ./Falcon-H1-0.5B
      h1export generate falcon-int4 "def fibonacci(n):"

    Exit codes: 0 done, 1 a check of validate, doctor or gate failed, 2 bad input or could not run, 3 gate could not
    decide.
    """


cli.section("Make an artifact", build, plan, sensitivity)
cli.section("Judge an artifact", validate, doctor, bench, gate, evaluate, report)
cli.section("Trust an artifact", sign, verify)
cli.section("Use an artifact", generate)
cli.section("Look inside", inspect, trace)
cli.section("One target", coreml, trt)
cli.section("The shell", completion)


def main() -> None:
    """Run the command line of this process, and exit; this is the console script."""
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
        sys.stdout = None  # the reader is gone, and the interpreter must not flush the rest to it
    except (Exception, click.Abort) as error:
        if debug:
            traceback.print_exc()
        click.echo(f"h1export: {_message(error)}", err=True)
    return 2


def _message(error: BaseException) -> str:
    """Return the line that the user reads: where, what is wrong, and the next step."""
    if isinstance(error, H1ExportError):
        return str(error)
    if isinstance(error, click.Abort):
        return "interrupted"
    if isinstance(error, OSError):
        where = error.filename or "disk"
        return f"{where}: {error.strerror or error}; free some space or choose another place, and run again"
    if isinstance(error, MemoryError):
        return "memory: not enough of it; close other programs or export a smaller model"
    return f"internal error: {type(error).__name__}: {error}; run again with --debug and report it"
