"""Ollama's Modelfile: where the model is, where it stops, and its chat template in Ollama's language.

Ollama reads chat templates as Go's text/template and not as Jinja. A template that writes each message as a text around
it is translated, and the translation is compared with it; of another, Ollama has to find its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from h1export.checkpoint.chat_template import ChatTemplate, Message
from h1export.checkpoint.tokenizer import Tokenizer
from h1export.errors import H1ExportError
from h1export.targets.gguf.vocabulary import WholeVocabulary
from h1export.targets.gguf.writer import MODEL

MODELFILE = "Modelfile"
MARK = "H1EXPORT MESSAGE"  # stands for a content, and no template has it
ROLES = ("system", "user", "assistant")
TRIED = ' "quoted" \n<b>&</b> <think>x</think> \\ {} '  # contents that a template may change, beside plain ones
GO = """{{- range .Messages }}
{{- if eq .Role "system" }}SYSTEM
{{- else if eq .Role "user" }}USER
{{- else if eq .Role "assistant" }}ASSISTANT
{{- end }}
{{- end }}REPLY"""


def text(vocabulary: WholeVocabulary, template: ChatTemplate) -> str:
    """Return the Modelfile of a file with its tokenizer."""
    lines = [f"FROM ./{MODEL}"]
    lines += [f"PARAMETER stop {quoted(stop)}" for stop in _stops(vocabulary.tokenizer, vocabulary.special.eos)]
    pieces = message_pieces(template)
    if pieces is not None:
        lines.append(f"TEMPLATE {quoted(_go(pieces))}")
    return "\n".join(lines) + "\n"


def quoted(value: str) -> str:
    """Return ``value`` between the quotes that a Modelfile takes for a text of several lines."""
    return f'"""{value}"""' if "\n" in value or '"' in value else f'"{value}"'


def _stops(tokenizer: Tokenizer, ends: Sequence[int]) -> list[str]:
    return [stop for token in ends if (stop := tokenizer.id_to_token(token))]


def message_pieces(template: ChatTemplate) -> Mapping[str, tuple[str, str]] | None:
    """Return role -> what a template writes before and after a content; "" -> ("", what opens the reply).

    None where there is no template, or where what it writes of a message depends on the others.
    """
    try:
        found = {role: _around(template, role) for role in ROLES}
        opening = _render(template, [_message("user", MARK)], reply=True).removeprefix(
            _render(template, [_message("user", MARK)])
        )
    except (H1ExportError, ValueError):
        return None
    if not all(_joins(template, found, opening, content=content) for content in (MARK, TRIED)):
        return None
    pieces = {**found, "": ("", opening)}
    safe = all("{{" not in part and '"""' not in part for pair in pieces.values() for part in pair)
    return pieces if safe else None


def _joins(template: ChatTemplate, found: Mapping[str, tuple[str, str]], opening: str, *, content: str) -> bool:
    """Return whether a conversation is its messages, one after the other."""
    chat = [_message(role, content) for role in [*ROLES, "user"]]
    joined = "".join(f"{found[role][0]}{content}{found[role][1]}" for role in [*ROLES, "user"])
    try:
        return _render(template, chat, reply=True) == joined + opening
    except H1ExportError:
        return False


def _around(template: ChatTemplate, role: str) -> tuple[str, str]:
    """Return the texts before and after a content. Raises ValueError where the content is not there once."""
    before, after = _render(template, [_message(role, MARK)]).split(MARK)
    return before, after


def _render(template: ChatTemplate, messages: Sequence[Message], *, reply: bool = False) -> str:
    return template.render(messages, reply=reply)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _go(pieces: Mapping[str, tuple[str, str]]) -> str:
    found = GO
    for role in ROLES:
        before, after = pieces[role]
        found = found.replace(f"}}}}{role.upper()}\n", f"}}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}\n")
    return found.replace("REPLY", _literal(pieces[""][1]))


def _literal(part: str) -> str:
    """Return ``part`` as a Go action, whose line breaks the trimming around it leaves alone."""
    return f"{{{{ {json.dumps(part, ensure_ascii=False)} }}}}" if part else ""
