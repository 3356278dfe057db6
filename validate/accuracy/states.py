"""How far two sets of states are apart, state by state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from h1export.model.falcon_h1.states import Array, StateSpec
from h1export.validate.accuracy.logits import relative_error

StatePair = tuple[Mapping[str, Array], Mapping[str, Array]]


def state_errors(pairs: Sequence[StatePair], states: StateSpec) -> dict[str, float]:
    """Return StateTensor.key -> relative_error, the worst of the (found, truth) pairs."""
    return {t.key: max(relative_error(found[t.key], truth[t.key]) for found, truth in pairs) for t in states.tensors}


def row_of_batch(snapshot: Mapping[str, Array], states: StateSpec, row: int, *, pad: int) -> dict[str, Array]:
    """Return one row of a snapshot without its padding columns, as if it had been run alone."""
    return {t.key: snapshot[t.key][row][:, pad:] if t.kind.grows else snapshot[t.key][row] for t in states.tensors}
