"""Section (d) in a dry run, and what it says of a node that fell back to the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.targets.onnxruntime.fixed_decode import FixedDecode
from h1export.targets.onnxruntime.runner import OnnxRuntimeRunner
from h1export.targets.onnxruntime.variants import CPU, CUDA, GRAPH_VARIANTS
from h1export.validate.accuracy.reference import Reference

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))
from gpu_host.section import Host
from gpu_host.sections import artifacts


@pytest.mark.ort
def test_a_dry_run_validates_and_places_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRAPH_VARIANTS, "cuda", GRAPH_VARIANTS["cuda"])  # type: ignore[misc]  restored afterwards
    rows = list(artifacts.run(Host(tmp_path, tmp_path, "cpu")))
    assert [row for row in rows if row.passed is False] == []
    assert any("ragged chunks" in row.name and row.passed for row in rows)
    assert [row.passed for row in rows if row.name == "embedded-int4 captured decode"] == [True]
    last = rows[-1]
    assert last.name == "embedded-int4 node placements"
    assert last.passed
    assert last.figures["nodes"] == last.figures["nodes_on_provider"] > 50


@pytest.fixture
def int4(tiny: Path, build: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """An artifact of the CUDA graph, which the CPU provider runs."""
    stand_in = replace(GRAPH_VARIANTS["cuda"], provider=CPU)
    monkeypatch.setitem(GRAPH_VARIANTS, "cuda", stand_in)  # type: ignore[misc]  it is a dict
    return build(tiny, "int4", graph="cuda")


@pytest.mark.ort
def test_rows_are_yielded_when_they_are_found(int4: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A section that is killed keeps the rows it had, so none may wait for the end of the validation."""
    calls = []
    full = Reference.full

    def counted(self: Reference, ids: Any) -> Any:
        calls.append(ids)
        return full(self, ids)

    monkeypatch.setattr(Reference, "full", counted)
    seen = {row.name: len(calls) for row in artifacts._validated("x", int4, quick=True)}
    assert seen["x stored integers source"] == 0
    assert sorted(seen.values()) == list(seen.values())
    assert 0 < seen["x case source one token"] < seen["x case stored one token"] < len(calls)


@pytest.mark.ort
def test_an_artifact_beside_its_graph_in_float32(int4: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(artifacts.drift("x", int4))
    assert [row.name for row in rows] == ["x case drift one token", "x case drift ragged chunks"]
    assert all(row.passed and 0 < float(row.figures["logits"] or 0) < 1e-2 for row in rows)
    step = OnnxRuntimeRunner.step

    def without_states(self: Any, ids: Any, mask: Any, states: Any) -> Any:
        zeros = {name: np.zeros_like(state) for name, state in states.items()}
        return step(self, ids, mask, states if self.provenance.float32 else zeros)

    monkeypatch.setattr(OnnxRuntimeRunner, "step", without_states)
    assert [row.passed for row in artifacts.drift("x", int4)] == [True, False]


@pytest.mark.ort
def test_captured_decode_that_is_wrong_fails(int4: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    assert artifacts.captured_decode("x", int4, steps=3).passed
    monkeypatch.setattr(FixedDecode, "_capture", FixedDecode._run)  # which does not put the states back
    assert not artifacts.captured_decode("x", int4, steps=3).passed


def event(name: str, kind: str, provider: str) -> dict[str, object]:
    types = {"output_type_shape": [{"int64": [1]}]}
    return {"name": f"{name}_kernel_time", "args": {"op_name": kind, "provider": provider, **types}}


def test_a_node_on_the_cpu_fails_unless_it_computes_shapes() -> None:
    events = [event("a", "MatMulNBits", CUDA), event("b", "Shape", CPU), event("c", "MemcpyToHost", CUDA)]
    row = artifacts.placed("x", [*events, *events, {"name": "session"}], CUDA)
    assert (row.passed, row.figures) == (True, {"nodes": 3, "nodes_on_provider": 2, "memcpy_nodes": 1})
    fallen = artifacts.placed("x", [*events, event("d", "GroupQueryAttention", CPU)], CUDA)
    assert not fallen.passed
    assert "GroupQueryAttention" in fallen.detail
    assert not artifacts.placed("x", [], CUDA).passed


@pytest.mark.parametrize("kind", sorted(artifacts.SHAPES))
@pytest.mark.parametrize("dtype", ["int64", "int32", "float", "float16", "bfloat16", ""])
def test_a_shape_operator_may_be_on_the_cpu_for_integers_alone(kind: str, dtype: str) -> None:
    """Cast, Concat and Slice compute activations too; a profile without dtypes proves nothing."""
    sides = {"input_type_shape": [{dtype: [1]}], "output_type_shape": [{"int64": [1]}]} if dtype else {}
    node = {"name": "n", "args": {"op_name": kind, "provider": CPU, **sides}}
    row = artifacts.placed("x", [event("a", "MatMulNBits", CUDA), node], CUDA)
    allowed = dtype in ("int64", "int32") or (kind == "Shape" and dtype != "")
    assert row.passed == allowed
    assert (kind in row.detail) == (not allowed)
