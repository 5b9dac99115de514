"""Initial prompts: their range, their rows, their repeatability, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.peft.adapter_file import write_peft
from prompt_tuning_jax.checkpoints.prompt_file import save_prompt
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.setup import read_init_arrays
from prompt_tuning_jax.methods import PROMPT, MultitaskPrompts, PromptTuning
from prompt_tuning_jax.methods.prompt_init import initial_prompt
from tests.micro import D, V, Words, normal

TABLE = jnp.asarray(normal(V, D))
KEY = jax.random.key(0)
WORDS = Words()


def init(name, length=10, *, key=KEY, table=TABLE, **kwargs):
    return np.asarray(initial_prompt(name, key=key, embedding_VD=table, length=length, **kwargs))


def pieces_of(rows, table=TABLE):
    """Which pieces rows are the embeddings of; each row must be one."""
    same = (rows[:, None] == np.asarray(table, np.float32)[None]).all(axis=-1)
    assert (same.sum(axis=1) == 1).all()
    return same.argmax(axis=1)


@pytest.mark.parametrize(("name", "low"), [("uniform", -0.5), ("uniform_positive", 0.0)])
def test_uniform_fills_its_range(name, low):
    drawn = init(name, length=500)
    assert drawn.shape == (500, D) and drawn.dtype == np.float32
    assert low <= drawn.min() < low + 0.01 and 0.49 < drawn.max() < 0.5
    assert drawn.mean() == pytest.approx((low + 0.5) / 2, abs=0.01)
    assert len(np.unique(drawn)) > 0.99 * drawn.size


@pytest.mark.parametrize("name", ["uniform", "uniform_positive", "sampled_vocabulary"])
def test_the_key_decides(name):
    np.testing.assert_array_equal(init(name), init(name))
    assert (init(name) != init(name, key=jax.random.key(1))).any(axis=1).sum() > 5


def test_sampled_vocabulary_repeats_nothing_until_the_population_is_used_up():
    for length, population, distinct in [(20, 20, 20), (10, 20, 10), (V, 0, V), (V, 5000, V)]:
        pieces = pieces_of(init("sampled_vocabulary", length, population=population))
        assert len(set(pieces)) == distinct
        assert pieces.max() < (population or V)
    pieces = pieces_of(init("sampled_vocabulary", 300, population=7))
    assert set(pieces) == set(range(7))


def test_sampled_vocabulary_is_float32_from_a_bfloat16_table():
    table = TABLE.astype(jnp.bfloat16)
    rows = init("sampled_vocabulary", table=table)
    assert rows.dtype == np.float32
    pieces_of(rows, table)


def test_described_is_sampled_words_that_vote_for_the_labels_in_turn():
    labels = ("ab", "cd ef")
    rows = init("described", 5, vocabulary=WORDS, labels=labels, population=30)
    words = init("sampled_vocabulary", 5, population=30)
    named = init("class_labels", 2, vocabulary=WORDS, labels=labels)
    for row in range(5):
        turned = np.roll(words[row], words.shape[1] // 2)
        np.testing.assert_allclose(rows[row], named[row % 2] + turned, rtol=1e-6)


def test_class_labels_are_means_of_pieces_and_the_rest_is_sampled():
    labels = ("aa", "ab cd", "x y z")
    rows = init("class_labels", 8, vocabulary=WORDS, labels=labels, population=30)
    table = np.asarray(TABLE)
    for row, label in zip(rows, labels, strict=False):
        np.testing.assert_allclose(row, table[WORDS.encode(label)].mean(axis=0), atol=1e-6)
    rest = pieces_of(rows[3:])
    assert len(set(rest)) == 5 and rest.max() < 30
    np.testing.assert_array_equal(rows[3:], init("sampled_vocabulary", 8, population=30)[3:])
    # More labels than rows: the first ones.
    np.testing.assert_array_equal(
        init("class_labels", 2, vocabulary=WORDS, labels=labels), rows[:2]
    )


def test_the_mean_of_a_label_is_taken_in_float32():
    table = TABLE.astype(jnp.bfloat16)
    (row,) = init("class_labels", 1, table=table, vocabulary=WORDS, labels=("ab cd ef",))
    want = np.asarray(table, np.float32)[WORDS.encode("ab cd ef")].mean(axis=0)
    np.testing.assert_allclose(row, want, rtol=1e-6, atol=1e-7)


def test_a_string_is_its_pieces_and_then_sampled():
    text = "good bad ugly good"
    rows = init("string", 7, vocabulary=WORDS, text=text)
    np.testing.assert_array_equal(pieces_of(rows)[:4], WORDS.encode(text))
    np.testing.assert_array_equal(rows[4:], init("sampled_vocabulary", 7)[4:])
    np.testing.assert_array_equal(init("string", 2, vocabulary=WORDS, text=text), rows[:2])


@pytest.mark.parametrize(
    ("name", "kwargs", "left_out"),
    [
        ("class_labels", {"labels": tuple("abcd")}, "4 labels and the prompt has 2 positions"),
        ("described", {"labels": tuple("abcd")}, "nothing starts from 'c', 'd'"),
        ("string", {"text": "a b c d"}, "the prompt has 2 positions"),
    ],
)
def test_what_a_short_prompt_leaves_out_is_said(caplog, name, kwargs, left_out):
    init(name, 2, vocabulary=WORDS, **kwargs)
    assert left_out in caplog.text
    caplog.clear()
    init(name, 20, vocabulary=WORDS, **kwargs)
    assert not caplog.text


def test_an_adapters_prompt_is_put_into_the_models_space(tmp_path):
    prompt = normal(6, D, seed=4)
    write_peft(tmp_path / "adapter", prompt, base_model_name_or_path="org/t5gemma")
    method = PromptTuning(init="file", init_path=str(tmp_path / "adapter"))
    arrays = read_init_arrays(method, peft_scale=4.0)
    np.testing.assert_array_equal(arrays[PROMPT], 4 * prompt)


@pytest.mark.parametrize("ending", ["npy", "safetensors"])
def test_a_file_comes_back_bit_for_bit(tmp_path, ending):
    prompt = normal(6, D, seed=4)
    file = tmp_path / f"prompt.{ending}"
    save_prompt(file, prompt)
    arrays = read_init_arrays(PromptTuning(init="file", init_path=str(file)))
    for key in (KEY, jax.random.key(1)):
        got = init("file", 6, key=key, file_PD=arrays[PROMPT])
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, prompt)


def test_a_file_of_another_shape_is_refused():
    for shape in [(5, D), (6, D + 1)]:
        with pytest.raises(UserError, match=r"method\.init_path") as error:
            init("file", 6, file_PD=normal(*shape))
        for part in (str(list(shape)), f"[6, {D}]", "method.length"):
            assert part in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        (
            "class_labels",
            {"labels": ("a",)},
            r"needs the model's vocabulary; set model\.vocabulary",
        ),
        ("string", {"text": "a"}, r"needs the model's vocabulary; set model\.vocabulary"),
        ("class_labels", {"vocabulary": WORDS}, r"the task has no labels; give data\.labels"),
        ("described", {"vocabulary": WORDS}, r"init=described: the task has no labels"),
        ("class_labels", {"vocabulary": WORDS, "labels": ("a", " ")}, "label ' ' has no pieces"),
        ("string", {"vocabulary": WORDS}, r"method\.init_text has no pieces"),
        ("file", {}, r"needs method\.init_path"),
    ],
)
def test_what_is_missing_is_named_in_one_line(name, kwargs, message):
    with pytest.raises(UserError, match=message) as error:
        init(name, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (PromptTuning(init="file"), r"init=file needs method\.init_path"),
        (PromptTuning(init="file", init_path="/nowhere/prompt.npy"), "/nowhere/prompt.npy"),
        (MultitaskPrompts(init="source"), r"init=source needs method\.init_path"),
    ],
)
def test_an_init_that_cannot_be_read_is_named(method, message):
    assert read_init_arrays(dataclasses.replace(method, init="uniform")) == {}
    with pytest.raises(UserError, match=message):
        read_init_arrays(method)
