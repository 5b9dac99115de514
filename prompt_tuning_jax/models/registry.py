"""Published models by name, of all families."""

import difflib
import itertools
from collections.abc import Mapping

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.presets import PRESETS as CAUSAL_LM_PRESETS
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.t5.config import PRESETS as T5_PRESETS
from prompt_tuning_jax.models.t5gemma.presets import PRESETS as T5GEMMA_PRESETS
from prompt_tuning_jax.models.vit.presets import PRESETS as VIT_PRESETS

_PRESETS: tuple[Mapping[str, ModelConfig], ...] = (
    T5_PRESETS,
    CAUSAL_LM_PRESETS,
    T5GEMMA_PRESETS,
    VIT_PRESETS,
)


def find_preset(name: str) -> ModelConfig | None:
    """Returns the configuration of a published model, or None for another name."""
    return next((presets[name] for presets in _PRESETS if name in presets), None)


def preset(name: str) -> ModelConfig:
    """Returns the configuration of a published model; UserError with similar names if unknown."""
    config = find_preset(name)
    if config is None:
        known = list(itertools.chain(*_PRESETS))
        near = difflib.get_close_matches(name, known, n=3) or known
        raise UserError(f"no preset is called {name!r}; did you mean {', '.join(near)}?")
    return config
