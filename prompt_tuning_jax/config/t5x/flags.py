"""T5X's macros as flags of this package's own gin files, where no file uses a macro of the name."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from prompt_tuning_jax.config.gin_syntax import Bound
from prompt_tuning_jax.errors import UserError

_log = logging.getLogger(__name__)

Fields = dict[str, Any]  # group.field -> value
# T5X's libraries, whose names are those of gin files for T5X.
T5X_LIBRARIES = ("__gin__", "__main__", "flax", "flaxformer", "jax", "prompt_tuning", "seqio", "t5")
USE_IMPORT_GIN = "'prompt-tuning import-gin FILE... --output config.py' writes a config from it"


def is_t5x_module(name: str) -> bool:
    """Returns whether a gin file that imports the module is one of T5X's."""
    return name.partition(".")[0] in (*T5X_LIBRARIES, "t5x")


def fields_of_t5x_flags(flags: Mapping[str, Bound]) -> Fields:
    """Returns the fields that T5X's macros set; UserError for a value of another type.

    A macro without an effect here is noted.
    """
    fields: Fields = {}
    for name, bound in flags.items():
        fields |= T5X_MACROS[name](bound)
    return fields


def note_pretraining_steps(flags: Mapping[str, Bound], values: Mapping[str, Any]) -> None:
    """Notes a TRAIN_STEPS that seems to include the steps of the restored checkpoint, as T5X's."""
    bound = flags.get("TRAIN_STEPS")
    initial = values.get("optimizer", {}).get("initial_step", 0)
    if bound and isinstance(bound.value, int) and bound.value > (initial or bound.value):
        _log.warning(
            "--gin.TRAIN_STEPS=%d counts from the first step of this run; in T5X it includes the "
            "checkpoint's %d, so there it is %d steps",
            *(bound.value, initial, bound.value - initial),
        )


def _one(field: str) -> Callable[[Bound], Fields]:
    return lambda bound: {field: bound.value}


def _lengths(bound: Bound) -> Fields:
    known = {"inputs": "data.inputs_length", "targets": "data.targets_length"}
    if not isinstance(bound.value, dict) or not set(bound.value) <= set(known):
        raise UserError(
            f"{bound.where}: {bound.value!r} must be a dictionary such as "
            "{'inputs': 512, 'targets': 8}"
        )
    return {known[feature]: length for feature, length in bound.value.items()}


def _module(bound: Bound) -> Fields:
    if isinstance(bound.value, str) and is_t5x_module(bound.value):
        return {}  # its tasks are here by name
    return {"data.module": bound.value or ""}


def _labels(bound: Bound) -> Fields:
    return {"method.init": "class_labels", "method.init_labels": bound.value}


def _prompt_file(bound: Bound) -> Fields:
    return {"method.init": "file", "method.init_path": bound.value}


def _normalization(bound: Bound) -> Fields:
    if bound.value == "NUM_REAL_TARGET_TOKENS":
        return {"training.loss_normalization": "tokens"}
    if isinstance(bound.value, str):
        raise UserError(
            f"{bound.where}: {bound.value!r} has no counterpart; use None, a sum, or "
            "'NUM_REAL_TARGET_TOKENS', a mean over the target tokens"
        )
    if bound.value is not None:
        _log.warning(
            "%s=%s: the loss is a sum; a constant factor changes no update of Adafactor or Adam",
            *(bound.where, bound.value),
        )
    return {"training.loss_normalization": "sum"}


def _seed(bound: Bound) -> Fields:
    return {} if bound.value is None else {"training.seeds": [bound.value]}


def _cached(bound: Bound) -> Fields:
    _log.warning("%s has no effect: tokenized examples are cached; see data.cache", bound.where)
    return {}


# A macro of T5X's runs and of google-research/prompt-tuning, and the fields that it sets.
T5X_MACROS: dict[str, Callable[[Bound], Fields]] = {
    "BATCH_SIZE": _one("training.batch_size"),
    "CLASS_LABELS": _labels,
    "DROPOUT_RATE": _one("model.dropout_rate"),
    "EVAL_PERIOD": _one("training.eval_every"),
    "INITIAL_CHECKPOINT_PATH": _one("model.name_or_path"),
    "LOSS_NORMALIZING_FACTOR": _normalization,
    "MIXTURE_OR_TASK_MODULE": _module,
    "MIXTURE_OR_TASK_NAME": _one("data.task"),
    "MODEL_DIR": _one("training.workdir"),
    "PROMPT_FILE": _prompt_file,
    "PROMPT_LENGTH": _one("method.length"),
    "RANDOM_SEED": _seed,
    "TASK_FEATURE_LENGTHS": _lengths,
    "TRAIN_STEPS": _one("training.steps"),
    "USE_CACHED_TASKS": _cached,
    "Z_LOSS": _one("training.z_loss"),
}
