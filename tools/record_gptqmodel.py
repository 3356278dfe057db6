"""Record small checkpoints that GPTQModel quantised, and what its own kernels make of them, for the tests.

    pip install gptqmodel==7.7.0 && OMP_NUM_THREADS=1 python tools/record_gptqmodel.py

Beside each checkpoint, ``truth.json`` has the sha256 of every packed weight as GPTQModel dequantises it (float32), and
of its codes and zero points (uint8), all in the order [out_features, in_features or groups]. With one thread the files
are the same bytes in every run. GPTQModel's packing by threads and its offloading to disk are switched off.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import FalconH1Config, FalconH1ForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).parent.parent / "tests" / "checkpoint" / "packed"
KEPT = ("config.json", "quantize_config.json", "model.safetensors")
VOCABULARY = 48
LENGTH = 64
# name of the folder -> hidden size and settings; 128 columns need a wide model for two groups
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "gptqmodel-4bit-g128": (256, {"bits": 4, "group_size": 128}),
    "gptqmodel-4bit-g32-asymmetric-act-order": (64, {"bits": 4, "group_size": 32, "sym": False, "desc_act": True}),
    "gptqmodel-8bit-g32": (64, {"bits": 8, "group_size": 32}),
    "gptqmodel-8bit-g32-asymmetric-v2": (64, {"bits": 8, "group_size": 32, "sym": False, "format": "gptq_v2"}),
    "gptqmodel-4bit-channel": (64, {"bits": 4, "group_size": -1, "sym": False, "act_group_aware": False}),
}


def write_model(folder: Path, hidden: int) -> None:
    """Write a random Falcon-H1 of one layer; the rows of its in_proj do not fill words of 8 codes."""
    torch.manual_seed(hidden)
    inner = hidden // 2
    config = FalconH1Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner if inner >= 128 else hidden,
        num_hidden_layers=1,
        num_attention_heads=inner // 32 if inner >= 128 else 2,
        num_key_value_heads=1,
        head_dim=32,
        mamba_d_ssm=inner if inner >= 128 else hidden,
        mamba_n_heads=4 if inner >= 128 else 2,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_chunk_size=16,
        initializer_range=0.1,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: Any = FalconH1ForCausalLM(config)
    model.half().save_pretrained(folder)
    words = {f"t{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", pad_token="t0", eos_token="t2").save_pretrained(
        folder
    )


def truth(folder: Path) -> dict[str, dict[str, str]]:
    """Return weight -> the sha256 of what GPTQModel dequantises: as it is, with scales of 1, without zero points."""
    from gptqmodel import BACKEND, GPTQModel

    model: Any = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    found = {}
    for name, module in model.model.named_modules():
        if not hasattr(module, "qweight"):
            continue
        module.scales = module.scales.float()
        group_of = module.g_idx.long()
        dense = module.dequantize_weight().T
        module.scales = torch.ones_like(module.scales)
        difference = module.dequantize_weight().T
        module.qzeros = torch.zeros_like(module.qzeros)
        codes = module.dequantize_weight().T
        groups = int(group_of.max()) + 1
        first = [int((group_of == group).nonzero()[0]) for group in range(groups)]
        zeros = (codes - difference)[:, first]
        found[f"{name}.weight"] = {
            "dense": digest(dense, np.float32),
            "codes": digest(codes, np.uint8),
            "zeros": digest(zeros, np.uint8),
        }
    return found


def digest(tensor: Any, dtype: Any) -> str:
    """Return the sha256 of a tensor's values in ``dtype``, which must hold them exactly."""
    values = tensor.float().numpy()
    exact = np.ascontiguousarray(values.astype(dtype))
    assert np.array_equal(exact.astype(np.float32), values)
    return hashlib.sha256(exact.tobytes()).hexdigest()


def main() -> None:
    """Quantise a model for each kind, or for those named on the command line, and keep what GPTQModel saved."""
    os.cpu_count = lambda: 8  # GPTQModel refuses to share fewer among its pools of threads
    from gptqmodel import GPTQModel, QuantizeConfig

    for name in sys.argv[1:] or KINDS:
        hidden, settings = KINDS[name]
        rng = np.random.default_rng(0)
        samples = [
            {"input_ids": rng.integers(3, VOCABULARY, LENGTH).tolist(), "attention_mask": [1] * LENGTH}
            for _ in range(8)
        ]
        with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as saved:
            write_model(Path(source), hidden)
            config = QuantizeConfig(**settings, offload_to_disk=False, pack_impl="original")
            model: Any = GPTQModel.load(source, config, device="cpu", dtype=torch.float16)
            model.quantize(samples, batch_size=1)
            model.save(saved)
            folder = OUT / name
            folder.mkdir(parents=True, exist_ok=True)
            for file in KEPT:
                shutil.copyfile(Path(saved, file), folder / file)
            (folder / "truth.json").write_text(json.dumps(truth(Path(saved)), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
