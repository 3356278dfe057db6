"""Options of a target: a frozen dataclass, whose fields say all that the command line and the manifest need to know."""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from h1export.errors import H1ExportError
from h1export.quantize.choices import AUTO

if TYPE_CHECKING:  # the command line reads options without loading numpy
    from h1export.artifact.artifact import Artifact

OWN_KERNELS = ("native", "compiled")  # h1export's: "compiled" never takes those of the installed wheel
KERNELS = ("auto", *OWN_KERNELS, "stock")
Kernels = str  # one of KERNELS, or of a target's other_runtimes


@dataclass(frozen=True)
class Flag:
    """How the command line presents a field of a target's options.

    Attributes:
        help: what the option does, for `build --help`.
        name: the option's name; empty: the field's name with dashes.
        minimum: the least value of an integer.
        default: text for the help where the field's default does not explain itself.
        later: whether manifests of this format were written before the option; one without it means the default.
    """

    help: str
    name: str = ""
    minimum: int | None = None
    default: str = ""
    later: bool = False


# Flags that several targets have: one option of the command line, with the values and the default of each target.
COMPUTE = Flag("Dtype of activations.")
EMBEDDING = Flag(
    "Precision of the embedding, and of a head that is tied to it; auto: that of the other options.", later=True
)
MAX_CONTEXT = Flag("The most tokens of a sequence, prompt included.", minimum=1)


def need_halves(embedding: str, compute: str) -> None:
    """Check the choice of an embedding where floats have the dtype of the activations, ``compute``.

    Raises:
        H1ExportError: an embedding in fp16 beside other floats.
    """
    if embedding == "fp16" and compute != "fp16":
        what = f"fp16 is not the dtype in which --compute {compute} stores floats"
        raise H1ExportError("--embedding", what, "use --compute fp16, or leave --embedding out")


@dataclass(frozen=True)
class OptionField:
    """A field of a target's options, read from its annotation.

    Attributes:
        name: the field's name, in the dataclass and in the manifest.
        flag: the option's name on the command line.
        kind: the type of one value.
        choices: the values of a Literal; empty: any value of the type.
        optional: whether None is a value.
        repeated: whether the field is a tuple, and the option may be given several times.
        default: the dataclass's default.
        shown_default: the default in words, for the help.
        later: whether a manifest without it means the default.
    """

    name: str
    flag: str
    help: str
    kind: type
    choices: tuple[str, ...]
    optional: bool
    repeated: bool
    minimum: int | None
    default: Any
    shown_default: str
    later: bool

    @classmethod
    def of(cls, field: dataclasses.Field[Any], annotation: Any) -> OptionField:
        """Read ``annotation``: an Annotated bool, int, str, Literal, tuple of one of them, or one of them or None."""
        kind, flag = get_args(annotation)
        optional = get_origin(kind) in (Union, types.UnionType)
        if optional:
            (kind,) = (arm for arm in get_args(kind) if arm is not type(None))
        repeated = get_origin(kind) is tuple
        if repeated:
            kind = get_args(kind)[0]
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        return cls(
            field.name,
            flag.name or f"--{field.name.replace('_', '-')}",
            flag.help,
            kind=str if choices else kind,
            choices=choices,
            optional=optional,
            repeated=repeated,
            minimum=flag.minimum,
            default=field.default,
            shown_default=flag.default or ("" if field.default in (None, False, ()) else str(field.default)),
            later=flag.later,
        )

    def fault(self, value: Any) -> tuple[str, str] | None:
        """What is wrong with ``value``, and what to give instead; None where nothing is wrong."""
        if value is None and self.optional:
            return None
        values: tuple[Any, ...] = value if self.repeated and isinstance(value, tuple) else (value,)
        for one in values:
            if self.choices and one not in self.choices:
                return f"cannot be {one!r}", f"give {' or '.join(self.choices)}"
            right_kind = type(one) is self.kind
            if not right_kind:
                return f"cannot be {one!r}", f"give a value of type {self.kind.__name__}"
            if self.minimum is not None and one < self.minimum:
                return f"cannot be {one}", f"give {self.minimum} or more"
        return None


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """The options that every target has; each target's own are in a subclass.

    A value that a field does not take raises H1ExportError when the options are made.
    """

    logits: Annotated[Literal["all", "last"], Flag("Positions of a call that get logits.")] = "all"
    embedding: Annotated[str, EMBEDDING] = AUTO  # a target's own Literal has what it can store

    def __post_init__(self) -> None:
        for field in option_fields(type(self)):
            if fault := field.fault(getattr(self, field.name)):
                raise H1ExportError(field.flag, *fault)

    @property
    def last_logits(self) -> bool:
        """Whether only the last position gets logits."""
        return self.logits == "last"

    @property
    def traces_last(self) -> bool:
        """Whether the model is traced with the logits of the last position only."""
        return self.last_logits

    @classmethod
    def read(cls, artifact: Artifact) -> Self:
        """Return the options that ``artifact`` was built with.

        Raises:
            H1ExportError: the manifest has other fields, or values that they do not take.
        """
        from h1export.artifact.manifest import MANIFEST

        where = artifact.folder / MANIFEST
        stored = artifact.manifest.options
        known = {field.name: field for field in option_fields(cls)}
        needed = {name for name, field in known.items() if not field.later}
        if odd := sorted((stored.keys() - known.keys()) | (needed - stored.keys())):
            what = "is unknown to" if odd[0] in stored else "is missing, and belongs to"
            raise H1ExportError(
                where, f"option {odd[0]!r} {what} target {artifact.manifest.target}", "build the artifact again"
            )
        values: dict[str, Any] = {}
        for name, field in known.items():
            value = stored.get(name, field.default)
            values[name] = tuple(value) if field.repeated and isinstance(value, list) else value
            if fault := field.fault(values[name]):
                raise H1ExportError(where, f"option {name!r} {fault[0]}", "build the artifact again")
        try:
            return cls(**values)
        except H1ExportError as error:  # fields that do not fit each other
            raise H1ExportError(where, f"{error.where}: {error.what}", "build the artifact again") from None


def option_fields(options: type[TargetOptions]) -> tuple[OptionField, ...]:
    """The fields of a target's options."""
    hints = get_type_hints(options, include_extras=True)
    return tuple(OptionField.of(field, hints[field.name]) for field in dataclasses.fields(options))
