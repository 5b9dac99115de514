"""What the server's paths answer with: states, tasks, and errors as JSON."""

from collections.abc import Callable, Coroutine
from pathlib import Path, PureWindowsPath
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.serving import schema
from prompt_tuning_jax.serving.limits import RefusedError
from prompt_tuning_jax.serving.service import Service
from prompt_tuning_jax.serving.tasks import ServedPrompt, ServedTask
from prompt_tuning_jax.untrusted_input import read_json


def handle_errors(app: FastAPI) -> None:
    """Every error in the form of ``schema.Error``."""

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
            message = f"the body is {kind or 'of no type'}; send content-type: application/json"
            return error_of(422, message, field="body")
        if first["loc"] == ("body",) and first["type"].startswith("model_"):
            message = 'the body is not an object; send {"task": "NAME", "inputs": ["TEXT"]}'
            return error_of(422, message, field="body")
        field = ""
        for part in first["loc"][1:]:
            if isinstance(part, int):
                field += f"[{part}]"
            elif part.isidentifier():  # others name a branch of a type
                field += f".{part}" if field else part
        for branch in (".str", ".constrained_str"):
            field = field.removesuffix(branch)
        return error_of(422, first["msg"], field=field or "body")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # the framework's word for a body that could not be read
            cause = error.__cause__
            message = str(cause) if isinstance(cause, UserError) else "the body is not JSON"
            return error_of(422, message, field="body")
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the framework names the methods of one route alone
            headers["Allow"] = ", ".join(_methods_at(request))
        return error_of(error.status_code, str(error.detail), headers=headers)


class BoundedRoute(APIRoute):
    """A path whose JSON body is read within bounds; what is beyond them is refused as a body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handle(_BoundedRequest(request.scope, request.receive))

        return bounded


class _BoundedRequest(Request):
    async def json(self) -> Any:
        return read_json(await self.body(), of="the body")


def _methods_at(request: Request) -> list[str]:
    """What this path takes."""
    found: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return sorted({*found, "HEAD"} if "GET" in found else found)


def status_of(service: Service, code: int) -> Response:
    """How the server is doing, with this status of HTTP."""
    progress = service.engine.compiler.progress
    status = schema.Status(
        status=service.state,
        rows_per_second=round(service.metrics.rows_per_second(), 2),
        waiting=service.batcher.waiting if service.state != "starting" else 0,
        compiled=progress.made,
        to_compile=progress.all,
        required_compiled=progress.first_made,
        required_to_compile=progress.first,
    )
    return JSONResponse(status.model_dump(), status_code=code)


def info_of(task: ServedTask) -> schema.TaskInfo:
    """What the list of tasks says of one."""
    prompts = []
    for prompt in task.prompts:
        known = prompt.metadata
        prompts.append(
            schema.PromptInfo(
                name=prompt.name,
                method=prompt.method,
                parameters=prompt.parameters,
                length=len(prompt.prompt_PD) if isinstance(prompt, ServedPrompt) else None,
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
    """A name as it is; of a place on this machine or in a bucket its last part."""
    if Path(name).is_absolute() or PureWindowsPath(name).is_absolute() or "://" in name:
        return PureWindowsPath(name.rstrip("/")).name or name
    return Path(name).name if name.startswith(("~", "../")) else name


def as_json(model: BaseModel) -> Response:
    """Without the fields that say nothing."""
    return Response(model.model_dump_json(exclude_none=True), media_type="application/json")


def error_of(
    status: int, message: str, *, field: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """An answer that is none."""
    body = schema.Error(error=schema.ErrorBody(message=message, field=field))
    return JSONResponse(body.model_dump(exclude_none=True), status_code=status, headers=headers)
