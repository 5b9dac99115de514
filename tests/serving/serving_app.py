"""A service on the micro engine, and the application asked without a network."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from prompt_tuning_jax.serving.app import make_app
from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.loading import find_tasks, load_tasks
from prompt_tuning_jax.serving.schema import Limits
from prompt_tuning_jax.serving.service import Service
from prompt_tuning_jax.serving.task_store import TaskStore
from prompt_tuning_jax.serving.tasks import PromptValidator, Tasks
from tests.serving.serving_micro import D, micro_engine, micro_model, write_prompt

ADMIN = {"Authorization": "Bearer let-me-change"}
FINGERPRINT = "0123456789abcdef"


class Compiled:
    """The shared engine, for which there is nothing left to compile; ``fail`` makes rows fail."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # What was measured of a micro model, beside other processes, says little: all go together.
        engine.seconds = dict.fromkeys(engine.programs(), 1.0)
        self.batches: list[tuple[str, int]] = []
        self.poison: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def compile_first(self, report: Any) -> None:
        self._engine.reset()

    def score(self, rows: Any, program: Any) -> Any:
        self._check(rows)
        self.batches.append(("score", len(rows)))
        return self._engine.score(rows, program)

    def prefill(self, rows: Any, slots: Any, program: Any) -> None:
        self._check(rows)
        self.batches.append(("generate", len(rows)))
        self._engine.prefill(rows, slots, program)

    def _check(self, rows: Any) -> None:
        if any(self.poison in row.ids for row in rows):
            raise RuntimeError("the device said no")


def validator() -> PromptValidator:
    model = micro_model()
    return PromptValidator(
        embed_dim=D,
        fingerprint=FINGERPRINT,
        dtype="float32",
        vocabulary=model.vocabulary,
        longest_label=6,
    )


def task_folder(folder: Path) -> Path:
    """One task alone, an ensemble of three, one without labels."""
    write_prompt(folder / "color.safetensors", seed=1, model_fingerprint=FINGERPRINT)
    for seed in range(3):
        write_prompt(folder / "voted" / f"seed_{seed}.safetensors", 3 + seed, seed=10 + seed)
    write_prompt(folder / "plain.npy", 7, seed=20)
    return folder


def make_service(
    folder: Path, *, allow_changes: bool = True, limits: Limits | None = None
) -> Service:
    tasks = [task for found in find_tasks(folder) for task in load_tasks(found, validator())]
    store = TaskStore(folder)
    served = store.apply({task.name: task for task in tasks}, validator())
    engine: Any = Compiled(micro_engine())
    return Service(
        engine,
        Tasks(served),
        validator=validator(),
        task_store=store,
        allow_changes=allow_changes,
        limits=limits or Limits(inputs=20),
        model_name="micro",
    )


@asynccontextmanager
async def running(service: Service, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, once that is ready."""
    app = make_app(service, **{"admin_token": "let-me-change", **options})
    async with app.router.lifespan_context(app):
        await app.state.starting
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            yield client


async def ask(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/predict", json=body)
