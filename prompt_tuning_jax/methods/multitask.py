"""Multitask prompts: a shared prompt combined with per-task parameters (Wang et al. 2023).

The combinations but ``low_rank`` are those of prompt_tuning/extended/multitask_prompts.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.config.methods import Combine, MultitaskPrompts
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import small_param
from prompt_tuning_jax.methods.prompt import joined_input, require_decoder_prompts
from prompt_tuning_jax.methods.prompt_init import init_prompt
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.injections import Injections
from prompt_tuning_jax.typing import Array, HostArray

SHARED, TASK = "method/shared_PD", "method/task_NQD"
COLS, ROWS = "method/cols_NPR", "method/rows_NRD"
# Of ``features`` and ``projection``, S and A shared features and those of a task.
SHARED_FEATURES, TASK_FEATURES = "method/shared_PS", "method/task_NPA"
KERNEL, BIAS = "method/kernel_NDS", "method/bias_ND"
PER_TASK = (TASK, COLS, ROWS, TASK_FEATURES, KERNEL, BIAS)
ARRAYS = (SHARED, SHARED_FEATURES, *PER_TASK)
# The standard deviation of initial values in peft 0.21, tuners/multitask_prompt_tuning/model.py.
_STD = 0.02


class TaskPrompts(TuningModule[MultitaskPrompts]):
    """Prepends the prompt of each row's task to its input.

    ``arrays`` maps paths to arrays: those of ``ARRAYS`` that ``combine`` uses.
    """

    def __init__(self, config: MultitaskPrompts, arrays: Mapping[str, Array | HostArray]):
        super().__init__(config)
        for path, array in arrays.items():
            shared = path not in PER_TASK
            axes = ("prompt", "prompt_embed") if shared else ("tasks", *[None] * (array.ndim - 1))
            setattr(self, path.removeprefix("method/"), small_param(jnp.asarray(array), *axes))

    @classmethod
    def attach(
        cls, config: MultitaskPrompts, model: Model, *, key: Array, context: Context
    ) -> TunedModel:
        tasks = config.tasks or context.num_tasks
        if tasks < context.num_tasks:
            raise UserError(
                f"method.tasks is {tasks} and the data has {context.num_tasks} tasks; set it to 0"
            )
        require_decoder_prompts(config.decoder_length, model)
        shapes = array_shapes(config, model, tasks=tasks)
        if config.init == "source":
            arrays = target_start(context.init_arrays, tasks=tasks, task=config.source_task)
            _require_shapes(arrays, shapes, config)
            return TunedModel(model, cls(config, arrays))

        def initial(key: Array, length: int) -> Array:
            return init_prompt(config, model, key=key, length=length, context=context)

        return TunedModel(model, cls(config, _initialized(config, shapes, initial, key=key)))

    def for_inference(self, model: Model) -> TunedModel:
        config = replace(self.config.as_trained(), tasks=self.num_tasks)
        return TunedModel(model, TaskPrompts(config, self.arrays()))

    def arrays(self) -> dict[str, Array]:
        """Returns all arrays by path."""
        params = {path: getattr(self, path.removeprefix("method/"), None) for path in ARRAYS}
        return {path: param.get_value() for path, param in params.items() if param is not None}

    @property
    def num_tasks(self) -> int:
        """The number of tasks."""
        return next(len(array) for path, array in self.arrays().items() if path in PER_TASK)

    def injections(
        self,
        model: Model,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        if task_B is None and self.num_tasks > 1:
            raise UserError(
                f"method=multitask_prompts has prompts for {self.num_tasks} tasks, and the task of "
                "these inputs is unknown: train on a mixture of as many tasks (data.task), and set "
                "data.task to one of them to use its prompt"
            )
        if task_B is None:
            prompt = combined(self.config.combine, self.arrays(), 0)
        else:
            arrays = self.arrays()
            # Combine per task, not per row: there are fewer tasks, and the gradient then sums over
            # rows only once.
            each = [combined(self.config.combine, arrays, n) for n in range(self.num_tasks)]
            prompt = jnp.stack(each)[task_B]
        in_input, in_decoder = parts_of(self.config, prompt)
        source = joined_input(self.config, model, tokens_BT, in_input)
        return Injections(model_input=source, decoder_prompt=in_decoder)


P = TypeVar("P", Array, HostArray)


def parts_of(config: MultitaskPrompts, prompt: P) -> tuple[P, P | None]:
    """Splits a prompt ``[..., P, D]`` into that of the input and that of a decoder, if any."""
    if not config.decoder_length:
        return prompt, None
    length = config.prompt_positions()
    return prompt[..., :length, :], prompt[..., length:, :]


def _initialized(
    config: MultitaskPrompts,
    shapes: Mapping[str, tuple[int, ...]],
    initial: Callable[[Array, int], Array],
    *,
    key: Array,
) -> dict[str, Array]:
    """Returns initial arrays of these shapes; ``initial`` draws a prompt of a length."""
    keys = jax.random.split(key, 4)
    shared_PD = initial(keys[0], config.length + config.decoder_length)
    if config.tasks_init != "near":
        low = -0.5 if config.tasks_init == "uniform" else 0.0
        shared_path = next(path for path in shapes if path not in PER_TASK)
        drawn = {
            path: jax.random.uniform(jax.random.fold_in(keys[1], n), shape, jnp.float32, low, 0.5)
            for n, (path, shape) in enumerate(shapes.items())
            if path in PER_TASK
        }
        return {shared_path: shared_PD[:, : shapes[shared_path][1]], **drawn}
    if config.combine in ("features", "projection"):
        features = shapes[SHARED_FEATURES][1]
        shared = {SHARED_FEATURES: shared_PD[:, :features]}
        if config.combine == "features":
            noise = _STD * jax.random.normal(keys[1], shapes[TASK_FEATURES])
            return {**shared, TASK_FEATURES: shared_PD[:, features:] + noise}
        # The shared features pass through; further features start near zero.
        kernel = _STD * jax.random.normal(keys[1], shapes[KERNEL]) / features**0.5
        width = shapes[KERNEL][1]
        through = jnp.eye(width, features)
        return {**shared, KERNEL: kernel + through, BIAS: jnp.zeros(shapes[BIAS])}
    initialized = {SHARED: shared_PD}
    for name, array_key in zip((TASK, COLS, ROWS), keys[1:], strict=True):
        if name not in shapes:
            continue
        if config.combine == "concatenation":
            task_keys = jax.random.split(array_key, shapes[name][0])
            initialized[name] = jnp.stack([initial(k, config.task_length) for k in task_keys])
            continue
        array = _STD * jax.random.normal(array_key, shapes[name])
        if config.combine == "low_rank":
            # The first rank starts near one, so every entry of the product does too.
            first = (0, slice(None)) if name == ROWS else (slice(None), 0)
            array = array.at[:, *first].add(1.0)
        initialized[name] = array
    return initialized


def array_shapes(
    config: MultitaskPrompts, model: Model, *, tasks: int
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array by path; UserError if ``shared_features`` is too large."""
    length = config.length + config.decoder_length
    width, rank = model.config.embed_dim, config.rank
    features = config.shared_width(width)
    if features > width - (config.combine == "features"):
        raise UserError(
            f"method.shared_features is {features}, and with method.combine={config.combine} the "
            f"most for this model of width {width} is {width - (config.combine == 'features')}"
        )
    shared = {SHARED_FEATURES: (length, features)}
    by_combine: dict[Combine, dict[str, tuple[int, ...]]] = {
        "sum": {SHARED: (length, width), TASK: (tasks, length, width)},
        "concatenation": {SHARED: (length, width), TASK: (tasks, config.task_length, width)},
        "low_rank": {
            SHARED: (length, width),
            COLS: (tasks, length, rank),
            ROWS: (tasks, rank, width),
        },
        "features": {**shared, TASK_FEATURES: (tasks, length, width - features)},
        "projection": {**shared, KERNEL: (tasks, width, features), BIAS: (tasks, width)},
    }
    return by_combine[config.combine]


def combined(combine: Combine, arrays: Mapping[str, Array | HostArray], task: int) -> Array:
    """Computes the plain prompt ``[P, D]`` of one task (``[P + Q, D]`` for a concatenation).

    ``arrays`` maps paths to the arrays of a single member.  The result is a prompt for
    ``PromptTuning``: saved to a file, it can initialize another run (``init=file``) or be served
    directly.  Raises UserError if there is no task with this number.
    """
    tasks = next(len(array) for path, array in arrays.items() if path in PER_TASK)
    if not 0 <= task < tasks:
        raise UserError(f"there are {tasks} tasks, counted from 0; got number {task}")
    if combine == "features":
        parts = arrays[SHARED_FEATURES], arrays[TASK_FEATURES][task]
        return jnp.concatenate([jnp.asarray(part) for part in parts], axis=1)
    if combine == "projection":
        return jnp.asarray(arrays[SHARED_FEATURES]) @ arrays[KERNEL][task].T + arrays[BIAS][task]
    shared_PD = jnp.asarray(arrays[SHARED])
    if combine == "low_rank":
        return shared_PD * (arrays[COLS][task] @ arrays[ROWS][task])
    task_QD = jnp.asarray(arrays[TASK][task])
    return shared_PD + task_QD if combine == "sum" else jnp.concatenate([shared_PD, task_QD])


def target_start(
    arrays: Mapping[str, Array | HostArray], *, tasks: int, task: int = -1
) -> dict[str, HostArray]:
    """Builds the initial arrays of ``tasks`` new tasks from a source run.

    The shared prompt is copied from the source.  Each new task starts from the arrays of the
    source's task ``task``, or from the mean over its tasks if ``task`` is -1.  Raises UserError if
    ``arrays`` has no shared prompt, or the source has no such task.
    """
    shared = next((name for name in (SHARED, SHARED_FEATURES) if name in arrays), None)
    if shared is None:
        raise UserError(
            "method.init=source needs a run of multitask_prompts; set method.init_path to its "
            "folder"
        )
    start = {shared: np.asarray(arrays[shared])}
    for name in PER_TASK:
        if name not in arrays:
            continue
        source = np.asarray(arrays[name])
        if task >= len(source):
            raise UserError(f"method.source_task is {task}; the source has {len(source)} tasks")
        chosen = source.mean(axis=0) if task < 0 else source[task]
        start[name] = np.repeat(chosen[None], tasks, axis=0)
    return start


def _require_shapes(
    arrays: Mapping[str, HostArray],
    shapes: Mapping[str, tuple[int, ...]],
    config: MultitaskPrompts,
) -> None:
    for name, shape in shapes.items():
        if name not in arrays or arrays[name].shape != shape:
            given = list(arrays[name].shape) if name in arrays else "missing"
            raise UserError(
                f"method.init_path: {name} is {given} in {config.init_path}, and {list(shape)} "
                "here; method.combine, length, rank, task_length, shared_features and the model "
                "must be those of the source"
            )
