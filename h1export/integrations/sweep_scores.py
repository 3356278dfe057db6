"""The scores of a sweep's cells by lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from h1export.commands.sweep import Cell
from h1export.integrations.lm_eval import ArtifactLM, evaluate

NO_SCORES = ("sample_len",)  # numbers in lm-eval's results that judge nothing


def task_scores(cell: Cell, out: Path) -> Mapping[str, float]:
    """Return "TASK METRIC" -> value, of the tasks of a cell on its artifact. Raises H1ExportError as `eval` does."""
    assert cell.tasks is not None
    asked = cell.tasks
    model = ArtifactLM(out, 0 if cell.speed is None else cell.speed.threads, cell.validate.kernels)
    include = None if asked.include is None else Path(asked.include)
    found = evaluate(
        model, asked.names, include, fewshot=asked.fewshot, limit=asked.limit, chat=asked.chat, unsafe_code=False
    )
    return {
        f"{task} {metric.partition(',')[0]}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "_stderr" not in metric and metric not in NO_SCORES
    }
