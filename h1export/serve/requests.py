"""What clients ask for: the bodies of requests as forms, whose types and ranges are checked while they are read.

Fields are those of OpenAI's API, with ``top_k``, ``min_p`` and ``repetition_penalty`` of other servers. A field that
has no meaning here is taken and ignored; one that is unknown is refused, so that no wish is passed over in silence.
"""

from __future__ import annotations

import re
from secrets import randbelow
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from h1export.forms import ENUM_VALUE
from h1export.runtime.generation import Sampling
from h1export.serve.problems import ProblemError

MOST_CHOICES = 64
MOST_PROMPTS = 256
DEEPEST = 64  # levels of a schema
MOST_SEED = (1 << 63) - 1
PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)

Text = Annotated[str, Meta(max_length=1 << 23)]
Name = Annotated[str, Meta(max_length=256)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Stop = Annotated[str, Meta(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], Meta(max_length=16)]
Count = Annotated[int, Meta(ge=1, le=1 << 24)]
Seed = Annotated[int, Meta(ge=-MOST_SEED, le=MOST_SEED)]
Token = Annotated[int, Meta(ge=0, le=1 << 31)]
FormT = TypeVar("FormT")


class Form(Struct, forbid_unknown_fields=True, kw_only=True):
    """A JSON object without other keys than its fields."""


class StreamOptions(Form, kw_only=True):
    """What a stream has besides text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Common(Form, kw_only=True):
    """What both kinds of requests have."""

    model: Name
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=1 << 24)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 24)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    seed: Seed | None = None
    stop: Stop | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # taken and ignored: they change nothing in an answer of this server
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which the answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options is not None and self.stream_options.include_usage)

    def samplings(self, vocab_size: int) -> list[Sampling]:
        """Return how each choice is sampled: choice i has the seed plus i; without a seed it is a random one.

        Raises:
            ProblemError: ``logit_bias`` names something else than a token.
        """
        bias = tuple((_token(name, vocab_size), value) for name, value in (self.logit_bias or {}).items())
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        seed = randbelow(MOST_SEED) if self.seed is None else self.seed
        return [
            Sampling(
                temperature if top_p else 0.0,  # no share at all leaves the likeliest token
                max(self.top_k or 0, 0),
                top_p or 1.0,
                seed=(seed + choice) % (MOST_SEED + 1),
                min_p=self.min_p or 0.0,
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
                bias=bias,
            )
            for choice in range(self.n or 1)
        ]


class CompletionRequest(Common, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: Text | Annotated[list[Text | Token | list[Token]], Meta(min_length=1)]
    best_of: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each a text or token ids.

        Raises:
            ProblemError: The list has items of several kinds.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not isinstance(self.prompt[0], int) and len(self.prompt) > MOST_PROMPTS:
            raise ProblemError(400, f"there are {MOST_PROMPTS} prompts at most in a request", param="prompt")
        tokens = [item for item in self.prompt if isinstance(item, int)]
        if len(tokens) == len(self.prompt):
            return [tokens]
        prompts = [item for item in self.prompt if not isinstance(item, int)]
        if len(prompts) == len(self.prompt) and len({type(item) for item in prompts}) == 1:
            return prompts
        raise ProblemError(400, "a list of prompts has texts only, tokens only or lists of tokens only", param="prompt")

    def check(self) -> None:
        """Raise ProblemError where fields do not go together."""
        if self.suffix:
            raise ProblemError(400, "texts are continued at their end only; leave out suffix", param="suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ProblemError(400, "best_of has to be n: choices are not ranked", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise ProblemError(400, "max_tokens of 0 goes with echo only", param="max_tokens")


class TextPart(Form, kw_only=True):
    """A part of a message: this server takes texts only."""

    type: Literal["text"]
    text: Text


class FunctionCall(Form, kw_only=True):
    """A call that the model made before."""

    name: Name
    arguments: Text


class ToolCall(Form, kw_only=True):
    """The same with its id."""

    id: Name
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class Message(Form, kw_only=True):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Name | None = None
    refusal: Text | None = None
    tool_call_id: Name | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None
    reasoning_content: Text | None = None
    # taken and ignored: fields of answers, which clients send back as they are
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class FunctionForm(Form, kw_only=True):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Form, kw_only=True):
    """A tool, which is always a function."""

    function: FunctionForm
    type: Literal["function"] = "function"


class NamedFunction(Form, kw_only=True):
    """The name of a function."""

    name: Name


class NamedTool(Form, kw_only=True):
    """The choice of one tool."""

    function: NamedFunction
    type: Literal["function"] = "function"


class JsonSchema(Form, kw_only=True):
    """A schema of an answer, with its name."""

    name: Name
    schema: dict[str, Any] | None = None
    description: Text | None = None
    strict: bool | None = None


class ResponseFormat(Form, kw_only=True):
    """What an answer has to be: a text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Common, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    def check(self) -> None:
        """Raise ProblemError where fields do not go together."""
        if self.max_tokens == 0:
            raise ProblemError(400, "max_tokens has to be 1 at least", param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ProblemError(400, "top_logprobs goes with logprobs only", param="top_logprobs")
        schemas = [tool.function.parameters for tool in self.tools or ()]
        if self.response_format is not None and self.response_format.json_schema is not None:
            schemas.append(self.response_format.json_schema.schema)
        if not all(_is_shallow(schema) for schema in schemas):
            raise ProblemError(400, f"a schema is nested more than {DEEPEST} levels deep")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ProblemError(400, "tool_choice goes with tools only", param="tool_choice")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ProblemError(400, "tool_choice names a function that is not among the tools", param="tool_choice")
        form = self.response_format
        if (
            form is not None
            and form.type == "json_schema"
            and (form.json_schema is None or not form.json_schema.schema)
        ):
            raise ProblemError(400, "response_format of the type json_schema needs a schema", param="response_format")


def read(body: bytes, form: type[FormT]) -> FormT:
    """Return the body of a request as ``form``.

    Raises:
        ProblemError: It is not UTF-8, not JSON, nested too deeply, or not what the form says.
    """
    try:
        return msgspec.json.decode(body, type=form)
    except msgspec.ValidationError as error:
        found = PATH.match(ENUM_VALUE.sub("", str(error)))
        assert found is not None
        raise ProblemError(400, found["what"], param=found["path"] or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProblemError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise ProblemError(400, "the body is nested too deeply", code="invalid_json") from None


def _token(name: str, vocab_size: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", name, re.ASCII) or int(name) >= vocab_size:
        raise ProblemError(400, f"a key of logit_bias is no token id from 0 to {vocab_size - 1}", param="logit_bias")
    return int(name)


def _is_shallow(value: Any) -> bool:
    """Whether a JSON value has at most DEEPEST levels; libraries that walk through it have their own limits."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return True
    return False
