"""AwqFormat: how a checkpoint in AWQ's "gemm" format stores its weights.

Source: AutoAWQ's ``AwqConfig``, transformers' ``AwqConfig``, and what GPTQModel writes for AWQ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from h1export.checkpoint.packed_format import (
    UNQUANTISED,
    PackedFormat,
    check_dynamic,
    check_keys,
    read_bits,
    read_group_size,
)
from h1export.model.config_reader import ConfigReader

USED_KEYS = frozenset(
    {
        "quant_method",
        "method",
        "bits",
        "w_bit",
        "group_size",
        "q_group_size",
        "zero_point",
        "sym",
        "version",
        "format",
        "checkpoint_format",
        "pack_dtype",
        "dynamic",
        "adapter",
        "rotation",
    }
)
_FILE = "the safetensors file shows which tensors are packed"
_KERNELS = "a run-time switch of other kernels"
IGNORED_KEYS = {
    "modules_to_not_convert": _FILE,
    "lm_head": _FILE,
    "backend": _KERNELS,
    "do_fuse": _KERNELS,
    "fuse_max_seq_len": _KERNELS,
    "modules_to_fuse": _KERNELS,
    "exllama_config": _KERNELS,
    "desc_act": "AWQ keeps the order of columns",
    "meta": "information only",
    "activation": "how the scales were found",
    "damp_percent": "how the integers were found",
    "true_sequential": "how the integers were found",
}
VERSION_KEYS = ("version", "format", "checkpoint_format")


@dataclass(frozen=True)
class AwqFormat(PackedFormat):
    """The storage format of a checkpoint in AWQ's "gemm" layout; codes have 4 bits.

    Attributes:
        quant_method: "awq"; a manifest records it.
    """

    quant_method: str = "awq"

    used_keys: ClassVar = USED_KEYS

    @classmethod
    def read(cls, read: ConfigReader) -> AwqFormat:
        """Check the keys of a quantization_config and return its format.

        Raises:
            H1ExportError: a key is unknown, or has a value that cannot be exported exactly.
        """
        check_keys(read, USED_KEYS, IGNORED_KEYS)
        read.must_be("method", "awq")
        for key in VERSION_KEYS:
            value = read.config.get(key)
            if value is not None and str(value).lower() != "gemm":
                raise read.error(key, f"is {str(value)[:40]!r}", "only 'gemm' is read; " + UNQUANTISED)
        bits = read_bits(read, "bits" if "bits" in read.config else "w_bit")
        if bits != 4:
            raise read.error("bits", f"is {bits}, and the gemm layout has 4", UNQUANTISED)
        read.must_be("pack_dtype", "int32")
        for key in ("adapter", "rotation"):
            read.must_be(key, None)
        check_dynamic(read)
        group_size = read_group_size(read, "group_size" if "group_size" in read.config else "q_group_size")
        zero_point = read.flag("zero_point", not read.flag("sym", False))
        if read.config.get("sym") is not None and read.flag("sym", False) == zero_point:
            raise read.error("sym", "contradicts zero_point", "keep the one that the file was written with")
        return cls(bits, group_size, sym=not zero_point)
