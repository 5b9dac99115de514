"""What a decoder-only model cannot read is refused before it is computed."""

from typing import Any

import numpy as np
import pytest

import prompt_tuning_jax as pt
from prompt_tuning_jax.errors import UserError
from tests.tiny_lm import make_lm


@pytest.fixture(scope="module")
def model() -> Any:
    made = make_lm("gpt2")
    return made


def test_prompt_input_and_target_share_the_window(model: Any) -> None:
    window = model.config.max_positions
    prompt = np.zeros((4, model.config.embed_dim), np.float32)
    fits = [[5] * (window - 4 - 2)]
    assert pt.score(model, fits, [[6, 7, 8]], prompt).shape == (1,)
    assert pt.generate(model, fits, prompt, max_length=3).ids.shape == (1, 3)
    for call in (
        lambda: pt.score(model, fits, [[6, 7, 8, 9]], prompt),
        lambda: pt.logits(model, fits, [[6, 7, 8, 9]], prompt),
        lambda: pt.generate(model, fits, prompt, max_length=4),
        lambda: pt.logits(model, [[5] * (window + 1)]),
        lambda: pt.encode(model, [[5] * (window + 1)]),
    ):
        with pytest.raises(UserError, match=rf"window has {window} positions: \d of the prompt"):
            call()


def test_a_row_without_tokens_needs_a_prompt(model: Any) -> None:
    fill = model.token_ids.fill
    empty = np.full((1, 3), model.token_ids.pad)
    assert fill == -1
    with pytest.raises(UserError, match=r"inputs\[0\] has no tokens"):
        pt.generate(model, empty)
    prompt = np.zeros((4, model.config.embed_dim), np.float32)
    assert pt.generate(model, empty, prompt, max_length=2).ids.shape == (1, 2)
