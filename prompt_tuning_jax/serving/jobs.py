"""The rows of a request: for each input one for each prompt of its task, or several."""

import asyncio
from collections.abc import Callable, Hashable, Sequence

from prompt_tuning_jax.serving.adapter_spec import ServedMethod
from prompt_tuning_jax.serving.batcher import Job
from prompt_tuning_jax.serving.methods import Methods
from prompt_tuning_jax.serving.request_parser import Wanted
from prompt_tuning_jax.serving.rows import Row
from prompt_tuning_jax.serving.schema import Mode
from prompt_tuning_jax.serving.shapes import Kind, Shapes
from prompt_tuning_jax.serving.tasks import Served

# The number of an input and the name of a prompt -> what hears of the ids as they are written.
Follow = Callable[[int, str], Callable[[list[int]], None]]


def jobs_of(
    mode: Mode,
    wanted: Sequence[Wanted],
    *,
    shapes: Shapes,
    methods: Methods,
    apart: bool = False,
    follow: Follow | None = None,
) -> list[list[Job]]:
    """For each input a job for each prompt, or several where there are many labels.

    ``apart`` keeps tasks out of each other's batches; ``methods`` says which of them, that are no
    prompts, can share one.
    """
    owner = object()
    loop = asyncio.get_running_loop()
    jobs = []
    for number, one in enumerate(wanted):
        own = []
        for prompt in one.prompts:
            for targets in [()] if mode == "generate" else _in_parts(one.targets, shapes):
                method = prompt if isinstance(prompt, ServedMethod) else None
                row = Row(
                    ids=one.ids,
                    prompt=None if isinstance(prompt, ServedMethod) else prompt,
                    method=method,
                    targets=targets,
                    limit=one.limit,
                    min_length=one.min_length,
                    repetition_penalty=one.repetition_penalty,
                    no_repeat_ngram_size=one.no_repeat_ngram_size,
                )
                name = "" if prompt is None else prompt.name
                beside: Hashable = one.task.name if apart else None
                if method is not None:
                    beside = method.number if apart else methods.shared_by(method)
                job = Job(
                    kind=_kind(mode, prompt),
                    row=row,
                    future=loop.create_future(),
                    owner=owner,
                    apart=beside,
                    on_ids=None if follow is None else follow(number, name),
                )
                own.append(job)
        jobs.append(own)
    return jobs


def _kind(mode: Mode, prompt: Served | None) -> Kind:
    if mode != "generate":
        return "score"
    return "write" if isinstance(prompt, ServedMethod) else "generate"


def _in_parts(
    targets: tuple[tuple[int, ...], ...], shapes: Shapes
) -> list[tuple[tuple[int, ...], ...]]:
    """Targets in parts that fit the compiled shapes, in order."""
    number = shapes.targets_at_once(max(map(len, targets)))
    return [targets[i : i + number] for i in range(0, len(targets), number)]
