"""The application: routes, and what they share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from ett import __version__
from ett.errors import UserError
from ett.serve.chat import Chat
from ett.serve.engine import Engine
from ett.serve.errors import ApiError, add_error_handlers
from ett.serve.guard import Guard
from ett.serve.images import Images
from ett.serve.limits import Limits
from ett.serve.meters import CONTENT_TYPE, Meters
from ett.serve.requests import ChatRequest, DrawingRequest, ReconstructionRequest
from ett.serve.run_report import RunReport
from ett.serve.served import Served

PAGE = Path(__file__).parent / "page"
_HEADERS = {
    # the page is ours alone: nothing from elsewhere, no frames, no inline scripts; the report brings its style with it
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def create_app(
    served: Served,
    limits: Limits = Limits(),
    *,
    keys: Sequence[str] = (),
    hosts: Collection[str] | None = None,
    run: RunReport | None = None,
) -> FastAPI:
    """An ASGI application around a model.

    Args:
        served: what answers. limits: what a request may ask.
        keys: of which each request must bring one; empty lets everybody in. Page and ``/health`` are always open.
        hosts: names that it answers to, lower case; None answers to any.
        run: whose report the page shows.
    """
    meters = Meters()
    engine = Engine(limits.seconds, meters)
    preparing = ThreadPoolExecutor(1, thread_name_prefix="ett-preparing")
    chat = Chat(served, engine, limits, meters, preparing)
    images = Images(served, engine, limits, meters, preparing)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.stop()
        preparing.shutdown()

    app = FastAPI(
        title="ett",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False, "operation_spans": False},
    )
    add_error_handlers(app)

    @app.post("/v1/chat/completions")
    async def chat_completions(given: ChatRequest, request: Request) -> Response:
        return await chat.respond(given, request)

    @app.post("/v1/images/generations")
    async def images_generations(given: DrawingRequest, request: Request) -> Response:
        return await images.draw(given, request)

    @app.post("/v1/images/reconstructions")
    async def images_reconstructions(given: ReconstructionRequest, request: Request) -> Response:
        return await images.reconstruct(given, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(served, limits, run)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        served.check_name(name)
        return _described(served, limits, run)

    @app.get("/run/report")
    async def report(request: Request) -> Response:
        if run is None:
            raise ApiError(404, "This server shows no run. Start it with --run DIR.")
        try:
            tag, page = await asyncio.to_thread(run.current)
        except (UserError, OSError) as error:
            raise ApiError(503, str(error), code="report_unavailable") from error
        if request.headers.get("if-none-match") == f'"{tag}"':
            return Response(status_code=304)
        return HTMLResponse(page, headers={"ETag": f'"{tag}"', "Cache-Control": "no-cache", **_HEADERS})

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok", "version": __version__})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(meters.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse((PAGE / "index.html").read_text(encoding="utf-8"), headers=_HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    routes = [
        "/v1/chat/completions", "/v1/images/generations", "/v1/images/reconstructions", "/v1/models", "/run/report",
        "/health", "/metrics", "/",
    ]  # fmt: skip
    app.add_middleware(Guard, limits=limits, meters=meters, keys=keys, hosts=hosts, routes=routes)
    return app


def _described(served: Served, limits: Limits, run: RunReport | None) -> dict[str, Any]:
    """OpenAI's model object; under ``ett`` what a page needs to know beforehand."""
    height, width = served.size
    return {
        "id": served.name,
        "object": "model",
        "created": 0,
        "owned_by": "ett",
        "ett": {
            "chats": served.model is not None,
            "draws": served.can_draw,
            "initial": served.initial is not None,
            "run": run is not None,
            "image_size": [height, width],
            "downsample": served.tokenizer.downsample,
            "codebook_size": served.tokenizer.codebook_size,
            "max_images": limits.max_images,
            "max_body": limits.max_body,
            "max_new_tokens": limits.max_new_tokens,
        },
    }
