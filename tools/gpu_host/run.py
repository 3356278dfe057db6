"""Run the sections of a joined bundle on plain python3, each in a process of its own with a time limit.

    python3 bundle/tree/tools/gpu_host/run.py --out results

The exit code is 0 when every section passed, 1 when one failed or was killed at its limit, and 2 for bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOOLS))

from gpu_host import bundle as places  # noqa: E402
from gpu_host import results  # noqa: E402
from gpu_host.section import SECTIONS, Section  # noqa: E402

SITE, PEERS_SITE = "site", "site-peers"  # folders of the work folder into which wheels are unpacked
LOG_CHARACTERS = 4000  # of a section's output, from its end
NAMED = ("torch", "triton", "transformers", "onnx", "onnx-ir", "onnxruntime-gpu", "onnxruntime", "h1export")
NAMED += ("mamba-ssm", "fla-core")
QUERY = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0")


def install(wheels: Path, site: Path) -> None:
    """Unpack the bundle's wheels into ``site``, once.

    Raises:
        SystemExit: a wheel has a file that leads out of it, or is damaged.
    """
    for wheel in sorted(wheels.glob("*.whl")):
        done = site / f".{wheel.name}"
        if done.exists():
            continue
        try:
            with zipfile.ZipFile(wheel) as archive:
                if any(name.startswith("/") or ".." in Path(name).parts for name in archive.namelist()):
                    raise SystemExit(f"run: {wheel}: has a file that leads out of it; make the bundle again")
                archive.extractall(site)
        except zipfile.BadZipFile:
            raise SystemExit(f"run: {wheel}: is damaged; join the bundle again") from None
        done.touch()


def environment(bundle: Path, work: Path, device: str, *, section: Section | None = None) -> dict[str, str]:
    """Return the environment variables of a section's process; None is for one that is no section's."""
    tree = bundle / places.TREE
    folders = [str(work / SITE), str(tree / "tools"), str(tree / "benchmarks")]
    if section is not None and section.peers:
        folders.append(str(work / PEERS_SITE))
    threads = {} if section is None or section.threads is None else {"OMP_NUM_THREADS": str(section.threads)}
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {
        **os.environ,
        **threads,
        "PYTHONPATH": os.pathsep.join([*folders, *inherited]),
        "TRITON_INTERPRET": "1" if device == "cpu" else "0",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(work / "cache"),
    }


def facts(bundle: Path, device: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return what the run is of, without versions: device, driver, CUDA, date and revision."""
    name, driver = "CPU", ""
    if device == "cuda":
        shown = subprocess.run(QUERY, capture_output=True, text=True, check=False).stdout.strip().split(", ")
        name, driver = (*shown, "", "")[:2]
    code = "import torch; print(torch.version.cuda or '')"
    asked = subprocess.run([sys.executable, "-c", code], env=dict(environ), capture_output=True, text=True, check=False)
    return {
        "device": name,
        "driver": driver,
        "cuda": asked.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "revision": places.facts(bundle)["revision"],
        "dry": device == "cpu",
    }


def versions(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the version of Python, and of each package of NAMED that a section with these variables has."""
    site = [entry for entry in environ["PYTHONPATH"].split(os.pathsep) if entry]
    found = {dist.name.lower(): dist.version for dist in metadata.distributions(path=[*site, *sys.path][::-1])}
    return {"python": sys.version.split()[0], **{name: found[name] for name in NAMED if name in found}}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a section's rows; a process that was killed may leave half of one."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def run_section(
    section: Section, bundle: Path, work: Path, *, device: str, environ: Mapping[str, str], limit_s: float
) -> dict[str, Any]:
    """Run a section in a process group of its own, kill the group at the limit, and return its JSON without `run`."""
    rows = work / f"rows-{section.letter}.jsonl"
    rows.unlink(missing_ok=True)
    log = work / f"log-{section.letter}.txt"
    worker = str(TOOLS / "gpu_host" / "worker.py")
    command = [sys.executable, worker, section.module, str(bundle), str(work), device, str(rows)]
    start = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=dict(environ), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            state = "done" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "timeout"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # children that outlived it too
            process.wait()
    return {
        "format": results.FORMAT,
        "letter": section.letter,
        "title": section.title,
        "state": state,
        "seconds": round(time.monotonic() - start, 2),
        "limit_s": limit_s,
        "rows": read_rows(rows),
        "log": "" if state == "done" else log.read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:],
    }


def chosen(only: str | None) -> list[Section]:
    """Return the sections to run, in their order.

    Raises:
        SystemExit: ``only`` names a letter that no section has.
    """
    if only is None:
        return [section for section in SECTIONS if not section.on_demand]
    letters = only.split(",")
    if unknown := [letter for letter in letters if letter not in {section.letter for section in SECTIONS}]:
        known = ", ".join(section.letter for section in SECTIONS)
        raise SystemExit(f"run: --only: no section {unknown[0][:20]!r}; one of {known}")
    return [section for section in SECTIONS if section.letter in letters]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=TOOLS.parents[1], help="the folder that join.py made")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON files")
    parser.add_argument("--work", type=Path, help="folder for everything else; default: work/ in the bundle")
    parser.add_argument("--only", help="letters of sections, separated by commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run without figures")
    args = parser.parse_args(arguments)
    try:
        sections = chosen(args.only)
        bundle = args.bundle.resolve()
        places.facts(bundle)
        if args.device == "cuda" and shutil.which("nvidia-smi") is None:
            raise SystemExit("run: no NVIDIA GPU here (nvidia-smi is missing); --device cpu is the dry run")
        out = args.out.resolve()
        work = (args.work or bundle / "work").resolve()
        out.mkdir(parents=True, exist_ok=True)
        for wheels, site in ((places.WHEELS, SITE), (places.PEERS, PEERS_SITE)):
            (work / site).mkdir(parents=True, exist_ok=True)
            install(bundle / wheels, work / site)
    except SystemExit as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"run: {error.filename}: {error.strerror}; check space and permissions", file=sys.stderr)
        return 2
    run = facts(bundle, args.device, environment(bundle, work, args.device))
    finished = []
    for section in sections:
        limit_s = section.dry_limit_s if args.device == "cpu" else section.limit_s
        print(f"{section.letter}  {section.title} (at most {limit_s} s)", flush=True)
        environ = environment(bundle, work, args.device, section=section)
        result = run_section(section, bundle, work, device=args.device, environ=environ, limit_s=limit_s)
        finished.append({**result, "run": {**run, "versions": versions(environ)}})
        results.write_json(out / results.section_file(section.letter), finished[-1])
        results.collect(out, [known.letter for known in SECTIONS])
    print(results.table(finished))
    return 0 if all(map(results.passed, finished)) else 1


if __name__ == "__main__":
    sys.exit(main())
