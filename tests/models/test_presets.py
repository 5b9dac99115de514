"""Published decoder-only models have the published numbers of parameters."""

import math

import pytest

from prompt_tuning_jax.checkpoints.parameters import parameter_shapes
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.presets import PRESETS
from prompt_tuning_jax.models.registry import preset

# As the models' cards and their safetensors' metadata give them.
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200,
    "bigscience/bloomz-560m": 559_214_592,
    "bigscience/bloomz-1b1": 1_065_314_304,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    """The shapes are compared with those of models in checkpoints/test_causal_hf.py."""
    assert sum(map(math.prod, parameter_shapes(preset(name)).values())) == PUBLISHED[name]


def test_every_preset_is_counted() -> None:
    assert PRESETS.keys() == PUBLISHED.keys()


def test_an_unknown_name_is_answered_with_similar_ones() -> None:
    with pytest.raises(UserError, match=r"'google/gemma-3-270'; did you mean google/gemma-3-270m"):
        preset("google/gemma-3-270")


def test_qwen_3_has_its_published_window_and_end() -> None:
    config = preset("Qwen/Qwen3-0.6B")
    assert (config.max_positions, config.token_ids.eos) == (40_960, 151_645)
