"""CompressedFormat: how a checkpoint in compressed-tensors' "pack-quantized" format stores its weights.

Source: compressed-tensors' ``QuantizationConfig``, ``QuantizationScheme`` and ``QuantizationArgs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from h1export.checkpoint.packed_format import UNQUANTISED, PackedFormat, check_keys, ignored_in, read_bits
from h1export.model.config_reader import ConfigReader

PACKED = "pack-quantized"
USED_KEYS = frozenset(
    {"quant_method", "format", "config_groups", "kv_cache_scheme", "sparsity_config", "transform_config"}
)
IGNORED_KEYS = {
    "global_compression_ratio": "information only",
    "ignore": "the safetensors file shows which tensors are packed",
    "quantization_status": "the safetensors file shows which tensors are packed",
    "version": "of the library",
    "run_compressed": "a run-time switch of other kernels",
}
GROUP_KEYS = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
WEIGHT_KEYS = frozenset(
    {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "block_structure", "actorder"}
)
IGNORED_WEIGHT_KEYS = {
    "observer": "how the integers were found",
    "observer_kwargs": "how the integers were found",
    "scale_dtype": "the safetensors file shows it",
    "zp_dtype": "the safetensors file shows it",
}
ORDERS = (None, False, True, "group", "weight", "static", "dynamic")  # the weight_g_idx of each tensor counts


@dataclass(frozen=True)
class CompressedFormat(PackedFormat):
    """The storage format of a checkpoint in compressed-tensors' "pack-quantized" layout.

    Attributes:
        quant_method: "compressed-tensors"; a manifest records it.
    """

    quant_method: str = "compressed-tensors"

    used_keys: ClassVar = USED_KEYS

    @classmethod
    def read(cls, read: ConfigReader) -> CompressedFormat:
        """Check the keys of a quantization_config and return its format.

        Raises:
            H1ExportError: a key is unknown, or has a value that cannot be exported exactly.
        """
        check_keys(read, USED_KEYS, IGNORED_KEYS)
        if read.config.get("format") != PACKED:
            found = str(read.config.get("format"))[:40]
            raise read.error("format", f"is {found!r}, and only {PACKED!r} is read", UNQUANTISED)
        for key in ("kv_cache_scheme", "transform_config"):
            if read.config.get(key) not in (None, {}):
                raise read.error(key, "changes the model beyond its weights", UNQUANTISED)
        sparsity = read.config.get("sparsity_config")
        if sparsity not in (None, {}) and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
            raise read.error("sparsity_config", "leaves out weights", UNQUANTISED)
        groups = read.config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise read.error("config_groups", "is no object with a group", "download the checkpoint again")
        found_formats = {
            cls._group(group, f"{read.where}: config_groups: {str(name)[:40]!r}") for name, group in groups.items()
        }
        if len(found_formats) > 1:
            raise read.error(
                "config_groups", "gives tensors bits or groups of their own", "give a checkpoint with the same for all"
            )
        return found_formats.pop()

    @classmethod
    def ignored_keys(cls, config: Mapping[str, Any]) -> list[str]:
        found = super().ignored_keys(config)
        for name, group in config["config_groups"].items():
            found += [f"config_groups.{name}.weights.{key}" for key in ignored_in(group["weights"], WEIGHT_KEYS)]
        return found

    @classmethod
    def _group(cls, group: Any, where: str) -> CompressedFormat:
        outer = ConfigReader(group if isinstance(group, dict) else {}, where)
        check_keys(outer, GROUP_KEYS, {})
        if outer.config.get("format") not in (None, PACKED):
            raise outer.error("format", f"is {str(outer.config['format'])[:40]!r}", UNQUANTISED)
        for key in ("input_activations", "output_activations"):
            if outer.config.get(key) is not None:
                raise outer.error(key, "quantises activations, and only weights are exported so", UNQUANTISED)
        weights = outer.config.get("weights")
        if not isinstance(weights, Mapping):
            raise outer.error("weights", "is no object", UNQUANTISED)
        read = ConfigReader(weights, f"{where}: weights")
        check_keys(read, WEIGHT_KEYS, IGNORED_WEIGHT_KEYS)
        read.must_be("type", "int")
        read.must_be("dynamic", False)
        read.must_be("block_structure", None)
        if not any(read.config.get("actorder") is order or read.config.get("actorder") == order for order in ORDERS):
            raise read.error("actorder", f"is {str(read.config['actorder'])[:40]!r}", UNQUANTISED)
        return cls(read_bits(read, "num_bits"), _group_size(read), sym=read.flag("symmetric", True))


def _group_size(read: ConfigReader) -> int:
    """Return the group size, -1 for a scale a row. Where there is no strategy, the library derives it from the size."""
    size = read.config.get("group_size")
    strategy = read.config.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "channel" and size in (None, -1):
        return -1
    if strategy == "group":
        return read.size("group_size", 0)
    raise read.error("strategy", f"is {str(strategy)[:40]!r}", "only 'group' and 'channel' are read; " + UNQUANTISED)
