"""What a decoder-only model cannot read is refused before it is computed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prompt_tuning_jax as pt
from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.setup import Members
from prompt_tuning_jax.methods import (
    Cartridge,
    Context,
    NoTuning,
    PrefixTuning,
    PromptTuning,
    attach_method,
)
from tests.micro import Words
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


@pytest.mark.parametrize("method", [PrefixTuning(length=3), Cartridge(length=3, init="uniform")])
def test_a_prefix_alone_is_nothing_to_go_on_from(method: Any) -> None:
    """It has keys and values and no hidden state, from which the first token would follow."""
    model = make_lm("llama")
    model.vocabulary = Words()
    context = Context(vocabulary=Words())
    attached = attach_method(model, method, key=jax.random.key(0), context=context)
    empty = np.full((1, 3), model.token_ids.pad)
    for call in (
        lambda: pt.logits(attached, empty, [[5]]),
        lambda: pt.score(attached, empty, [[5]]),
        lambda: pt.generate(attached, empty, max_length=2),
    ):
        with pytest.raises(UserError, match=r"inputs\[0\] has no tokens"):
            call()
    assert members_of(model, NoTuning()).added_positions() == (0, 0)
    inside, before = members_of(model, method).added_positions()
    assert inside == 0 and before >= 2
    assert members_of(model, PromptTuning(length=4, init="uniform")).added_positions() == (4, 0)
    plain = dict(param_tree.split(attached)[1])
    stacked = param_tree.stack_layers(plain, jnp.stack)
    assert any("/layers/" in name for name in stacked)
    group = Members(
        graphdef=param_tree.split(attached)[0], trainable={}, frozen=stacked, mask={}, number=1
    )
    assert group.added_positions() == (inside, before)


def members_of(model: Any, method: Any) -> Members:
    context = Context(vocabulary=Words())
    attached = attach_method(model, method, key=jax.random.key(0), context=context)
    graphdef, params = param_tree.split(attached)
    own = {name: array[None] for name, array in params.items() if method.trains(name)}
    frozen = {name: array for name, array in params.items() if name not in own}
    return Members(graphdef=graphdef, trainable=own, frozen=frozen, mask={}, number=1)
