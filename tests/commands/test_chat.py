"""Chat: a turn costs its own tokens, and the result is that of a fresh run of the whole conversation."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import TEMPLATES

from h1export.artifact.artifact import Artifact
from h1export.artifact.manifest import MANIFEST, Manifest
from h1export.checkpoint.chat_template import ChatTemplate, TemplateRefusalError
from h1export.checkpoint.tokenizer import load_tokenizer
from h1export.commands.chat import Chat
from h1export.commands.load import load_runner
from h1export.errors import H1ExportError
from h1export.runtime.generation import Sampling
from h1export.targets.onnxruntime.bound_session import BoundSession

Build = Callable[..., Artifact]
TURNS = ("Write the module heapq.", "import os", "Why?", "def main(argv):")
# a template that shows the last reply only, as one that drops earlier thinking
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last and loop.index < messages | length - 1 %}"
    "<|im_start|>assistant\n(forgotten)<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
pytestmark = pytest.mark.ort  # the other targets: test_saved_states.py of each


@pytest.fixture(scope="module")
def made(tiny: Path, build: Build) -> Artifact:
    return build(tiny)


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """One runner for all copies of an artifact: they differ in their templates only."""
    runners: dict[tuple[str, str], Any] = {}

    def load(artifact: Artifact, *arguments: Any, **how: Any) -> Any:
        key = artifact.manifest.source, f"{artifact.manifest.scheme} {arguments} {how}"
        if key not in runners:
            runners[key] = load_runner(artifact, *arguments, **how)
        return runners[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("h1export.commands.chat.load_runner", load)
        yield


@pytest.fixture
def out(made: Artifact, tmp_path: Path) -> Callable[..., Path]:
    """out(template) -> a copy of the artifact with another chat template."""

    def make(template: str | None = None, artifact: Artifact = made) -> Path:
        folder = Path(shutil.copytree(artifact.folder, tmp_path / "out", dirs_exist_ok=True))
        if template is not None:
            with_template(folder, template)
        return folder

    return make


def with_template(folder: Path, template: str) -> None:
    manifest = Manifest.parse((folder / MANIFEST).read_text(), folder)
    files = {name: entry for name, entry in manifest.files.items() if name != "chat_template.jinja"}
    (folder / "chat_template.jinja").write_text(template)
    object.__setattr__(manifest, "files", files)
    (folder / MANIFEST).write_text(manifest.to_json())


def talk_to(folder: Path, tokens: int = 12, state: Path | None = None, **sampling: Any) -> Chat:
    return Chat(folder, tokens, sampling=Sampling(**sampling), kernels="stock", state=state)


def said(talk: Chat, text: str) -> str:
    return "".join(talk.reply(text))


def rendered(folder: Path, messages: Any) -> list[int]:
    return list(load_tokenizer(folder).encode(ChatTemplate.read(folder).render(messages), add_special_tokens=False).ids)


def check_fresh(talk: Chat, folder: Path, reply: str, tokens: int = 12) -> None:
    """The reply and its logits are those of a chat that begins with the whole conversation."""
    fresh = talk_to(folder, tokens)
    fresh.messages = talk.messages[:-2]
    assert said(fresh, talk.messages[-2]["content"]) == reply
    assert fresh.messages == talk.messages
    assert fresh.sequence.ids == talk.sequence.ids
    for key, state in talk.sequence.save().states.arrays.items():
        assert np.abs(state - fresh.sequence.save().states.arrays[key]).max() <= 1e-5 * max(1, np.ptp(state)), key
    token = 5
    ours, theirs = talk.sequence.save(), fresh.sequence.save()
    logits = [after(talk, saved.states, token) for saved in (ours, theirs)]
    assert np.abs(logits[0] - logits[1]).max() <= 1e-6 * np.ptp(logits[1])


def after(talk: Chat, states: Any, token: int) -> Any:
    session = talk._runner.start(1, states.length + 1)
    session.restore(states)
    return session.append(np.array([[token]]))


@pytest.mark.parametrize("template", [None, TEMPLATES["headers"], TEMPLATES["thinking"], FORGETFUL])
def test_every_turn_is_that_of_a_fresh_run(out: Callable[..., Path], template: str | None) -> None:
    folder = out(template)
    talk = talk_to(folder)
    for text in TURNS:
        reply = said(talk, text)
        assert reply
        check_fresh(talk, folder, reply)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * len(TURNS)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every call that any session of this process makes from now on."""
    fed: list[int] = []
    append = BoundSession.append

    def counted(self: BoundSession, ids: Any, *, keep: int | None = None) -> Any:
        fed.append(ids.shape[1])
        assert keep == 1 or fed[-1] == 1  # nobody reads the logits inside a turn
        return append(self, ids, keep=keep)

    monkeypatch.setattr(BoundSession, "append", counted)
    return fed


def test_a_turn_costs_its_own_tokens(out: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fed are the last token of the reply before, what closes it, the user's turn, and the reply but its last token."""
    folder = out()
    fed = count_calls(monkeypatch)
    talk = talk_to(folder)
    before = 0
    for text in TURNS:
        fed.clear()
        said(talk, text)
        prompt = rendered(folder, talk.messages[:-1])
        assert talk.sequence.ids[: len(prompt)] == prompt
        assert sum(fed) == len(talk.sequence.ids) - before
        assert len(talk.sequence.ids) == len(prompt) + 11
        before = len(talk.sequence.ids)
    assert sum(fed) < len(talk.sequence.ids) / 3


def test_a_template_that_rewrites_the_last_reply_costs_that_reply(
    out: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the template begins a reply with what it leaves out later, the states go back to the user's turn."""
    opening = TEMPLATES["chatml"].replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>{% endif")
    folder = out(opening)
    fed = count_calls(monkeypatch)
    talk = talk_to(folder)
    said(talk, TURNS[0])
    for text in TURNS[1:]:
        closed = rendered(folder, talk.messages[:-1])
        fed.clear()
        reply = said(talk, text)
        prompt = rendered(folder, talk.messages[:-1])
        assert sum(fed) <= len(prompt) - len(closed) + 12 + 12
        check_fresh(talk, folder, reply)


def test_the_system_message_and_the_beginning_can_change(out: Callable[..., Path]) -> None:
    folder = out()
    talk = talk_to(folder)
    assert talk.system is None
    plain = said(talk, TURNS[0])
    talk.system = "def"
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    check_fresh(talk, folder, said(talk, TURNS[1]))
    talk.system = "class"
    assert (talk.system, len(talk.messages)) == ("class", 5)
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "class"}]
    check_fresh(talk, folder, said(talk, TURNS[0]))
    talk.system = None
    talk.reset()
    assert talk.messages == []
    assert said(talk, TURNS[0]) == plain


def test_a_turn_is_taken_back(out: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = out()
    talk = talk_to(folder)
    with pytest.raises(H1ExportError, match="there is no turn yet"):
        talk.undo()
    talk.system = "Be brief."
    said(talk, TURNS[0])
    before = list(talk.messages)
    other = said(talk, TURNS[1])
    talk.undo()
    assert talk.messages == before
    fed = count_calls(monkeypatch)
    assert said(talk, TURNS[1]) == other
    assert sum(fed) < len(rendered(folder, talk.messages[:-1]))  # the states went back to a saved point
    check_fresh(talk, folder, other)
    talk.undo()
    talk.undo()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_a_reply_that_ends_early_is_part_of_the_conversation(out: Callable[..., Path]) -> None:
    folder = out()
    talk = talk_to(folder, 40)
    whole = said(talk_to(folder, 40), TURNS[0])
    asked = count()
    assert 0 < len("".join(talk.reply(TURNS[0], lambda: next(asked) >= 6))) < len(whole)
    assert whole.startswith(talk.messages[-1]["content"])
    reply = said(talk, TURNS[1])
    check_fresh(talk, folder, reply, 40)
    reader = talk.reply(TURNS[2])
    piece = next(reader)
    reader.close()  # type: ignore[attr-defined]
    assert talk.messages[-1] == {"role": "assistant", "content": piece}
    messages = list(talk.messages)
    assert list(talk.reply(TURNS[3], lambda: True)) == []  # before the first call
    assert talk.messages == messages


def test_a_turn_that_is_refused_changes_nothing(out: Callable[..., Path]) -> None:
    folder = out(TEMPLATES["no_system"])
    talk = talk_to(folder)
    reply = said(talk, TURNS[0])
    messages = list(talk.messages)
    talk.system = "Be brief."
    with pytest.raises(TemplateRefusalError, match="System role not supported"):
        said(talk, TURNS[1])
    talk.system = None
    with pytest.raises(H1ExportError, match="tokens, and the context is 4096; shorten it"):
        said(talk, "x " * 9000)
    assert talk.messages == messages
    check_fresh(talk, folder, reply)
    check_fresh(talk, folder, said(talk, TURNS[1]))


def test_sampling_is_reproducible(out: Callable[..., Path]) -> None:
    folder = out()

    def all_of(seed: int) -> list[str]:
        talk = talk_to(folder, temperature=1.2, seed=seed)
        return [said(talk, text) for text in TURNS[:3]]

    first = all_of(1)
    assert first == all_of(1) != all_of(2)


def test_saved_chats_go_on(out: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = out()
    talk = talk_to(folder)
    with pytest.raises(H1ExportError, match="there is no reply yet"):
        talk.save(tmp_path / "talk")
    talk.system = "Be «brief»."
    said(talk, TURNS[0])
    talk.save(tmp_path / "talk")
    expected = said(talk, TURNS[1])
    fed = count_calls(monkeypatch)
    again = talk_to(folder, state=tmp_path / "talk")
    assert (again.system, len(again.messages)) == ("Be «brief».", 3)
    assert said(again, TURNS[1]) == expected
    assert again.messages == talk.messages
    assert sum(fed) == len(again.sequence.ids) - len(rendered(folder, talk.messages[:2])) - 11
    check_fresh(again, folder, expected)


def test_a_chat_of_another_artifact(out: Callable[..., Path], tmp_path: Path, tiny: Path, build: Build) -> None:
    talk = talk_to(out())
    said(talk, TURNS[0])
    talk.save(tmp_path / "talk")
    other = build(tiny, "int4")
    with pytest.raises(H1ExportError, match="was saved with another artifact"):
        talk_to(other.folder, state=tmp_path / "talk")


def test_an_artifact_without_a_template(out: Callable[..., Path]) -> None:
    folder = out("")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(H1ExportError, match="no chat template"):
        talk_to(folder)


def test_one_reply_is_read_at_a_time(out: Callable[..., Path]) -> None:
    """Two replies in turns would mix: the second one raises until the first has ended or is closed."""
    talk, alone = (Chat(out(), 6, sampling=Sampling()) for _ in range(2))
    truth = "".join(alone.reply(TURNS[0]))
    first: Any = talk.reply(TURNS[0])
    said = next(first)
    for other in (
        lambda: next(talk.reply(TURNS[1])),
        talk.reset,
        lambda: talk.save(Path("nowhere")),
        lambda: setattr(talk, "system", "Be brief."),
    ):
        with pytest.raises(H1ExportError, match="conversation: is in use by another call"):
            other()
    assert said + "".join(first) == truth
    assert talk.messages == alone.messages
    second: Any = talk.reply(TURNS[1])
    next(second)
    second.close()
    assert len(talk.messages) == 4
    talk.reset()
    assert "".join(talk.reply(TURNS[0])) == truth
