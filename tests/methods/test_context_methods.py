"""Cartridges, trained contexts and templates of a decoder-only model are what the text would be."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.setup import read_init_text
from prompt_tuning_jax.methods import (
    CPT,
    WARP,
    Cartridge,
    Context,
    MethodConfig,
    PTuning,
    TunedModel,
    attach_method,
    trainable_mask,
)
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.training.optim import make_optimizer, make_schedule
from prompt_tuning_jax.training.step import init_state, make_train_step
from tests.method_cases import LABELS, LM_SIZES
from tests.micro import EOS, Words, make_t5
from tests.tiny_lm import make_lm

INPUTS = [[5, 6, 7], [8, 9, 10]]
TARGETS = np.asarray([[3, 4, EOS], [11, EOS, -1]], np.int32)


def lm(family: str = "gemma") -> Model:
    """A model with a window, a factor on embeddings and rotary positions, and a vocabulary."""
    changes = {name: LM_SIZES[name] for name in ("vocab_size", "embed_dim", "token_ids")}
    model = make_lm(family, **changes)
    model.vocabulary = Words(model.token_ids)
    return model


def attached_to(model: Model, method: MethodConfig) -> TunedModel:
    context = Context(labels=LABELS, vocabulary=model.vocabulary)
    return attach_method(model, method, key=jax.random.key(3), context=context)


def logits(module: Any, rows: list[list[int]]) -> np.ndarray:
    graphdef, params = param_tree.split(module)
    inputs = np.asarray(rows, np.int32)

    @jax.jit
    def run(params: Any) -> jax.Array:
        merged: Any = param_tree.merge(graphdef, params)
        call = merged if isinstance(merged, TunedModel) else merged.run
        computed: jax.Array = call(inputs, TARGETS)
        return computed

    return np.asarray(run(params))[TARGETS >= 0]


def test_a_new_cartridge_is_its_text(tmp_path: Path) -> None:
    model, text = lm(), "some words of a text that is too long"
    tokens = model.vocabulary.encode(text)[:4]
    want = logits(model, [[*tokens, *row] for row in INPUTS])
    method = Cartridge(length=4, init="text", init_text=text)
    np.testing.assert_allclose(logits(attached_to(model, method), INPUTS), want, atol=2e-5)
    (tmp_path / "text.txt").write_text(text)
    from_file = dataclasses.replace(method, init_text="", init_path=str(tmp_path / "text.txt"))
    context = Context(vocabulary=model.vocabulary, init_text=read_init_text(from_file))
    attached = attach_method(model, from_file, key=jax.random.key(0), context=context)
    np.testing.assert_allclose(logits(attached.for_inference(), INPUTS), want, atol=2e-5)


def test_a_cartridge_wants_one_text_that_is_long_enough(tmp_path: Path) -> None:
    model = lm()
    with pytest.raises(UserError, match=r"the text has 2 tokens, and method\.length is 3"):
        attached_to(model, Cartridge(length=3, init="text", init_text="too short"))
    with pytest.raises(UserError, match=r"method\.frozen is 3; must be below method\.length, 3"):
        attached_to(model, Cartridge(length=3, frozen=3))
    with pytest.raises(UserError, match=r"needs one of method\.init_text and method\.init_path"):
        attached_to(model, Cartridge(length=3, init="text"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, said in (("binary", "is not a text file in UTF-8"), ("none", "cannot read")):
        method = Cartridge(init="text", init_path=str(tmp_path / name))
        with pytest.raises(UserError, match=said):
            read_init_text(method)


def test_the_first_positions_of_a_cartridge_never_move() -> None:
    """Weight decay would move what has no gradient."""
    model = lm()
    attached = attached_to(model, Cartridge(length=5, frozen=2, init_population=0))
    graphdef, params = param_tree.split(attached)
    mask = trainable_mask(attached.method.config, list(params))
    own, frozen = param_tree.partition(params, mask)
    settings = Optimizer(name="sgd", learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(settings, mask)
    state = init_state({name: array[None] for name, array in own.items()}, optimizer)
    schedule = make_schedule(settings, total_steps=2)
    step = make_train_step(graphdef, optimizer, schedule, learning_rates=(0.1,), seeds=(0,))
    batch = {"inputs": np.asarray([INPUTS], np.int32), "targets": TARGETS[None]}
    before = {name: np.asarray(array) for name, array in own.items()}
    for _ in range(2):
        state, _ = step(state, frozen, batch)
    for name, array in state.trainable.items():
        moved = (np.asarray(array[0]) != before[name]).any(axis=(0, 2, 3))
        assert moved.tolist() == [False, False, True, True, True], name


def test_an_untrained_context_is_the_examples_themselves() -> None:
    model = lm()
    method = CPT(
        examples=("one two", "alpha", "three", "beta"), demonstration="x {inputs} is {targets}"
    )
    words = model.vocabulary.encode
    tokens = [*words("x one two is alpha"), EOS, *words("x three is beta"), EOS]
    attached = attached_to(model, method)
    assert attached.method.tokens == tuple(tokens)
    assert attached.method.types == (1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 8)
    want = logits(model, [[*tokens, *row] for row in INPUTS])
    np.testing.assert_allclose(logits(attached, INPUTS), want, atol=2e-5)
    np.testing.assert_allclose(logits(attached.for_inference(), INPUTS), want, atol=2e-5)
    assert attached.for_inference().method.config.prompt_positions() == len(tokens)


def test_a_context_leaves_out_the_examples_that_do_not_fit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    method = CPT(examples=("one two", "alpha", "three", "beta"), length=5)
    attached = attached_to(lm(), method)
    assert len(attached.method.tokens) == 4 and "the first 1 of 2 examples fit" in caplog.text
    with pytest.raises(UserError, match=r"no example fits method\.length"):
        attached_to(lm(), dataclasses.replace(method, length=3))
    with pytest.raises(UserError, match="only for decoder-only models"):
        attached_to(make_t5(), method)
    with pytest.raises(UserError, match=r"method\.examples has 1 texts"):
        attached_to(lm(), CPT(examples=("one",)))


def test_the_answers_of_a_context_weigh_less_the_farther_they_are() -> None:
    model = lm("llama")
    context = Context(vocabulary=model.vocabulary)
    method = CPT(examples=("one two", "alpha", "three", "beta"), decay=0.5)
    attached = attach_method(model, method, key=jax.random.key(0), context=context)
    tokens = np.asarray(attached.method.tokens, np.int32)
    inputs = np.asarray(INPUTS, np.int32)

    @jax.jit
    def computed() -> Any:
        hidden = model.read(model.embed(tokens[None])).hidden_BUD
        log_probs = jax.nn.log_softmax(model.logits(hidden)[0], axis=-1)
        sums = (attached.token_sums(inputs, TARGETS, training=on) for on in (False, True))
        return log_probs, attached.method.context_sums(model), *sums

    log_probs, sums, plain, both = computed()
    nll = [-float(log_probs[at - 1, tokens[at]]) for at in (2, 3, 5, 6)]
    want = 0.25 * (nll[0] + nll[1]) + 0.5 * (nll[2] + nll[3])
    np.testing.assert_allclose(sums.loss, want, rtol=1e-5)
    assert float(sums.tokens) == 4
    np.testing.assert_allclose(both.loss - plain.loss, 2 * want, rtol=1e-4)
    assert float(both.tokens - plain.tokens) == 2 * 4


def test_trained_vectors_and_anchors_of_a_template_take_the_places_of_tokens() -> None:
    model = lm()
    method = PTuning(encoder="none", template="{prompt:2} it {input:1} {prompt:1} is {input}")
    attached = attached_to(model, method)
    ids = [20, 21, 22]
    vectors = model.embedding_table()[jnp.asarray(ids)].astype(jnp.float32)
    attached.method.prompt_PD.set_value(vectors)
    it, is_ = model.vocabulary.encode("it is")
    want = logits(model, [[20, 21, it, row[0], 22, is_, *row[1:]] for row in INPUTS])
    np.testing.assert_allclose(logits(attached, INPUTS), want, atol=2e-5)
    # Inputs do not end with an end of sequence, before which a vector would be put.
    behind = attached_to(model, PTuning(encoder="none", template="{input} {prompt:3}"))
    behind.method.prompt_PD.set_value(vectors)
    ending = [[5, 6, EOS], [8, 9, 10]]
    want = logits(model, [[*row, *ids] for row in ending])
    np.testing.assert_allclose(logits(behind, ending), want, atol=2e-5)
    np.testing.assert_allclose(logits(behind.for_inference(), ending), want, atol=2e-5)


def test_new_class_vectors_score_the_first_token_of_each_label() -> None:
    model = lm("llama")
    attached = attached_to(model, WARP(template="{input}"))
    first = [model.vocabulary.encode(label)[0] for label in LABELS]
    inputs = np.asarray(INPUTS, np.int32)
    want = jax.jit(model.run)(inputs, TARGETS)[:, 0, np.asarray(first)]
    np.testing.assert_allclose(jax.jit(attached.label_logits)(inputs), want, atol=2e-5)
