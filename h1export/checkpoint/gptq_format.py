"""GptqFormat: how a prequantized checkpoint stores its weights, read from ``quantization_config`` in its config.json.

Source: transformers' ``GPTQConfig``, and what AutoGPTQ, optimum and GPTQModel write. ``USED_KEYS`` lists every key that
is read; every other key must be in ``IGNORED_KEYS``,
or be one that ``check_keys`` lets pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from h1export.checkpoint.packed_format import PackedFormat, check_dynamic, check_keys, read_bits, read_group_size
from h1export.model.config_reader import ConfigReader

ZERO_OFFSETS: Mapping[str, int] = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> zero point minus its stored value

USED_KEYS = frozenset(
    {
        "quant_method",
        "method",
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
        "data_type",
        "act_bits",
        "super_bits",
        "super_group_size",
        "extra_config",
    }
)
UNQUANTISED_BITS = 16  # bits from which on a writer means "not quantised"

# Why a key may be ignored.
_RECIPE = "how the integers were found"
_KERNELS = "a run-time switch of other kernels"
_FILE = "the safetensors file shows which tensors are packed"
_ACTIVATIONS = "activations are quantised where act_bits says so"
_ORIGIN = "where the checkpoint was stored before"
IGNORED_KEYS: Mapping[str, str] = {
    "act_data_type": _ACTIVATIONS,
    "act_dynamic": _ACTIVATIONS,
    "act_group_aware": _RECIPE,
    "act_group_size": _ACTIVATIONS,
    "act_sym": _ACTIVATIONS,
    "activation": _RECIPE,
    "amp": _RECIPE,
    "backend": _KERNELS,
    "batch_size": _RECIPE,
    "block_name_to_quantize": _FILE,
    "cache_block_outputs": _RECIPE,
    "damp_auto_increment": _RECIPE,
    "damp_percent": _RECIPE,
    "dataset": _RECIPE,
    "desc_act": "the g_idx of each tensor gives the order of its columns",
    "disable_exllama": _KERNELS,
    "enable_minmax_tuning": _RECIPE,
    "enable_norm_bias_tuning": _RECIPE,
    "enable_quanted_input": _RECIPE,
    "exllama_config": _KERNELS,
    "failsafe": _RECIPE,
    "fallback": _RECIPE,
    "foem": _RECIPE,
    "gptaq": _RECIPE,
    "gradient_accumulate_steps": _RECIPE,
    "hyb_act": _RECIPE,
    "iters": _RECIPE,
    "lm_head": _FILE,
    "low_gpu_mem_usage": _RECIPE,
    "lr": _RECIPE,
    "lr_scheduler": _RECIPE,
    "max_input_length": _KERNELS,
    "meta": "information only",
    "minmax_lr": _RECIPE,
    "model_file_base_name": _ORIGIN,
    "model_name_or_path": _ORIGIN,
    "model_seqlen": _RECIPE,
    "module_name_preceding_first_block": _FILE,
    "modules_in_block_to_quantize": _FILE,
    "modules_to_not_convert": _FILE,
    "mse": _RECIPE,
    "not_use_best_mse": _RECIPE,
    "nsamples": _RECIPE,
    "packing_format": _FILE,
    "pad_token_id": _RECIPE,
    "quant_block_list": _FILE,
    "quantizer": "information only",
    "sampler": _RECIPE,
    "scale_dtype": _FILE,
    "seqlen": _RECIPE,
    "static_groups": _RECIPE,
    "to_quant_block_names": _FILE,
    "tokenizer": _RECIPE,
    "true_sequential": _RECIPE,
    "use_cuda_fp16": _KERNELS,
    "use_exllama": _KERNELS,
}


@dataclass(frozen=True)
class GptqFormat(PackedFormat):
    """The storage format of a checkpoint in GPTQ format; groups are in the order in which GPTQ rounded the columns.

    Attributes:
        zero_offset: zero point minus its stored value: 1 in checkpoint_format "gptq", 0 in "gptq_v2".
    """

    zero_offset: int

    used_keys: ClassVar = USED_KEYS

    @classmethod
    def read(cls, read: ConfigReader) -> GptqFormat:
        """Check the keys of a quantization_config and return its format.

        Raises:
            H1ExportError: a key is unknown, or has a value that cannot be exported exactly.
        """
        check_keys(read, USED_KEYS, IGNORED_KEYS)
        read.must_be("method", "gptq")  # GPTQModel writes it beside quant_method
        bits = read_bits(read, "bits")
        group_size = read_group_size(read, "group_size")
        read.must_be("pack_dtype", "int32")
        read.must_be("is_marlin_format", False)
        for key in ("adapter", "rotation"):
            read.must_be(key, None)
        check_dynamic(read)
        _check_autoround(read)
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


def _check_autoround(read: ConfigReader) -> None:
    """Refuse what AutoRound can write and a plain GPTQ file cannot say: other integers, and quantised activations."""
    read.must_be("data_type", "int")
    for key in ("super_bits", "super_group_size"):
        read.must_be(key, None)
    if read.config.get("act_bits") is not None and read.size("act_bits", 16, limit=64) < UNQUANTISED_BITS:
        raise read.error(
            "act_bits", "quantises activations, and only weights are exported so", "give another checkpoint"
        )
    own = read.config.get("extra_config")
    if own in (None, {}):
        return
    for module, settings in own.items() if isinstance(own, dict) else [("", None)]:
        if not isinstance(settings, dict):
            raise read.error("extra_config", "has an entry that is no object", "download the checkpoint again")
        if type(settings.get("bits")) is int and settings["bits"] >= UNQUANTISED_BITS:
            continue  # the file shows it
        names = ("bits", "group_size", "sym", "data_type")
        if any(settings.get(name) not in (None, read.config.get(name)) for name in names):
            what = f"gives {str(module)[:80]!r} bits or groups of its own"
            raise read.error("extra_config", what, "give a checkpoint with the same for all")
