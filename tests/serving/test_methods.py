"""Methods that are no plain prompts answer as they are predicted with, in batches of their own."""

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import pytest

from prompt_tuning_jax import commands, tree
from prompt_tuning_jax.commands.serving import Serving, open_service
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.experiment import Evaluation, Experiment, Model
from prompt_tuning_jax.methods import LoRA, MultitaskPrompts
from prompt_tuning_jax.serving.service import Service
from prompt_tuning_jax.serving.tasks import ServedPrompt
from tests import tiny_run
from tests.method_cases import CASES, ONE_OF_EACH
from tests.serving.serving_app import ADMIN, ask, running
from tests.serving.serving_methods import stored, write_method
from tests.serving.serving_micro import write_prompt
from tests.tiny_run import LABELS, model_folder

SERVING = Serving(lengths=(8,), batch_sizes=(4,), max_new_tokens=4, slots=4)
INPUTS = ["ban red", "kolo green", "mita"]
SERVED = [name for name in ONE_OF_EACH if name not in ("full", "prompt_tuning")]
Test = Callable[[httpx.AsyncClient, Service], Coroutine[Any, Any, None]]


def experiment(strategy: Any = "rank") -> Experiment:
    base = tiny_run.experiment("")
    return dataclasses.replace(base, evaluation=Evaluation(strategy=strategy))


def served(folder: Path, **options: Any) -> Service:
    model = Model(name_or_path=str(model_folder()))
    return open_service(Experiment(model=model), str(folder), serving=SERVING, **options)


def with_service(service: Service, test: Test) -> None:
    async def run() -> None:
        async with asyncio.timeout(100), running(service) as client:
            await test(client, service)

    asyncio.run(run())


@functools.cache
def all_of_them() -> tuple[Path, Service]:
    folder = tiny_run.scratch() / "all_methods"
    for name in SERVED:
        write_method(folder / f"{name}.safetensors", CASES[name].method)
    write_prompt(folder / "plain.safetensors", seed=3)
    return folder, served(folder)


def test_every_method_answers_as_it_is_predicted_with() -> None:
    folder, service = all_of_them()

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        for name in (*SERVED, "plain"):
            known = commands.predict(
                experiment(), prompts=[str(folder / f"{name}.safetensors")], inputs=INPUTS
            )
            every = [(text, label) for text in INPUTS for label in LABELS]
            scored = await ask(
                client,
                task=name,
                inputs=[text for text, _ in every],
                mode="score",
                options={"targets": [label for _, label in every]},
            )
            found = [one["log_prob"] for one in scored.json()["results"]]
            expected = [one.log_probs[label] for one in known for label in LABELS]  # type: ignore
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=name)
            labelled = (await ask(client, task=name, inputs=INPUTS)).json()["results"]
            assert [one["prediction"] for one in labelled] == [one.prediction for one in known]

    with_service(service, test)
