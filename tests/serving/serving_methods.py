"""What methods of all kinds keep of a training, for the micro T5 that the server's tests use."""

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.checkpoints.tuned_checkpoint import TunedCheckpoint, save_tuned
from prompt_tuning_jax.config.experiment import Experiment, Model
from prompt_tuning_jax.config.overrides import method_to_json, to_json
from prompt_tuning_jax.config.serving import Serving
from prompt_tuning_jax.inference.setup import model_fingerprint
from prompt_tuning_jax.methods import (
    Context,
    LoRA,
    MethodConfig,
    TunedModel,
    attach_method,
    trainable_mask,
)
from prompt_tuning_jax.serving.launch import open_service
from prompt_tuning_jax.serving.service import Service
from tests import tiny_run
from tests.serving.serving_app import running
from tests.serving.serving_micro import micro_model
from tests.tiny_run import LABELS, model_folder

LORA = LoRA(rank=2, dropout=0.1)
# So that targets have one shape: of a label and the end.
RANKING = Serving(
    lengths=(8,), batch_sizes=(4,), modes=("label", "score"), max_new_tokens=2, cache_rows=4
)
Test = Callable[[httpx.AsyncClient, Service], Coroutine[Any, Any, None]]


def moved(
    method: MethodConfig, *, seed: int = 0, labels: Sequence[str] = LABELS, tasks: int = 1
) -> TunedModel:
    """Away from where training begins, so that every array matters."""
    model = micro_model()
    context = Context(labels=tuple(labels), vocabulary=model.vocabulary, num_tasks=tasks)
    attached = attach_method(model, method, key=jax.random.key(seed), context=context)
    graphdef, params = param_tree.split(attached)
    draw = np.random.default_rng(seed)
    moved = {
        name: p + jnp.asarray(0.3 * draw.normal(size=p.shape), p.dtype)
        for name, p in params.items()
        if method.trains(name)
    }
    return param_tree.merge(graphdef, {**params, **moved})


def stored(
    method: MethodConfig,
    *,
    seed: int = 0,
    labels: Sequence[str] = LABELS,
    tasks: Sequence[str] = (),
) -> TunedCheckpoint:
    """What is kept of it."""
    attached = moved(method, seed=seed, labels=labels, tasks=len(tasks) or 1)
    for_inference = attached.for_inference()
    kept = for_inference.method.config
    params = param_tree.split(for_inference)[1]
    mask = trainable_mask(kept, list(params))
    metadata = PromptMetadata(
        model_fingerprint=model_fingerprint(micro_model()),
        task="colors",
        seed=seed,
        labels=tuple(labels),
    )
    return TunedCheckpoint(
        trainable={name: np.asarray(p) for name, p in params.items() if mask[name]},
        method=method_to_json(kept),
        metadata=metadata,
        tasks=tuple(tasks),
    )


def write_method(path: Path, method: MethodConfig, *, seed: int = 0, **about: str) -> Path:
    """A file as a run keeps it."""
    kept = stored(method, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tuned(
        path, dataclasses.replace(kept, metadata=dataclasses.replace(kept.metadata, **about))
    )
    return path


def write_json(folder: Path, method: MethodConfig, **training_fields: Any) -> None:
    """The config of a run of this method."""
    experiment = dataclasses.replace(tiny_run.experiment(folder), method=method)
    training = dataclasses.replace(experiment.training, **{"seeds": (0,), **training_fields})
    of = dataclasses.replace(experiment, training=training)
    (folder / "experiment.json").write_text(to_json(of))


def opened(folder: Path, serving: Serving = RANKING, **options: Any) -> Service:
    model = Model(name_or_path=str(model_folder()))
    return open_service(Experiment(model=model), str(folder), serving=serving, **options)


def with_service(service: Service, test: Test) -> None:
    async def run() -> None:
        async with asyncio.timeout(100), running(service) as client:
            while service.engine.compiler.is_running:
                await asyncio.sleep(0.02)
            await test(client, service)

    asyncio.run(run())


def opened_specs(service: Service) -> set[Any]:
    every = [one for task in service.tasks.everything().values() for one in task.prompts]
    return {one.adapter_spec for one in every if one.adapter_spec is not None}
