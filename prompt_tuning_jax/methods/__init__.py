"""Tuning methods.

Each method has a config and a ``TuningModule``.  The config (``config/methods/``) holds the
hyper-parameters.  The module (one file in this folder) holds the parameters and defines what they
add to a model.  ``attach_method`` looks up the module by the name that the config gives.
"""

from importlib import import_module
from typing import Any

from prompt_tuning_jax.config.methods import (
    CPT,
    IA3,
    METHODS,
    WARP,
    Adapters,
    AdaptionPrompt,
    ADePT,
    Cartridge,
    DeepPrompts,
    DePT,
    DescribedPrompts,
    FullTuning,
    LoRA,
    MethodConfig,
    MultitaskPrompts,
    NoTuning,
    PatternTuning,
    PrefixTuning,
    PromptDesign,
    PromptTuning,
    PTuning,
    ResidualPrompt,
    SuperPosPrompt,
    method_name,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import (
    PROMPT,
    Context,
    Known,
    TunedModel,
    TuningModule,
    trainable_mask,
)
from prompt_tuning_jax.methods.image_models import with_classifier
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.typing import Array


def attach_method(
    model: Model, config: MethodConfig, *, key: Array, context: Context
) -> TunedModel:
    """Attaches a method with new parameters to a model; ``key`` initializes the parameters.

    ``model`` is not modified, and the result shares its arrays.  A model that reads images gets a
    classifier of the context's labels.  Raises UserError if a field of the config is invalid, or if
    the method needs something that the model and the context lack.
    """
    for error in config.config_errors():
        raise UserError(error)
    if model.config.reads_images:
        model = with_classifier(model, config, key=key, context=context)
    implementation: Any = config.implementation
    if isinstance(implementation, str):
        module, _, name = implementation.partition(":")
        implementation = getattr(import_module(module), name)
    tuned: TunedModel = implementation.attach(config, model, key=key, context=context)
    return tuned


__all__ = [
    "CPT",
    "IA3",
    "METHODS",
    "PROMPT",
    "WARP",
    "ADePT",
    "Adapters",
    "AdaptionPrompt",
    "Cartridge",
    "Context",
    "DePT",
    "DeepPrompts",
    "DescribedPrompts",
    "FullTuning",
    "Known",
    "LoRA",
    "MethodConfig",
    "MultitaskPrompts",
    "NoTuning",
    "PTuning",
    "PatternTuning",
    "PrefixTuning",
    "PromptDesign",
    "PromptTuning",
    "ResidualPrompt",
    "SuperPosPrompt",
    "TunedModel",
    "TuningModule",
    "attach_method",
    "method_name",
    "trainable_mask",
]
