"""Methods on models that read images: what applies to them, and their trained classifier."""

from typing import cast

import jax

from prompt_tuning_jax.config.methods import (
    METHODS,
    MethodConfig,
    PrefixTuning,
    PromptTuning,
    method_name,
)
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.vit.config import ViTConfig
from prompt_tuning_jax.typing import Array


def with_classifier(model: Model, config: MethodConfig, *, key: Array, context: Context) -> Model:
    """Returns the model with a classifier of the context's labels, which every method trains.

    The model's own is the start if it has the same labels.  Raises UserError for methods and fields
    that are about text, and without labels.
    """
    _require_for_images(config)
    if not config.is_trainable:
        return model
    if not context.labels:
        raise UserError(
            "this model chooses among classes, and no labels are known: set data.labels"
        )
    # The fold keeps this key distinct from those of the method's parameters.
    tuned = model.for_labels(context.labels, key=jax.random.fold_in(key, 0xC1A5))
    tuned.vocabulary = ClassVocabulary(cast(ViTConfig, tuned.config))
    return tuned


def _require_for_images(config: MethodConfig) -> None:
    if not config.for_images:
        known = ", ".join(sorted(name for name, method in METHODS.items() if method.for_images))
        raise UserError(
            f"method={method_name(config)} works with words, and this model reads images; choose "
            f"one of {known}"
        )
    if isinstance(config, PromptTuning):
        usual = PromptTuning()
        for name in ("placement", "prompt_to_input", "prompt_to_prompt", "input_to_prompt"):
            if getattr(config, name) != getattr(usual, name):
                raise UserError(
                    f"method.{name} is {getattr(config, name)}, which is about text, and this "
                    "model reads images; drop it"
                )
    if isinstance(config, PrefixTuning) and config.init == "words" and not config.hidden:
        raise UserError(
            "method.init=words takes words, and this model reads images; set method.init=uniform"
        )
