"""Two replicas behind Ray Serve, as `serve run` starts them: right texts, affinity, kills, stops and a full queue."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest
from serve_texts import LONG, user

from h1export.artifact.artifact import Artifact
from h1export.commands.generate import generate_text
from h1export.errors import H1ExportError
from h1export.runtime.generation import Sampling

pytestmark = pytest.mark.ray
START_SECONDS = 180.0
TRIES = 3
AGENTS = ("dashboard-agent-grpc", "dashboard-agent-listen", "metrics-export", "runtime-env-agent")
ROWS, QUEUE = 2, 4
PROMPTS = [f"import module_{number}" for number in range(5)]


def waited(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition becomes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


class Cluster:
    """A node of Ray's, and what `serve run` has started on it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self._folder = folder
        self._log = open(folder / "log", "wb")  # noqa: SIM115  closed by stop
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self, program: str, *words: object) -> subprocess.Popen[bytes]:
        """Start a program of Ray's."""
        command = [str(Path(sys.executable).with_name(program)), *map(str, words)]
        ours = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **ours}
        self._processes.append(
            subprocess.Popen(command, cwd=self._folder, env=environment, stdout=self._log, stderr=self._log)
        )
        return self._processes[-1]

    def start(self, config: Path) -> None:
        """Start both. Ray gives its agents 15 seconds to begin, which a busy machine may need twice."""
        for _ in range(TRIES):
            port, *ports = free_ports(5)
            given = [f"--{name}-port={one}" for name, one in zip(AGENTS, ports, strict=True)]
            head = ("start", "--head", "--block", "--include-dashboard=false", "--num-cpus=2")
            node = self.run("ray", *head, f"--port={port}", "--object-store-memory=100000000", *given)
            assert waited(lambda node=node: self.has_begun() or node.poll() is not None, START_SECONDS), self.log()
            if node.poll() is None:
                break
        assert node.poll() is None, self.log()
        run = self.run("serve", "run", "--address", f"127.0.0.1:{port}", config)
        assert waited(lambda: self.is_up() or run.poll() is not None, START_SECONDS), self.log()
        assert waited(lambda: len(self.replicas()) == 2, START_SECONDS), self.log()

    def stop(self) -> None:
        """End all its processes."""
        family = self._family()
        for process in reversed([one for one in self._processes if one.poll() is None]):
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for child in family:
            if child.is_running():
                child.kill()
        self._log.close()

    def has_begun(self) -> bool:
        """Whether the node runs."""
        return "Ray runtime started" in self.log()

    def log(self) -> str:
        """The end of what was printed."""
        return (self._folder / "log").read_text(errors="replace")[-3000:]

    def _family(self) -> list[psutil.Process]:
        running = [psutil.Process(process.pid) for process in self._processes if process.poll() is None]
        return [child for process in running for child in process.children(recursive=True)]

    def replicas(self) -> list[psutil.Process]:
        """The processes of replicas, without those of entrances."""
        found = []
        for process in self._family():
            try:
                words = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if "ServeReplica" in words and ":H1Export" in words:
                found.append(process)
        return found

    def metrics(self, session: str) -> tuple[str, ...]:
        """The metrics of the replica that has this session."""
        text = httpx2.get(f"{self.url}/metrics", headers={"x-session-id": session}, timeout=60).text
        return tuple(line for line in text.splitlines() if not line.startswith("#") and "_created" not in line)

    def is_up(self) -> bool:
        """Whether it answers."""
        try:
            return httpx2.get(f"{self.url}/health", timeout=10).status_code == 200
        except httpx2.HTTPError:
            return False


@pytest.fixture(scope="module")
def out(tiny: Path, build: Callable[..., Artifact]) -> Path:
    return build(tiny, "int4", accuracy_level=4).folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("node") / "cache"


@pytest.fixture(scope="module")
def cluster(out: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    (port,) = free_ports(1)
    arguments = {
        "out": [f"tiny=file://{out}"],
        "autoscaling": {"min_replicas": 2, "max_replicas": 3, "target_ongoing_requests": 1000},
        "cpus": 0.5,
        "rows": ROWS,
        "queue": QUEUE,
        "threads": 1,
        "kernels": "stock",
        "cache": str(cache),
        "health_period": 2,
        "health_timeout": 5,
        "retries": 3,
    }
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "h1",
                "route_prefix": "/",
                "import_path": "h1export.integrations.ray_serve:build",
                "args": arguments,
            }
        ],
    }
    folder = tmp_path_factory.mktemp("ray")
    (folder / "serve.yaml").write_text(json.dumps(config))  # JSON is YAML
    found = Cluster(folder, f"http://127.0.0.1:{port}")
    try:
        found.start(folder / "serve.yaml")
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def truth(out: Path) -> dict[str, str]:
    """What `generate` says after PROMPTS, greedily."""
    return {
        prompt: "".join(generate_text(out, prompt, 24, sampling=Sampling(), kernels="stock", threads=1))
        for prompt in PROMPTS
    }


def said(client: openai.OpenAI, prompt: str, stream: bool) -> str:
    """The 24 greedy tokens after a prompt, or "error CODE" where the server says why there are none."""
    how: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": stream}
    try:
        answer: Any = client.completions.create(**how)
        if not stream:
            return str(answer.choices[0].text)
        parts = [chunk.choices[0] for chunk in answer]
    except openai.APIError as error:
        status = getattr(error, "status_code", None)  # None: in a stream that had begun
        right = error.code in ("server_lost", "queue_full", "unavailable") and status in (None, 429, 503)
        return f"error {error.code}" if right else f"wrong {status} {error!r}"
    assert parts[-1].finish_reason, "a stream has ended without a word"
    return "".join(part.text for part in parts)


def test_texts_are_those_of_generate(
    cluster: Cluster, client: openai.OpenAI, truth: dict[str, str], out: Path, cache: Path
) -> None:
    for stream in (False, True):
        assert {prompt: said(client, prompt, stream) for prompt in PROMPTS} == truth
    how = Sampling(temperature=1.0, seed=7)
    expected = "".join(generate_text(out, "Who?", 12, sampling=how, chat=True, kernels="stock", threads=1))
    answer = client.chat.completions.create(model="tiny", messages=[user("Who?")], seed=7, max_tokens=12)
    assert answer.choices[0].message.content == expected
    with pytest.raises(openai.NotFoundError, match="there is no model 'nobody'"):
        client.completions.create(model="nobody", prompt="x")
    assert "<title>h1export chat</title>" in httpx2.get(cluster.url).text
    assert [model.id for model in client.models.list()] == ["tiny"]
    copies = [folder for folder in cache.iterdir() if folder.is_dir()]
    assert len(copies) == 1  # of two replicas
    Artifact.open(copies[0]).check_hashes()


def test_a_conversation_stays_with_its_replica(cluster: Cluster, client: openai.OpenAI) -> None:
    """Its turns find the states of the turns before; conversations spread over both replicas."""
    for number in range(6):
        talk: list[Any] = [{"role": "system", "content": f"You are number {number}."}, user(LONG)]
        tokens = 0
        for turn in range(3):
            answer = client.chat.completions.create(model="tiny", messages=talk, max_tokens=4, temperature=0)
            usage: Any = answer.usage
            assert usage.prompt_tokens_details.cached_tokens == (tokens if turn else 0)
            tokens = usage.prompt_tokens
            talk += [{"role": "assistant", "content": answer.choices[0].message.content}, user("And then?")]
    assert len({cluster.metrics(f"session {number}") for number in range(12)}) >= 2
    before = cluster.metrics("mine")

    def generated(lines: tuple[str, ...]) -> float:
        (line,) = [line for line in lines if line.startswith('h1export_tokens_total{kind="generated"')]
        return float(line.rpartition(" ")[2])

    for _ in range(5):
        client.completions.create(
            model="tiny",
            prompt="x",
            max_tokens=4,
            temperature=0,
            logit_bias={"5": 100},
            extra_headers={"x-session-id": "mine"},
        )
    assert generated(cluster.metrics("mine")) >= generated(before) + 20  # Ray's looks at its health add to it


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_replica_that_ends_under_load(
    number: signal.Signals, cluster: Cluster, client: openai.OpenAI, truth: dict[str, str]
) -> None:
    """No request hangs and no text is wrong: they are retried, or say why not; the replica is replaced."""
    assert waited(lambda: len(cluster.replicas()) >= 2, START_SECONDS)
    victim = cluster.replicas()[0]
    done: list[tuple[str, str, float]] = []

    def work(place: int) -> None:
        prompt = PROMPTS[place % len(PROMPTS)]
        begin = time.monotonic()
        done.append((prompt, said(client, prompt, place % 2 == 1), time.monotonic() - begin))

    with ThreadPoolExecutor(ROWS * 2) as pool:
        futures = [pool.submit(work, place) for place in range(160)]
        assert waited(lambda: len(done) > 20, 120)
        victim.send_signal(number)
        for future in futures:
            future.result(180)
    outcomes = Counter(text if text.startswith("error") else "right" for _, text, _ in done)
    print(f"{number.name}: {dict(outcomes)}, slowest {max(seconds for *_, seconds in done):.1f} s")
    assert [(prompt, text) for prompt, text, _ in done if not text.startswith("error") and text != truth[prompt]] == []
    assert len(done) == 160
    assert outcomes["right"] >= 160 - 2 * ROWS  # at most the streams that the replica had begun
    gone = time.monotonic()
    assert waited(lambda: victim not in cluster.replicas() and len(cluster.replicas()) >= 2, START_SECONDS)
    print(f"replaced {time.monotonic() - gone:.1f} s after the last answer")
    assert {prompt: said(client, prompt, False) for prompt in PROMPTS} == truth


def test_clients_that_go_away_leave_nothing(cluster: Cluster, client: openai.OpenAI) -> None:
    for number in range(12):
        how: Any = {"max_tokens": 3000, "logit_bias": {"1": -100, "3": -100}, "stream": True}
        stream = client.chat.completions.create(model="tiny", messages=[user(f"import {number}")], **how)
        next(stream)
        stream.close()

    def idle() -> bool:
        lines = [line for place in range(8) for line in cluster.metrics(f"session {place}")]
        found = [line for line in lines if line.startswith(("h1export_running", "h1export_waiting"))]
        return bool(found) and all(line.endswith(" 0.0") for line in found)

    assert waited(idle, 60)


def test_a_full_queue(cluster: Cluster, client: openai.OpenAI, truth: dict[str, str]) -> None:
    """What is too much is told at once, with the header that says when to come again."""
    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(lambda place: said(client, PROMPTS[place % 5], False), range(120)))
    assert {text for text in found if not text.startswith("error")} <= set(truth.values())
    assert "error queue_full" in found
    assert {text for text in found if text.startswith("error")} == {"error queue_full"}
    assert {prompt: said(client, prompt, False) for prompt in PROMPTS} == truth


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "missing required field `out`"),
        ({"out": "x", "row": "2"}, "unknown field `row`"),
        ({"out": "x", "rows": "0"}, "Expected `int` >= 1"),
        ({"out": "x", "rows": "many"}, "Expected `int`"),
        ({"out": "x", "autoscaling": "[1]"}, "is not JSON of an object"),
        ({"out": ["x", "a=x", "b/x"]}, "that of another one"),
        ({"out": "=x"}, "NAME=OUT"),
    ],
    ids=["nothing", "unknown", "zero", "no number", "no object", "twice", "no name"],
)
def test_wrong_arguments_are_one_line(arguments: dict[str, Any], message: str) -> None:
    from h1export.integrations.ray_serve import build

    with pytest.raises(H1ExportError, match=message) as caught:
        build(arguments)
    assert "\n" not in str(caught.value)


def test_arguments_reach_the_deployment(tmp_path: Path) -> None:
    """Also as the texts that `serve run NAME=VALUE` gives."""
    from h1export.integrations.ray_serve import Settings, build

    asked = {"out": "s3://b/f=1", "autoscaling": '{"min_replicas": 1, "max_replicas": 5}', "rows": "3", "drain": "7.5"}
    settings = Settings.read(asked)
    assert settings.places == {"f=1": "s3://b/f=1"}
    assert (settings.rows, settings.drain) == (3, 7.5)
    entrance: Any = build(asked)._bound_deployment
    replicas = entrance.init_args[0]._bound_deployment
    config = replicas._deployment_config
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (1, 5)
    assert (config.max_ongoing_requests, config.max_queued_requests) == (6, 64)
    assert config.graceful_shutdown_timeout_s == 7.5
    assert "ConsistentHashRouter" in str(config.request_router_config.request_router_class)
    fixed = build({"out": str(tmp_path), "replicas": "3"})._bound_deployment.init_args[0]._bound_deployment
    assert fixed._deployment_config.num_replicas == 3
