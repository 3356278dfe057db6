"""The options of `build` and `plan` that belong to targets, derived from the targets' own dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
import cloup
from click.core import ParameterSource

from h1export.cli.ranges import count
from h1export.errors import H1ExportError
from h1export.targets import TargetOptions, options_class, target_infos
from h1export.targets.options import OptionField, option_fields

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class TargetFlag:
    """One option of the command line, which sets a field of the options of one target or of several.

    Attributes:
        name: the option's name, such as "--max-context".
        owners: target -> the field that it sets; their help is the same, their values and defaults may differ.
    """

    name: str
    owners: Mapping[str, OptionField]

    @property
    def parameter(self) -> str:
        """The name of click's parameter."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def heading(self) -> str:
        """The heading of the help under which the option stands."""
        if len(self.owners) == len(target_infos()):
            return "All targets"
        return f"{' and '.join(self.owners)} options"

    def option(self) -> Decorator:
        """The option for click; its value is None or False, or empty, where it is not given."""
        fields = list(self.owners.values())
        first = fields[0]
        kind: Any = count(first.minimum or 0) if first.kind is int else first.kind
        if first.choices:
            kind = click.Choice(list(dict.fromkeys(choice for field in fields for choice in field.choices)))
        if first.kind is bool:
            return cloup.option(self.name, self.parameter, is_flag=True, help=self._help())
        return cloup.option(self.name, self.parameter, type=kind, multiple=first.repeated, help=self._help())

    def _help(self) -> str:
        """The help of the fields, with what differs between targets."""
        fields = self.owners.values()
        text = next(iter(fields)).help
        if len({field.choices for field in fields}) > 1:
            choices = (f"{target}: {', '.join(field.choices)}" for target, field in self.owners.items())
            text += f" {'; '.join(choices)}."
        if next(iter(fields)).repeated:
            text += " Repeatable."
        defaults = list(dict.fromkeys(field.shown_default for field in fields))
        if len(defaults) > 1:
            defaults = [", ".join(f"{target}: {field.shown_default}" for target, field in self.owners.items())]
        return f"{text} [default: {defaults[0]}]" if defaults[0] else text


def target_flags() -> tuple[TargetFlag, ...]:
    """Every option of every target, those that most targets share first."""
    owners: dict[str, dict[str, OptionField]] = {}
    for target in target_infos():
        for field in option_fields(options_class(target)):
            owners.setdefault(field.flag, {})[target] = field
    flags = [TargetFlag(name, fields) for name, fields in owners.items()]
    return tuple(sorted(flags, key=lambda flag: (-len(flag.owners), list(flag.owners))))


def target_option_groups() -> list[Decorator]:
    """The options, under a heading for each set of targets that own them."""
    groups: dict[str, list[Decorator]] = {}
    for flag in target_flags():
        groups.setdefault(flag.heading, []).append(flag.option())
    return [cloup.option_group(heading, *options) for heading, options in groups.items()]


def chosen_options(context: click.Context, targets: Sequence[str]) -> dict[str, TargetOptions]:
    """The options of each of the ``targets``, from the command line's values.

    Raises:
        H1ExportError: an option that none of the targets has, or a value that one of them does not take.
    """
    source_of = context.get_parameter_source
    given = [flag for flag in target_flags() if source_of(flag.parameter) is not ParameterSource.DEFAULT]
    chosen: dict[str, dict[str, Any]] = {target: {} for target in targets}
    for flag in given:
        value = context.params[flag.parameter]
        owners = [target for target in targets if target in flag.owners]
        if not owners:
            what = f"is not an option of --target {', '.join(targets)}"
            raise H1ExportError(flag.name, what, f"leave it out; it is for {', '.join(flag.owners)}")
        for target in owners:
            field = flag.owners[target]
            if fault := field.fault(value):
                raise H1ExportError(flag.name, f"{fault[0]} for --target {target}", fault[1])
            chosen[target][field.name] = value
    return {target: options_class(target)(**values) for target, values in chosen.items()}
