"""Checks of any target's sessions: what is saved and restored goes on as if nothing had happened."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from h1export.artifact.artifact import Artifact
from h1export.commands.chat import Chat
from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import StateKind, StateSpec
from h1export.runtime.continued import ContinuedSequence
from h1export.runtime.generation import PREFILL_CHUNK, Sampling
from h1export.runtime.growing import GrowingSession
from h1export.runtime.prefix_store import PrefixStore
from h1export.runtime.prompt import Prompt
from h1export.runtime.runner import Runner
from h1export.runtime.saved_states import SavedStates
from h1export.runtime.session import SteppedSession, open_session
from h1export.targets import Kernels

ROOM = 64
TOLERANCE = 1e-6  # of the range, where another division into calls adds in another order


def random_ids(runner: Runner[Any], rows: int, tokens: int) -> Any:
    return np.random.default_rng(tokens).integers(0, runner.config.vocab_size, (rows, tokens))


def check_save_and_restore(runner: Runner[Any], rows: int) -> None:
    """Every row, whole and in parts, into another session and into one that had other tokens."""
    spec = StateSpec.of(runner.config)
    ids = random_ids(runner, rows, 30)
    session = runner.start(rows, ROOM)
    session.append(ids[:, :17])
    parts = [[session.save(row)] for row in range(rows)]
    session.append(ids[:, 17:18])
    session.append(ids[:, 18:24])
    wholes = [session.save(row) for row in range(rows)]
    for row in range(rows):
        parts[row].append(session.save(row, start=17))
    truth = [session.append(ids[:, place : place + 1]) for place in range(24, 30)]
    for row in range(rows):
        joined = SavedStates.joined(spec, parts[row])
        for saved in (wholes[row], joined):
            assert (saved.start, saved.length) == (0, 24)
            for tensor in spec.tensors:
                assert saved.arrays[tensor.key].shape == tensor.sized(1, 24)
                assert np.array_equal(saved.arrays[tensor.key], wholes[row].arrays[tensor.key])
        other = runner.start(rows, ROOM)
        other.append(random_ids(runner, rows, 40))
        for again in (runner.start(rows, ROOM), other):
            again.restore(joined)
            assert again.length == 24
            for place, expected in zip(range(24, 30), truth, strict=True):
                found = again.append(np.repeat(ids[row : row + 1, place : place + 1], rows, axis=0))
                difference = np.abs(found - expected[row : row + 1]).max()
                # a product of several rows may add in another order where the rows stand in other places
                assert difference <= (TOLERANCE * np.ptp(expected) if rows > 1 else 0)


def check_saved_is_a_copy(runner: Runner[Any]) -> None:
    ids = random_ids(runner, 1, 20)
    session = runner.start(1, ROOM)
    session.append(ids[:, :9])
    saved = session.save()
    kept = {key: array.copy() for key, array in saved.arrays.items()}
    session.append(ids[:, 9:])
    fork = runner.start(1, ROOM)
    fork.restore(saved)
    fork.append(ids[:, 3:8])
    assert all(np.array_equal(saved.arrays[key], kept[key]) for key in kept)


def check_a_stale_state_is_seen(runner: Runner[Any]) -> None:
    """The test of the test: with any one kind of state from another time, other logits follow."""
    ids = random_ids(runner, 1, 20)
    session = runner.start(1, ROOM)
    session.append(ids[:, :10])
    early = session.save()
    session.append(ids[:, 10:15])
    saved = session.save()
    truth = session.append(ids[:, 15:16])
    for kind in StateKind:
        arrays = dict(saved.arrays)
        for key in [key for key in arrays if key.endswith(kind)]:
            if kind.grows:
                arrays[key] = np.concatenate([arrays[key][:, :, :5], arrays[key][:, :, :10]], axis=2)
            else:
                arrays[key] = early.arrays[key]
        again = runner.start(1, ROOM)
        again.restore(SavedStates(0, 15, arrays))
        assert np.abs(again.append(ids[:, 15:16]) - truth).max() > 100 * TOLERANCE * np.ptp(truth), kind


def check_other_sessions(runner: Runner[Any]) -> None:
    """Sessions that step, and those whose rows change places, save and restore the same states."""
    ids = random_ids(runner, 1, 14)
    saved = []
    after = []
    for how in ({}, {"padded": True}, {"movable": True}):
        session: Any = open_session(runner, 1, ROOM, **how)
        session.append(ids[:, :13], keep=1)
        saved.append(session.save())
        again: Any = open_session(runner, 1, ROOM, **how)
        again.restore(saved[0])
        after.append(again.append(ids[:, 13:], keep=1))
    for found, logits in zip(saved[1:], after[1:], strict=True):
        assert np.abs(logits - after[0]).max() <= TOLERANCE * np.ptp(after[0])
        for key, array in found.arrays.items():
            assert np.abs(array - saved[0].arrays[key]).max() <= TOLERANCE * max(1.0, np.ptp(saved[0].arrays[key]))


def check_what_cannot_be_saved_or_restored(runner: Runner[Any]) -> None:
    session = runner.start(1, ROOM)
    with pytest.raises(H1ExportError, match="save: row 0 of 1 from token 0 of 0"):
        session.save()
    session.append(random_ids(runner, 1, 9))
    for row, start in ((1, 0), (-1, 0), (0, 9), (0, -1)):
        with pytest.raises(H1ExportError, match="save: row"):
            session.save(row, start)
    saved = session.save()
    key = next(iter(saved.arrays))
    for wrong, line in (
        (session.save(start=4), "join them"),
        (SavedStates(0, 9, {}), "not those of this model"),
        (SavedStates(0, 9, {**saved.arrays, "more": saved.arrays[key]}), "not those of this model"),
        (SavedStates(0, 9, {**saved.arrays, key: saved.arrays[key].astype(np.float64)}), "not those of this model"),
        (SavedStates(0, 8, saved.arrays), "not those of this model"),
    ):
        with pytest.raises(H1ExportError, match=line):
            session.restore(wrong)
    assert session.length == 9
    short = runner.start(1, 8)
    if not isinstance(short, SteppedSession):  # it has no capacity
        with pytest.raises(H1ExportError, match=r"room for|larger capacity"):
            short.restore(saved)


def check_conversations(runner: Runner[Any], turns: int = 12, tolerance: float = TOLERANCE) -> None:
    """A random tree of sequences: logits equal a fresh run's, and only what is new is computed."""
    random = np.random.default_rng(7)
    sequence = ContinuedSequence(runner)
    known: list[list[int]] = [[]]
    for _ in range(turns):
        ids = [*known[random.integers(len(known))], *random.integers(0, runner.config.vocab_size, 5).tolist()]
        if len(ids) > ROOM - 4:
            continue
        shared = shared_length(sequence.ids, ids)
        before = sequence.computed
        found = sequence.become(ids, [max(1, len(ids) - 2)])
        fresh = runner.start(1, ROOM).append(np.array([ids]))[0, -1]
        assert np.abs(found - fresh).max() <= tolerance * np.ptp(fresh)
        assert int(found.argmax()) == int(fresh.argmax())
        assert len(ids) - shared <= sequence.computed - before <= len(ids)
        known.append(ids)
        if random.random() < 0.5:
            sequence.append(int(found.argmax()))


def logits_of(runner: Runner[Any], store: PrefixStore | None, ids: Sequence[int], borders: Sequence[int]) -> Any:
    """The logits after a prompt, and the number of its tokens that were not computed."""
    prompt = Prompt(runner, store, ids, borders=borders)
    logits = None
    while not prompt.is_done:
        logits = prompt.session.append(prompt.next())
        prompt.extended()
    assert logits is not None
    return logits[0, -1], prompt.reused


def check_prefix_store(runner: Runner[Any], exact: bool = True) -> None:
    """Random trees of conversations longer than a call: logits after reuse are a fresh run's.

    The first store forgets almost everything; in the second one every border is found again. With the states of other
    points in the places of its own, other logits follow.
    """
    random = np.random.default_rng(3)
    spec = StateSpec.of(runner.config)
    most = min(runner.limits.max_context or 1 << 20, runner.config.max_position_embeddings) - 1
    for room in (3, 100):
        store = PrefixStore(spec, room * spec.nbytes(1, PREFILL_CHUNK))
        known: list[tuple[list[int], list[int]]] = [([], [])]
        for _ in range(8):
            before, borders = known[random.integers(len(known))]
            ids = [*before, *random.integers(0, runner.config.vocab_size, random.integers(20, 90)).tolist()][:most]
            expected = max((border for border in borders if border < len(ids)), default=0)
            borders = [*borders, len(ids) - 3]
            found, kept = logits_of(runner, store, ids, borders)
            fresh, _ = logits_of(runner, None, ids, borders)
            assert np.abs(found - fresh).max() <= (0 if exact else TOLERANCE * np.ptp(fresh))
            assert kept >= expected or room == 3
            known.append((ids, borders))
        assert store.reused > 0
    ids, borders = known[1]
    truth, _ = logits_of(runner, store, ids, borders)
    states = [node.fixed for node in store._points]
    for node, fixed in zip(store._points, [states[-1], *states], strict=False):
        node.fixed = fixed
    stale, kept = logits_of(runner, store, ids, borders)
    assert kept == borders[0]
    assert np.abs(stale - truth).max() > 100 * TOLERANCE * np.ptp(truth)


def check_forks(runner: Runner[Any]) -> None:
    """Forks go on from one copy of the states, each in its own way, as sessions that computed everything do."""
    ids = random_ids(runner, 1, 30)
    session = GrowingSession(runner)
    session.append(ids[:, :20])
    forks = [session.fork() for _ in range(3)]
    assert forks[0].save() is forks[1].save()
    kept = {key: array.copy() for key, array in forks[0].save().arrays.items()}
    for number, fork in enumerate([session, *forks]):
        alone = GrowingSession(runner)
        alone.append(ids[:, :20])
        token = ids[:, 20 + number : 21 + number]
        assert np.array_equal(fork.append(token), alone.append(token))
        assert np.array_equal(fork.save(start=20).arrays["0.key"], alone.save(start=20).arrays["0.key"])
    again = session.fork().fork()
    again.restore(SavedStates(0, 20, kept))
    assert np.array_equal(again.append(ids[:, 21:22]), forks[0].append(ids[:, 22:23])) is False
    assert again.length == 21


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def check_chat(artifact: Artifact, folder: Path, kernels: Kernels = "auto") -> None:
    """Three turns with an artifact of a tokenizer of bytes: the replies of fresh runs, at the cost of the turns."""
    shutil.copytree(artifact.folder, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}<")

    def chat() -> Chat:
        return Chat(folder, 4, sampling=Sampling(), kernels=kernels)

    talk = chat()
    before = ""
    for text in ("Hello", "How so?", "x"):
        computed = talk.sequence.computed
        said = "".join(talk.reply(text))
        fresh = chat()
        fresh.messages = talk.messages[:-2]
        assert "".join(fresh.reply(text)) == said
        assert fresh.sequence.ids == talk.sequence.ids
        # the opening "<" is not in the next rendering, so the reply before is computed again, and nothing before it
        assert talk.sequence.computed - computed <= len(f"[{before}][{text}]<".encode()) + 3
        before = said
    talk.save(folder.parent / "talk")
    again = Chat(folder, 4, sampling=Sampling(), kernels=kernels, state=folder.parent / "talk")
    assert "".join(again.reply("more")) == "".join(talk.reply("more"))


def check_kept_logits(runner: Runner[Any]) -> None:
    """The logits that are asked for are those of the last positions, and leave the same states."""
    ids = random_ids(runner, 1, 20)
    session = runner.start(1, ROOM)
    whole, after = session.append(ids), session.append(ids[:, :1])
    for keep in (1, 3, 20, 33):
        session = runner.start(1, ROOM)
        for wrong in (0, -1):
            with pytest.raises(H1ExportError, match=f"logits of {wrong} positions"):
                session.append(ids, keep=wrong)
        found = session.append(ids, keep=keep)
        assert found.shape == whole[:, -keep:].shape
        assert np.abs(found - whole[:, -keep:]).max() <= TOLERANCE * np.ptp(whole)
        assert np.abs(session.append(ids[:, :1], keep=keep) - after).max() <= TOLERANCE * np.ptp(after)
    if whole.shape[1] > 1:  # other positions are seen
        assert np.abs(whole[:, -1] - whole[:, -2]).max() > 100 * TOLERANCE * np.ptp(whole)


CHECKS = {
    "copy": check_saved_is_a_copy,
    "stale": check_a_stale_state_is_seen,
    "other_sessions": check_other_sessions,
    "refused": check_what_cannot_be_saved_or_restored,
    "conversations": check_conversations,
    "prefix_store": check_prefix_store,
    "forks": check_forks,
    "kept": check_kept_logits,
}
