"""ChatTemplate: the conversation of a chat as the text that its model was trained on.

A folder's templates and special tokens are read from its files alone, as transformers 5 reads them. No class of a
tokenizer is loaded, so nothing in the folder can name code to run, and templates are rendered in another process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from h1export.checkpoint.template_process import RenderError, TemplateProcess
from h1export.checkpoint.tokenizer import TOKENIZER_CONFIG
from h1export.errors import H1ExportError
from h1export.forms import content
from h1export.model.config_reader import shown

SPECIAL_TOKENS_MAP = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"  # it and the files in the folder come before the key of tokenizer_config.json
TEMPLATE_FOLDER = "additional_chat_templates"
KEY = "chat_template"
DEFAULT = "default"
FOR_TOOLS = "tool_use"
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same field; templates read the first
CONTINUED = "H1EXPORT-CONTINUES-HERE "  # the space shows whether a template removes spaces at the end of a message
AGAIN = "download it again"
MOST_JSON = 64 << 20  # bytes of a file
MOST_TEMPLATE = 1 << 20
NEXT = {
    "refused": "change the conversation, or leave out --system where the template takes no system message",
    "syntax": "correct the template, or leave out the chat",
    "failed": "correct the template, or change the conversation",
    "large": "correct the template, or shorten the conversation",
    "slow": "correct the template: it may never end",
    "crashed": "correct the template",
}

Message = Mapping[str, Any]  # "role" and "content", and what else the template reads; JSON values


class TemplateRefusalError(H1ExportError):
    """The template called raise_exception: it does not take this conversation."""


@dataclass(frozen=True)
class ChatTemplate:
    """The chat templates of a folder. Threads may share it; one renders at a time. A forked process reads its own.

    Attributes:
        folder: The checkpoint or artifact.
        templates: Name -> template.
        tokens: The special tokens that templates read, such as "bos_token" -> "<s>".
        process: What renders.
    """

    folder: Path
    templates: Mapping[str, str]
    tokens: Mapping[str, str]
    process: TemplateProcess = field(default_factory=TemplateProcess, repr=False, compare=False)

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate:
        """Read the templates of ``folder``, which may have none.

        Raises:
            H1ExportError: A file is too large or not what it should be.
        """
        config = _object(folder / TOKENIZER_CONFIG)
        templates = _files(folder) or _named(folder / TOKENIZER_CONFIG, config.get(KEY))
        tokens = dict(config)
        if "added_tokens_decoder" not in config:  # as older transformers wrote it
            tokens |= _object(folder / SPECIAL_TOKENS_MAP)
        return cls(folder, templates, dict(_tokens(tokens)))

    def chosen(self, tools: bool = False) -> str:
        """Return the template of a conversation, with tools or without.

        Raises:
            H1ExportError: There is none, or there are several and none is the default.
        """
        if not self.templates:
            raise H1ExportError(
                self.folder, "no chat template", "leave out --chat, or build from an instruct checkpoint"
            )
        if tools and FOR_TOOLS in self.templates:
            return self.templates[FOR_TOOLS]
        if DEFAULT not in self.templates:
            what = f"has the chat templates {shown(', '.join(sorted(self.templates)))} and none of them is the default"
            raise H1ExportError(self.folder, what, f"save the one to use as {TEMPLATE_FILE} in the folder")
        return self.templates[DEFAULT]

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reply: bool = True,
        continued: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation; its tokens are encoded without adding special ones.

        Args:
            messages: The conversation. Keys whose value is None are left out.
            tools: JSON schemas of the tools that the model may call.
            reply: Whether the text ends with the beginning of the model's reply.
            continued: Whether the last message is open at its end, for the model to continue it.
            variables: Further variables of the template, such as "enable_thinking".

        Raises:
            TemplateRefusalError: The template does not take this conversation.
            H1ExportError: There is no template to use, it does not parse, it fails, or it takes more than its limits.
        """
        template = self.chosen(tools is not None)
        chat = [_normalized(message) for message in messages]
        if continued:
            _mark_end(chat)
        values = {
            **self.tokens,
            **(variables or {}),
            "messages": chat,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": reply and not continued,
        }
        try:
            text = self.process.render(template, values)
        except RenderError as error:
            raise self._error(error) from None
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a pair of surrogates, which no tokenizer takes
            raise self._error(RenderError("failed", "its text is not Unicode")) from None
        return self._until_mark(text) if continued else text

    def _error(self, error: RenderError) -> H1ExportError:
        where = f"{self.folder}: chat template"
        what = {
            "refused": f"does not take this conversation: {error.what}",
            "syntax": f"does not parse, {error.what}",
            "failed": f"fails: {error.what}",
        }.get(error.kind, error.what)
        kind = TemplateRefusalError if error.kind == "refused" else H1ExportError
        return kind(where, what, NEXT[error.kind])

    def _until_mark(self, text: str) -> str:
        """Return ``text`` up to the end of the message that is continued."""
        place = text.rfind(CONTINUED.rstrip())
        if place < 0:
            raise H1ExportError(
                f"{self.folder}: chat template", "leaves out the message to continue", "end with another message"
            )
        before = text[:place]
        return before if text.startswith(CONTINUED, place) else before.rstrip()


def _normalized(message: Message) -> dict[str, Any]:
    """Return the message as templates expect it: without keys of None, its reasoning under the names that they read."""
    found = {key: value for key, value in message.items() if value is not None}
    reasoning = next((found[name] for name in REASONING if name in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, REASONING[0]: reasoning}


def _mark_end(chat: list[dict[str, Any]]) -> None:
    """Add CONTINUED to the text of the last message, whose content is a text or a list of parts."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + CONTINUED
        return
    parts = list(content) if isinstance(content, list) else []
    for place in reversed(range(len(parts))):
        if isinstance(parts[place], dict) and isinstance(parts[place].get("text"), str):
            parts[place] = {**parts[place], "text": parts[place]["text"] + CONTINUED}
            chat[-1]["content"] = parts
            return
    raise H1ExportError("messages", "the last one has no text to continue", "end with a message that has content")


def template_files(folder: Path) -> list[str]:
    """Return the names, relative to ``folder``, of the files of chat templates that it has."""
    named = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    return [str(path.relative_to(folder).as_posix()) for path in (folder / TEMPLATE_FILE, *named) if path.is_file()]


def _files(folder: Path) -> dict[str, str]:
    names = {
        name: DEFAULT if name == TEMPLATE_FILE else Path(name).name.removesuffix(".jinja")
        for name in template_files(folder)
    }
    return {named: _text(folder / name, MOST_TEMPLATE) for name, named in names.items()}


def _named(where: Path, value: Any) -> dict[str, str]:
    """Return name -> template of the key's value: null, one template, a list of named ones or an object of them."""
    if value is None:
        return {}
    if isinstance(value, str):
        found: list[tuple[Any, Any]] = [(DEFAULT, value)]
    elif isinstance(value, dict):
        found = list(value.items())
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        found = [(item.get("name"), item.get("template")) for item in value]
    else:
        found = [(None, None)]
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in found):
        raise H1ExportError(
            where, f"key {KEY!r} is neither a text nor a list of named texts", f"save the template as {TEMPLATE_FILE}"
        )
    if any(len(text) > MOST_TEMPLATE for _, text in found):
        raise H1ExportError(where, f"a chat template has more than {MOST_TEMPLATE} characters", "shorten it")
    return dict(found)


def _tokens(values: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Return the special tokens among ``values``: texts, or objects that have one as ``content``."""
    found = []
    extra = values.get("extra_special_tokens")
    for name, value in {**(extra if isinstance(extra, dict) else {}), **values}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found.append((name, text))
    return found


def _object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, which is empty where there is no file."""
    if not os.path.lexists(path):
        return {}
    try:
        value = json.loads(_text(path, MOST_JSON))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise H1ExportError(path, "not a JSON object", AGAIN)
    return value


def _text(path: Path, most: int) -> str:
    """Return the text of a regular file of at most ``most`` bytes."""
    try:
        return content(path, AGAIN, most).decode("utf-8")
    except UnicodeDecodeError:
        raise H1ExportError(path, "is not UTF-8 text", AGAIN) from None
