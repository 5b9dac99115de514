"""Published models by name, of all families."""

import difflib
from collections import ChainMap
from collections.abc import Mapping

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.presets import PRESETS as CAUSAL_LM_PRESETS
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.t5.config import PRESETS as T5_PRESETS
from prompt_tuning_jax.models.t5gemma.presets import PRESETS as T5GEMMA_PRESETS
from prompt_tuning_jax.models.vit.presets import PRESETS as VIT_PRESETS

_PRESETS: Mapping[str, ModelConfig] = ChainMap(
    T5_PRESETS, CAUSAL_LM_PRESETS, T5GEMMA_PRESETS, VIT_PRESETS
)


def find_preset(name: str) -> ModelConfig | None:
    """Returns the configuration of a published model, or None for another name."""
    return _PRESETS.get(name)


def preset(name: str) -> ModelConfig:
    """Returns the configuration of a published model; UserError with similar names if unknown."""
    config = find_preset(name)
    if config is None:
        near = difflib.get_close_matches(name, _PRESETS, n=3) or list(_PRESETS)
        raise UserError(f"no preset is called {name!r}; did you mean {', '.join(near)}?")
    return config
