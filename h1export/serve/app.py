"""The routes: a Starlette application over served models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from h1export.errors import H1ExportError
from h1export.serve import page
from h1export.serve.exchange import (
    Channel,
    EventStream,
    GoneError,
    chunks,
    next_of,
    read_body,
    refusal,
    unless_gone,
    whole,
)
from h1export.serve.keys import ApiKeys
from h1export.serve.metrics import CONTENT_TYPE, Metrics
from h1export.serve.model import ServedModel
from h1export.serve.problems import ProblemError, for_operator
from h1export.serve.requests import ChatRequest, CompletionRequest, read

GONE_STATUS = 499  # in metrics, as other servers count clients that did not wait
OPEN_PATHS = ("/health", *page.FILES)  # what needs no key; the page has a field for one
Endpoint = Callable[[Request], Awaitable[Response]]
Report = Callable[[str], None]


GAUGES: tuple[tuple[str, str, Callable[[ServedModel], float]], ...] = (
    ("h1export_running", "Choices that are computed.", lambda model: model.scheduler.running),
    ("h1export_waiting", "Prompts that wait.", lambda model: model.scheduler.waiting),
    ("h1export_prefix_bytes", "Bytes of kept states.", lambda model: model.store.nbytes if model.store else 0),
    ("h1export_prefix_points", "Kept states.", lambda model: len(model.store) if model.store else 0),
)


class Api:
    """The endpoints.

    Args:
        models: The models by name.
        metrics: Where answers are counted.
        keys: Who may ask; None means everyone.
        report: Is called with a line where this server, and not the client, is at fault.
    """

    def __init__(
        self, models: Mapping[str, ServedModel], metrics: Metrics, keys: ApiKeys | None, *, report: Report
    ) -> None:
        self._models = models
        self._metrics = metrics
        self._keys = keys
        self._report = report
        for name, text, value in GAUGES:
            metrics.gauges(name, text, partial(self._values, value))

    def _values(self, value: Callable[[ServedModel], float]) -> list[tuple[str, float]]:
        return [(model.name, value(model)) for model in self._models.values()]

    def application(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            self._route("/health", self._health, "GET"),
            self._route("/metrics", self._show_metrics, "GET"),
            self._route("/v1/models", self._list, "GET"),
            self._route("/v1/models/{model:path}", self._one, "GET"),
            self._route("/v1/chat/completions", self._chat, "POST"),
            self._route("/v1/completions", self._complete, "POST"),
            *(self._route(path, partial(_shown, file), "GET") for path, file in page.responses().items()),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: self._no_route})

    def _route(self, path: str, endpoint: Endpoint, method: str) -> Route:
        async def guarded(request: Request) -> Response:
            response: Response
            try:
                if path not in OPEN_PATHS:
                    self._check_key(request)
                response = await endpoint(request)
            except GoneError:
                self._metrics.answered(path, GONE_STATUS)
                return Response(status_code=GONE_STATUS)  # nobody reads it
            except Exception as error:
                if not isinstance(error, ProblemError | H1ExportError):
                    self._report(for_operator(path, error))
                response = refusal(error)
            self._metrics.answered(path, response.status_code)
            return response

        return Route(path, guarded, methods=[method])

    async def _no_route(self, request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = getattr(error, "headers", None)
        what = {404: "there is no such path", 405: "the path does not take this method"}.get(status, "not possible")
        self._metrics.answered("other", status)
        return refusal(ProblemError(status, what, code="not_found" if status == 404 else None, headers=headers))

    def _check_key(self, request: Request) -> None:
        if self._keys is not None and not self._keys.has(request.headers.get("authorization")):
            raise ProblemError(
                401,
                "no API key, or a wrong one, in the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_described(model) for model in self._models.values()]})

    async def _one(self, request: Request) -> Response:
        return JSONResponse(_described(self._model(request.path_params["model"])))

    async def _chat(self, request: Request) -> Response:
        form = read(await read_body(request), ChatRequest)
        model = self._model(form.model)
        return await self._answer(request, model, form)

    async def _complete(self, request: Request) -> Response:
        form = read(await read_body(request), CompletionRequest)
        model = self._model(form.model)
        return await self._answer(request, model, form)

    def _model(self, name: str) -> ServedModel:
        if name not in self._models:
            what = f"there is no model {name[:80]!r}; there are {', '.join(self._models)}"
            raise ProblemError(404, what, param="model", code="model_not_found")
        return self._models[name]

    async def _answer(self, request: Request, model: ServedModel, form: ChatRequest | CompletionRequest) -> Response:
        channel = Channel()
        tasks, answer = await run_in_threadpool(model.prepare, form, channel.emit)
        model.scheduler.submit(tasks)

        def cancel() -> None:
            for task in tasks:
                task.is_cancelled = True

        streaming = False
        try:
            if not form.stream:
                return JSONResponse(await unless_gone(request.receive, whole(channel, answer)))
            stream = chunks(channel, answer, form.wants_usage)
            first = await unless_gone(request.receive, next_of(stream))  # an error before it has a status of its own
            streaming = True
            return EventStream(first, stream, cancel)
        except asyncio.CancelledError:
            raise GoneError from None
        finally:
            if not streaming:
                cancel()


async def _shown(file: Response, request: Request) -> Response:
    return file


def _described(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "h1export",
        "max_model_len": model.context,
    }
