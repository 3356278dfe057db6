"""GptqFormat: how a prequantized checkpoint stores its weights, read from ``quantization_config`` in its config.json.

Source: transformers' ``GPTQConfig``, and what AutoGPTQ, optimum and GPTQModel write. ``USED_KEYS`` lists every key that
is read; every other key must be in ``IGNORED_KEYS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h1export.errors import H1ExportError
from h1export.model.config_reader import CONFIG, ConfigReader, read_config

QUANTIZATION_CONFIG = "quantization_config"  # the key of config.json
ZERO_OFFSETS: Mapping[str, int] = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> zero point minus its stored value
UNQUANTISED = "give the unquantised checkpoint, or one in GPTQ format with 4 or 8 bits"

USED_KEYS = frozenset(
    {
        "quant_method",
        "bits",
        "group_size",
        "sym",
        "checkpoint_format",
        "format",
        "pack_dtype",
        "is_marlin_format",
        "dynamic",
        "adapter",
        "rotation",
    }
)

# Why a key may be ignored.
_RECIPE = "how the integers were found"
_KERNELS = "a run-time switch of other kernels"
_FILE = "the safetensors file shows which tensors are packed"
_ORIGIN = "where the checkpoint was stored before"
IGNORED_KEYS: Mapping[str, str] = {
    "act_group_aware": _RECIPE,
    "backend": _KERNELS,
    "batch_size": _RECIPE,
    "block_name_to_quantize": _FILE,
    "cache_block_outputs": _RECIPE,
    "damp_auto_increment": _RECIPE,
    "damp_percent": _RECIPE,
    "dataset": _RECIPE,
    "desc_act": "the g_idx of each tensor gives the order of its columns",
    "disable_exllama": _KERNELS,
    "exllama_config": _KERNELS,
    "hyb_act": _RECIPE,
    "lm_head": _FILE,
    "max_input_length": _KERNELS,
    "meta": "information only",
    "model_file_base_name": _ORIGIN,
    "model_name_or_path": _ORIGIN,
    "model_seqlen": _RECIPE,
    "module_name_preceding_first_block": _FILE,
    "modules_in_block_to_quantize": _FILE,
    "modules_to_not_convert": _FILE,
    "mse": _RECIPE,
    "pad_token_id": _RECIPE,
    "quantizer": "information only",
    "static_groups": _RECIPE,
    "tokenizer": _RECIPE,
    "true_sequential": _RECIPE,
    "use_cuda_fp16": _KERNELS,
    "use_exllama": _KERNELS,
}


@dataclass(frozen=True)
class GptqFormat:
    """The storage format that all packed tensors of a checkpoint share.

    Attributes:
        bits: bits of a code, 4 or 8.
        group_size: columns that share a scale and a zero point, in the order in which GPTQ rounded them; -1: all
            columns of a row.
        sym: whether every zero point is the middle of the range of codes.
        zero_offset: zero point minus its stored value: 1 in checkpoint_format "gptq", 0 in "gptq_v2".
    """

    bits: int
    group_size: int
    sym: bool
    zero_offset: int

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes: 8 for 4 bits, 128 for 8 bits."""
        return 1 << (self.bits - 1)

    def groups(self, columns: int) -> int:
        """Return the number of groups in a row of ``columns`` columns."""
        return 1 if self.group_size == -1 else -(-columns // self.group_size)

    @classmethod
    def load(cls, folder: Path) -> GptqFormat | None:
        """Return the format of the checkpoint in ``folder``, or None where its config.json names no quantisation.

        Raises:
            H1ExportError: the checkpoint has a quantisation that cannot be exported exactly.
        """
        path = folder / CONFIG
        config = read_config(path) if path.exists() else None
        found = config.get(QUANTIZATION_CONFIG) if isinstance(config, dict) else None
        return None if found is None else cls.from_config(found, f"{path}: {QUANTIZATION_CONFIG}")

    @classmethod
    def from_config(cls, config: Any, where: object = QUANTIZATION_CONFIG) -> GptqFormat:
        """Check a parsed quantization_config and return its format.

        Raises:
            H1ExportError: a key is unknown, or has a value that cannot be exported exactly; the error names ``where``.
        """
        if not isinstance(config, dict):
            raise H1ExportError(where, "not a JSON object", "download the checkpoint again")
        read = ConfigReader(config, where)
        if config.get("quant_method") != "gptq":
            raise read.error(
                "quant_method", f"is {str(config.get('quant_method'))[:80]!r}, and only 'gptq' is read", UNQUANTISED
            )
        for key in config:
            if key not in USED_KEYS and key not in IGNORED_KEYS:
                raise read.error(
                    key,
                    "is unknown",
                    "remove it if it does not change the weights, or report it so that it can be supported",
                )
        bits = read.size("bits", 0, limit=32)
        if bits not in (4, 8):
            raise read.error("bits", f"is {bits}, and runtimes have kernels for 4 and 8", UNQUANTISED)
        group_size = -1 if config.get("group_size", 128) == -1 else read.size("group_size", 128)
        read.must_be("pack_dtype", "int32")
        read.must_be("is_marlin_format", False)
        for key in ("adapter", "rotation"):
            read.must_be(key, None)
        _check_dynamic(read)
        return cls(bits, group_size, read.flag("sym", True), zero_offset=ZERO_OFFSETS[_format(read)])


def _format(read: ConfigReader) -> str:
    """Return the checkpoint_format, whose key has two spellings; where both are missing it is the older one, "gptq"."""
    named = [key for key in ("checkpoint_format", "format") if read.config.get(key) is not None]
    for key in named:
        if read.config[key] not in tuple(ZERO_OFFSETS):
            raise read.error(
                key,
                f"is {str(read.config[key])[:80]!r}",
                f"one of {', '.join(ZERO_OFFSETS)} is read; convert it with GPTQModel",
            )
    if len({read.config[key] for key in named}) > 1:
        raise read.error("format", "differs from checkpoint_format", "keep the one in which the file was written")
    return str(read.config[named[0]]) if named else "gptq"


def _check_dynamic(read: ConfigReader) -> None:
    """Refuse rules that give tensors bits or groups of their own.

    Rules of exclusion ("-:...") need no check, because the file shows which tensors are packed.
    """
    rules = read.config.get("dynamic")
    if rules and not (isinstance(rules, dict) and all(str(rule).startswith("-:") for rule in rules)):
        raise read.error(
            "dynamic", "gives tensors bits or groups of their own", "give a checkpoint with the same for all"
        )
