"""The protocols of a loaded artifact: what clients need, what a judge needs, and what only some runtimes offer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.config import FalconH1Config
from h1export.model.falcon_h1.states import Array, Ids
from h1export.runtime.saved_states import SavedStates

States = TypeVar("States")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest calls that a Runner takes, so that a caller can leave out a case instead of failing in it.

    Attributes:
        max_batch: The largest number of rows in one call; None means that there is no limit.
        max_context: The largest number of tokens in one sequence; None means that there is no limit.
        all_logits: Whether a call returns the logits of every position; otherwise it returns those of the last one
        only.
    """

    max_batch: int | None = None
    max_context: int | None = None
    all_logits: bool = True


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Whose arithmetic computes what a Runner returns, and in which precision.

    Attributes:
        kernels: The name and version of the kernels that compute.
        gpu: The GPU that computes; it is empty where the CPU does.
        emulated: Whether something else stands in for the artifact's runtime: its numbers count, and its speed does
            not.
        float32: Whether activations are float32 throughout; otherwise they are rounded somewhere, and results drift by
            design.
        fallback: What computes slower here than it could, why, and the next step; it is empty where nothing does.
        scale_rounding: The largest relative error of a stored weight beside that of its integers, where µP is inside
            scales of half precision; 0 where scales are exact.
    """

    kernels: str
    gpu: str = ""
    emulated: bool = False
    float32: bool = True
    fallback: str = ""
    scale_rounding: float = 0.0


class Session(Protocol):
    """A batch of sequences that are being extended; their states are updated in place.

    A session takes one call at a time: while one runs, another one, of any thread, raises H1ExportError at once and
    changes nothing. Threads that take turns may share it. Sessions of one Runner share nothing that a call changes.

    Attributes:
        length: The number of tokens so far, which is the same for every row.
    """

    length: int

    def append(self, ids: Ids, *, keep: int | None = None) -> Array:
        """Extend every row by ids int64 [batch, new], and return logits float32 [batch, positions, vocab].

        Args:
            ids: The new tokens.
            keep: The number of last positions whose logits are returned, all where there are fewer; None means as many
                as the Runner gives. What is not returned need not be computed.

        Raises:
            H1ExportError: The ids do not fit the vocabulary, the batch or the capacity, ``keep`` is no positive number,
                another call is running, or this process is a fork of the one that opened the session.
        """
        ...


class RestorableSession(Session, Protocol):
    """A Session whose sequences can be saved, and go on from saved states."""

    def save(self, row: int = 0, start: int = 0) -> SavedStates:
        """Return a copy of the states of one row, with keys and values of the tokens from ``start`` on.

        Raises:
            H1ExportError: There is no such row or token, or the session has pads.
        """
        ...

    def restore(self, saved: SavedStates) -> None:
        """Let every row go on from ``saved``, whatever it had before: what follows is what followed it there.

        Raises:
            H1ExportError: The states are of another model, are not whole, or do not fit the capacity.
        """
        ...


class Runner(Protocol[States]):
    """A loaded artifact. ``States`` is the runtime's own form of the states, and opaque to callers.

    Any number of threads may call one Runner at once. Every call is independent, because ``step`` leaves the states
    that it is given as they are, and results are those of the same calls one after the other. Some runtimes compute
    one call at a time, and let the others wait. A process that was forked from the one that loaded the artifact cannot
    use it: ``step`` and ``start`` raise H1ExportError there. Such a process has to end with ``os._exit``, as those of
    multiprocessing do, because onnxruntime cannot end in it.
    """

    @property
    def config(self) -> FalconH1Config:
        """The architecture of the model."""
        ...

    @property
    def limits(self) -> Limits:
        """The largest calls that it takes."""
        ...

    @property
    def provenance(self) -> Provenance:
        """What computes its results."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a report has to know about this runtime."""
        ...

    def initial(self, batch: int) -> States:
        """Return the states of ``batch`` sequences before their first token."""
        ...

    def step(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States]:
        """Compute one call, and leave ``states`` usable.

        ``ids`` is [batch, new]. ``mask`` is [batch, past + new], 1 for real tokens and 0 for pads, which stand on the
        left only. Returns logits, float32 [batch, new or 1, vocab], and the states after the call.
        """
        ...

    def length(self, states: States) -> int:
        """Return how many tokens, pads counted, each sequence in ``states`` has."""
        ...

    def start(self, batch: int, capacity: int) -> RestorableSession:
        """Open ``batch`` new sequences with room for ``capacity`` tokens each: the fast way to generate."""
        ...


class Comparable(Runner[States], Protocol[States]):
    """A Runner whose states a judge can compare with the reference's."""

    def snapshot(self, states: States) -> dict[str, Array]:
        """Return the states by ``StateTensor.key`` in ``StateSpec``'s canonical layouts."""
        ...


@runtime_checkable
class Restorable(Comparable[States], Protocol[States]):
    """A Runner whose sequences can go on from saved states."""

    def restored(self, saved: SavedStates, batch: int) -> States:
        """Return the states of ``batch`` sequences that go on from ``saved``, which were checked."""
        ...


class Inspectable(Restorable[States], Protocol[States]):
    """A Runner over an artifact of h1export: a judge can read the weights that the artifact stores, too."""

    def stored_weights(self) -> Mapping[str, Array]:
        """Return every quantised tensor by its checkpoint name, dequantised from what the artifact stores.

        The tensors are float32 and unfolded. The mapping is lazy, and empty where nothing is quantised.
        """
        ...


@runtime_checkable
class StoresRoundedFloats(Protocol):
    """A Runner over an artifact whose floats are rounded, and with which its float32 form computes too."""

    def stored_floats(self) -> Mapping[str, Array]:
        """Return every tensor that is no integers by its checkpoint name, float32 and unfolded; lazy.

        The mapping is empty where no float is rounded.
        """
        ...


@runtime_checkable
class Observable(Comparable[States], Protocol[States]):
    """A Runner that shows values between its inputs and outputs."""

    def observe(self, ids: Ids, mask: Ids, states: States) -> tuple[Array, States, dict[str, Array]]:
        """Return what ``step`` returns, and the probes of model/falcon_h1/probes.py, float32 [batch, new, width].

        Raises:
            H1ExportError: The artifact does not name the values.
        """
        ...


@runtime_checkable
class TracksMagnitudes(Protocol):
    """A Runner that records how near its fp16 arithmetic came to the end of the range."""

    def magnitudes(self) -> Mapping[str, float]:
        """Return the largest magnitude so far, before rounding, by kind of op; one beyond 65504 became infinite.

        The mapping is empty where nothing was computed in fp16.
        """
        ...


def check_keep(keep: int | None) -> None:
    """Check how many positions a caller of ``Session.append`` asks for. Raises H1ExportError for less than one."""
    if keep is not None and keep < 1:
        raise H1ExportError("append", f"logits of {keep} positions", "ask for one or more, or leave it out for all")


def kept(logits: Array, keep: int | None) -> Array:
    """Return the logits [batch, positions, vocab] of the last ``keep`` positions; None means all."""
    return logits if keep is None else logits[:, -keep:]


def check_call(ids: Ids, mask: Ids, past: int, *, vocab_size: int, keep: int | None = None) -> None:
    """Check the inputs of ``Runner.step`` and ``Session.append``, as every runtime does before it computes.

    Raises:
        H1ExportError: The shapes do not fit, token ids lie outside the vocabulary, the mask is not left padding, or
            ``keep`` is no positive number.
    """
    check_keep(keep)
    if ids.ndim != 2 or not ids.size or mask.shape != (ids.shape[0], past + ids.shape[1]):
        what = f"input_ids {list(ids.shape)} and attention_mask {list(mask.shape)} after {past} tokens"
        raise H1ExportError("step", what, "expected [batch, new] and [batch, past + new]")
    if ids.dtype != np.int64 or mask.dtype != np.int64:
        raise H1ExportError("step", f"input_ids {ids.dtype} and attention_mask {mask.dtype}", "expected int64")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise H1ExportError(
            "step", f"token ids from {ids.min()} to {ids.max()}", f"the vocabulary is 0 to {vocab_size - 1}"
        )
    if mask.min() < 0 or mask.max() > 1:
        raise H1ExportError("step", "attention_mask has values besides 0 and 1", "1 is a real token, 0 a pad")
    if (mask[:, 1:] < mask[:, :-1]).any():
        raise H1ExportError(
            "step",
            "attention_mask has a pad after a real token",
            "pad on the left: recurrent states see tokens in order",
        )
