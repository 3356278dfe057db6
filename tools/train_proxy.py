"""Train the proxy: a Falcon-H1 of 1.45 million parameters that has seen many tokens each, so that 4 bits hurt it.

    python tools/train_proxy.py text WORK                  # tokenizer and token ids of the installed packages' sources
    python tools/train_proxy.py train WORK --stop 100      # to 100 tokens a parameter; the same command resumes
    python tools/train_proxy.py decay WORK --start 32 --length 8   # the rate falls to zero from the state kept at 32
    python tools/train_proxy.py publish WORK --state decay-32+8.pt OUT  # a checkpoint that transformers loads, its card

WORK is a folder outside the project. A killed run loses SAVE_SECONDS at most, and goes on as if it had not been killed.
Use OMP_NUM_THREADS=1 or more; ``--dtype bfloat16`` needs AVX512-BF16 or AMX to pay, ``--device cuda`` a GPU.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from proxy import corpus, training
from proxy.model import config
from proxy.publishing import publish, record_of
from transformers import AutoTokenizer, logging

STABLE = "stable.pt"


def ids_of(work: Path, name: str) -> np.ndarray:
    """Return the uint16 ids of a part of the text that ``text`` has written."""
    return np.memmap(work / "text" / f"{name}.u16", np.uint16, "r")


def run_phase(args: argparse.Namespace) -> None:
    """Train the stable phase to ``--stop``, or decay from the state kept at ``--start`` over ``--length``."""
    text = record_of(args.work)["train"]["sha256"]
    run = training.start(config(), seed=args.seed, text=text, device=args.device, batch=args.batch)
    state = args.work / STABLE
    if args.verb == "decay":
        kept = args.work / f"stable-{args.start}.pt" if args.start else args.work / STABLE
        state = args.work / f"decay-{args.start or 'last'}+{args.length:g}.pt"
        if not state.exists():
            run.load(kept)
            run.decay_from = run.done
            run.stop = run.done + run.windows(args.length)
            run.save(state)
    if state.exists():
        run.load(state)
        training.show(f"{state.name}: goes on at step {run.step}, {run.ratio:.2f} tokens a parameter")
    if args.verb == "train":
        run.stop = run.windows(args.stop)
    tok = AutoTokenizer.from_pretrained(args.work / "text" / "tokenizer")
    widths = corpus.token_bytes(tok)
    dtype = getattr(torch, args.dtype)
    training.train(
        run,
        ids_of(args.work, "train"),
        state,
        measure=lambda run: training.held_out(run, ids_of(args.work, "heldout"), widths, dtype=dtype),
        dtype=dtype,
        keep=args.keep if args.verb == "train" else 0,
    )


def main() -> None:
    """Run one verb."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("text", "train", "decay", "publish"):
        sub = verbs.add_parser(verb)
        sub.add_argument("work", type=Path)
        sub.add_argument("--seed", type=int, default=0)
        if verb in ("train", "decay"):
            sub.add_argument("--device", default="cpu")
            sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the products")
            sub.add_argument(
                "--batch", type=int, default=training.BATCH, help="windows of 512 tokens a step, of a new run"
            )
        if verb == "train":
            sub.add_argument("--stop", type=float, default=40, help="tokens a parameter")
            sub.add_argument("--keep", type=int, default=4, help="keep the state of every so many tokens a parameter")
        if verb == "decay":
            sub.add_argument("--start", type=int, help="tokens a parameter of a kept state; default is the last state")
            sub.add_argument("--length", type=float, required=True, help="tokens a parameter")
        if verb == "publish":
            sub.add_argument("--state", required=True, help="name of a decayed state in WORK")
            sub.add_argument("out", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    if args.verb == "text":
        corpus.prepare(args.work / "text", config().vocab_size, args.seed)
    elif args.verb == "publish":
        publish(args.work, args.state, args.out)
    else:
        run_phase(args)


if __name__ == "__main__":
    main()
