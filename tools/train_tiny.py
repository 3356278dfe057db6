"""Train the tiny Falcon-H1 that ships in h1export/assets/tiny, on the Python standard library, on two CPU cores.

The model is trained at effective scale (every µP multiplier 1) by a compact differentiable forward, then each weight is
divided by its multipliers on export. That is an exact change of variables: FalconH1ForCausalLM, which multiplies,
computes the same logits, and the export checks that it does.
"""

import argparse
import contextlib
import itertools
import math
import os
import platform
import random
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_model import config, forward, in_proj_rows, init_weights, multipliers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    FalconH1Config,
    FalconH1ForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    logging,
)

HELD_OUT = ("cmd", "csv", "fnmatch", "graphlib", "heapq", "sched", "shelve", "textwrap")
SKIP_DIRS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
    "turtledemo",
}
# one digit | punctuation | a word with the space before it | space before no word | space; written without \p{..} and
# with ASCII classes, because onnxruntime-genai's regular expressions know no more, and its ids must be the same
PIECES = r"[0-9]|[!-/:-@\[-`{-~]+| ?[^\s!-@\[-`{-~]+|\s+(?![^\s!-@\[-`{-~])|\s+"
SPECIAL = ["<|pad|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]  # ids 0 to 3
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SEQ = 512
BATCH = 4
WARM_UP = 54
EXCERPT_BYTES = 100_000
SIZE_LIMIT = 12_000_000
MUON_LR = 0.02
WEIGHT_DECAY = 0.1


def modules() -> tuple[dict[str, str], dict[str, str]]:
    """Source text by dotted module name below the standard library: (training, held out)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIP_DIRS & set(parts[:-1]) and not parts[0].startswith(
            ("_sysconfigdata", "config-")
        ):  # build paths of one machine
            with contextlib.suppress(UnicodeDecodeError):
                texts[".".join(parts)] = path.read_bytes().decode()
    held = {name: texts.pop(name) for name in HELD_OUT if name in texts}
    if missing := set(HELD_OUT) - set(held):
        raise SystemExit(
            f"train_tiny: {root}: no module {sorted(missing)}; use CPython 3.11 with its full standard library"
        )
    return texts, held


def excerpts(train: dict[str, str], seed: int) -> str:
    """About EXCERPT_BYTES of calibration text: 4 kB of whole lines of each seeded training module."""
    out = ""
    long = [train[name] for name in sorted(train) if len(train[name]) > 6000]
    for text in random.Random(seed).sample(long, EXCERPT_BYTES // 4000):
        start = text.rfind("\n", 0, len(text) // 3) + 1
        out += text[start : text.rfind("\n", start, start + 4000) + 1]
    return out


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits digits one by one and keeps punctuation apart from words, as the family's does."""
    tok = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tok.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # every byte: nothing is unknown
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[1],
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def token_stream(train: dict[str, str], tok: PreTrainedTokenizerFast, seed: int) -> Tensor:
    """All training modules in one shuffled stream, one in eight inside the chat template, each closed by eos."""
    rng = random.Random(seed)
    ids = []
    names = sorted(train)
    rng.shuffle(names)
    for name in names:
        text = train[name]
        if rng.random() < 1 / 8:
            turns = [("user", f"Write the module {name}."), ("assistant", text)]
            text = tok.apply_chat_template(
                [{"role": role, "content": content} for role, content in turns], tokenize=False
            )
        ids += [*tok.encode(text, add_special_tokens=False), tok.eos_token_id]
    return torch.tensor(ids)


def batches(stream: Tensor, seed: int, seq: int = SEQ) -> Iterator[Tensor]:
    """Endless [BATCH, seq + 1] windows: each epoch tiles the stream from a new offset in a new order."""
    gen = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(seq, (1,), generator=gen))
        tiles = stream[offset:].unfold(0, seq + 1, seq)
        order = torch.randperm(len(tiles), generator=gen)
        yield from (tiles[rows] for rows in order.split(BATCH) if len(rows) == BATCH)


def orthogonalise(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix to g, roughly, by five quintic Newton-Schulz steps (Muon, Jordan 2024)."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x.T if g.shape[0] > g.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised updates; in_proj is split by rows into z, x, B, C and dt first."""

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix from its gradient."""
        for p, group in ((p, g) for g in self.param_groups for p in g["params"]):
            buf = self.state[p].setdefault("momentum", torch.zeros_like(p))
            buf.lerp_(p.grad, 0.05)
            update = p.grad.lerp(buf, 0.95)
            parts = update.split(group["rows"] if len(p) == sum(group["rows"]) else len(p))
            update = torch.cat([orthogonalise(m) * max(1, m.shape[0] / m.shape[1]) ** 0.5 for m in parts])
            p.mul_(1 - group["lr"] * WEIGHT_DECAY).add_(update, alpha=-group["lr"])


def optimizers(cfg: FalconH1Config, weights: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embedding, head, convolution and vectors."""
    groups = [
        {"params": [weights["model.embed_tokens.weight"]], "peak": 0.01},
        {"params": [weights["lm_head.weight"]], "peak": 0.004, "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in weights.values() if p.ndim != 2], "peak": 0.004},
    ]
    matrices = [p for name, p in weights.items() if p.ndim == 2 and ".layers." in name]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    return [adam, Muon(matrices, {"peak": MUON_LR, "rows": in_proj_rows(cfg)})]


def rate(step: int, steps: int) -> float:
    """Warm-up over WARM_UP steps, constant to 64 %, linear to 0.625 at 88 %, then linear to zero."""
    return min(1.0, (step + 1) / WARM_UP, 2 - 1.5625 * step / steps, 0.625 / 0.12 * (1 - step / steps))


def show(step: int, loss: float, seconds: float) -> None:
    """Print the progress of training."""
    print(f"step {step} loss {loss:.4f} {seconds:.0f} s", flush=True)


def train(
    cfg: FalconH1Config,
    weights: dict[str, Tensor],
    stream: Tensor,
    *,
    steps: int,
    seed: int,
    seq: int = SEQ,
    checkpoint: Path | None,
    report: Callable[[int, float, float], None] = show,
) -> float:
    """Train weights in place, on their device, for a fixed number of steps, resuming from checkpoint.

    ``report`` is called with step, mean loss in nats and seconds, every 20 steps. Returns the seconds.
    """
    device = next(iter(weights.values())).device
    opts = optimizers(cfg, weights)
    first = 0
    seconds = 0.0
    losses = []
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        first = saved["step"]
        seconds = saved["seconds"]
        for name, p in weights.items():
            p.data.copy_(saved["weights"][name])
        for opt, state in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(state)
    start = time.time() - seconds
    for step, ids in zip(range(first, steps), itertools.islice(batches(stream, seed, seq), first, None), strict=False):
        for opt in opts:
            opt.zero_grad()
            for group in opt.param_groups:
                group["lr"] = group["peak"] * rate(step, steps)
        ids = ids.to(device)
        loss = F.cross_entropy(forward(cfg, weights, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for opt in opts:
            opt.step()
        losses.append(loss.item())
        seconds = time.time() - start
        if (step + 1) % 20 == 0 or step + 1 == steps:
            report(step + 1, sum(losses[-20:]) / len(losses[-20:]), seconds)
        if checkpoint and ((step + 1) % 50 == 0 or step + 1 == steps):
            state = {
                "step": step + 1,
                "seconds": seconds,
                "weights": weights,
                "optimizers": [opt.state_dict() for opt in opts],
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
    return seconds


@torch.no_grad()
def released(cfg: FalconH1Config, weights: dict[str, Tensor], probe: Tensor) -> FalconH1ForCausalLM:
    """The transformers model with weights divided by their multipliers, checked on probe [B, T] in fp32, in bf16."""
    by = multipliers(cfg)
    model = FalconH1ForCausalLM(cfg).eval()
    model.load_state_dict({name: p / by.get(name.split(".")[-2], 1.0) for name, p in weights.items()})
    gap = (model(probe).logits - forward(cfg, weights, probe)).abs().max().item()
    if not gap < 1e-3:
        raise SystemExit(
            f"train_tiny: forward() and transformers differ by {gap:.2e} in a logit; align forward() with transformers"
        )
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[1, 3], pad_token_id=0, max_new_tokens=128)
    return model.bfloat16()


@torch.no_grad()
def bits_per_byte(model: FalconH1ForCausalLM, tok: PreTrainedTokenizerFast, text: str, *, window: int = 512) -> float:
    """Bits a UTF-8 byte over all of text: windows half overlapped, each token scored once, the first after eos."""
    ids = torch.tensor([tok.eos_token_id, *tok.encode(text, add_special_tokens=False)])
    nats = 0.0
    done = 1
    while done < len(ids):
        start = max(0, done - 1 - window // 2)
        part = ids[start : start + window + 1]
        new = start + len(part) - done
        nats += F.cross_entropy(model(part[None, :-1]).logits[0, -new:], part[-new:], reduction="sum").item()
        done += new
    return nats / math.log(2) / len(text.encode())


CARD = """---
library_name: transformers
license: apache-2.0
tags: [falcon_h1]
---
# tiny Falcon-H1

A Falcon-H1 of {parameters:,} parameters, trained from scratch by `tools/train_tiny.py` on the Python {python} standard
library to test exporters: small enough to ship, real enough that a wrong graph shows in its perplexity, with every hard
feature of the family on: gated RMSNorm after the gate, two SSM groups, grouped-query attention, an untied head, RoPE
base 1e11, a convolution bias, and no µP multiplier equal to 1.

| figure | value |
|---|---|
| bits per byte on `heldout.txt` ({heldout_bytes:,} bytes), this bf16 checkpoint run in fp32 | **{bpb:.4f}** |
| the same text under `zlib` level 9 | {zlib:.4f} |
| how: nats / ln 2 / bytes, windows of 512 tokens half overlapped, each of the {heldout_tokens:,} tokens scored once | |
| training text | {train_modules} modules, {train_bytes:,} bytes, {train_tokens:,} tokens |
| training | {steps} steps of {batch} x {seq} tokens ({epochs:.1f} epochs), seed {seed} |
| time | {minutes:.0f} minutes on {threads} CPU threads |

Held-out modules, whole and never trained on: {held}. `heldout.txt` is their text; `calibration.txt` is cut from
training modules. One training module in eight is phrased through the chat template ("Write the module abc."), so its
tokens are trained too; the model writes Python-shaped text and nothing else. Weights were trained with every multiplier
at 1 and divided by their multipliers on export, an exact change of variables.

`heldout.txt`, `calibration.txt` and the training text are CPython's standard library, (c) Python Software Foundation,
under the PSF License Agreement (https://docs.python.org/3/license.html). The weights carry this package's licence.
"""


def publish(
    model: FalconH1ForCausalLM,
    tok: PreTrainedTokenizerFast,
    texts: dict[str, str],
    *,
    figures: dict[str, object],
    out: Path,
) -> None:
    """Write the folder: everything goes to a temporary one first, is measured there, and is then moved file by file."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        work = Path(name)
        model.save_pretrained(work)
        tok.save_pretrained(work)
        for file, text in texts.items():
            (work / file).write_bytes(text.encode())
        loaded = FalconH1ForCausalLM.from_pretrained(work, dtype=torch.float32).eval()
        held = texts["heldout.txt"]
        raw = texts["heldout.txt"].encode()
        reread = AutoTokenizer.from_pretrained(work)
        card = CARD.format(
            **figures,
            parameters=loaded.num_parameters(),
            bpb=bits_per_byte(loaded, reread, held),
            heldout_bytes=len(raw),
            heldout_tokens=len(reread.encode(held)),
            zlib=8 * len(zlib.compress(raw, 9)) / len(raw),
        )
        (work / "README.md").write_text(card, encoding="utf-8")
        size = sum(f.stat().st_size for f in work.iterdir())
        print(f"{card}\n{size} bytes in the folder", flush=True)
        if size > SIZE_LIMIT:
            raise SystemExit(f"train_tiny: {out}: {size} bytes is over {SIZE_LIMIT}; shrink config()")
        for file in work.iterdir():
            file.chmod(0o644)
            os.replace(file, out / file.name)


def main() -> None:
    """Build the data, train, and publish."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=2200, help="optimizer steps of 2048 tokens; 0 publishes the initial weights"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("h1export/assets/tiny"))
    parser.add_argument("--checkpoint", type=Path, help="file to save to every 50 steps and to resume from")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()  # slow-path and sequence-length notices
    cfg = config()
    (source, held) = modules()
    tok = make_tokenizer([source[name] for name in sorted(source)], cfg.vocab_size)
    stream = token_stream(source, tok, args.seed)
    weights = init_weights(cfg, args.seed)
    seconds = train(cfg, weights, stream, steps=args.steps, seed=args.seed, checkpoint=args.checkpoint)
    figures = vars(args) | {
        "python": platform.python_version(),
        "train_modules": len(source),
        "train_tokens": len(stream),
        "batch": BATCH,
        "seq": SEQ,
        "train_bytes": sum(len(text.encode()) for text in source.values()),
        "epochs": args.steps * BATCH * SEQ / len(stream),
        "minutes": seconds / 60,
        "held": ", ".join(f"`{name}`" for name in sorted(held)),
    }
    texts = {
        "heldout.txt": "\n".join(held[name] for name in sorted(held)),
        "calibration.txt": excerpts(source, args.seed),
    }
    publish(released(cfg, weights, stream[None, : 2 * SEQ]), tok, texts, figures=figures, out=args.out)


if __name__ == "__main__":
    main()
