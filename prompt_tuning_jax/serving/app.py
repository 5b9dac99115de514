"""The server's paths: HTTP in front of a Service."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib import resources
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPBearer

from prompt_tuning_jax.serving import schema
from prompt_tuning_jax.serving.limits import RefusedError
from prompt_tuning_jax.serving.middleware import Guard, bearer
from prompt_tuning_jax.serving.responses import (
    BoundedRoute,
    as_json,
    handle_errors,
    info_of,
    status_of,
    without_folder,
)
from prompt_tuning_jax.serving.service import Service
from prompt_tuning_jax.serving.tasks import NAME

_ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"description": "the bearer token is missing or wrong"},
    404: {"description": "no such task"},
    408: {"description": "the body did not come in time"},
    413: {"description": "the body or the batch is too large"},
    422: {"description": "a field is wrong"},
    429: {"description": "too many rows are waiting; Retry-After says when to come again"},
    500: {"description": "the computation has failed"},
    503: {"description": "not ready yet, or about to end"},
    504: {"description": "the deadline has passed"},
    507: {"description": "there is no room on the disk"},
}
for _about in _ERRORS.values():
    _about["model"] = schema.Error
_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
# A path -> the file beside this one that answers it, and what that is.
_PAGE_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
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
    """The application; ``report`` hears of each compiled program, ``on_started`` of the end of it.

    ``token`` is asked of predictions, ``admin_token`` of changes; without the latter there are
    no changes.  ``cors_origins`` are the origins (``https://host``, ``*`` for all) whose pages a
    browser lets ask.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        def started(task: asyncio.Task[None]) -> None:
            on_started(None if task.cancelled() else task.exception())

        starting = asyncio.create_task(service.start(report))
        starting.add_done_callback(started)
        app.state.starting = starting
        yield
        service.drain()
        with suppress(Exception):
            await starting
        await service.close()

    app = FastAPI(
        title="prompt-tuning serve",
        summary="One frozen T5, every task in one batch.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    limits = service.limits
    upload_bytes = 16 * service.engine.shapes.prompt_lengths[-1] * service.engine.config.embed_dim
    app.add_middleware(
        Guard,
        metrics=service.metrics,
        body_bytes=limits.body_bytes,
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
    reader = _asking_for(token, "token", "what PROMPT_TUNING_TOKEN is where the server runs")
    admin = _asking_for(admin_token, "admin", "what PROMPT_TUNING_ADMIN_TOKEN is there")

    for path, (file, media_type) in _PAGE_FILES.items():
        answer = partial(_page_file, file, media_type)
        app.add_api_route(path, answer, methods=["GET"], include_in_schema=False)

    @app.get("/healthz", response_model=schema.Status)
    async def healthz() -> Response:
        """Whether the server lives: also while it compiles, and until it has ended."""
        failed = app.state.starting.done() and app.state.starting.exception() is not None
        working = service.state == "starting" or service.batcher.alive
        return status_of(service, 200 if working and not failed else 500)

    @app.get("/readyz", response_model=schema.Status, responses={503: {"model": schema.Status}})
    async def readyz() -> Response:
        """Whether it takes requests: once what can answer them is compiled, until it ends."""
        return status_of(service, 200 if service.state == "ready" else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counters for Prometheus."""
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
        """Labels, text or log-probabilities for texts, with the prompts of one task or several."""
        began = time.perf_counter()
        if body.options.stream:
            return await _streamed(service, body, began)
        work = asyncio.create_task(service.predict(body))
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():  # nobody is there to be answered
                return Response(status_code=499)
            results = await work
        finally:
            for task in (work, gone):
                task.cancel()
                with suppress(asyncio.CancelledError, RefusedError):
                    await task
        seconds = time.perf_counter() - began
        service.metrics.seconds.labels(body.mode).observe(seconds)
        return as_json(schema.PredictResponse(results=results, seconds=round(seconds, 6)))

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
        """The tasks that are served, by name."""
        names = service.tasks.names()
        start = names.index(after) + 1 if after in names else 0
        page = names[start : start + limit]
        found = [task for name in page if (task := service.tasks.get(name)) is not None]
        more = start + limit < len(names)
        return as_json(
            schema.TaskList(
                model=without_folder(service.model_name),
                tasks=[info_of(task) for task in found],
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
        """The words whose embeddings are most like each position of a task's prompts."""
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
            """Adds or replaces a task, whose prompt is the body: an .npy or .safetensors file.

            With ``prompt`` it is one of the task's prompts, beside those that it has; ``label``,
            repeated, are the task's labels in place of those that the file names.
            """
            content = await request.body()
            task = await service.put_prompt(name, content, prompt=prompt, labels=label)
            return as_json(info_of(task))

        @app.delete(
            "/v1/tasks/{name}",
            dependencies=admin,
            status_code=204,
            responses={code: _ERRORS[code] for code in (401, 404, 422, 500, 503, 507)},
        )
        async def delete_task(name: Name) -> Response:
            """Serves the task no more; files that the server did not write itself stay."""
            await service.remove_task(name)
            return Response(status_code=204)

    return app


def _page_file(file: str, media_type: str) -> Response:
    text = resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    return Response(text, media_type=media_type, headers={"Cache-Control": "no-cache"})


def _asking_for(token: str, name: str, description: str) -> list[Any]:
    """What a path that asks for a token depends on; OpenAPI has it by this name."""
    if not token:
        return []
    said = HTTPBearer(scheme_name=name, description=description, auto_error=False)
    return [Depends(said), Depends(bearer(token))]


async def _streamed(service: Service, body: schema.PredictRequest, began: float) -> Response:
    events = service.stream(body)
    first = await anext(events)  # raises what is wrong with the request before a status is sent

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


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
