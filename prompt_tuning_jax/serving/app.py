"""The server's paths: HTTP in front of a Service."""

import asyncio
import json
import pathlib
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib import resources
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.serving import schema
from prompt_tuning_jax.serving.image_form import image_request
from prompt_tuning_jax.serving.middleware import Middleware, bearer
from prompt_tuning_jax.serving.schema import RefusedError
from prompt_tuning_jax.serving.service import Service
from prompt_tuning_jax.serving.tasks import NAME, ServedTask
from prompt_tuning_jax.storage import natural_order
from prompt_tuning_jax.untrusted_input import read_json

_ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"description": "The bearer token is missing or wrong."},
    404: {"description": "There is no such task."},
    408: {"description": "The body was not received in time."},
    413: {"description": "The body or the batch is too large."},
    422: {"description": "A field is invalid."},
    429: {"description": "Too many rows are waiting; Retry-After says when to try again."},
    500: {"description": "The computation failed."},
    503: {"description": "The server is starting or shutting down."},
    504: {"description": "The deadline has passed."},
    507: {"description": "The server's disk is full."},
}
for _about in _ERRORS.values():
    _about["model"] = schema.Error
_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "task": {"type": "string", "description": "its name; TASK/PROMPT for one"},
                        "image": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "PNG or JPEG files",
                        },
                    },
                }
            }
        },
    }
}
# A path -> the file beside this one that it returns, and its media type.
_PAGE_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
T = TypeVar("T")
_GONE = 499  # the client has gone; nobody reads the response
Name = Annotated[str, Path(pattern=f"^{NAME}$")]


def make_app(
    service: Service,
    *,
    token: str = "",
    admin_token: str = "",
    cors_origins: Sequence[str] = (),
    report: Callable[[str], None] = lambda name: None,
    on_started: Callable[[BaseException | None], None] = lambda error: None,
) -> FastAPI:
    """Returns the application; starting it compiles the service's first programs.

    ``report`` is called with the name of each compiled program, and ``on_started`` once the start
    has finished or failed.  Predictions require ``token`` and changes ``admin_token``; without an
    ``admin_token`` tasks cannot be changed.  ``cors_origins`` (``https://host``, or ``*`` for all)
    are those whose pages may send requests from a browser.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        def started(task: asyncio.Task[None]) -> None:
            on_started(asyncio.CancelledError() if task.cancelled() else task.exception())

        starting = asyncio.create_task(service.start(report))
        starting.add_done_callback(started)
        app.state.starting = starting
        yield
        service.drain()
        starting.cancel()
        with suppress(Exception, asyncio.CancelledError):
            await starting
        await service.close()

    app = FastAPI(
        title="prompt-tuning serve",
        summary="One frozen model serves every task in one batch.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from other sites
        redoc_url=None,
    )
    limits = service.limits
    upload_bytes = 16 * service.engine.shapes.prompt_lengths[-1] * service.engine.config.embed_dim
    app.add_middleware(
        Middleware,
        metrics=service.metrics,
        body_bytes=limits.images_bytes if service.engine.config.reads_images else limits.body_bytes,
        upload_bytes=upload_bytes + 100_000,
        seconds=limits.deadline_seconds,
    )
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "HEAD", "POST", *(["PUT", "DELETE"] if admin_token else [])],
            allow_headers=["authorization", "content-type"],
            expose_headers=["retry-after", "www-authenticate"],
        )
    handle_errors(app)
    app.router.route_class = BoundedRoute
    reader = _requiring(token, "token", "The server's PROMPT_TUNING_TOKEN.")
    admin = _requiring(admin_token, "admin", "The server's PROMPT_TUNING_ADMIN_TOKEN.")

    for path, (file, media_type) in _PAGE_FILES.items():
        answer = partial(_page_file, file, media_type)
        app.add_api_route(path, answer, methods=["GET"], include_in_schema=False)

    @app.get("/healthz", response_model=schema.Status)
    async def healthz() -> Response:
        """Returns whether the server is alive, also while it is starting or shutting down."""
        failed = app.state.starting.done() and app.state.starting.exception() is not None
        working = service.state == "starting" or service.scheduler.alive
        return status_of(service, 200 if working and not failed else 500)

    @app.get("/readyz", response_model=schema.Status, responses={503: {"model": schema.Status}})
    async def readyz() -> Response:
        """Returns whether the server accepts requests: once the programs it needs are compiled."""
        return status_of(service, 200 if service.is_ready else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Metrics in the format of Prometheus."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.post(
        "/v1/predict",
        dependencies=reader,
        response_model=schema.PredictResponse,
        responses={
            **_ERRORS,
            200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        },
    )
    async def predict(request: Request, body: schema.PredictRequest) -> Response:
        """Predicts labels, text or log-probabilities, with the prompts of one or several tasks."""
        began = time.perf_counter()
        if body.options.stream:
            return await _streamed(service, request, body, began)
        return await _predicted(service, request, body, began)

    if service.engine.config.reads_images:

        @app.post(
            "/v1/predict/images",
            dependencies=reader,
            response_model=schema.PredictResponse,
            responses=_ERRORS,
            openapi_extra=_FORM,
        )
        async def predict_images(request: Request) -> Response:
            """Predicts the labels of PNG and JPEG files, with the prompts of one task."""
            began = time.perf_counter()
            kind = request.headers.get("content-type", "")
            body, images = image_request(await request.body(), kind, most=limits.inputs)
            return await _predicted(service, request, body, began, images)

    @app.get(
        "/v1/tasks",
        dependencies=reader,
        response_model=schema.TaskList,
        responses={401: _ERRORS[401], 422: _ERRORS[422]},
    )
    def tasks(
        after: Annotated[str, Query(max_length=100)] = "",
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    ) -> Response:
        """Lists the served tasks in the order of their names."""
        names = service.tasks.names()
        # The task that ended the last page may be gone.
        start = bisect_right(names, natural_order(after), key=natural_order) if after else 0
        page = names[start : start + limit]
        known = [task for name in page if (task := service.tasks.get(name)) is not None]
        more = start + limit < len(names)
        return as_json(
            schema.TaskList(
                model=without_folder(service.model_name),
                reads_images=service.engine.config.reads_images,
                tasks=[info_of(task) for task in known],
                total=len(names),
                next=page[-1] if more else None,
            )
        )

    @app.get(
        "/v1/tasks/{name}/words",
        dependencies=reader,
        response_model=schema.TaskWords,
        responses={code: _ERRORS[code] for code in (401, 404, 422, 503)},
    )
    async def words(name: Name) -> Response:
        """Finds the words whose embeddings are most similar to each prompt position of a task."""
        prompts = [
            schema.PromptWords(
                prompt=prompt,
                positions=[
                    [schema.Word(word=word, cosine=cosine) for word, cosine in position]
                    for position in positions
                ],
            )
            for prompt, positions in await service.nearest_words(name)
        ]
        return as_json(schema.TaskWords(task=name, prompts=prompts))

    if admin_token:

        @app.put(
            "/v1/tasks/{name}",
            dependencies=admin,
            response_model=schema.TaskInfo,
            responses={code: _ERRORS[code] for code in (401, 408, 413, 422, 500, 503, 507)},
            openapi_extra=_UPLOAD,
        )
        async def put_task(
            request: Request,
            name: Name,
            prompt: Annotated[str | None, Query(pattern=f"^{NAME}$")] = None,
            label: Annotated[list[str], Query(max_length=256)] = [],  # noqa: B006
        ) -> Response:
            """Adds or replaces a task; the body is its prompt, an .npy or .safetensors file.

            With `prompt`, adds or replaces one prompt of the task and keeps the others.  `label`,
            which may be repeated, replaces the labels that the file names.
            """
            content = await request.body()
            task = await service.changes.put_prompt(name, content, prompt=prompt, labels=label)
            return as_json(info_of(task))

        @app.delete(
            "/v1/tasks/{name}",
            dependencies=admin,
            status_code=204,
            responses={code: _ERRORS[code] for code in (401, 404, 422, 500, 503, 507)},
        )
        async def delete_task(name: Name) -> Response:
            """Stops serving a task; deletes only files that a server has written itself."""
            await service.changes.remove_task(name)
            return Response(status_code=204)

    return app


def _page_file(file: str, media_type: str) -> Response:
    text = resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    return Response(text, media_type=media_type, headers={"Cache-Control": "no-cache"})


def _requiring(token: str, name: str, description: str) -> list[Any]:
    """Returns the dependencies of a path that requires a token.

    OpenAPI shows the token by this name.
    """
    if not token:
        return []
    scheme = HTTPBearer(scheme_name=name, description=description, auto_error=False)
    return [Depends(scheme), Depends(bearer(token))]


async def _predicted(
    service: Service,
    request: Request,
    body: schema.PredictRequest,
    began: float,
    images: Sequence[bytes] = (),
) -> Response:
    results = await _unless_gone(request, service.predict(body, images))
    if results is None:
        return Response(status_code=_GONE)
    seconds = time.perf_counter() - began
    service.metrics.seconds.labels(body.mode).observe(seconds)
    return as_json(schema.PredictResponse(results=results, seconds=round(seconds, 6)))


async def _streamed(
    service: Service, request: Request, body: schema.PredictRequest, began: float
) -> Response:
    events = service.stream(body)

    async def next_event() -> dict[str, Any]:
        return await anext(events)

    # Raises a RefusedError before a status is sent.
    first = await _unless_gone(request, next_event())
    if first is None:
        return Response(status_code=_GONE)

    async def lines() -> AsyncIterator[str]:
        try:
            yield f"data: {json.dumps(first)}\n\n"
            async for event in events:
                yield f"data: {json.dumps(event)}\n\n"
        finally:
            await events.aclose()  # type: ignore[attr-defined]
            service.metrics.seconds.labels(body.mode).observe(time.perf_counter() - began)

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Returns the result of ``work``, or None if the client goes before it is there."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(asyncio.CancelledError, RefusedError):
                await each


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def handle_errors(app: FastAPI) -> None:
    """Gives every error response the form of ``schema.Error``."""

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return error_of(error.status, error.message, field=error.field, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        kind = request.headers.get("content-type", "").partition(";")[0]
        if first["loc"] == ("body",) and "json" not in kind and kind != "application/octet-stream":
            message = (
                f"the content type is {kind or 'missing'}; send content-type: application/json"
            )
            return error_of(422, message, field="body")
        if first["loc"] == ("body",) and first["type"].startswith("model_"):
            message = 'the body is not a JSON object; send {"task": "NAME", "inputs": ["TEXT"]}'
            return error_of(422, message, field="body")
        field = ""
        for part in first["loc"][1:]:
            if isinstance(part, int):
                field += f"[{part}]"
            elif part.isidentifier():  # other parts name a branch of a union
                field += f".{part}" if field else part
        for branch in (".str", ".constrained_str"):
            field = field.removesuffix(branch)
        return error_of(422, first["msg"], field=field or "body")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # how the framework reports a body that it cannot read
            cause = error.__cause__
            message = str(cause) if isinstance(cause, UserError) else "the body is not JSON"
            return error_of(422, message, field="body")
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the framework names the methods of one route only
            headers["Allow"] = ", ".join(_methods_at(request))
        return error_of(error.status_code, str(error.detail), headers=headers)


class BoundedRoute(APIRoute):
    """A route that parses the JSON body with limits on its depth and on its numbers."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handle(_BoundedRequest(request.scope, request.receive))

        return bounded


class _BoundedRequest(Request):
    async def json(self) -> Any:
        return read_json(await self.body(), of="the body")


def _methods_at(request: Request) -> list[str]:
    """Returns the HTTP methods of this path."""
    methods: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return sorted({*methods, "HEAD"} if "GET" in methods else methods)


def status_of(service: Service, code: int) -> Response:
    """Returns the server's state, with this HTTP status."""
    progress = service.engine.compiler.progress
    status = schema.Status(
        status=service.state,
        rows_per_second=round(service.metrics.rows_per_second(), 2),
        waiting=service.scheduler.waiting if service.state != "starting" else 0,
        compiled=progress.made,
        to_compile=progress.all,
        required_compiled=progress.first_made,
        required_to_compile=progress.first,
    )
    return JSONResponse(status.model_dump(), status_code=code)


def info_of(task: ServedTask) -> schema.TaskInfo:
    """Returns a task as the list of tasks describes it."""
    prompts = []
    for prompt in task.prompts:
        known = prompt.metadata
        prompts.append(
            schema.PromptInfo(
                name=prompt.name,
                method=prompt.method,
                parameters=prompt.parameters,
                length=prompt.length,
                seed=known.seed,
                steps=known.steps,
                metric=known.metric or None,
                score=known.score,
                trained_on=without_folder(known.task) or None,
            )
        )
    labels = list(task.labels)
    wording = task.wording
    return schema.TaskInfo(
        name=task.name,
        method=task.method,
        labels=labels,
        inputs_template=wording.template or None,
        columns=[*wording.columns] if len(wording.columns) > 1 else None,
        prompts=prompts,
    )


def without_folder(name: str) -> str:
    """Returns the name; only the last part if it is a path on this machine or in a bucket."""
    windows = pathlib.PureWindowsPath(name)
    if pathlib.Path(name).is_absolute() or windows.is_absolute() or "://" in name:
        return pathlib.PureWindowsPath(name.rstrip("/")).name or name
    return pathlib.Path(name).name if name.startswith(("~", "../")) else name


def as_json(model: BaseModel) -> Response:
    """Returns the response without its empty fields."""
    return Response(model.model_dump_json(exclude_none=True), media_type="application/json")


def error_of(
    status: int, message: str, *, field: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """Returns an error response."""
    body = schema.Error(error=schema.ErrorBody(message=message, field=field))
    return JSONResponse(body.model_dump(exclude_none=True), status_code=status, headers=headers)
