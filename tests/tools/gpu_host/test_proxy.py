"""Section g: the carried text, and a training that was killed and started again."""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
from pathlib import Path

import pytest
import torch

TREE = Path(__file__).parents[3]
sys.path[:0] = [str(TREE / "tools"), str(TREE / "benchmarks")]
from gpu_host import bundle, pack  # noqa: E402
from gpu_host.section import Host  # noqa: E402
from gpu_host.sections import proxy  # noqa: E402


def test_a_training_that_was_started_again_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call is killed after the stable phase; the second computes no step of it again."""
    steps: list[int] = []
    nats = proxy.training.nats

    def counted(run: proxy.training.Run, *rest: object, **more: object) -> torch.Tensor:
        if torch.is_grad_enabled():
            steps.append(run.step)
        return nats(run, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(proxy.training, "nats", counted)
    host = Host(tmp_path, tmp_path, "cpu")
    first = proxy.run(host)
    assert [next(first).name, next(first).name] == ["text", "stable phase"]
    first.close()
    assert steps == [0]
    rows = {row.name: row for row in proxy.run(host)}
    assert steps == [0, 1]
    assert list(rows) == ["text", "stable phase", "training", "checkpoint"]
    assert all(row.passed for row in rows.values())
    assert (rows["stable phase"].figures["steps"], rows["training"].figures["steps"]) == (1, 2)
    assert (tmp_path / "proxy" / "log.txt").read_text().count("loss") == 2


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder as `train_proxy.py text` leaves it."""
    text = tmp_path / "trained" / "text"
    (text / "tokenizer").mkdir(parents=True)
    (text / "tokenizer" / "tokenizer.json").write_text("{}")
    tokens = bytes(range(256)) * 400
    (text / "train.u16").write_bytes(tokens)
    record = {"train": {"tokens": len(tokens) // 2, "sha256": hashlib.sha256(tokens).hexdigest()}}
    (text / "text.json").write_text(json.dumps(record))
    return text.parent


def carried(files: dict[str, Path], folder: Path) -> Host:
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())
    return Host(folder, folder / "work", "cuda")


def test_the_text_arrives_as_it_was(work: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    files = pack.text(work, scratch)
    assert all(name.startswith(f"{bundle.TEXT}/") for name in files)
    assert sum(path.stat().st_size for path in files.values()) < 5000
    host = carried(files, tmp_path / "bundle")
    proxy.unpack_text(host, tmp_path / "out")
    for name in ("train.u16", "text.json", "tokenizer/tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (work / "text" / name).read_bytes()
    packed = host.bundle / bundle.TEXT / "train.u16.xz"
    packed.write_bytes(lzma.compress(b"other"))
    proxy.unpack_text(host, tmp_path / "out")  # once
    with pytest.raises(ValueError, match=r"not those of text\.json"):
        proxy.unpack_text(host, tmp_path / "again")
    assert not (tmp_path / "again" / "train.u16").exists()


def test_a_bundle_without_the_text_is_a_failure(tmp_path: Path) -> None:
    (row,) = proxy.run(Host(tmp_path, tmp_path / "work", "cuda"))
    assert row.passed is False
    assert "--text WORK" in row.detail
