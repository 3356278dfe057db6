"""ChatTemplate: what transformers' apply_chat_template renders, from the same files, and an error line otherwise."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CONVERSATIONS, TEMPLATES, TOOLS
from transformers import AutoTokenizer

from h1export.checkpoint.chat_template import ChatTemplate, TemplateRefusalError, template_files
from h1export.checkpoint.template_process import TemplateProcess
from h1export.errors import H1ExportError

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    made = TemplateProcess()
    yield made
    made.close()


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Folder:
    """A folder with a tokenizer, and the given keys of tokenizer_config.json; those of None are absent."""

    def make(files: dict[str, str] | None = None, absent: tuple[str, ...] = (), **keys: Any) -> Path:
        shutil.copy(tiny / "tokenizer.json", tmp_path)
        config = json.loads((tiny / "tokenizer_config.json").read_text()) | keys
        kept = {key: value for key, value in config.items() if key not in absent}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(kept))
        for name, text in (files or {}).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    return make


def ours(where: Path, process: TemplateProcess) -> ChatTemplate:
    read = ChatTemplate.read(where)
    return ChatTemplate(where, read.templates, read.tokens, process)


@cache
def theirs_of(where: Path, written: str) -> Any:
    """The tokenizer that transformers makes of the files in ``where``, which say what is ``written``."""
    return AutoTokenizer.from_pretrained(where)


def both(where: Path, process: TemplateProcess, messages: Any, **options: Any) -> tuple[str, str]:
    """Our text and transformers', or the message of the exception that its template raised."""
    template = ours(where, process)
    theirs = theirs_of(where, repr(template))
    reply = options.pop("reply", True)
    continued = options.pop("continued", False)
    tools = options.pop("tools", None)
    try:
        expected = theirs.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=reply,
            continue_final_message=continued,
            **options,
        )
    except Exception as error:
        expected = str(error)
    try:
        found = template.render(messages, tools=tools, reply=reply, continued=continued, variables=options)
    except TemplateRefusalError as error:
        found = error.what.removeprefix("does not take this conversation: ")
    return found, expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(folder: Folder, process: TemplateProcess, name: str) -> None:
    """Every conversation, with a reply to begin or not, with tools or not."""
    where = folder({"chat_template.jinja": TEMPLATES[name]}, bos_token="<s>", eos_token="<|eot_id|>")
    texts = set()
    for messages, reply, tools in product(CONVERSATIONS.values(), (True, False), (None, TOOLS)):
        found, expected = both(where, process, messages, reply=reply, tools=tools)
        assert found == expected
        texts.add(found)
    assert len(texts) >= 3


@pytest.mark.parametrize("name", ["chatml", "headers", "no_system", "thinking"])
@pytest.mark.parametrize("text", ["The answer", "The answer is  \n", " x"])
def test_a_message_to_continue(folder: Folder, process: TemplateProcess, name: str, text: str) -> None:
    where = folder({"chat_template.jinja": TEMPLATES[name]})
    messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": text}]
    found, expected = both(where, process, messages, reply=False, continued=True)
    assert found == expected
    assert found.endswith(text.strip() if name in ("headers", "no_system") else text)


def test_a_message_of_parts_to_continue(folder: Folder, process: TemplateProcess) -> None:
    where = folder({"chat_template.jinja": "{% for part in messages[0].content %}{{ part.text }}|{% endfor %}"})
    parts = [{"type": "text", "text": "So "}, {"type": "text", "text": "be "}]
    assert both(where, process, [{"role": "assistant", "content": parts}], continued=True, reply=False) == (
        "So |be ",
        "So |be ",
    )
    for messages in ([], [{"role": "assistant"}], [{"role": "assistant", "content": []}]):
        with pytest.raises(H1ExportError, match="has no text to continue"):
            ChatTemplate.read(where).render(messages, continued=True)
    with pytest.raises(H1ExportError, match="leaves out the message to continue"):
        ChatTemplate(where, {"default": "x"}, {}, process).render(CONVERSATIONS["question"], continued=True)


def test_variables_reach_the_template(folder: Folder, process: TemplateProcess) -> None:
    where = folder({"chat_template.jinja": TEMPLATES["thinking"]})
    found, expected = both(where, process, CONVERSATIONS["turns"], enable_thinking=False)
    assert found == expected
    assert found.endswith("<think>\n\n</think>\n\n")


ADDED = {
    "__type": "AddedToken",
    "content": "<x>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
}


@pytest.mark.parametrize(
    "keys",
    [
        {"bos_token": "<s>", "eos_token": None, "unk_token": ADDED},
        {"pad_token": ADDED, "image_token": "<img>"},
        {"extra_special_tokens": {"boi_token": "<boi>"}, "bos_token": "<s>"},
        {"sep_token": "a", "cls_token": "b", "mask_token": "c"},
    ],
    ids=lambda keys: "-".join(keys),
)
def test_special_tokens_are_those_of_transformers(folder: Folder, process: TemplateProcess, keys: Any) -> None:
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image", "boi")
    where = folder({"chat_template.jinja": "".join(f"{name}={{{{ {name}_token }}}};" for name in names)}, **keys)
    found, expected = both(where, process, CONVERSATIONS["question"])
    assert found == expected


def test_the_old_map_of_special_tokens(folder: Folder, process: TemplateProcess) -> None:
    old = json.dumps({"bos_token": {"content": "<old>", "lstrip": False, "rstrip": False, "normalized": True}})
    where = folder({"chat_template.jinja": "{{ bos_token }}", "special_tokens_map.json": old})
    found, expected = both(where, process, CONVERSATIONS["question"])
    assert found == expected == "<old>"
    where = folder(added_tokens_decoder={})
    found, expected = both(where, process, CONVERSATIONS["question"])
    assert found == expected != "<old>"


@pytest.mark.parametrize(
    ("files", "key"),
    [
        ({}, "key"),
        ({"chat_template.jinja": "file"}, "key"),
        ({}, [{"name": "default", "template": "named"}, {"name": "tool_use", "template": "tools"}]),
        ({"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tools"}, "key"),
        ({"additional_chat_templates/default.jinja": "folder"}, "key"),
        ({"chat_template.jinja": "file", "additional_chat_templates/default.jinja": "folder"}, None),
        ({"chat_template.jinja": ""}, None),
    ],
    ids=str,
)
def test_which_template_counts(folder: Folder, process: TemplateProcess, files: dict[str, str], key: Any) -> None:
    where = folder(files, chat_template=key)
    for tools in (None, TOOLS):
        found, expected = both(where, process, CONVERSATIONS["question"], tools=tools)
        assert found == expected
    assert sorted(template_files(where)) == sorted(files)


@pytest.mark.parametrize(
    ("files", "key", "line"),
    [
        ({}, None, "no chat template; leave out --chat"),
        ({}, [], "no chat template"),
        ({}, [{"name": "rag", "template": "x"}, {"name": "tool", "template": "y"}], "'rag, tool' and none .* default"),
        (
            {"additional_chat_templates/a.jinja": "x"},
            "key",
            "'a' and none of them is the default; save the one to use as",
        ),
        ({}, 7, "neither a text nor a list of named texts"),
        ({}, [{"name": "default"}], "neither a text nor"),
        ({}, ["x"], "neither a text nor"),
        ({}, "{% for", "does not parse, line 1: "),
        ({}, "{{ messages[9].content.x }}", "fails: UndefinedError"),
        ({}, "{{ '' + 1 }}", "fails: TypeError"),
        ({}, "{{ '\\ud800' }}", "fails: its text is not Unicode"),
        ({}, "\ud800", "fails: "),
        ({}, "{{ raise_exception('Only user\nand assistant') }}", "take this conversation: Only user and assistant; "),
        ({}, "{{ raise_exception('x' * 9999) }}", r"xxx\.\.\.; change"),
        ({}, "x" * (1 << 20) + "y", "more than 1048576 characters"),
        ({"chat_template.jinja": "x" * (1 << 20) + "y"}, None, "has 1048577 bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_rendered_is_one_line(
    folder: Folder, process: TemplateProcess, files: dict[str, str], key: Any, line: str
) -> None:
    where = folder(files, chat_template=key)
    with pytest.raises(H1ExportError, match=line) as caught:
        ours(where, process).render(CONVERSATIONS["question"])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) - len(str(where)) < 400


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["bytes", "list", "deep", "fifo", "huge"])
def test_files_that_are_not_what_they_should_be(folder: Folder, name: str, kind: str) -> None:
    path = folder() / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge":
        with path.open("wb") as stream:
            stream.truncate(8 << 30)
    else:
        path.write_bytes({"bytes": b"\xff\xfe{", "list": b"[1]", "deep": b"[" * 100_000}[kind])
    if name.endswith("jinja") and kind in ("list", "deep", "fifo"):  # texts, or no file
        ChatTemplate.read(path.parent)
        return
    with pytest.raises(H1ExportError, match=rf"{name}: (not|is not|cannot be read)"):
        ChatTemplate.read(path.parent)
