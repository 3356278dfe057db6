"""Artifacts behind Ray Serve: replicas of the server's own application, and an entrance that chooses among them.

``serve run h1export.integrations.ray_serve:build out=falcon-int4 replicas=2``; docs/serve.md has a file with every
argument. The entrance sends the requests of one conversation to one replica, which has its states, by Ray's consistent
hashing; a replica that dies before it has answered anything is replaced by another one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message

from h1export.artifact.fetched import SCHEME, fetched
from h1export.errors import H1ExportError
from h1export.forms import ENUM_VALUE
from h1export.serve.app import Api
from h1export.serve.keys import ApiKeys
from h1export.serve.metrics import Metrics
from h1export.serve.model import Room, ServedModel
from h1export.serve.relay import FullError, LostError, Relay, Request, answers
from h1export.serve.server import named

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
REPLICAS, ENTRANCE = "H1Export", "Entrance"  # the names of the deployments
CACHE = "~/.cache/h1export/artifacts"
CANARY = "/v1/completions"
CANARY_SECONDS = 20.0
OVERTAKING = 2  # requests that a replica takes for each row, so that none is idle between two of them
LOST = (RayActorError, ReplicaUnavailableError)
Whole = Annotated[int, Meta(ge=0, le=1 << 24)]
Positive = Annotated[int, Meta(ge=1, le=1 << 24)]
Seconds = Annotated[float, Meta(gt=0, le=1e6)]


class Settings(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The arguments of ``build``.

    Attributes:
        out: FOLDER or NAME=FOLDER, or a list of them; a folder that every node has, or an address of fsspec.
        replicas: The number of replicas, where it does not change by itself.
        autoscaling: Ray's autoscaling_config, as an object or its JSON; it replaces ``replicas``.
        cpus: The cores of a replica.
        gpus: The GPUs of a replica.
        rows: As ``h1export serve --rows``, of each replica.
        queue: The requests that wait at the entrance; beyond that, 429.
        prefix_memory: As ``h1export serve --prefix-memory``, of each replica.
        threads: As ``h1export serve --threads``.
        kernels: As ``h1export serve --kernels``.
        keys: As ``h1export serve --keys``; a file that every node has.
        verify: As ``h1export serve --verify``; a file that every node has.
        cache: The folder of a node where artifacts of addresses are kept.
        entrances: The number of entrances.
        retries: How often a request is sent again where its replica has died.
        patience: The seconds in which a replica has to take a request.
        drain: The seconds that answers have to end where a replica is stopped.
        health_period: The seconds between two looks at the health of a replica.
        health_timeout: The seconds that a look may take.
        stalled: The seconds without a token after which a replica that has work is taken for dead.
    """

    out: str | list[str]
    replicas: Positive = 1
    autoscaling: dict[str, Any] | str | None = None
    cpus: Annotated[float, Meta(ge=0)] = 1.0
    gpus: Annotated[float, Meta(ge=0)] = 0.0
    rows: Positive = 8
    queue: Whole = 64
    prefix_memory: Whole = 512
    threads: Whole = 0
    kernels: str = "auto"
    keys: str | None = None
    verify: str | None = None
    cache: str = CACHE
    entrances: Positive = 1
    retries: Whole = 2
    patience: Seconds = 120.0
    drain: Seconds = 30.0
    health_period: Seconds = 10.0
    health_timeout: Seconds = 30.0
    stalled: Seconds = 600.0

    @classmethod
    def read(cls, arguments: Mapping[str, Any]) -> Settings:
        """Read the arguments of ``serve run`` or of a config file. Raises H1ExportError where one is wrong."""
        next_step = f"the arguments are {', '.join(cls.__struct_fields__)}; docs/serve.md describes them"
        try:
            found = msgspec.convert(dict(arguments), cls, strict=False)
        except msgspec.ValidationError as error:
            raise H1ExportError("arguments", ENUM_VALUE.sub("", str(error)), next_step) from None
        if isinstance(found.autoscaling, str):
            try:
                found.autoscaling = msgspec.json.decode(found.autoscaling, type=dict[str, Any])
            except msgspec.DecodeError:
                raise H1ExportError("autoscaling", "is not JSON of an object", next_step) from None
        return found

    @property
    def places(self) -> dict[str, str]:
        """Name -> folder or address of each artifact."""
        return _named([self.out] if isinstance(self.out, str) else self.out)


class Replica:
    """The application of ``h1export serve`` over the artifacts, in a process of Ray's."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._metrics = Metrics()
        cache = Path(settings.cache).expanduser()
        room = Room(settings.rows, max(settings.queue, OVERTAKING * settings.rows), settings.prefix_memory << 20)
        self._models: dict[str, ServedModel] = {}
        for name, place in settings.places.items():
            self._models[name] = ServedModel(
                name,
                fetched(place, cache),
                room,
                watch=self._metrics.watch(name, print),
                threads=settings.threads,
                kernels=settings.kernels,
                verify=None if settings.verify is None else Path(settings.verify),
            )
        keys = None if settings.keys is None else ApiKeys.read(Path(settings.keys))
        self._app = Api(self._models, self._metrics, keys, report=print).application()
        self._own = Api(self._models, Metrics(), None, report=print).application()  # without keys, and not counted
        self._tokens = 0.0
        self._moved = time.monotonic()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """Yield the messages of an answer."""
        async for message in answers(self._app, scope, body):
            yield message

    async def check_health(self) -> None:
        """Compute a token where nothing else is computed. Ray calls it, and replaces a replica where it raises.

        Raises:
            RuntimeError: That fails, or work stands still.
            TimeoutError: The token does not come.
        """
        lines = self._metrics.text().decode().splitlines()
        tokens = sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("h1export_tokens_total"))
        now = time.monotonic()
        busy = [model for model in self._models.values() if model.scheduler.running or model.scheduler.waiting]
        if tokens != self._tokens or not busy:
            self._tokens, self._moved = tokens, now
        elif now - self._moved > self._settings.stalled:
            raise RuntimeError(f"no token in {self._settings.stalled:g} seconds")
        for model in self._models.values():
            if model not in busy:
                await asyncio.wait_for(self._token_of(model.name), CANARY_SECONDS)

    async def _token_of(self, name: str) -> None:
        body = json.dumps({"model": name, "prompt": [0], "max_tokens": 1, "temperature": 0}).encode()
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": CANARY, "headers": headers}
        async for message in answers(self._own, {**scope, "query_string": b"", "raw_path": CANARY.encode()}, body):
            if message.get("status", 200) not in (200, 429):
                raise RuntimeError(f"a token of {name} ended with status {message['status']}")


class Entrance:
    """Takes the requests, and lets replicas answer them."""

    def __init__(self, replicas: DeploymentHandle, settings: Settings) -> None:
        self._replicas = replicas
        self._settings = settings

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return Relay(self._ask, self._settings.retries, self._settings.patience)

    async def _ask(self, request: Request) -> AsyncGenerator[Message, None]:
        options = {"session_id": request.key} if request.key else {}
        messages = self._replicas.options(stream=True, **options).answer.remote(request.scope, request.body)
        try:
            async for message in messages:
                yield message
        except BackPressureError:
            raise FullError from None
        except DeploymentUnavailableError:
            raise TimeoutError from None
        except LOST:
            raise LostError from None
        except RayTaskError as error:
            if isinstance(error.cause, LOST):
                raise LostError from None
            raise
        finally:
            with suppress(Exception):  # it raises again what has ended the call
                messages.cancel()


def build(arguments: dict[str, Any]) -> serve.Application:
    """Return the application for ``serve run`` and for config files; ``arguments`` are those of Settings.

    Raises:
        H1ExportError: An argument is wrong.
    """
    settings = Settings.read(arguments)
    settings.out = [f"{name}={place}" for name, place in settings.places.items()]  # nodes have other working folders
    deployment: Any = serve.deployment(
        name=REPLICAS,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=OVERTAKING * settings.rows * len(settings.out),
        max_queued_requests=settings.queue,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        health_check_period_s=settings.health_period,
        health_check_timeout_s=settings.health_timeout,
        graceful_shutdown_timeout_s=settings.drain,
        **({"num_replicas": settings.replicas} if not settings.autoscaling else {}),
        **({"autoscaling_config": settings.autoscaling} if settings.autoscaling else {}),
    )
    entrance: Any = serve.deployment(
        name=ENTRANCE,
        num_replicas=settings.entrances,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1 << 16,  # the queue's limit is that of the replicas
        graceful_shutdown_timeout_s=settings.drain,
    )
    replicas = deployment(Replica).bind(settings)
    return entrance(serve.ingress()(Entrance)).bind(replicas, settings)


def _named(outs: list[str]) -> dict[str, str]:
    """Return name -> absolute folder or address; a name is given as in NAME=OUT, or is the last part of OUT.

    Raises:
        H1ExportError: A name is empty or given twice.
    """
    found: dict[str, str] = {}
    for out in outs:
        name, given, place = out.partition("=")
        if not given or SCHEME in name:
            name, place = out.rstrip("/").rpartition("/")[2], out
        one = {name: place} if SCHEME in place else {key: str(path.absolute()) for key, path in named([out]).items()}
        if not name or one.keys() & found.keys():
            raise H1ExportError(out, "has no name, or that of another one", "give NAME=OUT, with names that differ")
        found |= one
    return found
