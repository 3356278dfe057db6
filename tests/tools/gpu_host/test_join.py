"""Parts are joined to the files they were cut from, in any number of transfers, and everything else is refused."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from gpu_host.join import INDEX, JoinError, join, main
from gpu_host.parts import write_parts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LIMIT = 4096


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Parts of two groups, of at most LIMIT bytes."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(bytes(range(256)) * 50)
    (source / "b.sh").write_text("true\n")
    (source / "b.sh").chmod(0o755)
    folder = tmp_path / "parts"
    folder.mkdir()
    groups = {"core": {"x/a": source / "a", "b.sh": source / "b.sh"}, "shape": {"y/a": source / "a"}}
    write_parts(groups, folder, LIMIT)
    return folder


def change_index(parts: Path, change: Any) -> None:
    index = json.loads((parts / INDEX).read_text())
    change(index)
    (parts / INDEX).write_text(json.dumps(index))


def test_parts_are_small_and_joined_to_the_same_files(parts: Path, tmp_path: Path) -> None:
    assert max(file.stat().st_size for file in parts.glob("*.part")) == LIMIT
    out = tmp_path / "out"
    assert join([parts], out) == []
    assert (out / "x" / "a").read_bytes() == (out / "y" / "a").read_bytes() == bytes(range(256)) * 50
    assert (out / "b.sh").stat().st_mode & 0o100
    assert not list((out / ".parts").iterdir())
    assert main([str(parts), "--out", str(out)]) == 0  # again


def test_the_same_files_give_the_same_bytes(parts: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    source = tmp_path / "source"
    (source / "a").touch()  # another time
    write_parts({"core": {"b.sh": source / "b.sh", "x/a": source / "a"}, "shape": {"y/a": source / "a"}}, again, LIMIT)
    assert {f.name: f.read_bytes() for f in parts.iterdir()} == {f.name: f.read_bytes() for f in again.iterdir()}


def test_transfers_may_bring_one_part_each(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    names = sorted(file.name for file in parts.glob("*.part"))
    for number, name in enumerate(names):
        transfer = tmp_path / "transfer"
        shutil.rmtree(transfer, ignore_errors=True)
        transfer.mkdir()
        shutil.copy(parts / INDEX, transfer)
        shutil.copy(parts / name, transfer)
        last = number == len(names) - 1
        assert main([str(transfer), "--out", str(out)]) == (0 if last else 2)
        assert last or capsys.readouterr().err.startswith("join: missing: ")
    assert (out / "y" / "a").is_file()


def test_a_group_alone_can_be_asked_for(parts: Path, tmp_path: Path) -> None:
    for file in parts.glob("shape.*"):
        file.unlink()
    assert join([parts], tmp_path / "out", ["core"]) == []
    assert join([parts], tmp_path / "out") != []
    with pytest.raises(JoinError, match="no group 'other'; one of core, shape"):
        join([parts], tmp_path / "out", ["other"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_changed_byte_is_seen(parts: Path, tmp_path: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(parts.glob("*.part"))))
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    try:
        with pytest.raises(JoinError, match=r"is damaged.*copy it again"):
            join([parts], tmp_path / "out")
    finally:
        file.write_bytes(whole)
    assert not (tmp_path / "out").exists()


def cut(parts: Path) -> None:
    (parts / "core.001.part").write_bytes(b"short")


def swap(parts: Path) -> None:
    first, second = parts / "core.001.part", parts / "core.002.part"
    first.rename(parts / "x")
    second.rename(first)
    (parts / "x").rename(second)


def extra(parts: Path) -> None:
    shutil.copy(parts / "core.001.part", parts / "core.099.part")


def link(parts: Path) -> None:
    part = parts / "core.001.part"
    part.rename(parts / "real")
    part.symlink_to(parts / "real")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut, "has 5 bytes and not"), (swap, "damaged"), (extra, "is not in index.json"), (link, "is not a plain file")],
)
def test_wrong_parts_are_refused_in_one_line(
    parts: Path, tmp_path: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(parts)
    assert main([str(parts), "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    with pytest.raises(JoinError, match=message):
        join([parts], tmp_path / "out")


def test_a_part_given_twice_is_refused(parts: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(parts, tmp_path / "twin"))
    with pytest.raises(JoinError, match="give each part once"):
        join([parts, twin], tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["groups"]["core"]["parts"][0].update(name="../core.001.part"),
        lambda index: index["groups"]["core"]["parts"][1].update(name="core.001.part"),
        lambda index: index["groups"]["core"]["parts"][0].update(bytes=True),
        lambda index: index["groups"]["core"]["parts"][0].update(sha256=None),
        lambda index: index["groups"].update({"../core": index["groups"].pop("core")}),
        lambda index: index["groups"]["core"].update(parts=[]),
        lambda index: index["groups"]["core"].update(sha256="0"),
        lambda index: index.update(format=2),
        lambda index: index.update(groups=[]),
    ],
)
def test_a_wrong_index_is_refused(parts: Path, tmp_path: Path, change: Any) -> None:
    change_index(parts, change)
    with pytest.raises(JoinError, match="damaged or of another format"):
        join([parts], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../evil", tarfile.REGTYPE),
        ("/tmp/evil", tarfile.REGTYPE),
        ("a/../../evil", tarfile.REGTYPE),
        ("l", tarfile.SYMTYPE),
    ],
)
def test_an_archive_that_leads_out_is_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type = kind
        member.linkname = ".." if kind == tarfile.SYMTYPE else ""
        archive.addfile(member)
    data = stream.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    part = {"name": "core.001.part", "bytes": len(data), "sha256": digest}
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "core.001.part").write_bytes(data)
    (parts / INDEX).write_text(json.dumps({"format": 1, "groups": {"core": {"sha256": digest, "parts": [part]}}}))
    with pytest.raises(JoinError, match="no plain file of the bundle"):
        join([parts], tmp_path / "out")
    assert not (tmp_path / "evil").exists()


def test_a_link_in_the_bundles_folder_is_not_followed(parts: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").symlink_to(outside)
    with pytest.raises(JoinError, match="by a link"):
        join([parts], out)
    assert not list(outside.iterdir())
