"""What `build` and `plan` are asked alike: which artifacts, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from h1export.core.quant.scheme import BEST, BLOCK_SIZES, Method, QuantName, QuantScheme
from h1export.errors import H1ExportError
from h1export.targets import MODULES, BuildOptions, Compute, ProviderName

if TYPE_CHECKING:  # help and completion come without loading a tokenizer
    from h1export.calibration import Calibration

LEVELS = {"cpu": 4, "cuda": 0}  # provider -> --accuracy-level where it is not given
BLOCKS, QUANTS, PROVIDERS = [str(size) for size in BLOCK_SIZES], get_args(QuantName), get_args(ProviderName)

OPTIONS = (
    click.argument("model", required=False),
    click.option("--target", "targets", type=click.Choice(list(MODULES)), multiple=True, required=True, help="Runtime. Repeatable."),
    click.option("--quant", type=click.Choice(QUANTS), default="int4", show_default=True, help="Precision of the weights."),
    click.option("--block", type=click.Choice(BLOCKS), default="32", show_default=True, help="Columns that share an int4 scale."),
    click.option(
        "--method",
        type=click.Choice(get_args(Method)),
        help="How integers are chosen: by rounding, by a search for scales, or by GPTQ on a text [default: gptq for int4].",
    ),
    click.option(
        "--calibration",
        "calibration_file",
        type=click.Path(path_type=Path),
        help='Text for gptq: .txt, or .jsonl with a "text" a line [default: shipped].',
    ),
    click.option("--calibration-samples", default=40, show_default=True, type=click.IntRange(min=1), help="Sequences of the text."),
    click.option("--calibration-length", default=512, show_default=True, type=click.IntRange(min=1), help="Tokens of each."),
    click.option("--calibration-seed", default=0, show_default=True, help="Of the places in the text."),
    click.option("--accuracy-level", type=int, help="ort on CPUs: 4 rounds activations to int8 (fast), 0 keeps float32 [default: 4]."),
    click.option("--provider", type=click.Choice(PROVIDERS), default="cpu", show_default=True, help="ort: what the graph is for."),
    click.option("--opset-only", is_flag=True, help="ort: ONNX's own operators alone, right on any runtime."),
    click.option("--logits", type=click.Choice(("all", "last")), default="all", show_default=True, help="Positions that get logits."),
    click.option("--max-context", default=2048, show_default=True, type=click.IntRange(min=1), help="coreml: tokens of a sequence."),
    click.option(
        "--compute", type=click.Choice(get_args(Compute)), default="fp16", show_default=True, help="coreml: dtype of activations."
    ),
    click.option("--state-io", is_flag=True, help="coreml: states as inputs and outputs instead of the runtime's own."),
    click.option("--out", type=click.Path(path_type=Path), help="Folder to make [default: MODEL-TARGET-QUANT]."),
    click.option("--jobs", default=0, show_default=True, type=click.IntRange(min=0), help="Threads that compute weights; 0: one a core."),
)


@dataclass(frozen=True)
class Asked:
    """The exports that a command line asks for."""

    checkpoint: Path
    targets: tuple[str, ...]
    scheme: QuantScheme
    options: BuildOptions
    calibration: Calibration
    out: Path | None
    jobs: int

    def places(self) -> Iterator[tuple[str, Path]]:
        """Each target and the folder that its artifact gets; several targets lie side by side in OUT."""
        for target in self.targets:
            named = self.out or Path(f"{self.checkpoint.resolve().name}-{target}-{self.scheme.quant}")
            yield target, named / target if self.out and len(self.targets) > 1 else named


def export_options(command: Callable[..., int]) -> Callable[..., int]:
    """Gives ``command`` the options above, as one Asked in place of them."""

    @wraps(command)
    def asked(
        model: str | None,
        targets: tuple[str, ...],
        quant: QuantName,
        block: str,
        method: Method | None,
        calibration_file: Path | None,
        calibration_samples: int,
        calibration_length: int,
        calibration_seed: int,
        accuracy_level: int | None,
        provider: ProviderName,
        opset_only: bool,
        logits: str,
        max_context: int,
        compute: Compute,
        state_io: bool,
        out: Path | None,
        jobs: int,
        **others: Any,
    ) -> int:
        from h1export import sources
        from h1export.calibration import Calibration

        checkpoint = sources.resolve(model)
        level = LEVELS[provider] if accuracy_level is None else accuracy_level
        options = BuildOptions(level, logits == "last", provider, opset_only, max_context, compute, state_io)
        scheme = QuantScheme(quant, int(block), method or BEST[quant])
        if calibration_file is not None and not scheme.calibrated:
            raise H1ExportError("--calibration", f"{scheme.method} looks at no text", "leave it out, or use --method gptq")
        calibration = Calibration(calibration_file, calibration_samples, calibration_length, calibration_seed)
        return command(Asked(checkpoint, tuple(dict.fromkeys(targets)), scheme, options, calibration, out, jobs), **others)

    for option in reversed(OPTIONS):
        asked = option(asked)
    return asked
