"""A program that renders chat templates, which are code of strangers, in a process of its own; h1export starts it.

Its argument is JSON: the folders of jinja2 and its dependencies, and the limits. A line of standard input is a request,
{"template": ..., "variables": {...}}; the answer is one line, {"text": ...} or {"error": KIND, "what": ...}. The kinds
are "syntax", "refused" (the template called raise_exception), "failed" and "large". It imports nothing of h1export.

The environment has what transformers 5 gives to chat templates: loop controls, the tag ``generation``, trimmed blocks,
and the functions ``raise_exception``, ``strftime_now`` and ``tojson``.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

MOST_SHOWN = 200  # characters of a template's own message in an error
MEMORY = "takes more memory than a template may have"
CACHED = 16  # templates that stay compiled


def restrict(memory: int) -> Callable[[int], None]:
    """Limit this process to ``memory`` bytes of address space and to writing no files, where the OS has such limits.

    Returns a function that limits the CPU time from now on, in seconds, in case nobody is left to end this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C of a terminal goes to this process, too
    try:
        import resource
    except ImportError:  # Windows: the parent process watches time and memory
        return lambda seconds: None

    def limit(kind: int, most: int) -> None:
        with suppress(ValueError, OSError):  # macOS refuses some
            resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))

    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        limit(kind, most)

    def limit_time(seconds: int) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)

    return limit_time


class Renderer:
    """Renders templates in jinja2's sandbox; it gives up beyond ``characters`` of output."""

    def __init__(self, characters: int) -> None:
        from jinja2 import TemplateError, TemplateSyntaxError, nodes
        from jinja2.exceptions import SecurityError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from jinja2.utils import Namespace

        class RefusalError(TemplateError):
            """The template called raise_exception."""

        class Generation(Extension):
            """The tag that marks what the model wrote; the text between is rendered in a scope of its own."""

            tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

            def parse(self, parser: Any) -> nodes.Node:
                line = next(parser.stream).lineno
                return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

        class PlainNamespace(Namespace):
            """A namespace without names that begin with an underscore: they lead to Python's internals."""

            def __init__(*args: Any, **values: Any) -> None:  # a template may set the name "self"
                found = dict(*args[1:], **values)
                for name in found:
                    PlainNamespace.check(name)
                Namespace.__init__(args[0], found)

            def __setitem__(self, name: str, value: Any) -> None:
                PlainNamespace.check(name)
                super().__setitem__(name, value)

            @staticmethod
            def check(name: object) -> None:
                if isinstance(name, str) and name.startswith("_"):
                    raise SecurityError(f"a namespace may not have the name {name!r}")

        def refuse(message: object = "") -> None:
            raise RefusalError(str(message))

        self._environment: Any = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], cache_size=0
        )
        self._environment.filters["tojson"] = to_json
        self._environment.globals.update(
            raise_exception=refuse,
            strftime_now=lambda format: datetime.now().strftime(format),
            dict=PlainDict(),
            namespace=PlainNamespace,
        )
        self._characters = characters
        self._compiled: dict[str, Any] = {}
        self._syntax_error = TemplateSyntaxError
        self._refusal = RefusalError

    def answer(self, template: str, variables: Mapping[str, Any]) -> dict[str, str]:
        """Return the answer to a request."""
        try:
            pieces = []
            left = self._characters
            for piece in self._template(template).generate(**variables):
                left -= len(piece)
                if left < 0:
                    return {"error": "large", "what": f"makes more than {self._characters} characters"}
                pieces.append(piece)
            return {"text": "".join(pieces)}
        except self._refusal as error:
            return {"error": "refused", "what": shortened(error)}
        except self._syntax_error as error:
            return {"error": "syntax", "what": f"line {error.lineno}: {shortened(error.message)}"}
        except MemoryError:
            return {"error": "large", "what": MEMORY}
        except Exception as error:  # whatever a stranger's code raises
            return {"error": "failed", "what": f"{type(error).__name__}: {shortened(error)}"}

    def _template(self, text: str) -> Any:
        if text not in self._compiled:
            while len(self._compiled) >= CACHED:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[text] = self._environment.from_string(text)
        return self._compiled[text]


class PlainDict:
    """The ``dict`` of templates: the class itself would have attributes that lead to Python's internals."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Return a dict of the given keys."""
        return dict.fromkeys(*args)


def to_json(  # noqa: PLR0917  templates pass them by position
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON without the escapes of HTML that jinja2's own filter makes."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def shortened(message: object) -> str:
    """Return the beginning of a message, in one line."""
    text = " ".join(str(message).split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def main() -> None:
    """Answer requests until standard input ends."""
    settings = json.loads(sys.argv[1])
    sys.path.extend(settings["paths"])
    renderer = Renderer(settings["characters"])
    renderer.answer("{% for i in [1] %}{{ i | tojson }}{% endfor %}", {})  # imports what jinja2 imports late
    limit_time = restrict(settings["memory"])
    sys.stdout.write('{"text": "ready"}\n')
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        limit_time(settings["seconds"])
        try:
            request = json.loads(line)
            answer = renderer.answer(request["template"], request["variables"])
            text = json.dumps(answer)
        except MemoryError:
            text = json.dumps({"error": "large", "what": MEMORY})
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
