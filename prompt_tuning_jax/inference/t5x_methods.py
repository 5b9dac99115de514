"""Opens what the original code trained, other than plain prompts, from T5X checkpoints."""

from collections.abc import Callable
from pathlib import Path

from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray
from prompt_tuning_jax.checkpoints.location import is_address, is_t5x
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.checkpoints.t5x.arrays import OptimizerState
from prompt_tuning_jax.checkpoints.t5x.methods import (
    Combined,
    has_method,
    is_numpy_folder,
    numpy_arrays,
    read_method,
)
from prompt_tuning_jax.checkpoints.t5x.reader import open_t5x
from prompt_tuning_jax.checkpoints.tuned_checkpoint import TunedCheckpoint
from prompt_tuning_jax.config.methods import MultitaskPrompts
from prompt_tuning_jax.config.overrides import method_to_json
from prompt_tuning_jax.data.tasks.task import TrainedTask
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.t5.config import T5Config


def holds_method(place: str | Path) -> bool:
    """Returns whether a T5X checkpoint holds more than a plain prompt.

    It may also be a folder of the original's checkpointer.
    """
    return _open(place) is not None


def t5x_method(
    place: str | Path, config: ModelConfig, *, combined: Combined | None = None
) -> TunedCheckpoint | None:
    """Reads the method in a T5X checkpoint as a run's checkpoint; None if it holds none.

    ``combined`` says what the checkpoint does not (``read_method``).  Tasks are called by their
    numbers, from 0.  Raises UserError for arrays
    that do not fit the model.
    """
    checkpoint = _open(place)
    if checkpoint is None:
        return None
    if not isinstance(config, T5Config):
        raise UserError(f"{place} was trained by T5X for a T5, and this model is not one")
    params, open_state = checkpoint
    method, trainable = read_method(
        params, config, of=str(place), combined=combined, open_state=open_state
    )
    # A checkpoint has no names of tasks, only their order.
    tasks = tuple(map(str, range(method.tasks))) if isinstance(method, MultitaskPrompts) else ()
    return TunedCheckpoint(
        trainable=trainable,
        method=method_to_json(method),
        metadata=PromptMetadata(mixture=tuple(TrainedTask(name=task) for task in tasks)),
        tasks=tasks,
    )


def _open(
    place: str | Path,
) -> tuple[dict[str, LazyArray], Callable[[], OptimizerState] | None] | None:
    if not is_address(str(place)):
        if not Path(place).exists():
            return None
        if Path(place).is_dir() and is_numpy_folder(Path(place)):
            return numpy_arrays(Path(place)), None
    if not is_t5x(place):
        return None
    checkpoint = open_t5x(place)
    if not has_method(checkpoint.params):
        return None
    return checkpoint.params, checkpoint.open_state
