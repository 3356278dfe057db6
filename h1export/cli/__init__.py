"""The command line. Data goes to standard output, everything else to standard error.

Exit codes: 0 done (validate, compare, doctor and gate: every check passed); 1 a check failed; 2 bad input, or it could
not run; 3 gate could not decide; 141 nobody read the rest of standard output.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from io import StringIO
from typing import Any

import click
import cloup

from h1export import __version__
from h1export.cli.bench import bench
from h1export.cli.build import build
from h1export.cli.chat import chat
from h1export.cli.compare import compare
from h1export.cli.completion import completion
from h1export.cli.coreml import coreml
from h1export.cli.doctor import doctor
from h1export.cli.evaluate import evaluate
from h1export.cli.gate import gate
from h1export.cli.generate import generate
from h1export.cli.inspect import inspect
from h1export.cli.output import say
from h1export.cli.plan import plan
from h1export.cli.report import report
from h1export.cli.sensitivity import sensitivity
from h1export.cli.serve import serve
from h1export.cli.signature import sign, verify
from h1export.cli.streams import READER_GONE, ReaderGoneError, guarded_streams
from h1export.cli.sweep import sweep
from h1export.cli.trace import trace
from h1export.cli.trt import trt
from h1export.cli.validate import validate
from h1export.errors import MOST_SHOWN, H1ExportError, naming_extras, shortened
from h1export.writing import FULL

FAILED = 2
NO_SPACE = "free some space or choose another place, and run again"


class Commands(cloup.Group):
    """The commands, with an error for a broken pipe inside their work.

    click takes every broken pipe for that of standard output, and would exit with 1.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            what = "a process or a connection that the command needs has ended"
            raise H1ExportError("internal error", what, "run again with --debug and report it") from None


@cloup.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
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

    Exit codes: 0 done, 1 a check of validate, compare, doctor or gate failed, 2 bad input or could not run, 3 gate
    could not decide.
    """


cli.section("Make an artifact", build, plan, sensitivity, sweep)
cli.section("Judge an artifact", validate, doctor, compare, bench, gate, evaluate, report)
cli.section("Trust an artifact", sign, verify)
cli.section("Use an artifact", generate, chat, serve)
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
    with guarded_streams() as streams:
        code = _run(arguments, debug)
        sys.stderr.flush()
    return FAILED if code == 0 and any(stream.lost for stream in streams) else code


def _run(arguments: list[str], debug: bool) -> int:
    try:
        check_encoding(arguments)
        with naming_extras():
            code = int(cli.main(arguments, "h1export", standalone_mode=False) or 0)
        sys.stdout.flush()
        return code
    except ReaderGoneError:
        return READER_GONE
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        _show_usage_error(error)
    except SystemExit:
        raise
    except BaseException as error:  # panics of libraries in Rust are no Exception
        if debug:
            traceback.print_exc()
        say(f"h1export: {_message(error)}")
    return FAILED


def check_encoding(arguments: list[str]) -> None:
    """Check that the command line is text; raise H1ExportError for an argument that is not in UTF-8."""
    for number, argument in enumerate(arguments, 1):
        try:
            argument.encode("utf-8", "surrogateescape").decode("utf-8")
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            unit = "byte" if isinstance(error, UnicodeDecodeError) else "character"
            raise H1ExportError(
                f"argument {number}", f"is not UTF-8 at {unit} {error.start}", "give it in UTF-8"
            ) from None


def _show_usage_error(error: click.ClickException) -> None:
    """Print a mistake in the command line as click does, with what the user typed as it is."""
    shown = StringIO()
    error.show(file=shown)
    for line in shown.getvalue().splitlines():
        say(shortened(line, MOST_SHOWN))


def _message(error: BaseException) -> str:
    """Return the line that the user reads: where, what is wrong, and the next step."""
    if isinstance(error, H1ExportError):
        return str(error)
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return "interrupted"
    if isinstance(error, OSError):
        copied = error.errno in FULL and error.filename2 is not None  # the second name is where a copy goes
        name = error.filename2 if copied else error.filename
        where = os.fsdecode(name) if isinstance(name, str | bytes) else "disk"
        what = shortened(error.strerror or str(error), MOST_SHOWN - len(NO_SPACE))
        if error.errno == errno.ENAMETOOLONG:
            return f"{shortened(where, MOST_SHOWN // 2)}: {what}; give a shorter one"
        return f"{where}: {what}; {NO_SPACE}"
    if isinstance(error, MemoryError):
        return "memory: not enough of it; close other programs or export a smaller model"
    what = shortened(" ".join(str(error).split()), MOST_SHOWN // 2)
    return f"internal error: {type(error).__name__}: {what}; run again with --debug and report it"
