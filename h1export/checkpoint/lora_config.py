"""LoraConfig: what decides an adapter's products, read from PEFT's adapter_config.json.

The names of the adapted modules (``target_modules`` and its like) are not read: the tensors of the file decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import re2

from h1export.checkpoint.packed_format import INFORMATION
from h1export.errors import H1ExportError
from h1export.model.config_reader import ConfigReader, read_config

ADAPTER_CONFIG = "adapter_config.json"
MERGE = "merge it with PEFT's merge_and_unload, and give the merged model"
MAX_RANK = 1 << 14
MAX_PATTERN = 200  # characters of a module pattern

USED_KEYS = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
)
_TENSORS = "the tensors of the file decide"
_TRAINING = "used in training only"
IGNORED_KEYS: Mapping[str, str] = {
    "auto_mapping": "information only",
    "base_model_name_or_path": "information only",
    "ensure_weight_tying": _TRAINING,
    "eva_config": _TRAINING,
    "exclude_modules": _TENSORS,
    "fan_in_fan_out": "every adapted module of this model is a linear layer, for which PEFT ignores it",
    "library_name": "information only",
    "inference_mode": _TRAINING,
    "layers_pattern": _TENSORS,
    "layers_to_transform": _TENSORS,
    "lora_dropout": _TRAINING,
    "megatron_core": "the name of a module that is used only where megatron_config is set, which is refused",
    "modules_to_save": _TENSORS,
    "peft_version": "information only",
    "qalora_group_size": "of use_qalora, which is refused",
    "revision": "information only",
    "target_modules": _TENSORS,
    "task_type": "information only",
    "runtime_config": "a run-time switch",
    "velora_config": _TRAINING,
}
# Values of init_lora_weights that leave the base model's weights as they are.
KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")


class Pattern(Protocol):
    """A compiled pattern."""

    def match(self, text: str, /) -> object:
        """Return a match, or None."""


@dataclass(frozen=True)
class LoraConfig:
    """The ranks and scaling factors of an adapter's modules.

    Attributes:
        r: the rank of modules that no pattern names.
        alpha: the alpha of modules that no pattern names.
        rank_stabilised: whether a product is scaled by alpha / sqrt(rank) and not by alpha / rank.
        ranks: patterns of a module's name with its rank; the first pattern that matches counts.
        alphas: patterns of a module's name with its alpha.
    """

    r: int
    alpha: float
    rank_stabilised: bool
    ranks: Sequence[tuple[Pattern, int]]
    alphas: Sequence[tuple[Pattern, float]]

    @classmethod
    def load(cls, folder: Path) -> LoraConfig:
        """Read the adapter_config.json of ``folder``.

        Raises:
            H1ExportError: there is none, or it describes more than low-rank products that are added to weights.
        """
        path = folder / ADAPTER_CONFIG
        if not path.is_file():
            raise H1ExportError(folder, f"has no {ADAPTER_CONFIG}", "give the folder that PEFT's save_pretrained wrote")
        config = read_config(path)
        if not isinstance(config, dict):
            raise H1ExportError(path, "not a JSON object", "save the adapter again")
        read = ConfigReader(config, path)
        if config.get("peft_type") != "LORA":
            found = str(config.get("peft_type"))[:40]
            raise read.error("peft_type", f"is {found!r}, and only 'LORA' is merged", MERGE)
        for key, value in config.items():
            information = INFORMATION.fullmatch(key) and isinstance(value, (str, int, float))
            if key not in USED_KEYS | IGNORED_KEYS.keys() and not information and value not in (None, False, [], {}):
                raise read.error(str(key)[:80], "is set, and only plain LoRA is merged", MERGE)
        if config.get("bias") not in (None, "none"):
            raise read.error("bias", f"is {str(config['bias'])[:40]!r}, and only 'none' is merged", MERGE)
        start = config.get("init_lora_weights")
        if not any(start is value or (isinstance(start, str) and start == value) for value in KEEPS_BASE):
            what = f"is {str(start)[:40]!r}, which changes the base model's weights"
            raise read.error("init_lora_weights", what, "convert it to plain LoRA with PEFT, or " + MERGE)
        ranks = [(pattern, _rank(read, "rank_pattern", value)) for pattern, value in _patterns(read, "rank_pattern")]
        alphas = [
            (pattern, _alpha(read, "alpha_pattern", value)) for pattern, value in _patterns(read, "alpha_pattern")
        ]
        return cls(
            _rank(read, "r", config.get("r", 8)),
            _alpha(read, "lora_alpha", config.get("lora_alpha", 8)),
            read.flag("use_rslora", False),
            ranks=ranks,
            alphas=alphas,
        )

    def rank(self, module: str) -> int:
        """Return the rank of ``module``."""
        return next((rank for pattern, rank in self.ranks if pattern.match(module)), self.r)

    def scaling(self, module: str) -> float:
        """Return the factor of the product of ``module``."""
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.match(module)), self.alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank


def _patterns(read: ConfigReader, key: str) -> list[tuple[Pattern, Any]]:
    found = read.config.get(key) or {}
    if not isinstance(found, dict):
        raise read.error(key, "is no JSON object", "save the adapter again")
    return [(_compiled(read, key, text), value) for text, value in found.items()]


def _compiled(read: ConfigReader, key: str, text: str) -> Pattern:
    """Return a pattern as PEFT reads it: of a whole name, or of what follows a dot.

    RE2 takes time in proportion to the name, and bounded memory, whatever the pattern is; Python's own library would
    take hours for some.
    """
    if len(text) > MAX_PATTERN:
        raise read.error(key, f"has a pattern of {len(text)} characters", MERGE)
    options = re2.Options()
    options.log_errors = False
    try:
        compiled: Pattern = re2.compile(rf"(.*\.)?({text})$", options)
    except (re2.error, UnicodeEncodeError):
        what = f"has the pattern {text[:40]!r}, which RE2 does not take"
        raise read.error(key, what, MERGE) from None
    return compiled


def _rank(read: ConfigReader, key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value <= MAX_RANK:
        raise read.error(key, f"is {str(value)[:40]}", f"expected whole numbers from 1 to {MAX_RANK}")
    return value


def _alpha(read: ConfigReader, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise read.error(key, f"is {str(value)[:40]}", "expected finite numbers")
    return float(value)
