"""Forms read what fits and refuse all else in one short line that holds no value of the file."""

from __future__ import annotations

import json
import math
import os
import re
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta
from odd_files import bounded

from h1export import forms
from h1export.errors import MOST_REASON, H1ExportError
from h1export.forms import Count, FormError, Sha256

SECRET = "hunter2" * 20


@dataclass(frozen=True)
class Inner:
    size: Count
    share: Annotated[float, Meta(ge=0, le=1)] = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    digest: Sha256
    inner: tuple[Inner, ...] = ()
    sizes: Mapping[str, tuple[str, Count]] = field(default_factory=dict)
    free: Mapping[str, Any] = field(default_factory=dict)


GOOD = {
    "name": "n",
    "digest": 64 * "a",
    "inner": [{"size": 3, "share": 1}],
    "sizes": {"x": ["f", 2]},
    "free": {"k": [1]},
}


def refused(text: str | bytes) -> str:
    with pytest.raises(H1ExportError) as caught:
        forms.parse(text, Outer, where="f.json", what="an outer", next_step="make it again")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 300
    assert SECRET not in message
    return message


def read_or_said(read: Callable[[], Outer]) -> tuple[Outer | None, str]:
    """Return what was read, or what a FormError said; any other exception is a fault."""
    try:
        return read(), ""
    except FormError as error:
        return None, str(error)


def test_what_fits_is_read() -> None:
    found = forms.fill(Outer, GOOD)
    assert found == Outer("n", 64 * "a", (Inner(3, 1.0),), {"x": ("f", 2)}, {"k": [1]})
    assert forms.parse(json.dumps(asdict(found)), Outer, where="", what="", next_step="") == found


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("name",), 3, "Expected `str`, got `int` - at `$.name`"),
        (("name",), None, "got `null` - at `$.name`"),
        (("digest",), SECRET, "$.digest"),
        (("digest",), "A" * 64, "$.digest"),
        (("inner",), {}, "Expected `array`"),
        (("inner", 0, "size"), -1, "$.inner[0].size"),
        (("inner", 0, "size"), True, "got `bool`"),
        (("inner", 0, "size"), 1 << 62, "$.inner[0].size"),
        (("inner", 0, "size"), 10**400, "$.inner[0].size"),
        (("inner", 0, "size"), 1.5, "got `float`"),
        (("inner", 0, "share"), 1.01, "$.inner[0].share"),
        (("inner", 0, "share"), 10**400, "$.inner[0].share"),
        (("inner", 0, SECRET[:10]), 1, "unknown key at $.inner[0]"),
        (("other",), SECRET, "unknown key at $.other"),
        (("sizes", "x"), ["f"], "length 2"),
        (("sizes", "x"), ["f", 2, 3], "length 2"),
        (("free",), [], "$.free"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_does_not_fit_is_named_by_its_place(place: tuple[Any, ...], value: Any, said: str) -> None:
    data = json.loads(json.dumps(GOOD))
    at = data
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    assert said in refused(json.dumps(data))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON at line 1, column 1"),
        (f'{{"name": "{SECRET}"', "not JSON at line 1"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("NaN", "NaN"),
        ('{"name": -Infinity}', "-Infinity"),
        ('{"name": 1e999}', "beyond every float"),
        ('{"name": "a", "name": "b"}', "a key is given twice"),
        (f'{{"name": {"9" * 100_000}}}', "is not an outer"),
    ],
    ids=range(10),
)
def test_what_is_no_json_of_ours(text: str | bytes, said: str) -> None:
    assert said in refused(text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_mutation_is_read_or_refused(data: st.DataObject) -> None:
    """Bytes of a good text are replaced, cut or doubled: nothing but FormError may come out."""
    text = bytearray(json.dumps(GOOD).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=6))
        if not text:
            break
    found, said = read_or_said(lambda: forms.fill(Outer, forms.from_json(bytes(text))))
    assert len(said) <= 2 * MOST_REASON
    assert found is None or all(math.isfinite(one.share) for one in found.inner)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*GOOD, "size", "x"]) | st.text(), inner),
        max_leaves=12,
    )
)
def test_any_value_is_read_or_refused(value: Any) -> None:
    _, said = read_or_said(lambda: forms.fill(Outer, value))
    assert len(said) <= 2 * MOST_REASON


@pytest.mark.parametrize("text", ["a = ", "a = 1\na = 2", b"\xff", "a = " + "[" * 100_000], ids=range(4))
def test_what_is_no_toml(text: str | bytes) -> None:
    with pytest.raises(FormError):
        forms.from_toml(text)


def test_a_pipe_a_folder_and_a_sparse_file_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(H1ExportError, match=r"pipe: cannot be read \(it is no regular file\)"):
        forms.content(tmp_path / "pipe", "next")
    with pytest.raises(H1ExportError, match="cannot be read"):
        forms.content(tmp_path, "next")
    with (tmp_path / "sparse").open("wb") as stream:
        stream.truncate(8 << 30)
    tracemalloc.start()
    with pytest.raises(H1ExportError, match="8589934592 bytes, and at most 8388608 are read"):
        forms.content(tmp_path / "sparse", "next")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    with pytest.raises(H1ExportError, match="No such file"):
        forms.content(tmp_path / "none", "next")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghij")
)
MERGES = "a: &a {k: v}\n" + "".join(
    f"{name}: &{name}\n  <<: [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "an anchor, an alias or a tag at line 1"),
        (MERGES, "an anchor, an alias or a tag at line 1"),
        ("a: &x 1", "an anchor, an alias or a tag at line 1"),
        ("a: !!python/object/apply:os.system [ls]", "an anchor, an alias or a tag at line 1"),
        ("a: !!binary aGk=", "an anchor, an alias or a tag"),
        ("[" * 100_000, "line 1, column 1001"),
        ("".join(f"{' ' * level}a:\n" for level in range(100)), "nested too deeply"),
        ("[" * 100 + "]" * 100, "nested too deeply"),
        ("{a: " * 100_000, "nested too deeply"),
        ("- " * 50_000, "nested too deeply"),
        ("a: 1\na: 2", "a key is given twice"),
        ("a:\n  b: 1\n  c: 2\n  b: 3", "a key is given twice below line 2"),
        ("? [1, 2]\n: 3", "a key at line 1 is no text"),
        ("a: 1\n---\nb: 2", "line 2"),
        ("a: [", "line"),
        ("a: 2001-99-99", "month must be in 1..12"),
        ("a: \x00", "unacceptable character"),
    ],
    ids=lambda value: value[:20].encode("unicode_escape").decode(),
)
def test_yaml_is_plain(text: str, said: str) -> None:
    with bounded(), pytest.raises(FormError, match=re.escape(said)) as caught:
        forms.from_yaml(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= MOST_REASON


def test_yaml_is_read() -> None:
    assert forms.from_yaml("# x\na: {b: [1, '2', none], c: 1.5}\n") == {"a": {"b": [1, "2", "none"], "c": 1.5}}
    assert forms.from_yaml("") is None


def test_a_file_whose_name_has_a_nul() -> None:
    with pytest.raises(H1ExportError, match="its name has a NUL"):
        forms.content(Path("a\0b"), "give another")
