"""Make a random checkpoint of any public Falcon-H1 shape, to measure builds on models whose weights are not available.

    python benchmarks/make_checkpoint.py --shape 0.5B /path/to/checkpoint

The folder is in Hugging Face layout and loads with transformers. Tensors are bfloat16 and are written block by block,
so that memory stays small at every shape; a name, a shape and a seed always give the same bytes. The text such a model
writes is noise. Sizes follow the public configs; µP multipliers are those of the 0.5B model where a shape's own are not
public.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from h1export.checkpoint.resolve import embedded_model
from h1export.checkpoint.shards import INDEX, SINGLE
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import tensor_shapes

BLOCK = 1 << 22  # values made at a time: 16 MiB of float32
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "mamba_d_ssm",
    "mamba_n_heads",
    "mamba_d_head",
    "mamba_d_state",
    "mamba_n_groups",
    "max_position_embeddings",
    "mamba_rms_norm",
)
SHAPES: Mapping[str, tuple[int, ...]] = {
    "tiny-90M": (24, 512, 768, 32768, 8, 2, 64, 768, 24, 32, 64, 1, 262144, False),
    "0.5B": (36, 1024, 2048, 32784, 8, 2, 64, 1536, 24, 64, 128, 1, 16384, False),
    "1.5B": (24, 2048, 4608, 65536, 8, 2, 128, 3072, 48, 64, 256, 1, 131072, True),
    "1.5B-Deep": (66, 1280, 3072, 65536, 6, 2, 128, 1536, 24, 64, 256, 1, 131072, True),
    "3B": (32, 2560, 6144, 65536, 10, 2, 128, 4096, 32, 128, 256, 1, 131072, True),
    "7B": (44, 3072, 12288, 130048, 12, 2, 128, 3072, 24, 128, 256, 1, 262144, True),
    "34B": (72, 5120, 21504, 261120, 20, 4, 128, 4096, 32, 128, 256, 2, 262144, True),
}
COMMON: Mapping[str, Any] = {
    "architectures": ["FalconH1ForCausalLM"],
    "model_type": "falcon_h1",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "mamba_chunk_size": 128,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_norm_before_gate": False,
    "mamba_proj_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "embedding_multiplier": 5.656854249492381,
    "lm_head_multiplier": 0.0390625,
    "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 0.9375,
    "key_multiplier": 0.390625,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.23570226039551587,
    "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
    "mlp_multipliers": [0.8838834764831844, 0.5859375],
}
OWN: Mapping[str, dict[str, Any]] = {  # what a shape is known to have otherwise
    "tiny-90M": {"tie_word_embeddings": True, "embedding_multiplier": 0.11084, "lm_head_multiplier": 0.078125},
    "34B": {
        "lm_head_multiplier": 0.0078125,
        "attention_out_multiplier": 0.0375,
        "key_multiplier": 0.0110485,
        "ssm_in_multiplier": 0.25,
        "ssm_multipliers": [0.353553, 0.25, 0.176777, 0.5, 0.353553],
        "mlp_multipliers": [0.176777, 0.0111607],
    },
}

Floats = npt.NDArray[np.float32]


def config(shape: str, layers: int | None, context: int | None = None) -> dict[str, Any]:
    """config.json of a shape, cut to ``layers`` layers and for ``context`` positions where given."""
    cut = {} if layers is None else {"num_hidden_layers": layers}
    cut |= {} if context is None else {"max_position_embeddings": context}
    return {**COMMON, **dict(zip(SIZES, SHAPES[shape], strict=True)), **OWN.get(shape, {}), **cut}


def bfloat16(x: Floats) -> npt.NDArray[np.uint16]:
    """The upper halves of float32 values, rounded to nearest even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def values(name: str, count: int, rng: np.random.Generator) -> Floats:
    """``count`` initial values for tensor ``name``, in the ranges of trained models; A and dt as in Mamba-2."""
    if name.endswith("A_log"):
        return np.log(np.linspace(1, 16, count, dtype=np.float32))
    if name.endswith("dt_bias"):
        dt = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), count))
        return (dt + np.log(-np.expm1(-dt))).astype(np.float32)  # the inverse of softplus
    normal = rng.standard_normal(count, dtype=np.float32)
    if name.endswith((".D", "norm.weight")):
        return 1 + 0.05 * normal
    if name.endswith("conv1d.weight"):
        return 0.3 * normal
    return 0.02 * normal


def blocks(name: str, shape: tuple[int, ...], seed: int) -> Iterator[bytes]:
    """A tensor's bytes; its values depend on seed and name only, however the checkpoint is sharded."""
    rng = np.random.default_rng([seed, *name.encode()])
    count = prod(shape)
    for start in range(0, count, BLOCK):
        yield bfloat16(values(name, min(BLOCK, count - start), rng)).tobytes()


def write_shard(stream: BinaryIO, tensors: Mapping[str, tuple[int, ...]], seed: int | None) -> None:
    """A safetensors file: u64 header size, JSON header, data in the header's order; without a seed, a hole of zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start = end
        end = end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts on 8 bytes
    stream.write(struct.pack("<Q", len(text)) + text)
    if seed is None:
        stream.truncate(stream.tell() + end)
        return
    for name, shape in tensors.items():
        for block in blocks(name, shape, seed):
            stream.write(block)


def split(tensors: Mapping[str, tuple[int, ...]], shards: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in order, in ``shards`` groups of about the same size."""
    total = sum(map(prod, tensors.values()))
    before = 0
    groups: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    for name, shape in tensors.items():
        groups[min(before * shards // total, shards - 1)][name] = shape
        before += prod(shape)
    return [group for group in groups if group]


def write_checkpoint(
    folder: Path, settings: Mapping[str, Any], shards: int, *, seed: int, real_shards: int | None = None
) -> None:
    """Write config, weights and, where the vocabulary has room for it, the embedded tokenizer into a new ``folder``.

    Where ``real_shards`` is given, only the first so many hold random values; the others are files of zeros that take
    no disk.
    """
    tensors = tensor_shapes(FalconH1Config.from_config(settings, folder / "config.json"))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    groups = split(tensors, shards)
    names = (
        [SINGLE]
        if len(groups) == 1
        else [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    )
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        with (folder / name).open("wb") as stream:
            write_shard(stream, group, seed if real_shards is None or number < real_shards else None)
    if len(groups) > 1:
        where = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        index = {"metadata": {"total_size": 2 * sum(map(prod, tensors.values()))}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if FalconH1Config.load(embedded_model()).vocab_size <= settings["vocab_size"]:
        for name in TOKENIZER_FILES:
            shutil.copyfile(embedded_model() / name, folder / name)
        fill_vocabulary(folder / TOKENIZER_FILES[0], settings["vocab_size"])


def fill_vocabulary(file: Path, tokens: int) -> None:
    """Give every token that a tokenizer.json lacks a text of its own, because a server streams no token without one."""
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    named = {*vocabulary.values(), *(token["id"] for token in content["added_tokens"])}
    vocabulary |= {f"t{token}": token for token in range(tokens) if token not in named}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write it; must not exist")
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5B")
    parser.add_argument("--config", type=Path, help="a config.json to take whole, instead of a shape")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--context", type=int, help="another max_position_embeddings than the shape's")
    parser.add_argument("--shards", type=int, default=1, help="safetensors files")
    parser.add_argument(
        "--real-shards", type=int, help="the first so many hold values, the others are sparse files of zeros"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder}: exists; give a new folder")
    if args.shards < 1:
        parser.error(f"--shards {args.shards}: give 1 or more")
    write_checkpoint(
        args.folder,
        config(args.shape, args.layers, args.context)
        if args.config is None
        else json.loads(args.config.read_text(encoding="utf-8")),
        args.shards,
        seed=args.seed,
        real_shards=args.real_shards,
    )
    size = sum(file.stat().st_size for file in args.folder.glob("*.safetensors"))
    print(f"{args.folder}: {args.config or args.shape}, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
