"""Prompts made from words: the same as tuned prompts of those values, for each example its own."""

import jax
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import (
    Context,
    DescribedPrompts,
    PromptTuning,
    attach_method,
    trainable_mask,
)
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.training.run import train
from tests.micro import ONE_LAYER, D, make_t5
from tests.tiny_run import experiment

METHOD = DescribedPrompts(positions=3, words=4)
TEXT = [11, 12, 1, 0]
TARGETS = np.array([[0, 5]], np.int32)
BLOCKS = [
    [[5, 6, 7, 0], [9, 9, 0, 0], [4, 5, 6, 7]],
    [[4, 0, 0, 0], [3, 8, 5, 6], [7, 7, 7, 7]],
]


def attach(model):
    return attach_method(model, METHOD, key=jax.random.key(0), context=Context())


def inputs(*blocks):
    return np.array([np.ravel(block).tolist() + TEXT for block in blocks], np.int32)


def test_a_position_is_the_label_and_the_turned_mean_of_the_words():
    model = make_t5(ONE_LAYER)
    logits_BSV = jax.jit(attach(model))(inputs(*BLOCKS), TARGETS.repeat(2, axis=0))
    table_VD = np.asarray(model.token_embedder.embedding.get_value())
    for row, block in enumerate(BLOCKS):
        vectors = []
        for label, *words in block:
            known = [table_VD[word] for word in words if word]
            mean = np.mean(known, axis=0) if known else np.zeros(D, np.float32)
            vectors.append(table_VD[label] + np.roll(mean, D // 2))
        trainable = with_prompt(model, np.stack(vectors), PromptTuning(length=3))
        np.testing.assert_allclose(
            logits_BSV[row], jax.jit(trainable)(np.array([TEXT]), TARGETS)[0], atol=1e-5
        )


def test_a_position_without_a_label_is_not_seen():
    attached = jax.jit(attach(make_t5(ONE_LAYER)))
    one, other, third = (
        attached(inputs([[5, 6, 7, 0], middle, [4, 5, 6, 7]]), TARGETS)
        for middle in ([0, 0, 0, 0], [0, 9, 8, 3], [9, 0, 0, 0])
    )
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - third).max() > 1e-3


def test_it_needs_inputs_with_descriptions(tmp_path):
    with pytest.raises(UserError, match=r"described_prompts reads .* set data\.objectives"):
        train(experiment(tmp_path, {"method": METHOD}))
    assert not list(tmp_path.iterdir())
    for field in ("positions", "words"):
        method = DescribedPrompts(**{field: 0})
        assert [f"method.{field} is 0" in error for error in method.config_errors()] == [True]


def test_all_of_the_model_trains_and_nothing_is_added():
    model = make_t5(ONE_LAYER)
    names = list(param_tree.split(attach(model))[1])
    assert names == [f"model/{name}" for name in param_tree.split(model)[1]]
    assert all(trainable_mask(METHOD, names).values())
