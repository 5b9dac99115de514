"""Checks of ``check_gpu``: the server's engine and scheduler, without the network."""

import asyncio
import time
from typing import Any

import jax
import numpy as np
from _check_gpu_ops import relative_error
from _check_gpu_report import Report
from _check_gpu_speed import SMALL_T5, T5_BASE

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.hub import ASSETS
from prompt_tuning_jax.checkpoints.load import random_model
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.inference.ensemble import DecodeConfig, label_scores, write
from prompt_tuning_jax.methods import PROMPT, PromptTuning
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.metrics import Metrics
from prompt_tuning_jax.serving.scheduler import Job, Scheduler
from prompt_tuning_jax.serving.shapes import Kind, Row, Shapes, Targets
from prompt_tuning_jax.serving.tasks import ServedPrompt

_SCORE_ERROR = 3e-2  # of scores in bfloat16, whose programs round differently
_SAME_TOKENS = 0.85  # first tokens, likewise
_LABELS = ((5, 6, 1), (7, 1))


def run(report: Report) -> None:
    """Compiles a server's programs, answers requests for several prompts, and compares answers."""
    small = report.options.small
    name = SMALL_T5 if small else T5_BASE
    shapes = Shapes(
        lengths=(16 if small else 128,),
        batch_sizes=(4 if small else 16,),
        prompt_lengths=(5 if small else 100,),
        targets=(Targets(number=len(_LABELS), length=3),),
        max_new_tokens=4 if small else 32,
        slots=4 if small else 16,
    )
    requests = 8 if small else 128
    with report.guarded("serving"):
        vocabulary = str(ASSETS / "tiny" / "spiece.model")
        model = random_model(name, dtype="bfloat16", param_dtype="bfloat16", vocabulary=vocabulary)
        began = time.perf_counter()
        engine = Engine(model, shapes=shapes, cache_rows=8)
        engine.compile()
        seconds = time.perf_counter() - began
        report.check(
            "server compiles", True, f"{engine.compiler.progress.all} programs: {seconds:.1f} s"
        )
        rows = _rows(shapes, requests, width=model.config.embed_dim)
        for kind in ("score", "generate"):
            with report.guarded(f"serve {kind}"):
                answers, seconds = asyncio.run(_ask(engine, kind, rows))
                said = f"{requests / seconds:.0f} requests/s ({name}, T={shapes.longest})"
                passed, compared = _compared(model, shapes, kind, rows[0 : shapes.slots], answers)
                report.check(f"serve {kind}", passed, f"{said}; {compared}")


def _rows(shapes: Shapes, number: int, *, width: int) -> list[Row]:
    """Returns requests for two prompts in turn."""
    rng = np.random.default_rng(0)
    prompts = [
        ServedPrompt(
            name=f"prompt_{n}",
            prompt_PD=rng.normal(size=(shapes.prompt_lengths[-1], width)).astype(np.float32),
            metadata=PromptMetadata(),
        )
        for n in range(2)
    ]
    lengths = rng.integers(shapes.longest // 2, shapes.longest, number)
    return [
        Row(
            ids=(*rng.integers(3, 5000, length).tolist(), 1),
            prompt=prompts[n % 2],
            targets=_LABELS,
            limit=shapes.max_new_tokens,
        )
        for n, length in enumerate(lengths)
    ]


async def _ask(engine: Engine, kind: Kind, rows: list[Row]) -> tuple[list[Any], float]:
    """Sends all requests at once; returns the answers and the seconds that all took."""
    scheduler = Scheduler(engine, Metrics())
    scheduler.start()
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    jobs = [Job(kind=kind, row=row, future=loop.create_future(), owner=object()) for row in rows]
    scheduler.submit(jobs)
    try:
        answers = await asyncio.gather(*(job.future for job in jobs))
        return answers, time.perf_counter() - began
    finally:
        await scheduler.close()


def _compared(
    model: Model, shapes: Shapes, kind: Kind, rows: list[Row], answers: list[Any]
) -> tuple[bool, str]:
    """Compares answers of the server with those of each row's prompt by itself."""
    labels_CS = np.zeros((len(_LABELS), 3), np.int32)
    for label_S, ids in zip(labels_CS, _LABELS, strict=True):
        label_S[: len(ids)] = ids
    errors, same = [], []
    for first in range(2):  # the rows of each prompt
        own = rows[first::2]
        prompt_PD = own[0].prompt.prompt_PD  # type: ignore[union-attr]
        tuned = with_prompt(model, prompt_PD, PromptTuning(length=len(prompt_PD)))
        graphdef, frozen = param_tree.split(tuned)
        trainable = {PROMPT: frozen.pop(PROMPT)[None]}
        tokens_BT = np.zeros((len(own), shapes.longest), np.int32)
        for tokens_T, row in zip(tokens_BT, own, strict=True):
            tokens_T[: len(row.ids)] = row.ids
        mine = answers[: len(rows)][first::2]
        if kind == "score":
            expected = label_scores(graphdef, trainable, frozen, tokens_BT, labels_CS, 1)
            errors.append(relative_error(mine, np.asarray(expected)[0]))
        else:
            config = DecodeConfig(max_length=shapes.max_new_tokens)
            key = jax.random.key(0)
            ids_BS = np.asarray(write(graphdef, config, trainable, frozen, tokens_BT, key)[0])[0]
            same += [a.ids[0] == int(b[0]) for a, b in zip(mine, ids_BS, strict=True)]
    if kind == "score":
        return max(errors) <= _SCORE_ERROR, f"error {max(errors):.1e} of {_SCORE_ERROR:.0e}"
    share = float(np.mean(same))
    return share >= _SAME_TOKENS, f"{100 * share:.0f} % of the first tokens"
