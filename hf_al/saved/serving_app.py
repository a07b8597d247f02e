"""The application that `hf-al serve` runs: answers in batches, its health, and metrics for Prometheus."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import PreTrainedTokenizerBase

from ..loading import device_of
from ..modeling.modeling_al import ALForSequenceClassification
from .batcher import Answer, Batcher, ModelError, Options, Overloaded
from .prediction import predict
from .request_body import SCHEMA, Refused, read_body
from .rows import Texts

LINKS = {"predict": "/predict", "health": "/health", "metrics": "/metrics", "openapi": "/openapi.json"}
RETRY_AFTER = {"Retry-After": "1"}  # seconds
CLOSE = {"Connection": "close"}  # what is left of the body is not read
CPU_TOKENS = 2048  # to compute together: more gain nothing on a CPU, and texts of like length need less padding
GONE = 499  # nobody sees it, but it is counted: nginx's number for a client that has left
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


@dataclass(frozen=True)
class Limits:
    """
    Args:
        max_batch_size: texts that are answered together.
        max_wait_ms: milliseconds that a text waits for others while the model has nothing to do.
        max_waiting: texts that may wait, of all requests; more are refused.
        max_body_kib: size of a body, in KiB.
    """

    max_batch_size: int
    max_wait_ms: int
    max_waiting: int
    max_body_kib: int


class Metrics:
    """What Prometheus reads."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("hf_al_requests", "Requests to /predict, by HTTP status", ["status"], registry=registry)
        self.seconds = Histogram(
            "hf_al_request_seconds", "Seconds from a request to its answer", buckets=SECONDS, registry=registry
        )
        self.texts = Counter("hf_al_texts", "Texts answered, by the exit that answered", ["exit"], registry=registry)
        self.batch_size = Histogram(
            "hf_al_batch_size", "Texts answered together", buckets=[2**i for i in range(11)], registry=registry
        )
        self.waiting = Gauge("hf_al_waiting_texts", "Texts that wait for the model", registry=registry)


def build(
    model: ALForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    exit: int | str,
    limits: Limits,
) -> FastAPI:
    """The application.

    Args:
        model, tokenizer: of a finished run.
        name: of the model, as clients see it.
        exit: the block to stop at unless a request says otherwise, or `"adaptive"`.
        limits: on what is accepted.
    """
    metrics = Metrics()
    most_tokens = CPU_TOKENS if device_of(model).type == "cpu" else None

    def answer(texts: list[Texts], options: Options) -> list[Answer]:
        metrics.batch_size.observe(len(texts))
        chunks = predict(model, tokenizer, texts, limits.max_batch_size, options.exit, options.all_scores, most_tokens)
        answers = [found for chunk in chunks for found in chunk]
        for found in answers:
            metrics.texts.labels(found["exit"] if "exit" in found else found["exits"][-1]["block"]).inc()
        return answers

    batcher = Batcher(answer, limits.max_batch_size, limits.max_wait_ms / 1000, limits.max_waiting)
    metrics.waiting.set_function(lambda: len(batcher.queue))

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.run())
        yield
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker

    app = FastAPI(title=f"hf-al serve: {name}", docs_url=None, redoc_url=None, lifespan=running)

    async def answered(request: Request) -> Response:
        body = await _body(request, limits.max_body_kib)
        asked = read_body(body, model.config, exit, limits.max_waiting)
        answers = await _unless_gone(request, batcher.ask(asked.texts, asked.exit, asked.all_scores))
        return JSONResponse({"answers": answers})

    @app.post(LINKS["predict"], openapi_extra={"requestBody": {"content": {"application/json": {"schema": SCHEMA}}}})
    async def predict_texts(request: Request) -> Response:
        start, status = time.perf_counter(), 500
        try:
            response = await _or_refused(answered(request), limits)
            status = response.status_code
            return response
        finally:
            metrics.requests.labels(status).inc()
            metrics.seconds.observe(time.perf_counter() - start)

    @app.head(LINKS["health"], include_in_schema=False)
    @app.get(LINKS["health"])
    async def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "model": name,
            "exits": model.config.exits(),
            "exit": exit,
            "numbers": model.config.numeric_columns or [],
        }

    @app.get(LINKS["metrics"])
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def links() -> dict[str, str]:
        return LINKS

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> Response:
        reason = f"Expected POST /predict, GET /health or GET /metrics, got {request.method} {request.url.path}."
        return JSONResponse({"error": reason}, error.status_code, error.headers)

    return app


async def _or_refused(answered: Coroutine[Any, Any, Response], limits: Limits) -> Response:
    """The response, or the one that says why there is none."""
    try:
        return await answered
    except Refused as refused:
        return JSONResponse({"error": str(refused)}, refused.status, CLOSE if refused.status == 413 else None)
    except Overloaded:
        reason = f"Expected at most {limits.max_waiting} texts to wait, got more. Try again after a second."
        return JSONResponse({"error": reason}, 503, RETRY_AFTER)
    except ModelError as error:
        return JSONResponse({"error": str(error)}, 500)
    except ClientDisconnect:
        return Response(status_code=GONE)


async def _body(request: Request, most_kib: int) -> bytes:
    """The body of a request; one that is too large is not read to its end."""
    too_large = Refused(413, f"Expected a body of at most {most_kib} KiB, got a larger one. Send fewer texts at once.")
    if int(request.headers.get("content-length", 0)) > most_kib * 1024:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most_kib * 1024:
            raise too_large
    return bytes(body)


async def _unless_gone(request: Request, answers: Coroutine[Any, Any, list[Answer]]) -> list[Answer]:
    """The answers, unless the client leaves before they are there: then they are no longer asked for."""
    asking = asyncio.create_task(answers)
    leaving = asyncio.create_task(_leaves(request))
    try:
        await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            raise ClientDisconnect
        return asking.result()
    finally:
        asking.cancel()
        leaving.cancel()


async def _leaves(request: Request) -> None:
    """Returns when the client of a request that was read is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
