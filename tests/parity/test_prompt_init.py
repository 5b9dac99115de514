"""Initial prompts recorded from the original code."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.data.vocabularies.vocab import load_vocabulary
from prompt_tuning_jax.methods import prompt_init


@pytest.fixture(scope="module")
def recorded(shared):
    folder = shared / "fixtures/t5x"
    embedding_VD = jnp.asarray(np.load(folder / "tiny_embeddings_32128x4.npy"))
    vocabulary = load_vocabulary(shared / "fixtures/t5_vocab.model")
    texts = json.loads((folder / "init_texts.json").read_text())
    return np.load(folder / "init.npz"), texts, embedding_VD, vocabulary


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("population", [None, 5000, 10])
@pytest.mark.parametrize("length", [5, 20])
def test_sampled_vocabulary_draws_the_same_pieces(recorded, seed, population, length):
    want, _, embedding_VD, _ = recorded
    got = prompt_init.sampled_vocabulary(
        jax.random.PRNGKey(seed), embedding_VD, length, population=population or 0
    )
    np.testing.assert_array_equal(got, want[f"sample_seed{seed}_pop{population}_P{length}"])


@pytest.mark.parametrize("name", ["boolq", "cb", "sst", "longer"])
@pytest.mark.parametrize("length", [2, 7, 20])
def test_class_labels_are_means_of_their_pieces(recorded, name, length):
    want, texts, embedding_VD, vocabulary = recorded
    labels = texts[name]["texts"]
    expected = want[f"list_{name}_P{length}_sample5000"]
    got = prompt_init.initial_prompt(
        "class_labels",
        key=jax.random.PRNGKey(0),
        embedding_VD=embedding_VD,
        length=length,
        vocabulary=vocabulary,
        labels=labels,
    )
    first = min(len(labels), length)
    np.testing.assert_allclose(got[:first], expected[:first], atol=1e-6)
    assert got.shape == expected.shape


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("length", [5, 20])
def test_a_string_is_its_pieces(recorded, name, length):
    want, texts, embedding_VD, vocabulary = recorded
    text = texts[f"string_{name}"]["text"]
    keys = [k for k in want.files if k.startswith(f"string_{name}_P{length}_")]
    assert keys
    got = prompt_init.initial_prompt(
        "string",
        key=jax.random.PRNGKey(0),
        embedding_VD=embedding_VD,
        length=length,
        vocabulary=vocabulary,
        text=text,
    )
    rows = min(len(vocabulary.encode(text)), length)
    for key in keys:
        np.testing.assert_array_equal(got[:rows], want[key][:rows])
