"""Whether an artifact fits this machine and computes what it should, as a document without private data."""

from __future__ import annotations

import dataclasses
import getpass
import json
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from h1export import host
from h1export.artifact.artifact import Artifact
from h1export.commands.load import check_source, read_options
from h1export.commands.validate import validate_artifact
from h1export.errors import MOST_SHOWN, H1ExportError, printable, shortened
from h1export.progress import SILENT, Progress
from h1export.targets import get_target
from h1export.targets.base import Finding

PACKAGES = ("h1export", "torch", "transformers", "numpy")  # whose versions are given; targets give the runtime's
PATH = re.compile(r"(?<![\w.~])(?:[A-Za-z]:)?(?:[\\/][^\s\\/:;,'\"()\[\]]+){2,}")  # absolute, of two names or more
VALIDATE = "validate --quick"


def examine(
    out: Path,
    checkpoint: Path,
    *,
    build: bool = False,
    progress: Progress = SILENT,
    adapters: Sequence[Path] = (),
) -> dict[str, Any]:
    """Examine the artifact ``out`` on this machine; nothing that is missing or wrong here raises.

    Args:
        out: the artifact's folder.
        checkpoint: the checkpoint that it was built from.
        build: whether to build what is missing, such as an engine.
        progress: shows the stages.
        adapters: folders of the adapters that it was built with, in order.

    Returns:
        JSON values: "fits", "artifact", "machine", "findings" and "results", without paths, or names of the user or the
        machine.

    Raises:
        H1ExportError: ``out`` is not an artifact of a known target, or lacks files.
    """
    artifact = Artifact.open(out)
    read_options(artifact)
    progress.stage("files")
    findings = [_files(artifact)]
    if findings[0].passed:
        progress.stage("machine")
        target = get_target(artifact.manifest.target)
        try:
            findings.extend(target.examine(artifact, build=build, progress=progress))
        except Exception as error:  # of a runtime or a driver, and what a report is for
            findings.append(_crash("machine", error))
    results: list[dict[str, Any]] = []
    if any(finding.passed is False for finding in findings):
        findings.append(Finding(VALIDATE, None, "was not run, because something above did not pass"))
    else:
        finding, results = _validated(out, checkpoint, progress, adapters=adapters)
        findings.append(finding)
    document = {
        "fits": not any(finding.passed is False for finding in findings),
        "artifact": _identity(Artifact.open(out)),  # with the engine, where one was built
        "machine": host.machine_facts() | {"versions": _versions()},
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "results": results,
    }
    scrubbed: dict[str, Any] = _scrub(document, _private(out, checkpoint, adapters))
    return scrubbed


def page(document: dict[str, Any]) -> str:
    """Return the document as one page of Markdown."""
    artifact = document["artifact"]
    verdict = "fits this machine" if document["fits"] else "does not fit this machine"
    lines = [
        f"# h1export doctor: the artifact {verdict}",
        "",
        f"Target {artifact['target']}, manifest {artifact['manifest'][:16]}, source {artifact['source'][:16]}.",
        "",
        "| what | passed | found | next step |",
        "|---|---|---|---|",
    ]
    words = {True: "yes", False: "NO", None: "-"}
    for finding in document["findings"]:
        cells = (finding["name"], words[finding["passed"]], finding["detail"], finding["next_step"])
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    machine = document["machine"]
    lines += ["", f"{machine['system']} {machine['machine']}, {machine['cpu']}, Python {machine['python']}.", ""]
    lines += [f"- {name} {version}" for name, version in machine["versions"].items()]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return printable(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")


def _crash(name: str, error: Exception) -> Finding:
    first = shortened((str(error).strip() or "no message").splitlines()[0], MOST_SHOWN)
    return Finding(name, False, f"{type(error).__name__}: {first}", "run with --debug, and report it with this file")


def _files(artifact: Artifact) -> Finding:
    try:
        artifact.check_hashes()
    except H1ExportError as error:
        return Finding.of("files", error)
    return Finding("files", True, f"{len(artifact.manifest.files)} have the sha256 of the manifest")


def _validated(
    out: Path, checkpoint: Path, progress: Progress, *, adapters: Sequence[Path]
) -> tuple[Finding, list[dict[str, Any]]]:
    try:
        check_source(Artifact.open(out), checkpoint, adapters)
    except H1ExportError as error:
        return Finding(VALIDATE, None, f"was not run: the artifact {error.what}", error.next_step), []
    try:
        report = validate_artifact(out, checkpoint, {}, quick=True, save=False, progress=progress, adapters=adapters)
    except H1ExportError as error:
        return Finding.of(VALIDATE, error), []
    except Exception as error:  # of a runtime, and what a report is for
        return _crash(VALIDATE, error), []
    rows: list[dict[str, Any]] = json.loads(report.to_json())["rows"]
    detail = f"{len(rows)} rows, {'all within their tolerances' if report.passed else 'some beyond their tolerance'}"
    next_step = "" if report.passed else "run h1export validate --bisect, and report it with this file"
    return Finding(VALIDATE, report.passed, detail, next_step), rows


def _identity(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "target": manifest.target,
        "manifest": manifest.key,
        "source": manifest.source,
        "scheme": dict(manifest.scheme),
        "options": dict(manifest.options),
        "toolchain": dict(manifest.toolchain),
        "requirements": dict(manifest.requirements),
        "files": {name: digest for name, (digest, _) in manifest.files.items()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _private(out: Path, checkpoint: Path, adapters: Sequence[Path] = ()) -> dict[str, str]:
    """Return what must not be in the document -> what stands for it, the longest first."""
    named = {platform.node(): "HOST"}
    with suppress(OSError, KeyError, ImportError):
        named[getpass.getuser()] = "USER"
    named_paths = (
        (out, "OUT"),
        (checkpoint, "MODEL"),
        *((folder, "ADAPTER") for folder in adapters),
        (Path.home(), "~"),
    )
    for path, instead in named_paths:
        named |= dict.fromkeys(map(str, (path, path.absolute(), path.resolve())), instead)
    return dict(sorted(named.items(), key=lambda pair: -len(pair[0])))


def _scrub(value: Any, private: dict[str, str]) -> Any:
    """Return JSON values whose texts have no private word and no absolute path, of which the last name is left."""
    if isinstance(value, dict):
        return {name: _scrub(item, private) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_scrub(item, private) for item in value]
    if not isinstance(value, str):
        return value
    for word, instead in private.items():
        if word not in ("", "."):
            value = re.sub(rf"(?<![\w.-]){re.escape(word)}(?![\w-])", instead, value)
    return PATH.sub(lambda found: re.split(r"[\\/]", found[0])[-1], value)
