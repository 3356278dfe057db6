"""Artifact: a finished folder, opened and checked against its manifest. docs/artifact.md describes the folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from h1export.artifact.files import NOT_PLAIN, names, plain_size, sha256_file
from h1export.artifact.journal import JOURNAL, SCRATCH
from h1export.artifact.manifest import MANIFEST, Manifest
from h1export.errors import H1ExportError, listed
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.tensors import tensor_shapes

NO_SHA256 = 64 * "0"
REPORT = "report.json"  # `h1export validate` writes it into a finished artifact, so the manifest does not list it


@dataclass(frozen=True)
class Artifact:
    """A finished folder that holds every file of its manifest in full length."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Artifact:
        """Read the manifest in ``folder`` and check the size of every file that it lists. Other files are ignored.

        Raises:
            H1ExportError: ``folder`` is not an artifact, a listed file is missing, has another size or is a symbolic
                link, or the manifest lists weights that the model of config.json does not have.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise H1ExportError(folder, f"no {MANIFEST}", "give a folder that h1export build has made")
        manifest = Manifest.read(path)
        for name, (_, size) in manifest.files.items():
            found = plain_size(folder, name)
            if found == NOT_PLAIN:
                raise H1ExportError(
                    path, f"lists {name!r}, which is not a plain file of the folder", "build the artifact again"
                )
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes, and the manifest says {size}"
                raise H1ExportError(listed(folder, name), what, "build the artifact again")
        artifact = cls(folder, manifest)
        if manifest.weights:
            manifest.check_weights(path, tensor_shapes(artifact.config))
        return artifact

    def check_hashes(self) -> None:
        """Compare the sha256 of every listed file with the manifest.

        Raises:
            H1ExportError: a file has another sha256, or cannot be read.
        """
        for name, (digest, _) in self.manifest.files.items():
            if sha256_file(self.folder / name) != digest:
                raise H1ExportError(
                    listed(self.folder, name), "was changed after the build", "build the artifact again"
                )

    @property
    def identity(self) -> str:
        """The sha256 of the manifest: the same for artifacts whose files are the same, byte for byte."""
        return hashlib.sha256(self.manifest.to_json().encode()).hexdigest()

    @cached_property
    def config(self) -> FalconH1Config:
        """The architecture, read once from the artifact's own copy of config.json."""
        return FalconH1Config.load(self.folder)


def file_table(folder: Path, sizes_only: bool = False) -> dict[str, tuple[str, int]]:
    """Return name -> (sha256, bytes) of every file below ``folder``.

    The journal and the scratch folder of a stage are left out. With ``sizes_only`` no file is read, and every sha256 is
    ``NO_SHA256``.

    Raises:
        H1ExportError: a manifest may not list a file below ``folder``, such as a symbolic link.
    """
    table = {}
    for name in names(folder):
        if name == JOURNAL or name.startswith(f"{SCRATCH}/"):
            continue
        size = plain_size(folder, name)
        if size is None or size == NOT_PLAIN:
            raise H1ExportError(folder / name, "is not a plain file", "a target writes plain files and folders only")
        table[name] = (NO_SHA256 if sizes_only else sha256_file(folder / name), size)
    return table
