"""Multitask prompts: a shared prompt, and what each task has of its own (Wang et al. 2023)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, Method, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import small_param
from prompt_tuning_jax.methods.prompt_init import Init, initial_prompt
from prompt_tuning_jax.models.injections import Injections
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array, HostArray

Combine = Literal["low_rank", "sum", "concatenation"]
MultitaskInit = Literal[Init, "source"]
SHARED, TASK = "method/shared_PD", "method/task_NQD"
COLS, ROWS = "method/cols_NPR", "method/rows_NRD"
OWN = (TASK, COLS, ROWS)
# Of the tasks' own arrays at the start, as in peft 0.21, tuners/multitask_prompt_tuning/model.py.
_SPREAD = 0.02


@dataclass(frozen=True, kw_only=True)
class MultitaskPrompts(Method):
    """A prompt shared by N tasks and, by ``combine``, what each has of its own, before the input.

    With P = ``length``, D the model's width, R = ``rank`` and Q = ``task_length``:

    - ``low_rank``: shared ∘ (cols[task] @ rows[task]), MPT's; ``P*D + N*R*(P + D)`` parameters,
    - ``sum``: shared + task's; ``P*D + N*P*D``,
    - ``concatenation``: shared, then Q vectors of the task; ``P*D + N*Q*D``.

    Every task starts from the shared prompt itself, a little apart from each other; in a
    concatenation its own part starts as ``init`` says.  ``tasks`` 0 is as many as the data has.

    ``init=source`` starts from a run of the same ``combine`` and sizes, whose folder is
    ``init_path`` (the target stage of MPT): each task here from the source's task number
    ``source_task``, or from the mean of all (-1).  Of several members the ``source_member``-th.
    """

    length: int = 100
    combine: Combine = "low_rank"
    rank: int = 1
    task_length: int = 20
    tasks: int = 0
    init: MultitaskInit = "sampled_vocabulary"
    init_text: str = ""
    init_path: str = ""
    init_population: int = 5000
    source_task: int = -1
    source_member: int = 0

    def attach(self, model: T5, *, key: Array, context: Context) -> TunedModel:
        tasks = self.tasks or context.tasks
        if tasks < context.tasks:
            raise UserError(
                f"method.tasks is {tasks} and the data has {context.tasks} tasks; set it to 0"
            )
        shapes = self.shapes(model, tasks=tasks)
        if self.init == "source":
            start = target_start(self._read_source(), tasks=tasks, task=self.source_task)
            for name, shape in shapes.items():
                if name not in start or start[name].shape != shape:
                    found = list(start[name].shape) if name in start else "missing"
                    raise UserError(
                        f"method.init_path: {name} is {found} in {self.init_path}, and "
                        f"{list(shape)} here; method.combine, length, rank, "
                        "task_length and the model must be those of the source"
                    )
            return self.with_arrays(model, start)
        keys = jax.random.split(key, 4)
        init = self.init

        def drawn(key: Array, length: int) -> Array:
            return initial_prompt(
                init,
                key=key,
                embedding_VD=model.token_embedder.table(),
                length=length,
                vocabulary=context.vocabulary,
                labels=context.labels,
                text=self.init_text,
                path=self.init_path,
                population=self.init_population,
            )

        arrays = {SHARED: drawn(keys[0], self.length)}
        for name, own_key in zip(OWN, keys[1:], strict=True):
            if name not in shapes:
                continue
            if self.combine == "concatenation":
                parts = [drawn(each, self.task_length) for each in jax.random.split(own_key, tasks)]
                arrays[name] = jnp.stack(parts)
                continue
            around_0 = _SPREAD * jax.random.normal(own_key, shapes[name])
            if self.combine == "low_rank":
                # The first rank is about one everywhere, so that the product is.
                first = (0, slice(None)) if name == ROWS else (slice(None), 0)
                around_0 = around_0.at[:, *first].add(1.0)
            arrays[name] = around_0
        return self.with_arrays(model, arrays)

    def with_arrays(self, model: T5, arrays: Mapping[str, Array | HostArray]) -> TunedModel:
        """The model with these arrays by path: the shared prompt's, and the tasks' own."""
        return TunedModel(model, TaskPrompts(self, arrays))

    def shapes(self, model: T5, *, tasks: int) -> dict[str, tuple[int, ...]]:
        """The shape of each array by path."""
        width = model.config.embed_dim
        own = {
            "sum": {TASK: (tasks, self.length, width)},
            "concatenation": {TASK: (tasks, self.task_length, width)},
            "low_rank": {
                COLS: (tasks, self.length, self.rank),
                ROWS: (tasks, self.rank, width),
            },
        }
        return {SHARED: (self.length, width), **own[self.combine]}

    def for_inference(self, attached: TunedModel) -> tuple[Method, TunedModel]:
        own = attached.method
        assert isinstance(own, TaskPrompts)
        kept = replace(
            self, tasks=own.tasks, init="uniform", init_path="", source_task=-1, source_member=0
        )
        arrays = own.arrays()
        return kept, kept.with_arrays(attached.model, arrays)

    def prompt_positions(self) -> int:
        return self.length + (self.task_length if self.combine == "concatenation" else 0)

    def config_errors(self) -> Iterator[str]:
        for name in ("rank", "task_length"):
            if getattr(self, name) < 1:
                yield f"method.{name} is {getattr(self, name)}; must be at least 1"
        for name, low in (("tasks", 0), ("source_member", 0), ("source_task", -1)):
            if getattr(self, name) < low:
                yield f"method.{name} is {getattr(self, name)}; must be at least {low}"

    def _read_source(self) -> dict[str, HostArray]:
        """The best arrays of one member of the run that is started from."""
        if not self.init_path:
            raise UserError(
                "method.init=source needs method.init_path, the folder of a run of "
                "multitask_prompts"
            )
        found = train_state.read_latest(Path(self.init_path).expanduser() / train_state.BEST)
        if found is None:
            raise UserError(
                f"method.init_path: {self.init_path} has no best checkpoint; give the folder of a "
                "run of multitask_prompts that has been evaluated"
            )
        leaves = {
            name.removeprefix("trainable/"): np.asarray(leaf) for name, leaf in found[1].items()
        }
        arrays = {name: leaves[name] for name in (SHARED, *OWN) if name in leaves}
        if SHARED not in arrays or len(arrays) == 1:
            raise UserError(f"method.init_path: {self.init_path} is no run of multitask_prompts")
        members = len(arrays[SHARED])
        if self.source_member >= members:
            raise UserError(
                f"method.source_member is {self.source_member} and {self.init_path} has {members} "
                "members, counted from 0"
            )
        return {name: array[self.source_member] for name, array in arrays.items()}


class TaskPrompts(TuningModule):
    """Puts the prompt of each row's task before its input."""

    def __init__(self, config: MultitaskPrompts, arrays: Mapping[str, Array | HostArray]):
        self.config = config
        for path, array in arrays.items():
            axes = ("prompt", "prompt_embed") if path == SHARED else ("tasks", None, None)
            setattr(self, path.removeprefix("method/"), small_param(jnp.asarray(array), *axes))

    def arrays(self) -> dict[str, Array]:
        """All arrays by path."""
        names = (SHARED, *OWN)
        own = {path: getattr(self, path.removeprefix("method/"), None) for path in names}
        return {path: param.get_value() for path, param in own.items() if param is not None}

    @property
    def tasks(self) -> int:
        """How many tasks there are."""
        return next(len(array) for path, array in self.arrays().items() if path in OWN)

    def injections(
        self,
        model: T5,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        if task_B is None and self.tasks > 1:
            raise UserError(
                f"method=multitask_prompts has prompts of {self.tasks} tasks, and nothing says "
                "which is meant: train on a mixture of so many (data.task), and use data.task with "
                "one of them"
            )
        if task_B is None:
            prompt = combined(self.config.combine, self.arrays(), 0)
        else:
            arrays = self.arrays()
            # One per task and not per row: there are fewer, and the gradient sums over rows once.
            each = [combined(self.config.combine, arrays, n) for n in range(self.tasks)]
            prompt = jnp.stack(each)[task_B]
        return Injections(encoder_input=model.embed(tokens_BT, prompt))


def combined(combine: Combine, arrays: Mapping[str, Array | HostArray], task: int) -> Array:
    """The plain prompt ``[P, D]`` of one task (``[P + Q, D]`` of a concatenation).

    ``arrays`` are those of one member by path, as the tuned ones of a run.  It is what
    ``PromptTuning`` takes: saved as a file, it starts one (``init=file``), or serves by itself.
    """
    tasks = next(len(array) for path, array in arrays.items() if path in OWN)
    if not 0 <= task < tasks:
        raise UserError(f"there are {tasks} tasks, counted from 0; got number {task}")
    shared_PD = jnp.asarray(arrays[SHARED])
    if combine == "low_rank":
        return shared_PD * (arrays[COLS][task] @ arrays[ROWS][task])
    own_QD = jnp.asarray(arrays[TASK][task])
    return shared_PD + own_QD if combine == "sum" else jnp.concatenate([shared_PD, own_QD])


def target_start(
    arrays: Mapping[str, Array | HostArray], *, tasks: int, task: int = -1
) -> dict[str, HostArray]:
    """What ``tasks`` new tasks start from: the source's shared prompt, and a task's own arrays.

    These are the ``task``-th of the source's, or the mean over all (-1), as often as asked for.
    """
    start = {SHARED: np.asarray(arrays[SHARED])}
    for name in OWN:
        if name not in arrays:
            continue
        own = np.asarray(arrays[name])
        if task >= len(own):
            raise UserError(f"method.source_task is {task}; the source has {len(own)} tasks")
        chosen = own.mean(axis=0) if task < 0 else own[task]
        start[name] = np.repeat(chosen[None], tasks, axis=0)
    return start
