"""Attention that starts as a look at what is alike: before any training, prompts have a say."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import Context, DescribedPrompts, attach_method
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.pretraining.initializations import start_attention

D = 128
CONFIG = T5Config(
    vocab_size=300,
    embed_dim=D,
    num_heads=2,
    head_dim=D // 2,
    mlp_dim=32,
    num_encoder_layers=4,
    num_decoder_layers=1,
    mlp_activations=("gelu", "linear"),
    tie_embeddings=False,
)
EXAMPLES = 300


def share_right(*, matching: bool) -> float:
    """How often the class with a word of the text has the higher logit of two, untrained."""
    model = T5(CONFIG, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    table_VD = random.normal(size=(CONFIG.vocab_size, D)).astype(np.float32)
    model.token_embedder.embedding.set_value(jax.numpy.asarray(table_VD))
    model.decoder.logits_dense.kernel.set_value(jax.numpy.asarray(table_VD.T * D**-0.5))
    start_attention(model, matching=matching)
    right = random.integers(0, 2, EXAMPLES)
    labels = random.integers(3, 100, (EXAMPLES, 2))
    words = random.integers(100, 200, (EXAMPLES, 2, 2))
    texts = random.integers(200, 300, (EXAMPLES, 6))
    rows = np.arange(EXAMPLES)
    texts[:, 3] = words[rows, right, random.integers(0, 2, EXAMPLES)]
    block = np.concatenate([labels[..., None], words], axis=2).reshape(EXAMPLES, -1)
    attached = attach_method(
        model, DescribedPrompts(positions=2, words=3), key=jax.random.key(0), context=Context()
    )
    tokens = np.concatenate([block, texts], axis=1).astype(np.int32)
    logits = np.asarray(jax.jit(attached)(tokens, np.zeros((EXAMPLES, 1), np.int32)))[:, 0]
    scores = np.take_along_axis(logits, labels, axis=1)
    return float(np.mean(scores.argmax(1) == right))


def test_matching_attention_finds_the_class_of_a_word_and_mimetic_does_not():
    assert share_right(matching=True) > 0.65
    assert abs(share_right(matching=False) - 0.5) < 0.1


def test_the_start_is_of_its_seed_alone():
    def kernels(seed: int) -> dict[str, np.ndarray]:
        model = T5(CONFIG, rngs=nnx.Rngs(0))
        start_attention(model, matching=True, seed=seed)
        return {k: np.asarray(v) for k, v in param_tree.split(model)[1].items() if "attention" in k}

    one, again, other = kernels(0), kernels(0), kernels(1)
    name = "encoder/layers_0/attention/query/kernel"
    assert all((one[key] == again[key]).all() for key in one)
    assert not np.allclose(one[name], other[name])


def test_heads_that_do_not_make_up_the_width_are_refused():
    model = T5(dataclasses.replace(CONFIG, num_heads=1), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"num_heads \* head_dim"):
        start_attention(model, matching=False)
