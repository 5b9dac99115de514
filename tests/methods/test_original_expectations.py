"""The expectations of the original code's own tests, in figures: google-research/prompt-tuning.

Those of extended/multitask_prompts_test.py are in test_multitask.py, and those of the layers and of
train_test.py in the tests against T5X's recorded numbers.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.config.methods import Placement
from prompt_tuning_jax.data.vocabularies.vocab import Vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.ia3 import Scale
from prompt_tuning_jax.methods.prompt_combine import attention_mask, combine
from prompt_tuning_jax.methods.prompt_init import initial_prompt
from prompt_tuning_jax.models.injections import LayerPrompt, ModelInput
from tests.micro import ONE_LAYER, make_t5

# Each row of the table holds its own number.
TABLE = jnp.tile(jnp.arange(100.0)[:, None], (1, 10))


class Pieces(Vocabulary):
    """A vocabulary with the pieces that those tests give to three texts."""

    def __init__(self) -> None:
        pass

    def encode(self, text: str) -> list[int]:
        return {"true": [23, 54], "false": [45], "text": [10, 50, 75]}.get(text, [0])


def start(init: Any, length: int, *, labels: Sequence[str] = (), population: int = 0) -> np.ndarray:
    prompt_PD = initial_prompt(
        init,
        key=jax.random.key(0),
        embedding_VD=TABLE,
        length=length,
        vocabulary=Pieces(),
        labels=labels,
        text="text",
        population=population,
    )
    return np.asarray(prompt_PD)


@pytest.mark.parametrize(("length", "labels"), [(10, 2), (2, 3)])
def test_prompts_from_labels(length: int, labels: int) -> None:
    prompt_PD = start("class_labels", length, labels=("true", "false", "maybe")[:labels])
    assert prompt_PD.shape == (length, 10)
    np.testing.assert_array_equal(prompt_PD[0], np.full(10, (23 + 54) / 2))
    np.testing.assert_array_equal(prompt_PD[1], np.full(10, 45))


@pytest.mark.parametrize("length", [2, 6])
def test_prompts_from_a_text(length: int) -> None:
    prompt_PD = start("string", length)
    assert prompt_PD.shape == (length, 10)
    np.testing.assert_array_equal(prompt_PD[:3, 0], [10, 50, 75][:length])


@pytest.mark.parametrize(("length", "population"), [(20, 100), (15, 50), (15, 0)])
def test_prompts_from_sampled_embeddings(length: int, population: int) -> None:
    prompt_PD = start("sampled_vocabulary", length, population=population)
    assert prompt_PD.shape == (length, 10)
    assert len(np.unique(prompt_PD[:, 0])) == length
    assert prompt_PD.max() < (population or 100)
    np.testing.assert_array_equal(prompt_PD, np.tile(prompt_PD[:, :1], (1, 10)))


def test_a_prompt_from_an_array_of_another_shape() -> None:
    fields: dict[str, Any] = {"key": jax.random.key(0), "embedding_VD": jnp.zeros((9, 256))}
    array = np.random.default_rng(0).normal(size=(5, 256))
    np.testing.assert_allclose(initial_prompt("file", length=5, file_PD=array, **fields), array)
    with pytest.raises(UserError, match=r"shape \[5, 256\]; this run trains \[256, 256\]"):
        initial_prompt("file", length=256, file_PD=array, **fields)


def embedded(lengths: Sequence[int], *, width: int = 20) -> tuple[ModelInput, np.ndarray]:
    """Inputs of ones that end with -2 before padding of -1, and their tokens."""
    longest = max(lengths)
    tokens_BT = np.zeros((len(lengths), longest), np.int32)
    embeddings = np.full((len(lengths), longest, width), -1.0, np.float32)
    for row, length in enumerate(lengths):
        tokens_BT[row, :length], embeddings[row, :length] = 5, 1.0
        tokens_BT[row, length - 1], embeddings[row, length - 1] = 1, -2.0
    source = ModelInput(embeddings_BUD=jnp.asarray(embeddings), mask_BU=jnp.asarray(tokens_BT != 0))
    return source, tokens_BT


@pytest.mark.parametrize("placement", ["prefix", "after_first", "before_eos"])
def test_where_prompts_come(placement: Placement) -> None:
    source, tokens_BT = embedded([14, 7])
    prompt_BPD = jnp.arange(2 * 5 * 20.0).reshape(2, 5, 20)
    found, _ = combine(prompt_BPD, source, tokens_BT, placement=placement)
    joined = found.embeddings_BUD
    if found.prompt_BPD is not None:
        joined = jnp.concatenate([found.prompt_BPD, joined], axis=1)
    assert joined.shape == (2, 14 + 5, 20)
    for row, length in enumerate([14, 7]):
        at = {"prefix": 0, "after_first": 1, "before_eos": length - 1}[placement]
        own = np.asarray(source.embeddings_BUD[row])
        expected = np.concatenate([own[:at], prompt_BPD[row], own[at:]])
        np.testing.assert_array_equal(joined[row], expected)


# Lengths and prompt lengths of extended/masks_test.py, and which positions may see which.
MASKS: list[tuple[list[int], int, dict[str, Any]]] = [
    ([5, 6, 7, 6, 1], 4, {"prompt_to_input": True, "prompt_to_prompt": "all"}),
    ([1, 2, 6, 3, 2, 5], 10, {"prompt_to_input": False, "prompt_to_prompt": "none"}),
    ([10, 5, 2, 1, 2, 5, 10], 5, {"prompt_to_input": False, "prompt_to_prompt": "all"}),
    ([8, 1, 3, 4, 1, 5], 4, {"prompt_to_input": False, "prompt_to_prompt": "causal"}),
    ([8, 1, 3, 4, 1, 5], 4, {"prompt_to_input": True, "prompt_to_prompt": "causal"}),
]


@pytest.mark.parametrize(("lengths", "prompt_length", "fields"), MASKS)
def test_who_sees_whom(lengths: list[int], prompt_length: int, fields: dict[str, Any]) -> None:
    source, tokens_BT = embedded(lengths)
    prompt = jnp.zeros((prompt_length, 20))
    found, is_prompt_BU = combine(prompt, source, tokens_BT, placement="prefix")
    mask = attention_mask(is_prompt_BU, input_to_prompt=True, **fields)
    whole = prompt_length + max(lengths)
    seen = np.ones((1, whole, whole), bool) if mask is None else np.asarray(mask)
    seen = np.broadcast_to(seen, (len(lengths), whole, whole))
    for row, length in enumerate(lengths):
        for query in range(prompt_length + length):
            for key in range(prompt_length + length):
                expected = True
                if query < prompt_length and key >= prompt_length:
                    expected = fields["prompt_to_input"]
                elif query < prompt_length:
                    among = fields["prompt_to_prompt"]
                    expected = among == "all" or (key <= query if among == "causal" else False)
                    expected = expected or key == query
                assert seen[row, query, key] == expected, (row, query, key)
    np.testing.assert_array_equal(found.mask_BU, tokens_BT != 0)


@pytest.mark.parametrize(("add", "expected"), [(False, 2.0), (True, 3.0)])
def test_prompts_of_layers(add: bool, expected: float) -> None:
    prompt = LayerPrompt(vectors_BPD=jnp.full((2, 5, 20), 2.0), add=add)
    after = np.asarray(prompt.put_into(jnp.ones((2, 14, 20))))
    assert after.shape == (2, 14, 20)
    np.testing.assert_array_equal(after[:, :5], expected)
    np.testing.assert_array_equal(after[:, 5:], 1.0)


def test_scales_of_heads_are_scales_of_their_joined_outputs() -> None:
    linear = make_t5(ONE_LAYER).encoder.layer(0).attention.key
    scale, heads = Scale(linear, of="output"), ONE_LAYER.num_heads
    factors_HK = jax.random.uniform(jax.random.key(0), (heads, ONE_LAYER.head_dim))
    scale.scale_F.set_value(factors_HK.reshape(-1))
    x = jax.random.normal(jax.random.key(1), (12, 10, linear.kernel.shape[0]))
    y = linear(x)
    of_heads = y.reshape(12, 10, heads, -1) * factors_HK
    np.testing.assert_allclose(scale(x, linear), of_heads.reshape(y.shape), rtol=1e-6)
