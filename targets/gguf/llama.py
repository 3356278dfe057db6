"""llama.cpp's C API by ctypes: the structures of one release, checked when they are loaded, and a model with a context.

Structures are passed by value and change from release to release, so that sdk.py takes one release only, and ``_check``
compares the defaults that llama.cpp fills in with those of include/llama.h, field by field.
"""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from h1export.errors import H1ExportError
from h1export.model.falcon_h1.states import Array, Ids
from h1export.targets.gguf import sdk

MOST_AT_ONCE = 512  # tokens of one call of llama_decode
FLASH_OFF = 0
GGML_F32 = 0
GGML_F16 = 1
SEQUENCE = 0  # the only sequence of a context
Pointer = c.c_void_p


class ModelParams(c.Structure):
    """llama_model_params."""

    _fields_ = (
        ("devices", Pointer),
        ("tensor_buft_overrides", Pointer),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int32),
        ("load_mode", c.c_int32),
        ("lazy_mode", c.c_int32),
        ("main_gpu", c.c_int32),
        ("tensor_split", Pointer),
        ("progress_callback", Pointer),
        ("progress_callback_user_data", Pointer),
        ("kv_overrides", Pointer),
        ("vocab_only", c.c_bool),
        ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool),
        ("no_host", c.c_bool),
        ("no_alloc", c.c_bool),
        ("load_mtp", c.c_bool),
        ("guard", c.c_uint8 * 64),  # room for a structure that has grown
    )


class ContextParams(c.Structure):
    """llama_context_params."""

    _fields_ = (
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int32),
        ("rope_scaling_type", c.c_int32),
        ("pooling_type", c.c_int32),
        ("attention_type", c.c_int32),
        ("flash_attn_type", c.c_int32),
        ("rope_freq_base", c.c_float),
        ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float),
        ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", Pointer),
        ("cb_eval_user_data", Pointer),
        ("type_k", c.c_int32),
        ("type_v", c.c_int32),
        ("abort_callback", Pointer),
        ("abort_callback_data", Pointer),
        ("unnamed", Pointer),  # this release has 8 bytes here, always 0, that older headers do not name
        ("embeddings", c.c_bool),
        ("offload_kqv", c.c_bool),
        ("no_perf", c.c_bool),
        ("op_offload", c.c_bool),
        ("swa_full", c.c_bool),
        ("kv_unified", c.c_bool),
        ("samplers", Pointer),
        ("n_samplers", c.c_size_t),
        ("ctx_other", Pointer),
        ("guard", c.c_uint8 * 64),
    )


class Batch(c.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


# What llama.cpp gives where nothing is chosen. A field that is elsewhere has another value.
DEFAULTS: Mapping[type[c.Structure], Mapping[str, float | None]] = {
    ModelParams: {
        "devices": None,
        "tensor_buft_overrides": None,
        "n_gpu_layers": -1,
        "split_mode": 1,
        "load_mode": -1,
        "lazy_mode": 1,
        "main_gpu": 0,
        "kv_overrides": None,
        "vocab_only": False,
        "check_tensors": False,
        "use_extra_bufts": True,
        "no_host": False,
        "no_alloc": False,
    },
    ContextParams: {
        "n_ctx": 512,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_seq_max": 1,
        "n_outputs_max_per_seq": 1,
        "rope_scaling_type": -1,
        "pooling_type": -1,
        "attention_type": -1,
        "flash_attn_type": -1,
        "rope_freq_base": 0.0,
        "yarn_ext_factor": -1.0,
        "yarn_orig_ctx": 0,
        "defrag_thold": -1.0,
        "type_k": GGML_F16,
        "type_v": GGML_F16,
        "unnamed": None,
        "embeddings": False,
        "offload_kqv": True,
        "no_perf": True,
        "op_offload": True,
        "swa_full": True,
        "kv_unified": False,
        "samplers": None,
        "n_samplers": 0,
    },
}
FUNCTIONS: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_log_set": (None, (Pointer, Pointer)),
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (Pointer, (c.c_char_p, ModelParams)),
    "llama_model_free": (None, (Pointer,)),
    "llama_model_get_vocab": (Pointer, (Pointer,)),
    "llama_vocab_n_tokens": (c.c_int32, (Pointer,)),
    "llama_tokenize": (
        c.c_int32,
        (Pointer, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32, c.c_bool, c.c_bool),
    ),
    "llama_vocab_is_eog": (c.c_bool, (Pointer, c.c_int32)),
    "llama_init_from_model": (Pointer, (Pointer, ContextParams)),
    "llama_free": (None, (Pointer,)),
    "llama_n_ctx": (c.c_uint32, (Pointer,)),
    "llama_n_batch": (c.c_uint32, (Pointer,)),
    "llama_n_ubatch": (c.c_uint32, (Pointer,)),
    "llama_n_threads": (c.c_int32, (Pointer,)),
    "llama_get_memory": (Pointer, (Pointer,)),
    "llama_memory_clear": (None, (Pointer, c.c_bool)),
    "llama_decode": (c.c_int32, (Pointer, Batch)),
    "llama_get_logits_ith": (c.POINTER(c.c_float), (Pointer, c.c_int32)),
    "llama_state_seq_get_size": (c.c_size_t, (Pointer, c.c_int32)),
    "llama_state_seq_get_data": (c.c_size_t, (Pointer, Pointer, c.c_size_t, c.c_int32)),
    "llama_state_seq_set_data": (c.c_size_t, (Pointer, Pointer, c.c_size_t, c.c_int32)),
}
LOGGED: list[str] = []  # what llama.cpp has logged as an error since a call began
ERROR = 4  # GGML_LOG_LEVEL_ERROR


def _log(level: int, text: bytes | None, _: Any) -> None:
    if level == ERROR and text:
        LOGGED.append(text.decode(errors="replace").strip())


LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, Pointer)(_log)  # kept: llama.cpp calls it as long as it is loaded


@cache
def api() -> Any:
    """Return the library, with the types of its functions.

    Raises:
        H1ExportError: xllamacpp is not installed, or its structures are not those of this module.
    """
    path = sdk.library()
    try:
        library = c.CDLL(str(path))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments
    except (OSError, AttributeError) as error:
        raise H1ExportError(path, f"cannot be used ({error})", sdk.INSTALL) from None
    _check(library.llama_model_default_params(), path)
    _check(library.llama_context_default_params(), path)
    library.llama_log_set(c.cast(LOG, Pointer), None)
    library.llama_backend_init()
    return library


def _check(found: c.Structure, path: Path) -> None:
    """Raise H1ExportError where a structure of llama.cpp is laid out in another way than here."""
    for name, expected in DEFAULTS[type(found)].items():
        value = getattr(found, name)
        if value != expected:
            what = f"has {type(found).__name__}.{name} = {value}, and h1export expects {expected}: another layout"
            raise H1ExportError(path, what, f"pip install xllamacpp=={sdk.XLLAMACPP}")


@contextmanager
def _errors(path: Path, what: str) -> Iterator[None]:
    """Turn a RuntimeError of the block into one that has the first error that llama.cpp has logged."""
    LOGGED.clear()
    try:
        yield
    except RuntimeError as error:
        said = f": {LOGGED[0]}" if LOGGED else ""
        raise H1ExportError(path, f"llama.cpp {what} ({error}{said})", "build the artifact again") from None


class Model:
    """A model that llama.cpp has loaded, on CPUs.

    Args:
        path: the GGUF file.
        vocab_only: whether the tokenizer alone is loaded.
    """

    def __init__(self, path: Path, vocab_only: bool = False) -> None:
        self._api = api()
        self.path = path
        params = self._api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.vocab_only = vocab_only
        with _errors(path, "cannot load it"):
            self.handle = self._api.llama_model_load_from_file(os.fsencode(path), params)
            if not self.handle:
                raise RuntimeError("llama_model_load_from_file")
        self.vocab = self._api.llama_model_get_vocab(self.handle)
        self.vocab_size = int(self._api.llama_vocab_n_tokens(self.vocab))

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._api.llama_model_free(self.handle)

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return the ids of ``text``, special tokens in it included."""
        data = text.encode()
        room = len(data) + 8
        ids = (c.c_int32 * room)()
        count = self._api.llama_tokenize(self.vocab, data, len(data), ids, room, add_special, True)
        if count < 0:
            raise H1ExportError(self.path, f"llama_tokenize wants room for {-count} tokens", "shorten the text")
        return list(ids[:count])

    def ends(self, token: int) -> bool:
        """Return whether llama.cpp stops at ``token``."""
        return bool(self._api.llama_vocab_is_eog(self.vocab, token))


class Context:
    """One sequence of at most ``tokens`` tokens, with keys and values in float32 and without flash attention.

    llama.cpp's own default is fp16 for both, which rounds what the other targets keep.
    """

    def __init__(self, model: Model, tokens: int, threads: int) -> None:
        self._api = api()
        self._model = model  # outlives the context
        params = self._api.llama_context_default_params()
        params.n_ctx = max(tokens, MOST_AT_ONCE)  # llama.cpp makes calls no longer than the context
        params.n_batch = params.n_ubatch = params.n_outputs_max_per_seq = MOST_AT_ONCE
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = GGML_F32
        params.flash_attn_type = FLASH_OFF
        with _errors(model.path, f"has no memory for {tokens} tokens"):
            self.handle = self._api.llama_init_from_model(model.handle, params)
            if not self.handle:
                raise RuntimeError("llama_init_from_model")
        self.room = int(self._api.llama_n_ctx(self.handle))
        kept = (self._api.llama_n_batch(self.handle), self._api.llama_n_threads(self.handle))
        if self.room < tokens or kept != (MOST_AT_ONCE, threads):
            what = f"has {self.room} tokens, calls of {kept[0]} and {kept[1]} threads of {tokens}, {MOST_AT_ONCE}"
            raise H1ExportError(model.path, f"{what} and {threads}: another layout", sdk.INSTALL)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._api.llama_free(self.handle)

    def clear(self) -> None:
        """Forget the sequence."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self.handle), True)

    def decode(self, ids: Ids, past: int, *, every: bool) -> Array:
        """Append ids [new] after ``past`` tokens, and return logits [new, vocab], or of the last one [1, vocab]."""
        parts = [
            self._decode(ids[start : start + MOST_AT_ONCE], past + start, every=every)
            for start in range(0, len(ids), MOST_AT_ONCE)
        ]
        return np.concatenate(parts if every else parts[-1:])

    def _decode(self, ids: Ids, past: int, *, every: bool) -> Array:
        count = len(ids)
        sequence = c.c_int32(SEQUENCE)
        wanted = [every] * (count - 1) + [True]
        batch = Batch(
            count,
            (c.c_int32 * count)(*ids.tolist()),
            None,
            (c.c_int32 * count)(*range(past, past + count)),
            (c.c_int32 * count)(*[1] * count),
            (c.POINTER(c.c_int32) * count)(*[c.pointer(sequence)] * count),
            (c.c_int8 * count)(*wanted),
        )
        with _errors(self._model.path, f"cannot append {count} tokens after {past}"):
            if code := self._api.llama_decode(self.handle, batch):
                raise RuntimeError(f"llama_decode gives {code}")
            first = 0 if every else count - 1
            rows = [self._api.llama_get_logits_ith(self.handle, place) for place in range(first, count)]
            if not all(rows):
                raise RuntimeError("there are no logits")
        return np.stack([np.ctypeslib.as_array(row, (self._model.vocab_size,)) for row in rows])

    def state(self) -> npt.NDArray[np.uint8]:
        """Return the sequence's states as llama.cpp saves them."""
        size = self._api.llama_state_seq_get_size(self.handle, SEQUENCE)
        data = np.empty(size, np.uint8)
        with _errors(self._model.path, "cannot save its states"):
            written = self._api.llama_state_seq_get_data(self.handle, data.ctypes.data, size, SEQUENCE)
            if written != size:
                raise RuntimeError(f"{written} of {size} bytes")
        return data

    def restore(self, data: npt.NDArray[np.uint8]) -> None:
        """Go on from what ``state`` has returned."""
        self.clear()
        with _errors(self._model.path, "cannot go on from saved states"):
            read = self._api.llama_state_seq_set_data(self.handle, data.ctypes.data, data.size, SEQUENCE)
            if read != data.size:
                raise RuntimeError(f"{read} of {data.size} bytes")
