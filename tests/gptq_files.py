"""Writes checkpoints in GPTQ format as its writers do, word by word with shifts and without h1export's reader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

Tensors = dict[str, npt.NDArray[Any]]
MATRICES = ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "x")


@dataclass(frozen=True)
class Gptq:
    """The checkpoint to write.

    Attributes:
        bits: bits of a code.
        group: columns of a group; -1: all columns.
        sym: whether all zero points are the middle of the codes' range.
        v2: whether zero points are stored as they are; otherwise 1 is subtracted.
        act_order: whether columns are assigned to groups at random, for each tensor that is not a key of ``like``.
        like: module of a layer -> the module, earlier in the alphabet, whose groups it shares.
        head: whether lm_head is packed too.
        seed: seed of the codes, zero points and scales.
        keys: keys of quantization_config besides those that follow from the other attributes.
        layout: a key of LAYOUTS.
    """

    bits: int = 4
    group: int = 32
    sym: bool = True
    v2: bool = False
    act_order: bool = False
    like: Mapping[str, str] = field(default_factory=dict)
    head: bool = False
    seed: int = 0
    keys: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "gptq"


@dataclass(frozen=True)
class Written:
    """A checkpoint, and the values of each packed weight.

    These are codes [rows, columns], zeros and scales [rows, groups], and g_idx [columns].
    """

    folder: Path
    codes: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    zeros: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    scales: dict[str, npt.NDArray[np.float16]] = field(default_factory=dict)
    g_idx: dict[str, npt.NDArray[np.int32]] = field(default_factory=dict)

    def weight(self, name: str) -> npt.NDArray[np.float64]:
        """Compute scales * (codes - zeros), column by column, in float64."""
        groups = self.g_idx[name]
        difference = self.codes[name] - self.zeros[name][:, groups]
        weight: npt.NDArray[np.float64] = difference * self.scales[name][:, groups].astype(np.float64)
        return weight


def pack(values: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.int32]:
    """Pack [n, m] to words [n * bits / 32, m], filled up with zeros; a word's first value is in its lowest bits."""
    each = 32 // bits
    values = np.pad(values, ((0, -len(values) % each), (0, 0)))
    words = np.zeros((len(values) // each, values.shape[1]), np.uint64)
    for place in range(each):
        words |= values[place::each].astype(np.uint64) << np.uint64(bits * place)
    return words.astype(np.uint32).view(np.int32)


def write(source: Path, out: Path, how: Gptq) -> Written:
    """Write the model of ``source`` with its projections replaced by random integers of about the same size."""
    shutil.copytree(source, out, dirs_exist_ok=True)
    tensors: Tensors = {
        name: tensor.float().numpy() for name, tensor in load_torch(source / "model.safetensors").items()
    }
    written = write_tensors(tensors, out, how)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = LAYOUTS[how.layout][0](how) | dict(how.keys)
    (out / "config.json").write_text(json.dumps(config))
    return written


def write_tensors(tensors: Tensors, out: Path, how: Gptq) -> Written:
    """Write model.safetensors of ``tensors``, with the weights of projections packed."""
    written = Written(out)
    rng = np.random.default_rng(how.seed)
    modules = {f"{module}.weight" for module in (*MATRICES, *(["lm_head"] if how.head else []))}
    names = [name for name in sorted(tensors) if ".".join(name.split(".")[-2:]) in modules]
    for name in names:
        tensors |= _packed(name, tensors.pop(name), how, written=written, rng=rng)
    _save(out, tensors)
    return written


def _save(folder: Path, tensors: Tensors) -> None:
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")


def _packed(name: str, weight: Any, how: Gptq, *, written: Written, rng: np.random.Generator) -> dict[str, Any]:
    rows, columns = weight.shape
    size = columns if how.group == -1 else how.group
    top = 2**how.bits
    groups = -(-columns // size)
    g_idx = (np.arange(columns) // size).astype(np.int32)
    if how.act_order:
        module = ".".join(name.split(".")[3:-1])
        like = how.like.get(module)
        g_idx = rng.permutation(g_idx) if like is None else written.g_idx[name.replace(module, like)]
    codes = rng.integers(0, top, (rows, columns))
    zeros = np.full((rows, groups), top // 2) if how.sym else rng.integers(0, top, (rows, groups))
    step = np.std(weight) / np.std(np.arange(top)) * (1 if how.sym else 0.7)
    scales = (step * rng.uniform(0.5, 1.5, (rows, groups))).astype(np.float16)
    written.codes[name] = codes
    written.zeros[name] = zeros
    written.scales[name] = scales
    written.g_idx[name] = g_idx
    return LAYOUTS[how.layout][1](name, how, codes, zeros, scales, g_idx)


def _gptq_config(how: Gptq) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": how.bits,
        "group_size": how.group,
        "sym": how.sym,
        "desc_act": how.act_order,
        "checkpoint_format": "gptq_v2" if how.v2 else "gptq",
        "damp_percent": 0.1,
        "lm_head": how.head,
        "meta": {"quantizer": ["x:1"]},
    }


def _gptq_tensors(name: str, how: Gptq, codes: Any, zeros: Any, scales: Any, g_idx: Any) -> dict[str, Any]:
    stored = pack(zeros, how.bits).view(np.uint32)  # [rows * bits / 32, groups]
    if not how.v2:  # from all of a word at once, as GPTQModel does: a 0 borrows from its neighbour
        stored = stored - np.uint32(0x11111111 if how.bits == 4 else 0x01010101)
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": pack(codes.T, how.bits),
        f"{stem}qzeros": stored.view(np.int32).T,
        f"{stem}scales": scales.T,
        f"{stem}g_idx": g_idx,
    }


def _awq_config(how: Gptq) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "bits": how.bits,
        "group_size": how.group,
        "zero_point": not how.sym,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
        "do_fuse": False,
    }


def _awq_tensors(name: str, how: Gptq, codes: Any, zeros: Any, scales: Any, g_idx: Any) -> dict[str, Any]:
    places = np.arange(len(codes)).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].ravel()
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": pack(codes[places], 4).T,
        f"{stem}qzeros": pack(zeros[places], 4).T,
        f"{stem}scales": scales.T,
    }


def _compressed_config(how: Gptq) -> dict[str, Any]:
    weights = {
        "num_bits": how.bits,
        "type": "int",
        "symmetric": how.sym,
        "strategy": "channel" if how.group == -1 else "group",
        "group_size": None if how.group == -1 else how.group,
        "dynamic": False,
        "actorder": "group" if how.act_order else None,
        "observer": "minmax",
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "version": "0.12.2",
    }


def _compressed_tensors(name: str, how: Gptq, codes: Any, zeros: Any, scales: Any, g_idx: Any) -> dict[str, Any]:
    stem = name.removesuffix("weight")
    found = {
        f"{stem}weight_packed": pack(codes.T, how.bits).T,
        f"{stem}weight_scale": scales,
        f"{stem}weight_shape": np.array(codes.shape, np.int64),
    }
    if not how.sym:
        found[f"{stem}weight_zero_point"] = pack(zeros, how.bits)
    return found | ({f"{stem}weight_g_idx": g_idx} if how.act_order else {})


LAYOUTS: Mapping[str, tuple[Callable[[Gptq], dict[str, Any]], Callable[..., dict[str, Any]]]] = {
    "gptq": (_gptq_config, _gptq_tensors),
    "awq": (_awq_config, _awq_tensors),
    "compressed": (_compressed_config, _compressed_tensors),
}


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite the tensors after ``change`` has changed them in place (name -> array)."""
    tensors = {name: tensor.copy() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    _save(folder, tensors)
