"""TemplateProcess: a template that never ends, or fills the memory, ends in an error within 2 s."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from threaded_runners import in_fork

from h1export.checkpoint import template_process
from h1export.checkpoint.template_process import RenderError, RenderLimits, TemplateProcess
from h1export.errors import H1ExportError

LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"
GROWING = "{% set n = namespace(a='xy') %}" + LOOP + "{% set n.a = "
HOSTILE = {
    "nested_loops": LOOP * 3 + END * 3,
    "product": "{{ 'a' * 10**10 }}",
    "product_of_lists": "{{ [1] * 10**10 }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "large_power": "{{ (9 ** 99999) ** 99999 }}",
    "range": "{{ range(10**9) | list }}",
    "ranges": "{% set a = range(99999) | list %}" + LOOP + "{% set _ = (a * 99999) %}" + END,
    "recursion": "{% macro m(a) %}{{ m(a) }}{{ m(a) }}{% endmacro %}{{ m(1) }}",
    "recursion_in_width": "{% macro m(a) %}{% if a %}{{ m(a - 1) }}{{ m(a - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive_loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "doubling_by_tilde": GROWING + "n.a ~ n.a %}" + END,
    "doubling_by_plus": GROWING + "n.a + n.a %}" + END,
    "doubling_by_join": GROWING + "[n.a, n.a] | join %}" + END,
    "doubling_by_format": GROWING + "'%s%s' % (n.a, n.a) %}" + END,
    "doubling_by_replace": GROWING + "n.a.replace('x', n.a) %}" + END,
    "doubling_of_lists": "{% set n = namespace(a=[1]) %}" + LOOP + "{% set n.a = n.a + n.a %}" + END,
    "percent": "{{ '%9999999999d' % 1 }}",
    "precision": "{{ '%.9999999999f' % 1 }}",
    "padding": "{{ '{:>9999999999}'.format(1) }}",
    "format_filter": "{{ '%09999999999d' | format(1) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "tabs": "{{ '\t'.expandtabs(2000000000) }}",
    "center": "{{ 'x' | center(10**10) }}",
    "indent": "{{ 'x\ny' | indent(10**10) }}",
    "tojson": "{{ [1] | tojson(indent=10**10) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list | length }}",
    "slices": "{{ [1] | slice(10**9) | list | length }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "bytes": "{{ ('a' * 10**6).encode() * 10**6 }}",
    "output": LOOP + "{{ 'x' * 1000 }}" + END,
    "output_of_a_macro": "{% macro m() %}" + LOOP + "{{ 'x' * 9999 }}" + END + "{% endmacro %}{{ m() | length }}",
    "sort": "{% set a = ('x' * 99999) | list %}" + LOOP + "{{ a | sort | length }}" + END,
    "nested_parentheses": "{{ " + 50_000 * "(" + 50_000 * ")" + " }}",
    "nested_lists": "{{ " + 50_000 * "[" + 50_000 * "]" + " }}",
    "nested_blocks": 5_000 * "{% if 1 %}" + 5_000 * "{% endif %}",
    "long_chain": "{{ 1" + 100_000 * " + 1" + " }}",
    "many_texts": 250_000 * "{{1}}",
}


FINISH = {"power", "nested_blocks", "many_texts", "long_chain", "sort", "batch", "slices"}  # on a fast machine
HARMLESS = ("", "[Undefined]", "{0.__class__}", "[]")
QUICK = RenderLimits(seconds=0.3)


def attempt(process: TemplateProcess, template: str, variables: dict[str, Any] | None = None) -> str | RenderError:
    try:
        return process.render(template, variables or {})
    except RenderError as error:
        return error


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    made = TemplateProcess(QUICK)
    yield made
    made.close()


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TemplateProcess]:
    """A process without limits of the OS, as on Windows: it finds no module ``resource``."""
    (tmp_path / "resource.py").write_text("raise ImportError")
    paths = template_process.module_paths()
    monkeypatch.setattr(template_process, "module_paths", lambda: [str(tmp_path), *paths])
    text = template_process.WORKER.read_text().replace("sys.path.extend(", "sys.path[:0] = (")
    (tmp_path / "worker.py").write_text(text)
    monkeypatch.setattr(template_process, "WORKER", tmp_path / "worker.py")
    made = TemplateProcess(QUICK)
    yield made
    made.close()


def check_end(process: TemplateProcess, name: str, limit: float) -> None:
    assert process.render("{{ a }}", {"a": 1}) == "1"
    before = time.monotonic()
    found = attempt(process, HOSTILE[name])
    assert time.monotonic() - before < limit
    if isinstance(found, RenderError):
        assert found.kind in ("failed", "large", "slow", "crashed")
        assert len(found.what) < 300
    else:
        assert name in FINISH
        assert len(found) <= RenderLimits().characters
    assert process.render("{{ a }}", {"a": "still here"}) == "still here"


@pytest.mark.parametrize("name", HOSTILE)
def test_it_ends(process: TemplateProcess, name: str) -> None:
    check_end(process, name, QUICK.seconds + 0.7)


@pytest.mark.parametrize("name", ["nested_loops", "large_power", "doubling_by_tilde"])
def test_by_default_it_ends_within_two_seconds(name: str) -> None:
    process = TemplateProcess()
    check_end(process, name, 2)
    process.close()


@pytest.mark.parametrize("name", ["product", "padding", "doubling_by_join", "doubling_of_lists", "nested_loops"])
def test_it_ends_where_the_os_has_no_limits(watched: TemplateProcess, name: str) -> None:
    check_end(watched, name, QUICK.seconds + 0.7)


@pytest.mark.parametrize("kind", ["process", "watched"])
def test_memory_is_bounded(kind: str, request: pytest.FixtureRequest) -> None:
    """The process is looked at from outside while a template grows."""
    process = request.getfixturevalue(kind)
    process.render("x", {})
    worker = psutil.Process(process._worker._process.pid)
    with ThreadPoolExecutor(1) as pool:
        growing = "{% set n = namespace(a=[]) %}" + LOOP + "{% set n.a = n.a + [n.a + ['x' * 99999]] %}" + END
        task = pool.submit(process.render, growing, {})
        most = 0
        while not task.done():
            try:
                most = max(most, worker.memory_info().rss)
            except psutil.Error:
                break
            time.sleep(0.002)
        with pytest.raises(RenderError):
            task.result()
    assert most < 1.5 * RenderLimits().memory
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_the_process_ends_with_its_owner() -> None:
    process = TemplateProcess()
    process.render("x", {})
    worker = psutil.Process(process._worker._process.pid)
    del process
    worker.wait(5)
    code = (
        "from h1export.checkpoint.template_process import TemplateProcess as T\n"
        "p = T(); p.render('x', {}); print(p._worker._process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not psutil.pid_exists(int(done.stdout))


def test_the_process_has_no_secrets_and_no_modules_of_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit")
    (tmp_path / "json.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("API_KEY", "secret")
    process = TemplateProcess()
    assert process.render("{{ '%d' % 7 }}", {}) == "7"
    environment = psutil.Process(process._worker._process.pid).environ()  # type: ignore[union-attr]
    assert environment.keys() <= set(template_process.KEPT) | {"LC_CTYPE"}
    process.close()


def test_threads_share_a_process() -> None:
    process = TemplateProcess()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: process.render("{{ i * 2 }}", {"i": i}), range(200)))
    assert found == [str(2 * i) for i in range(200)]
    process.close()


def test_an_interrupt_leaves_it_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a template is rendered: its late answer is not taken for that of the next one."""
    process = TemplateProcess()
    process.render("x", {})
    worker = process._worker

    def interrupted(self: Any, seconds: float) -> dict[str, str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(worker), "_answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            process.render("late", {})
    assert process.render("next", {}) == "next"
    process.close()


def test_ctrl_c_in_a_terminal_is_not_for_the_process_and_one_that_was_ended_is_started_again() -> None:
    process = TemplateProcess()
    assert process.render("a", {}) == "a"
    (worker,) = (child for child in psutil.Process().children() if "template_worker" in " ".join(child.cmdline()))
    assert os.getsid(worker.pid) != os.getsid(0)  # a terminal signals the processes of its session's group
    worker.kill()
    psutil.wait_procs([worker], timeout=10)
    assert process.render("b", {}) == "b"
    process.close()


def test_a_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(template_process, "WORKER", tmp_path / "missing.py")
    with pytest.raises(H1ExportError, match="the process that renders it does not start"):
        TemplateProcess().render("x", {})
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(H1ExportError, match="no Python interpreter"):
        TemplateProcess().render("x", {})


def test_what_a_template_can_reach(process: TemplateProcess, tmp_path: Path) -> None:
    """Ways out of a sandbox: none of them gives an attribute of Python's internals."""
    marker = tmp_path / "ran"
    ways = [
        "''.__class__.__mro__[1].__subclasses__()",
        "''['__class__']",
        "'' | attr('__class__')",
        "cycler.__init__.__globals__.os.system('{}')",
        "lipsum.__globals__['os'].popen('{}')",
        "joiner.__init__.__globals__",
        "namespace.__init__.__globals__",
        "namespace(__class__=1)",
        "dict.__class__",
        "raise_exception.__globals__",
        "strftime_now.__code__",
        "self.__init__.__globals__",
        "self._TemplateReference__context",
        "'{0.__class__}'.format('')",
        "'%s' | format(''.__class__)",
        "[''] | map(attribute='__class__') | list",
        "'{0.__class__}'.format_map({'0': ''})",
        "(''.format)('{0.__class__}')",
        "messages.__class__",
        "range.__self__",
    ]
    for way in ways:
        found = attempt(process, "{{ " + way.replace("{}", f"touch {marker}") + " }}", {"messages": []})
        assert found.kind == "failed" if isinstance(found, RenderError) else found.strip() in HARMLESS, way
    assert not marker.exists()


def test_a_fork_is_refused_and_leaves_the_worker_alone() -> None:
    """A forked process ends, with all its finalizers, and the parent's worker still answers."""
    process = TemplateProcess()
    assert process.render("{{ a }}", {"a": "x"}) == "x"
    worker = process._worker

    def work() -> None:
        with pytest.raises(H1ExportError, match="chat template: was made in process"):
            process.render("{{ a }}", {"a": "y"})
        process.close()
        assert worker is not None
        worker.close()

    in_fork(work)
    assert process.render("{{ a }}", {"a": "z"}) == "z"
    assert process._worker is worker
    process.close()


def test_nothing_is_left_of_many_processes() -> None:
    """Neither zombies nor descriptors nor threads, whether a process is closed or let go."""

    def held() -> tuple[int, int, int]:
        gc.collect()
        return len(os.listdir("/dev/fd")), threading.active_count(), len(psutil.Process().children())

    before = held()
    for number in range(12):
        process = TemplateProcess()
        assert process.render("{{ a }}", {"a": number}) == str(number)
        if number % 2:
            process.close()
        del process
    end = time.monotonic() + 10  # readers end when their pipe does
    while held() != before and time.monotonic() < end:
        time.sleep(0.01)
    assert held() == before
