"""`h1export eval`."""

from __future__ import annotations

from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import click
import cloup

from h1export.cli.common import answer, common, kernels_option
from h1export.cli.output import say_text
from h1export.cli.ranges import THREADS, count
from h1export.errors import H1ExportError
from h1export.targets import Kernels

ANSWERED = ("results", "groups", "n-shot", "n-samples", "versions")  # parts of lm-eval's results that --json prints


@cloup.command("eval", short_help="Run tasks of lm-evaluation-harness.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tasks", required=True, metavar="NAME,...", help="Tasks, groups or tags of lm-eval.")
@click.option(
    "--include",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with YAML files of further tasks.",
)
@click.option("--fewshot", type=count(), help="Examples before each question [default: the task's].")
@click.option("--limit", type=count(1), help="Documents of each task [default: all].")
@click.option("--chat", is_flag=True, help="Frame prompts by the chat template.")
@click.option("--system", metavar="TEXT", help="System message before every prompt.")
@click.option(
    "--gen-kwargs", metavar="KEY=VALUE,...", help="Options of generation, which replace the task's, such as top_k=5."
)
@click.option(
    "--max-length",
    default=0,
    show_default=True,
    type=count(),
    help="Tokens of a sequence; 0: the model's context.",
)
@click.option("--unsafe-code", is_flag=True, help="Allow tasks that run what the model wrote, such as humaneval.")
@click.option("--threads", default=0, show_default=True, type=THREADS, help="0: the runtime's choice.")
@kernels_option
@common
def evaluate(
    out: Path,
    tasks: str,
    include: Path | None,
    fewshot: int | None,
    limit: int | None,
    chat: bool,
    system: str | None,
    gen_kwargs: str | None,
    max_length: int,
    unsafe_code: bool,
    threads: int,
    kernels: Kernels,
    quiet: bool,
    as_json: bool,
) -> int:
    """Run tasks of lm-evaluation-harness on the artifact OUT. Needs the extra eval.

    \b
    Examples:
      h1export eval falcon-int4 --tasks mmlu,gsm8k --chat
      HF_ALLOW_CODE_EVAL=1 h1export eval falcon-int4 --tasks humaneval --unsafe-code
    """
    if find_spec("lm_eval") is None:
        raise H1ExportError("lm_eval", "is not installed", "pip install 'h1export[eval]'")
    from lm_eval.utils import make_table

    from h1export.integrations.lm_eval import ArtifactLM
    from h1export.integrations.lm_eval import evaluate as run

    model = ArtifactLM(out, threads, kernels, max_length=max_length)
    names = [name for name in tasks.split(",") if name]
    with redirect_stderr(StringIO()) if quiet or as_json else nullcontext():  # its progress bars
        found = run(
            model,
            names,
            include,
            fewshot=fewshot,
            limit=limit,
            chat=chat,
            unsafe_code=unsafe_code,
            system=system,
            options=gen_kwargs,
        )
    if as_json:
        answer({part: found[part] for part in ANSWERED if part in found})
    for part in ("results", "groups"):
        if found.get(part):
            say_text(make_table(found, part), quiet or as_json)
    return 0
