"""Whatever the description of the paths allows, and a crowd: no 5xx, no hang, nothing lost."""

import asyncio
import gc
import os
import random
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks

from prompt_tuning_jax.serving.schema import Limits
from prompt_tuning_jax.serving.service import Service
from tests.serving.live_server import live
from tests.serving.serving_app import ADMIN, ask, make_service, running, task_folder

FUZZED = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "12")),
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CHECKS = (
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
)


def test_everything_that_its_description_allows(tmp_path: Path) -> None:
    service = make_service(task_folder(tmp_path / "tasks"))
    with live(service, admin_token="let-me-change") as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        tried = []
        for result in schema.get_all_operations():
            operation = result.ok()
            tried.append(f"{operation.method.upper()} {operation.path}")
            modes = schemathesis.GenerationMode

            @FUZZED
            @given(
                case=operation.as_strategy() | operation.as_strategy(generation_mode=modes.NEGATIVE)
            )
            def one(case: Any) -> None:
                headers = ADMIN if "tasks/{name}" in case.path else {}
                case.call_and_validate(checks=CHECKS, headers=headers, timeout=20)

            one()
        assert len(tried) == 8, tried
        assert httpx.get(f"{url}/readyz").status_code == 200
        body = {"inputs": ["ban"], "options": {"labels": ["red", "green"]}}
        assert httpx.post(f"{url}/v1/predict", json=body).status_code == 200
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"]


async def _crowd(client: httpx.AsyncClient, service: Service, number: int) -> dict[int, int]:
    """Random requests of all kinds at once, each checked; how many got which status."""
    draw = random.Random(7)
    words = ["ban", "kolo", "red", "green", "mita", "dota"]
    known: dict[tuple[str, str, str], Any] = {}
    statuses: dict[int, int] = {}
    limit = asyncio.Semaphore(20)

    async def one() -> None:
        mode = draw.choice(["label", "label", "generate", "score"])
        tasks = draw.choices(["color", "voted"], k=draw.randint(1, 3))
        inputs = [" ".join(draw.choices(words, k=draw.randint(1, 2))) for _ in tasks]
        options: dict[str, Any] = {"targets": ["red"] * len(tasks)} if mode == "score" else {}
        if draw.random() < 0.05:
            options["deadline_ms"] = 1
        body = {"task": tasks, "inputs": inputs, "mode": mode, "options": options}
        async with limit:
            if draw.random() < 0.05:  # goes away
                asking = asyncio.create_task(ask(client, **body))
                await asyncio.sleep(0.002)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                return
            answer = await ask(client, **body)
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        if answer.status_code != 200:
            return
        results = answer.json()["results"]
        assert [result["task"] for result in results] == tasks
        for task, text, result in zip(tasks, inputs, results, strict=True):
            parts = [
                p.get("probabilities", {}).values() or [p["log_prob"]] for p in result["prompts"]
            ]
            numbers = np.array([list(part) for part in parts])
            before = known.setdefault((task, text, mode), numbers)
            np.testing.assert_allclose(numbers, before, rtol=1e-4, atol=1e-5)

    await asyncio.gather(*(one() for _ in range(number)))
    return statuses


def _resident() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def test_a_crowd_gets_the_same_answers_as_each_alone(tmp_path: Path) -> None:
    async def test() -> None:
        service = make_service(task_folder(tmp_path), limits=Limits(waiting_rows=100))
        async with asyncio.timeout(60), running(service) as client:
            statuses = await _crowd(client, service, 150)
            assert set(statuses) <= {200, 429, 504}
            assert statuses[200] > 20
            assert service.scheduler.waiting == 0

    asyncio.run(test())


@pytest.mark.slow
def test_a_soak_leaves_memory_flat(tmp_path: Path) -> None:
    async def test() -> None:
        service = make_service(task_folder(tmp_path))
        async with asyncio.timeout(300), running(service) as client:
            held = []
            for _ in range(6):
                statuses = await _crowd(client, service, 200)
                assert set(statuses) <= {200, 504}
                gc.collect()
                held.append(_resident())
            assert service.scheduler.waiting == 0
            # kB; the first rounds fill caches.
            assert held[-1] - held[2] < 8_000, held
            assert len(asyncio.all_tasks()) < 5

    asyncio.run(test())
