"""Section g: train the quality proxy, the model of tools/train_tiny.py, on the host's own standard library.

The state of the training stays in the work folder, so that the section can be started again after its time limit; the
checkpoint and the loss curve are written to the work folder's proxy/.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import torch
from tiny_model import config, init_weights
from train_tiny import SEQ, make_tokenizer, modules, released, token_stream, train

from gpu_host.section import Host, Row

STEPS = 2200
DRY_STEPS = 1
DRY_MODULES = 4
SEED = 0


def run(host: Host) -> Iterator[Row]:
    """Yield the text's size, then the training's loss and seconds, then the checkpoint that was written."""
    cfg = config()
    source, _ = modules()
    if host.dry:
        source = {name: source[name] for name in sorted(source)[:DRY_MODULES]}
    tokenizer = make_tokenizer([source[name] for name in sorted(source)], cfg.vocab_size)
    stream = token_stream(source, tokenizer, SEED)
    yield Row("text", True, {"modules": len(source), "tokens": len(stream)})

    out = host.work / "proxy"
    out.mkdir(exist_ok=True)
    steps, seq = (DRY_STEPS, cfg.mamba_chunk_size) if host.dry else (STEPS, SEQ)
    weights = {
        name: weight.detach().to(host.device).requires_grad_() for name, weight in init_weights(cfg, SEED).items()
    }
    curve_file = out / "loss.json"
    curve = json.loads(curve_file.read_text(encoding="utf-8")) if curve_file.exists() else []

    def report(step: int, loss: float, seconds: float) -> None:
        # a training that was killed goes on from its last checkpoint, and computes the steps since then again
        curve[:] = [point for point in curve if point["step"] < step]
        curve.append({"step": step, "loss_nats": loss, "seconds": seconds})
        curve_file.write_text(json.dumps(curve), encoding="utf-8")

    checkpoint = out / "training.pt"
    seconds = train(cfg, weights, stream, steps=steps, seed=SEED, seq=seq, checkpoint=checkpoint, report=report)
    first, last = curve[0]["loss_nats"], curve[-1]["loss_nats"]
    fell = math.isfinite(last) and (host.dry or last < 0.5 * math.log(cfg.vocab_size))
    yield Row("training", fell, {"steps": steps, "first_nats": first, "last_nats": last, "seconds": seconds})

    probe = 2 * cfg.mamba_chunk_size if host.dry else 2 * SEQ
    model = released(cfg, {name: weight.detach().cpu() for name, weight in weights.items()}, stream[None, :probe])
    model.save_pretrained(out / "checkpoint")
    tokenizer.save_pretrained(out / "checkpoint")
    written = out / "checkpoint" / "model.safetensors"
    finite = all(bool(torch.isfinite(weight).all()) for weight in model.state_dict().values())
    yield Row("checkpoint", finite, {"bytes": written.stat().st_size, "file": str(written.relative_to(host.work))})
