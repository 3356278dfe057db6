"""What `build` and `plan` are asked alike: which artifacts, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.core import ParameterSource

from h1export.checkpoint.gptq_format import GptqFormat
from h1export.errors import H1ExportError
from h1export.quantize.budget import Budget
from h1export.quantize.scheme import BEST, GROUP_SIZES, Method, QuantName, QuantScheme
from h1export.targets import MODULES, BuildOptions, Compute, ProviderName, RuntimeName, get_target

if TYPE_CHECKING:  # help and completion come without loading a tokenizer
    from h1export.quantize.calibration import Calibration

LEVELS = {"cpu": 4, "cuda": 0}  # provider -> --accuracy-level where it is not given
GROUPS = [str(size) for size in GROUP_SIZES]
QUANTS = get_args(QuantName)
PROVIDERS = get_args(ProviderName)

OF_A_METHOD = ("quant", "method", "calibration_file", "budget_bits", "budget_kl")  # parameters that choose integers
OPTIONS = (
    click.argument("model", required=False),
    click.option(
        "--target",
        "targets",
        type=click.Choice(list(MODULES)),
        multiple=True,
        required=True,
        help="Runtime. Repeatable.",
    ),
    click.option(
        "--quant", type=click.Choice(QUANTS), default="int4", show_default=True, help="Precision of the weights."
    ),
    click.option(
        "--group-size",
        type=click.Choice(GROUPS),
        default="32",
        show_default=True,
        help="Columns that share an int4 scale.",
    ),
    click.option(
        "--method",
        type=click.Choice(get_args(Method)),
        help="How integers are chosen: by rounding, by a search for scales, or by AWQ or GPTQ on a text [default: gptq for int4].",
    ),
    click.option(
        "--calibration",
        "calibration_file",
        type=click.Path(path_type=Path),
        help='Text for awq and gptq: .txt, or .jsonl with a "text" a line [default: shipped].',
    ),
    click.option(
        "--calibration-samples",
        default=40,
        show_default=True,
        type=click.IntRange(min=1),
        help="Sequences of the text.",
    ),
    click.option(
        "--calibration-length", default=512, show_default=True, type=click.IntRange(min=1), help="Tokens of each."
    ),
    click.option("--calibration-seed", default=0, show_default=True, help="Of the places in the text."),
    click.option(
        "--precisions", type=click.Path(path_type=Path), help="A plan.yaml of tensors with precisions of their own."
    ),
    click.option(
        "--budget-bits",
        type=float,
        help="Keep the most sensitive tensors at int8, up to so many bits a weight on average.",
    ),
    click.option("--budget-kl", type=float, help="The same, down to this sum of the others' divergences."),
    click.option(
        "--accuracy-level",
        type=int,
        help="ort on CPUs: 4 rounds activations to int8 (fast), 0 keeps float32 [default: 4].",
    ),
    click.option(
        "--provider", type=click.Choice(PROVIDERS), default="cpu", show_default=True, help="ort: what the graph is for."
    ),
    click.option("--opset-only", is_flag=True, help="ort: ONNX's own operators alone, right on any runtime."),
    click.option(
        "--logits",
        type=click.Choice(("all", "last")),
        default="all",
        show_default=True,
        help="Positions that get logits.",
    ),
    click.option(
        "--max-context",
        default=2048,
        show_default=True,
        type=click.IntRange(min=1),
        help="coreml, trt: tokens of a sequence.",
    ),
    click.option(
        "--compute",
        type=click.Choice(get_args(Compute)),
        default="fp16",
        show_default=True,
        help="Dtype of activations: coreml has fp16 and fp32, trt fp16 and bf16.",
    ),
    click.option("--state-io", is_flag=True, help="coreml: states as inputs and outputs instead of the runtime's own."),
    click.option(
        "--max-batch", default=1, show_default=True, type=click.IntRange(min=1), help="trt: sequences of a call."
    ),
    click.option(
        "--runtime",
        type=click.Choice(get_args(RuntimeName)),
        help="trt: TensorRT-RTX, whose engine is built here, or TensorRT, for `finish` on a GPU host [default: rtx, if installed].",
    ),
    click.option(
        "--sm", "architectures", type=int, multiple=True, help="trt: compute capability such as 89. Repeatable."
    ),
    click.option("--out", type=click.Path(path_type=Path), help="Folder to make [default: MODEL-TARGET-QUANT]."),
    click.option(
        "--jobs",
        default=0,
        show_default=True,
        type=click.IntRange(min=0),
        help="Threads that compute weights; 0: one a core.",
    ),
)

SWITCHES = {  # parameter -> field of BuildOptions
    "accuracy_level": "accuracy_level",
    "logits": "last_logits",
    "provider": "provider",
    "opset_only": "opset_only",
    "max_context": "max_context",
    "compute": "compute",
    "state_io": "state_io",
    "max_batch": "max_batch",
    "runtime": "runtime",
    "architectures": "architectures",
}


@dataclass(frozen=True)
class BuildRequest:
    """The exports that a command line asks for."""

    checkpoint: Path
    targets: tuple[str, ...]
    scheme: QuantScheme
    options: BuildOptions
    calibration: Calibration
    out: Path | None
    jobs: int
    precision: str

    def places(self) -> Iterator[tuple[str, Path]]:
        """Each target and the folder that its artifact gets; several targets lie side by side in OUT. ``precision`` names them."""
        for target in self.targets:
            named = self.out or Path(f"{self.checkpoint.resolve().name}-{target}-{self.precision}")
            yield target, named / target if self.out and len(self.targets) > 1 else named


def _budget(precisions: Path | None, bits: float | None, kl: float | None) -> Budget | None:
    """Of the three, at most one."""
    if sum(given is not None for given in (precisions, bits, kl)) > 1:
        raise H1ExportError("--precisions, --budget-bits, --budget-kl", "say the same thing twice", "give one of them")
    return None if bits is None and kl is None else Budget(bits, kl)


def check_switches(context: click.Context, targets: Sequence[str]) -> None:
    """Raises H1ExportError for a switch on the command line that none of the ``targets`` reads."""
    reads = {name: get_target(name).options for name in MODULES}
    for parameter in context.command.params:
        switch = SWITCHES.get(parameter.name or "")
        given = switch is not None and context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and not any(switch in reads[name] for name in targets):
            owners = ", ".join(name for name, fields in reads.items() if switch in fields)
            what = f"is nothing that --target {', '.join(targets)} reads"
            raise H1ExportError(parameter.opts[0], what, f"leave it out; it is for {owners}")


def _build_options(given: dict[str, Any]) -> BuildOptions:
    """From the command line's values, by field."""
    level = LEVELS[given["provider"]] if given["accuracy_level"] is None else given["accuracy_level"]
    return BuildOptions(**given | {"accuracy_level": level, "last_logits": given["last_logits"] == "last"})


def prequantized_format(checkpoint: Path) -> GptqFormat | None:
    """How the checkpoint is quantised already. Raises H1ExportError where it is, and the command line chooses integers for it too."""
    layout = GptqFormat.load(checkpoint)
    given = click.get_current_context().get_parameter_source
    for name in OF_A_METHOD if layout is not None else ():
        if given(name) is ParameterSource.COMMANDLINE:
            option = f"--{name.removesuffix('_file').replace('_', '-')}"
            what = "the checkpoint is quantised already, and its own integers are exported"
            raise H1ExportError(option, what, "leave it out, or give the unquantised checkpoint")
    return layout


def within(
    checkpoint: Path, scheme: QuantScheme, calibration: Calibration, budget: Budget, jobs: int, quiet: bool
) -> QuantScheme:
    """``scheme`` with the most sensitive tensors at int8."""
    from h1export.cli.tables import ProgressBars
    from h1export.commands import pipeline

    with ProgressBars(quiet) as bars:
        found = pipeline.sensitivity(checkpoint, scheme, calibration, bars, jobs)
    return replace(scheme, chosen=dict.fromkeys(budget.raised(found), "int8"))


def export_options(command: Callable[..., int]) -> Callable[..., int]:
    """Gives ``command`` the options above, as one Asked in place of them."""

    @wraps(command)
    def request(
        model: str | None,
        targets: tuple[str, ...],
        quant: QuantName,
        group_size: str,
        method: Method | None,
        calibration_file: Path | None,
        calibration_samples: int,
        calibration_length: int,
        calibration_seed: int,
        precisions: Path | None,
        budget_bits: float | None,
        budget_kl: float | None,
        out: Path | None,
        jobs: int,
        **others: Any,
    ) -> int:
        from h1export.checkpoint import resolve
        from h1export.quantize.calibration import Calibration
        from h1export.quantize.precision_plan import read_plan

        check_switches(click.get_current_context(), targets)
        checkpoint = resolve.resolve(model)
        options = _build_options({field: others.pop(parameter) for parameter, field in SWITCHES.items()})
        layout = prequantized_format(checkpoint)
        quant = "none" if layout else quant  # of what it has in floats
        scheme = QuantScheme(
            quant, int(group_size), method or BEST[quant], chosen=read_plan(precisions) if precisions else {}
        )
        budget = _budget(precisions, budget_bits, budget_kl)
        if calibration_file is not None and not scheme.calibrated and budget is None:
            raise H1ExportError(
                "--calibration", f"{scheme.method} looks at no text", "leave it out, or use --method gptq"
            )
        calibration = Calibration(calibration_file, calibration_samples, calibration_length, seed=calibration_seed)
        if budget is not None:
            scheme = within(checkpoint, scheme, calibration, budget, jobs, bool(others["quiet"] or others["as_json"]))
        precision = f"int{layout.bits}" if layout else quant
        return command(
            BuildRequest(
                checkpoint,
                tuple(dict.fromkeys(targets)),
                scheme,
                options=options,
                calibration=calibration,
                out=out,
                jobs=jobs,
                precision=precision,
            ),
            **others,
        )

    for option in reversed(OPTIONS):
        request = option(request)
    return request
