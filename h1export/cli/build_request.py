"""What `build` and `plan` have in common: the options that say which artifacts to make, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
import cloup
from click.core import ParameterSource

from h1export.cli.common import adapter_folders, adapter_option
from h1export.cli.ranges import SEED, THREADS, count
from h1export.cli.target_options import chosen_options, target_flags, target_option_groups
from h1export.errors import H1ExportError
from h1export.quantize.budget import Budget
from h1export.quantize.choices import BEST, CPU, GROUP_SIZES, JOINED, Method, Preset, QuantName, Step
from h1export.targets import TargetOptions, target_infos

if TYPE_CHECKING:  # help and completion load neither numpy nor a tokenizer
    from h1export.checkpoint.packed_format import PackedFormat
    from h1export.quantize.calibration import Calibration
    from h1export.quantize.scheme import QuantScheme

GROUPS = [str(size) for size in GROUP_SIZES]
INTEGER_PARAMETERS = (
    "quant",
    "method",
    "calibration_file",
    "preset",
    "budget_bits",
    "budget_kl",
    "device",
)  # refused for integers at hand

ARTIFACT = (
    cloup.option(
        "--target",
        "targets",
        type=click.Choice(list(target_infos())),
        multiple=True,
        required=True,
        help="Runtime to export to. Repeatable.",
    ),
    cloup.option(
        "--out",
        type=click.Path(path_type=Path),
        help="Folder to make [default: MODEL-TARGET-QUANT, in the current one].",
    ),
    cloup.option(
        "--jobs",
        default=0,
        show_default=True,
        type=THREADS,
        help="Threads that compute weights; 0: one a core.",
    ),
    adapter_option,
)
DEVICE = cloup.option(
    "--device",
    default=CPU,
    show_default=True,
    metavar="cpu|cuda|cuda:N",
    help="What runs the model for awq, gptq, steps and budgets.",
)
PRECISION = (
    cloup.option(
        "--quant",
        type=click.Choice(get_args(QuantName)),
        default="int4",
        show_default=True,
        help="Precision of the weights.",
    ),
    cloup.option(
        "--group-size",
        type=click.Choice(GROUPS),
        default="32",
        show_default=True,
        help="Columns that share an int4 scale.",
    ),
    cloup.option(
        "--method",
        metavar=f"{'|'.join(get_args(Method))}{''.join(f'[{JOINED}{step}]' for step in get_args(Step))}",
        help="How integers are chosen: by rounding, by a search for scales, or by AWQ or GPTQ on a text; steps after "
        "a + tune codes or scales by the model's predictions on the text [default: gptq for int4].",
    ),
    cloup.option(
        "--precisions", type=click.Path(path_type=Path), help="A plan.yaml of tensors with precisions of their own."
    ),
    cloup.option(
        "--preset",
        type=click.Choice(get_args(Preset)),
        help="Named rules for int4 builds: int8 where small models lose most (small), or where it buys most for its "
        "bits (balanced); plan has the figures.",
    ),
    cloup.option(
        "--budget-bits",
        type=float,
        help="Keep the most sensitive tensors at int8, up to so many bits a weight on average.",
    ),
    cloup.option(
        "--budget-kl",
        type=float,
        help="Keep the most sensitive tensors at int8, until the others' divergences add up to this at most.",
    ),
)
CALIBRATION = (
    cloup.option(
        "--calibration",
        "calibration_file",
        type=click.Path(path_type=Path),
        help='Text for awq and gptq: .txt, or .jsonl with a "text" a line [default: shipped].',
    ),
    cloup.option(
        "--calibration-samples",
        default=40,
        show_default=True,
        type=count(1),
        help="Sequences of the text.",
    ),
    cloup.option(
        "--calibration-length",
        default=512,
        show_default=True,
        type=count(1),
        help="Tokens of each sequence.",
    ),
    cloup.option(
        "--calibration-seed",
        default=0,
        show_default=True,
        type=SEED,
        help="Seed of the places where the sequences begin.",
    ),
    DEVICE,
)


@dataclass(frozen=True)
class BuildRequest:
    """The exports that a command line asks for.

    Attributes:
        options: target -> its options.
        precision: of the weights in words, for the name of a folder.
        adapters: folders of LoRA adapters to merge, in order.
    """

    checkpoint: Path
    options: Mapping[str, TargetOptions]
    scheme: QuantScheme
    calibration: Calibration
    out: Path | None
    jobs: int
    precision: str
    adapters: tuple[Path, ...] = ()

    def places(self) -> Iterator[tuple[str, Path]]:
        """Yield each target and the folder that its artifact gets; the folders of several targets are in OUT."""
        from h1export.checkpoint.resolve import model_name

        for target in self.options:
            named = self.out or Path(f"{model_name(self.checkpoint)}-{target}-{self.precision}")
            yield target, named / target if self.out and len(self.options) > 1 else named


def _budget(precisions: Path | None, preset: Preset | None, bits: float | None, *, kl: float | None) -> Budget | None:
    """The budget, where one of the last two is given. Raises H1ExportError where more than one of the four is."""
    given = {"--precisions": precisions, "--preset": preset, "--budget-bits": bits, "--budget-kl": kl}
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise H1ExportError(", ".join(named), "say the same thing twice", "give one of them")
    return None if bits is None and kl is None else Budget(bits, kl)


def prequantized_format(checkpoint: Path) -> PackedFormat | None:
    """The format of a checkpoint that is quantised already; None for any other.

    Raises:
        H1ExportError: it is quantised, and an option of the command line would choose its integers again.
    """
    from h1export.checkpoint.packed_formats import load_format

    found = load_format(checkpoint)
    source_of = click.get_current_context().get_parameter_source
    for name in INTEGER_PARAMETERS if found is not None else ():
        if source_of(name) is ParameterSource.COMMANDLINE:
            option = f"--{name.removesuffix('_file').replace('_', '-')}"
            what = "the checkpoint is quantised already, and its own integers are exported"
            raise H1ExportError(option, what, "leave it out, or give the unquantised checkpoint")
    return found


def within_budget(
    checkpoint: Path,
    scheme: QuantScheme,
    calibration: Calibration,
    *,
    budget: Budget,
    jobs: int,
    quiet: bool,
    adapters: Sequence[Path],
) -> QuantScheme:
    """The ``scheme`` with the most sensitive tensors at int8."""
    from h1export.cli.tables import ProgressBars
    from h1export.commands.sensitivity import measure_sensitivity

    with ProgressBars(quiet) as bars:
        found = measure_sensitivity(checkpoint, scheme, calibration, progress=bars, jobs=jobs, adapters=adapters)
    return replace(scheme, chosen=dict.fromkeys(budget.raised(found), "int8"))


def build_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give ``command`` the options of a build; it gets one BuildRequest in their place."""

    @wraps(command)
    def with_request(
        model: str | None,
        targets: tuple[str, ...],
        quant: QuantName,
        group_size: str,
        method: str | None,
        calibration_file: Path | None,
        calibration_samples: int,
        calibration_length: int,
        calibration_seed: int,
        device: str,
        precisions: Path | None,
        preset: Preset | None,
        budget_bits: float | None,
        budget_kl: float | None,
        out: Path | None,
        jobs: int,
        adapters: tuple[str, ...],
        **others: Any,
    ) -> int:
        from h1export.checkpoint import resolve
        from h1export.model.falcon_h1.config import FalconH1Config
        from h1export.quantize.calibration import Calibration
        from h1export.quantize.device import ComputeDevice
        from h1export.quantize.precision_plan import read_plan
        from h1export.quantize.presets import chosen_by
        from h1export.quantize.scheme import QuantScheme

        options = chosen_options(click.get_current_context(), tuple(dict.fromkeys(targets)))
        others = {name: others[name] for name in others.keys() - {flag.parameter for flag in target_flags()}}
        ComputeDevice.of(device)  # refuses one that is not here before a checkpoint is fetched
        checkpoint = resolve.resolve(model)
        prequantized = prequantized_format(checkpoint)
        folders = adapter_folders(adapters)
        quant = "none" if prequantized else quant  # of the tensors that the checkpoint has in floats
        budget = _budget(precisions, preset, budget_bits, kl=budget_kl)
        if preset and quant != "int4":
            raise H1ExportError("--preset", f"has rules for int4 builds, and this one is {quant}", "use --quant int4")
        chosen = read_plan(precisions) if precisions else {}
        chosen = chosen_by(preset, FalconH1Config.load(checkpoint)) if preset else chosen
        scheme = QuantScheme(quant, int(group_size), method or BEST[quant], chosen=chosen)
        if calibration_file is not None and not scheme.calibrated and budget is None:
            raise H1ExportError(
                "--calibration", f"{scheme.method} looks at no text", "leave it out, or use --method gptq"
            )
        if device != CPU and not scheme.calibrated and budget is None:
            raise H1ExportError("--device", f"{scheme.method} does not run the model", "leave it out")
        calibration = Calibration(
            calibration_file, calibration_samples, calibration_length, seed=calibration_seed, device=device
        )
        if budget is not None:
            quiet = bool(others["quiet"] or others["as_json"])
            scheme = within_budget(
                checkpoint, scheme, calibration, budget=budget, jobs=jobs, quiet=quiet, adapters=folders
            )
        request = BuildRequest(
            checkpoint,
            options,
            scheme,
            calibration=calibration,
            out=out,
            jobs=jobs,
            precision=f"int{prequantized.bits}" if prequantized else quant,
            adapters=folders,
        )
        return command(request, **others)

    groups = (
        cloup.option_group("Artifact", *ARTIFACT),
        cloup.option_group("Precision of the weights", *PRECISION),
        cloup.option_group("Calibration text", *CALIBRATION),
        *target_option_groups(),
    )
    wrapped: Any = with_request
    for group in reversed(groups):
        wrapped = group(wrapped)
    finished: Callable[..., int] = click.argument("model", required=False)(wrapped)
    return finished
