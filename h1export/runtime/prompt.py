"""Prompt: the tokens before a reply, computed call by call, from the longest beginning whose states are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Ids
from h1export.runtime.generation import PREFILL_CHUNK, calls
from h1export.runtime.growing import GrowingSession
from h1export.runtime.prefix_store import PrefixStore
from h1export.runtime.runner import Runner

EVERY = 4 * PREFILL_CHUNK  # tokens between two points of a long prompt


class Prompt:
    """A prompt over a session of its own.

    Its calls are those of ``generation.calls``, whatever the store has. So the logits after it are the same with and
    without reuse, bit for bit where the runtime computes the same call in the same way, and do not depend on what was
    computed before. States of generated tokens are not kept, because they come from calls of one token.

    Args:
        runner: The artifact.
        store: Where states are kept; None computes everything.
        ids: The tokens.
        borders: Where calls end besides the multiples of PREFILL_CHUNK, such as the ends of messages: there the next
            prompt of the conversation goes on.

    Attributes:
        session: The session, which has the first ``session.length`` tokens.
        reused: The number of tokens that were not computed.

    Raises:
        H1ExportError: There are no tokens, or they fill the context.
    """

    def __init__(
        self, runner: Runner[Any], store: PrefixStore | None, ids: Sequence[int], *, borders: Sequence[int] = ()
    ) -> None:
        self.session = GrowingSession(runner)
        if not ids:
            raise H1ExportError("prompt", "has no tokens", "give at least one")
        if len(ids) >= self.session.context:
            what = f"has {len(ids)} tokens, and the model's context is {self.session.context}"
            raise H1ExportError("prompt", what, "shorten it")
        self._ids = np.asarray(ids, np.int64)
        self._store = store
        self._borders = sorted({border for border in borders if 0 < border <= len(ids)})
        # where calls end is part of the key, because the states depend on it; multiples of PREFILL_CHUNK are the same
        self._key = 2 * self._ids
        self._key[[border - 1 for border in self._borders]] += 1
        self._points: frozenset[int] = frozenset()
        self.reused = 0
        if store is not None:
            self._points = self._chosen(store.shared(self._key.tolist()))
            found = store.find(self._key.tolist())
            if found is not None:
                self.session.restore(found)
                self.reused = found.length
        self.session.reserve(len(ids) + 1)

    @property
    def is_done(self) -> bool:
        """Whether the session has every token."""
        return self.session.length == len(self._ids)

    def next(self) -> Ids:
        """Return ids int64 [1, new] of the next call; extend ``session`` by them, and then call ``extended``.

        Whoever only goes on from the prompt asks ``session`` for the logits of the last position.
        """
        start, end = next(calls(self.session.length, len(self._ids), self._borders))
        return self._ids[None, start:end]

    def extended(self) -> None:
        """Keep the states where a point is due; call it after each call."""
        length = self.session.length
        if self._store is not None and length in self._points:
            self._store.add(self._key[:length].tolist(), lambda start: self.session.save(start=start))

    def _chosen(self, shared: int) -> frozenset[int]:
        """Return where states are kept.

        These are the borders, every EVERY tokens, the last end of a call before the end, for the same prompt again, and
        the last one of what another prompt begins with too, for the next such prompt.
        """
        ends = [*self._borders, *range(PREFILL_CHUNK, len(self._ids), PREFILL_CHUNK)]
        last = [max((end for end in ends if end <= most), default=0) for most in (len(self._ids) - 1, shared)]
        return frozenset({*self._borders, *range(EVERY, len(self._ids), EVERY), *last} - {0})
