"""Make a bundle for a GPU host without a network: parts of at most 40 MB, index.json and join.py.

    python tools/gpu_host/pack.py /path/to/parts

Groups: core (tests, tools, wheels, the embedded model, the TensorRT plugin), onnxruntime (onnxruntime-gpu), shape (the
artifacts of the 0.5B shape; without their data files, which run.py makes again from the seed, unless --shape whole),
and with --text the group text (the tokens on which section g trains the proxy).
docs/gpu.md has the way of a bundle.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

from gpu_host import bundle, wheels  # noqa: E402
from gpu_host.join import INDEX  # noqa: E402
from gpu_host.parts import Files, write_parts  # noqa: E402

MB = 10**6
PART_MB = 40
GROUPS = ("core", "onnxruntime", "shape")
TREE = ("tests/", "tools/", "benchmarks/", "pyproject.toml")
GENERATED = "model.onnx.data"
TOKENS = "train.u16"


def git(*arguments: str) -> str:
    """Return what git prints, about the checkout of this file."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def below(folder: Path, prefix: str) -> dict[str, Path]:
    """Return every file below ``folder`` by its name in the bundle."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {f"{prefix}/{file.relative_to(folder).as_posix()}": file for file in files}


def tree() -> dict[str, Path]:
    """Return the files of the checkout that the sections need, without what git ignores."""
    names = git("ls-files", "-z", "-co", "--exclude-standard").split("\0")
    wanted = [name for name in names if name.startswith(TREE) and (ROOT / name).is_file()]
    return {f"{bundle.TREE}/{name}": ROOT / name for name in wanted}


def revision() -> str:
    """Return the commit, and whether the checkout differs from it."""
    return git("rev-parse", "HEAD").strip() + ("-dirty" if git("status", "--porcelain").strip() else "")


def build_artifacts(scratch: Path, model: str, checkpoint: Path | None) -> dict[str, Path]:
    """Build both artifacts of a model, and return their files."""
    from gpu_host.sections.shape import build_command
    from h1export import cli

    files = {}
    for quant in bundle.QUANTS:
        out = scratch / f"{model}-{quant}"
        if code := cli.run(build_command(checkpoint, quant, out)):
            raise SystemExit(f"pack: h1export build of {model} {quant} ended with {code}; see above")
        files |= below(out, f"{bundle.ARTIFACTS}/{out.name}")
    return files


def core(args: argparse.Namespace, scratch: Path, wheel_files: Files) -> dict[str, Path]:
    """Return the files of the group core, without bundle.json."""
    files = tree() | dict(wheel_files) | build_artifacts(scratch, "embedded", None)
    if not args.no_plugin:
        from gpu_host import plugin_bundle

        plugin_bundle.build(scratch / bundle.PLUGIN)
        files |= below(scratch / bundle.PLUGIN, bundle.PLUGIN)
    return files


def shape(args: argparse.Namespace, scratch: Path) -> dict[str, Path]:
    """Return the files of the group shape."""
    from make_checkpoint import config, write_checkpoint

    checkpoint = scratch / "checkpoint"
    write_checkpoint(checkpoint, config(args.model, args.layers), 1, seed=args.seed)
    files = build_artifacts(scratch, "shape", checkpoint)
    if args.shape == "seed":
        files = {name: path for name, path in files.items() if not name.endswith(f"/{GENERATED}")}
    return files


def text(work: Path, scratch: Path) -> dict[str, Path]:
    """Return the files of the group text, from the folder of `train_proxy.py text`; the tokens are compressed.

    Raises:
        SystemExit: the folder has no text.
    """
    folder = work / bundle.TEXT
    tokens = folder / TOKENS
    if not tokens.is_file():
        raise SystemExit(f"pack: {tokens}: is not there; run tools/train_proxy.py text {work}")
    packed = scratch / f"{TOKENS}.xz"
    with tokens.open("rb") as plain, lzma.open(packed, "wb") as stream:
        shutil.copyfileobj(plain, stream, 1 << 20)
    others = {name: path for name, path in below(folder, bundle.TEXT).items() if path != tokens}
    return others | {f"{bundle.TEXT}/{packed.name}": packed}


def pack(args: argparse.Namespace, groups: Sequence[str], out: Path) -> None:
    """Write the parts of ``groups``, index.json and join.py into the new folder ``out``."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        scratch = Path(folder)
        found: dict[str, Files] = {}
        own: Files = {}
        runtime: Files = {}
        if not args.no_wheels:
            own, runtime = wheels.collect(ROOT, scratch / "wheels", args.host, peers="core" in groups)
        for group in groups:
            if group == "core":
                found[group] = core(args, scratch, own)
            elif group == "onnxruntime":
                found[group] = runtime
            elif group == "shape":
                found[group] = shape(args, scratch)
            else:
                found[group] = text(args.text, scratch)
        facts = {
            "format": bundle.FORMAT,
            "revision": revision(),
            "groups": list(groups),
            "shape": {"name": args.model, "layers": args.layers, "seed": args.seed} if "shape" in groups else None,
            "shape_data": args.shape,
            "host": {name: version for name, (version, _) in wheels.host_packages(args.host).items()},
            "wheels": sorted(Path(name).name for name in (*own, *runtime)),
        }
        file = scratch / bundle.FILE
        file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        found[groups[0]] = {**found[groups[0]], bundle.FILE: file}
        made = out.with_name(f".{out.name}.partial-{os.getpid()}")
        made.mkdir(parents=True)
        try:
            index = write_parts({name: files for name, files in found.items() if files}, made, int(args.part_mb * MB))
            shutil.copyfile(Path(__file__).with_name("join.py"), made / "join.py")
            made.rename(out)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    for name, group in index.items():
        sizes = [part["bytes"] for part in group["parts"]]  # type: ignore[attr-defined]
        print(f"{name}: {sum(sizes) / MB:.1f} MB in {len(sizes)} parts, the largest {max(sizes) / MB:.1f} MB")
    print(f"{out}: carry {INDEX}, join.py and the parts; docs/gpu.md has the next steps")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where to write the parts; must not exist")
    parser.add_argument("--groups", default=",".join(GROUPS), help="separated by commas; the first gets bundle.json")
    parser.add_argument("--shape", choices=("seed", "whole"), default="seed", help="whole: with the data files")
    parser.add_argument("--model", default="0.5B", help="a shape of benchmarks/make_checkpoint.py")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--seed", type=int, default=0, help="of the random checkpoint")
    parser.add_argument(
        "--text", type=Path, metavar="WORK", help="a folder of tools/train_proxy.py, for the group text"
    )
    parser.add_argument("--part-mb", type=float, default=PART_MB, help="the largest part, in MB")
    parser.add_argument("--host", type=Path, default=wheels.HOST, help="what the host's Python has, as pip freezes it")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files")
    parser.add_argument("--no-wheels", action="store_true", help="for a host that has everything, such as this one")
    parser.add_argument("--no-plugin", action="store_true", help="without the TensorRT plugin")
    args = parser.parse_args(arguments)
    groups = args.groups.split(",")
    if (wrong := [name for name in groups if name not in GROUPS]) or len(set(groups)) != len(groups):
        shown = f"{wrong[0][:20]!r}" if wrong else "a group twice"
        print(f"pack: --groups: {shown}; name each of {', '.join(GROUPS)} at most once", file=sys.stderr)
        return 2
    if not 0 < args.part_mb <= PART_MB:
        print(f"pack: --part-mb {args.part_mb}: give more than 0 and at most {PART_MB}", file=sys.stderr)
        return 2
    if args.text is not None:
        groups.append("text")
    if args.out.exists():
        print(f"pack: {args.out}: exists; give a new folder", file=sys.stderr)
        return 2
    try:
        pack(args, groups, args.out.absolute())
    except SystemExit as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
