"""The application: routes, errors in one shape, and what an operator asks."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from gateway.api_error import CODES, ApiError, not_found
from gateway.gateway import Gateway, in_thread
from gateway.openapi import description
from gateway.outer import Outer
from gateway.page import offered, page_routes
from gateway.routes import routes
from gateway.served import ServedModel
from gateway.store import StoreError
from runtime.built_for import default_video, video_ranges
from wan22.sampling import presets_for

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_app(gateway: Gateway) -> ASGIApp:
    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        gateway.hub.start()
        yield

    app = Starlette(
        routes=[*routes(gateway), *_operator_routes(gateway), *page_routes(gateway)],
        exception_handlers={
            ApiError: _api_error,
            ClientDisconnect: _gone,
            StoreError: _store_error,
            HTTPException: _http_error,
            Exception: _bug,
        },
        lifespan=lifespan,
    )
    app.state.gateway = gateway
    return Outer(app, gateway.options.most_body_bytes, gateway.options.body_within_s)


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _gone(_request: Request, _error: Exception) -> Response:
    """The client left inside its body: nobody reads this."""
    return ApiError(499, "cancelled", "the client has gone").response()


async def _store_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, StoreError)
    return ApiError(503, error.code, str(error), retry_after_s=10).response()


async def _http_error(_request: Request, error: Exception) -> Response:
    """The router's 404 and 405."""
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "error")
    return ApiError(error.status_code, code, str(error.detail).lower(), headers=dict(error.headers or {})).response()


async def _bug(_request: Request, _error: Exception) -> Response:
    """Only the log gets the reason."""
    return ApiError(500, "internal_error", "the gateway failed; see its log").response()


def _operator_routes(gateway: Gateway) -> list[Route]:
    async def list_models(request: Request) -> Response:
        await gateway.key(request)
        ready = await in_thread(gateway.claims.ready_servers)
        data = [model_object(model, ready.get(model.id, 0)) for model in (await gateway.models()).values()]
        return JSONResponse({"object": "list", "data": data})

    async def retrieve_model(request: Request) -> Response:
        await gateway.key(request)
        ready = await in_thread(gateway.claims.ready_servers)
        for model in (await gateway.models()).values():
            if request.path_params["model_id"] in model.aliases:
                return JSONResponse(model_object(model, ready.get(model.id, 0)))
        raise not_found("model")

    async def health(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_request: Request) -> Response:
        if gateway.draining:
            raise ApiError(503, "server_shutdown", "the gateway is ending", retry_after_s=30)
        if not await in_thread(gateway.claims.ready_servers):
            raise ApiError(503, "no_server", "no server is ready", retry_after_s=10)
        return JSONResponse({"status": "ready"})

    async def metrics(_request: Request) -> Response:
        return Response(await in_thread(gateway.metrics.text), headers={"content-type": METRICS_TYPE})

    async def openapi(_request: Request) -> Response:
        return JSONResponse(description())

    return [
        Route("/v1/models", list_models),
        Route("/v1/models/{model_id}", retrieve_model),
        Route("/health", health),
        Route("/ready", ready),
        Route("/health/ready", ready),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
    ]


def model_object(model: ServedModel, ready: int) -> dict[str, Any]:
    """OpenAI's model object, and under ``video`` what the engines make."""
    manifest = model.manifest
    spec, build = manifest.spec, manifest.build
    width, height, frames = default_video(manifest)
    return {
        "id": model.id,
        "object": "model",
        "created": _CREATED,
        "owned_by": "wan-trt",
        "aliases": list(model.aliases[1:]),
        "ready_servers": ready,
        "video": {
            "task": spec.task,
            "image": spec.takes.image,
            "last_image": spec.takes.last_image,
            "sizes": list(offered(model)),
            "default_size": f"{width}x{height}",
            "default_frames": frames,
            "shapes": [
                {"smallest": list(small), "best": list(best), "largest": list(large)}
                for small, best, large in video_ranges(manifest)
            ],  # width, height, frames; none: any
            "size_multiple": spec.size_multiple,
            "frames_multiple": spec.vae.temporal_stride,
            "most_frames": model.limits.max_frames,
            "most_pixels": model.limits.max_pixels,
            "most_steps": model.limits.max_steps,
            "fps": spec.sampling.fps,
            "steps": spec.sampling.steps,
            "experts": list(spec.experts),
            "guidance": spec.sampling.guidance,
            "preset": spec.sampling.preset,
            "presets": list(presets_for(spec.task)),
            "precision": manifest.precision,
            "target": build.target if build else None,
            "loras": list(model.loras),
        },
    }


_CREATED = int(time.time())  # OpenAI's shape wants a moment; that of the gateway's start says as much as any
