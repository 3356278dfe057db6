"""A checkpoint that changes while it is read fails the build with one line, whatever changes and however."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from h1export.checkpoint.store import WeightStore
from h1export.checkpoint.unchanged import SourceFiles
from h1export.commands import build as building
from h1export.commands.build import build_artifact
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.quantize.scheme import QuantScheme


@pytest.fixture
def source(spoken_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(spoken_checkpoint, tmp_path / "source"))


def flip(file: Path) -> None:
    """Change a byte in place, and set the times back."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(file: Path) -> None:
    """Put an equal copy in its place, as a download that ends does."""
    shutil.copy2(file, file.with_name("beside"))
    file.with_name("beside").replace(file)


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


CHANGES: dict[str, Callable[[Path], None]] = {
    "flip": flip,
    "replaced": replaced,
    "truncated": truncated,
    "removed": Path.unlink,
    "emptied": lambda file: os.truncate(file, 0),
}
FILES = ("model.safetensors", "config.json", "tokenizer.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_every_file_is_seen(change: str, name: str, source: Path) -> None:
    files = SourceFiles.of((source,))
    files.check()
    CHANGES[change](source / name)
    with pytest.raises(H1ExportError, match=rf"{name}: was \w+ while the checkpoint was read; let nothing write"):
        files.check()


def test_an_added_index_is_seen_and_a_log_is_not(source: Path) -> None:
    files = SourceFiles.of((source,))
    (source / "build.log").write_text("stage")
    files.check()
    (source / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(H1ExportError, match=r"index\.json: was added"):
        files.check()


@pytest.mark.parametrize("change", CHANGES)
def test_templates_in_their_folder_are_watched(change: str, source: Path) -> None:
    folder = source / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("{{ messages }}")
    files = SourceFiles.of((source,))
    files.check()
    CHANGES[change](folder / "tool_use.jinja")
    with pytest.raises(H1ExportError, match=r"tool_use\.jinja: was \w+ while the checkpoint was read"):
        files.check()


def test_what_a_link_leads_to_is_watched(source: Path, tmp_path: Path) -> None:
    """As in the cache of the Hub."""
    (source / "model.safetensors").rename(tmp_path / "blob")
    (source / "model.safetensors").symlink_to(tmp_path / "blob")
    files = SourceFiles.of((source,))
    flip(tmp_path / "blob")
    with pytest.raises(H1ExportError, match=r"model\.safetensors: was changed"):
        files.check()


@pytest.mark.parametrize("change", ["truncated", "removed", "emptied"])
def test_weights_that_shrink_under_a_read_are_an_error_and_no_signal(change: str, source: Path) -> None:
    config = FalconH1Config.load(source)
    store = WeightStore.open(source, config)
    name = "lm_head.weight"
    whole = store.entry(name).values()
    assert (store.entry(name).values(slice(1, 3)) == whole[1:3]).all()
    assert (store.entry(name).values(slice(1, 3), slice(2, 7)) == whole[1:3, 2:7]).all()
    assert (store.entry(name).values(columns=slice(2, 7)) == whole[:, 2:7]).all()
    CHANGES[change](source / "model.safetensors")
    with pytest.raises(H1ExportError, match=r"model\.safetensors: (became shorter|cannot be read)"):
        store.fingerprint()
    with pytest.raises(H1ExportError, match=r"model\.safetensors: (became shorter|cannot be read)"):
        store.rows(
            "model.final_layernorm.weight"
            if change != "truncated"
            else max((entry.start, entry.name) for entry in store.entries)[1],
            0,
            1,
        )


@pytest.mark.ort
@pytest.mark.parametrize("name", FILES)
def test_a_build_whose_checkpoint_changes_leaves_nothing(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = building.BuildJob.write

    def write(job: building.BuildJob, *arguments: object) -> object:
        made = written(job, *arguments)  # type: ignore[arg-type]
        flip(source / name)
        return made

    monkeypatch.setattr(building.BuildJob, "write", write)
    with pytest.raises(H1ExportError, match=rf"{name}: was changed while the checkpoint was read"):
        build_artifact(source, "ort", tmp_path / "out", scheme=QuantScheme("int8"))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


class At:
    """A Progress that calls ``act`` when stage ``name`` begins first."""

    def __init__(self, name: str, act: Callable[[], object]) -> None:
        self._name = name
        self._act = act
        self.stages: list[str] = []

    def stage(self, name: str, total_bytes: int = 0) -> None:
        self.stages.append(name)
        if name == self._name and self.stages.count(name) == 1:
            self._act()

    def advance(self, nbytes: int) -> None:
        pass


STAGES = ("checkpoint", "fingerprint", "trace", "weights", "hashes")  # of a build
MOMENTS = [  # every stage with half the files, and every change with some
    (stage, name, list(CHANGES)[(number + 2 * other) % len(CHANGES)])
    for number, stage in enumerate(STAGES)
    for other, name in enumerate((*FILES, "generation_config.json"))
    if (number + other) % 2
]


@pytest.mark.ort
@pytest.mark.parametrize(("stage", "name", "change"), MOMENTS)
def test_a_change_at_any_moment_of_a_build_is_one_line(
    stage: str, name: str, change: str, source: Path, *, tmp_path: Path
) -> None:
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    progress = At(stage, lambda: CHANGES[change](source / name))
    with pytest.raises(H1ExportError) as caught:
        build_artifact(source, "ort", tmp_path / "out", scheme=QuantScheme("int8"), progress=progress)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert stage in progress.stages
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
