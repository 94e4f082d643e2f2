"""The HTTP API: OpenAI's images endpoints, health and metrics."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from io import BytesIO
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi_offline import FastAPIOffline
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from .dispatch import Done, Failure, QueueFull
from .guard import error_body
from .requests import ImageRequest, Order, Rejected
from .service import Service, Ticket, Waiting

HTTP_FAILED = 500
CLIENT_LEFT = 499  # nobody reads it
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "allOf": [
                        {"$ref": "#/components/schemas/ImageRequest"},
                        {
                            "type": "object",
                            "required": ["image"],
                            "properties": {
                                "image": {
                                    "type": "string",
                                    "format": "binary",
                                    "description": "The image to edit.",
                                },
                                "mask": {
                                    "type": "string",
                                    "format": "binary",
                                    "description": "A PNG. Its transparent parts are generated.",
                                },
                            },
                        },
                    ]
                }
            }
        },
    }
}


def make_api(service: Service) -> FastAPI:
    """Return the API as an application, with its documentation at /docs."""
    app = FastAPIOffline(
        title="L2P", description="Images from L2P checkpoints, as OpenAI's images API has them."
    )
    add_error_handlers(app)

    @app.post("/v1/images/generations")
    async def generations(body: ImageRequest, request: Request) -> Response:
        """Generate images from a prompt."""
        return await respond(service, "image_generation", request, body)

    @app.post("/v1/images/edits", openapi_extra=FORM)
    async def edits(request: Request) -> Response:
        """Edit an image: image to image, or inpainting where there is a mask."""
        fields, files = await read_form(request, service.limits.upload)
        try:
            body = ImageRequest(**fields)
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from None
        if "image" not in files:
            raise Rejected("image is missing; send the image to edit as a file", "image")
        return await respond(
            service, "image_edit", request, body, files["image"], files.get("mask")
        )

    @app.get("/v1/models")
    async def models() -> dict:
        """List the served checkpoint."""
        height, width = service.pipe.layout.trained_size
        model = {"id": service.model_name, "object": "model", "created": 0, "owned_by": "l2p"}
        return {"object": "list", "data": [{**model, "size": f"{width}x{height}"}]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict:
        """Describe the served checkpoint."""
        known = (await models())["data"][0]
        if name != known["id"]:
            raise Rejected(f"there is no model {name}; there is {known['id']}", "model", 404)
        return known

    @app.get("/health")
    async def health() -> JSONResponse:
        """Say whether a worker is up: 200, or 503."""
        dispatcher = service.dispatcher
        up = dispatcher.available
        facts = {
            "status": "ok" if up else "unavailable",
            "workers": len(dispatcher.workers),
            "workers_available": up,
            "queue_length": dispatcher.waiting,
        }
        return JSONResponse(facts, 200 if up else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return counters in Prometheus's text format."""
        return Response(service.dispatcher.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def add_error_handlers(app: FastAPI) -> None:
    """Word every error as OpenAI's API does."""

    def reply(message: str, status: int, param: str | None = None) -> JSONResponse:
        headers = {"retry-after": "5"} if status == 429 else None
        return JSONResponse(error_body(message, status, param), status, headers)

    @app.exception_handler(Rejected)
    async def rejected(_: Request, error: Rejected) -> JSONResponse:
        return reply(str(error), error.status, error.param)

    @app.exception_handler(QueueFull)
    async def full(_: Request, error: QueueFull) -> JSONResponse:
        return reply("the queue is full; try again later", 429)

    @app.exception_handler(StarletteHTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return reply(str(error.detail), error.status_code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        names = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] == "extra_forbidden":
            return reply(f"unknown parameter {names[0]!r}; /docs lists them all", 400, names[0])
        name = names[0] if names else None
        message = f"{name}: {first['msg']}" if name else first["msg"]
        return reply(message, 400, name)


async def read_form(request: Request, limit: int) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return the fields and the files (image, mask) of a form, read into memory only.

    Raises Rejected."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise Rejected("expected a form: Content-Type multipart/form-data", status=415)
    parser = MultiPartParser(request.headers, request.stream(), max_files=4, max_fields=100)
    parser.spool_max_size = limit + 1  # so that no file is written
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Rejected(f"the form is damaged: {error}") from None
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    try:
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            known = name in ("image", "mask")
            if known != isinstance(value, UploadFile):
                raise Rejected(f"{name} is {'a field' if known else 'a file'}", name)
            if name in files or name in fields:
                raise Rejected(f"{name} came twice; one is supported", name)
            if isinstance(value, UploadFile):
                files[name] = await value.read()
            elif value != "":
                fields[name] = value
    finally:
        await form.close()
    return fields, files


async def respond(
    service: Service,
    kind: str,
    request: Request,
    body: Any,
    image: bytes | None = None,
    mask: bytes | None = None,
) -> Response:
    """Queue a request's images and answer. kind: "image_generation" or "image_edit"."""
    orders = await service.orders(body, image, mask)
    ticket = service.submit(orders)
    if body.stream:
        return EventStream(stream(service, kind, body, orders, ticket), ticket)
    finished = asyncio.create_task(collect(service, body, orders, ticket))
    left = asyncio.create_task(hang_up(request))
    try:
        await asyncio.wait((finished, left), return_when=asyncio.FIRST_COMPLETED)
        if not finished.done():
            return Response(status_code=CLIENT_LEFT)
        return JSONResponse(finished.result())
    finally:
        for task in (finished, left):
            task.cancel()
        ticket.cancel()


class EventStream(StreamingResponse):
    """Server-sent events. The images are cancelled however it ends, also where the client leaves
    before the first event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], ticket: Ticket):
        super().__init__(events, headers={"x-accel-buffering": "no"})
        self.ticket = ticket

    async def __call__(self, *connection: Any) -> None:
        """Send the events."""
        try:
            await super().__call__(*connection)
        finally:
            self.ticket.cancel()


async def hang_up(request: Request) -> None:
    """Return when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def collect(service: Service, body: Any, orders: list[Order], ticket: Ticket) -> dict:
    """Wait for all images of a request, and return OpenAI's answer. Raises Rejected."""
    images: dict[int, dict] = {}
    async with aclosing(ticket.events()) as events:
        async for number, event in events:
            if isinstance(event, Failure):
                raise Rejected(event.message, status=HTTP_FAILED)
            if isinstance(event, Done):
                images[number] = await finished_image(service, body, orders[number], event)
    settings = orders[0].job.settings
    return {
        "created": int(time.time()),
        "data": [images[number] for number in range(len(orders))],
        "size": f"{settings.width}x{settings.height}",
        "output_format": body.output_format,
        "background": "opaque",
        "usage": NO_USAGE,
    }


async def finished_image(service: Service, body: Any, order: Order, done: Done) -> dict:
    """One image as it stands in OpenAI's answer, with its seed."""
    data = await service.png(order, done)
    if body.output_format != "png":
        data = await asyncio.to_thread(
            encode, done.image, body.output_format, body.output_compression
        )
    text = base64.b64encode(data).decode()
    facts = {"seed": order.job.settings.seed, "revised_prompt": order.job.prompt}
    if body.response_format == "url":
        return {"url": f"data:image/{body.output_format};base64,{text}", **facts}
    return {"b64_json": text, **facts}


async def stream(
    service: Service, kind: str, body: Any, orders: list[Order], ticket: Ticket
) -> AsyncIterator[str]:
    """Server-sent events: previews as they come, and each image when it is done."""
    shown = [0] * len(orders)
    async with aclosing(ticket.events()) as events:
        async for number, event in events:
            if isinstance(event, Waiting):
                if body.progress:
                    yield server_event("l2p.progress", {"place": event.place})
                continue
            settings = orders[number].job.settings
            facts = {
                "created_at": int(time.time()),
                "size": f"{settings.width}x{settings.height}",
                "quality": "auto",
                "background": "opaque",
                "output_format": body.output_format,
                "image_index": number,
            }
            if isinstance(event, Failure):
                yield server_event("error", error_body(event.message, HTTP_FAILED))
                return
            if isinstance(event, Done):
                image = await finished_image(service, body, orders[number], event)
                yield server_event(f"{kind}.completed", {**facts, **image, "usage": NO_USAGE})
                continue
            if body.progress:
                done = {"image_index": number, "step": event.step, "steps": event.steps}
                yield server_event("l2p.progress", done)
            if event.preview is not None:
                data = await asyncio.to_thread(
                    encode, event.preview, body.output_format, body.output_compression
                )
                facts["b64_json"] = base64.b64encode(data).decode()
                facts["partial_image_index"] = shown[number]
                shown[number] += 1
                yield server_event(f"{kind}.partial_image", facts)


NO_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}


def server_event(name: str, data: dict) -> str:
    """One server-sent event. Its data says its type too, as OpenAI's does."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"


def encode(image: Image.Image, format: str, quality: int) -> bytes:
    """The image in a file format, without settings."""
    stream = BytesIO()
    image.save(stream, format, **({} if format == "png" else {"quality": quality}))
    return stream.getvalue()
