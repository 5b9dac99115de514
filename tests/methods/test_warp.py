"""WARP: class vectors score the first position, and start as the model's own for the labels."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.ensemble import DecodeConfig, score_labels, write
from prompt_tuning_jax.methods import WARP, Context, TunedModel, attach_method
from prompt_tuning_jax.models.quantization import quantize_modules
from tests.micro import EOS, ONE_LAYER, T5_1_0, D, Words, call, make_t5, token_rows

LABELS = ("ab", "cd ef", "gh")
TIED = dataclasses.replace(T5_1_0, num_encoder_layers=1, num_decoder_layers=1)
SOURCE = token_rows([5, 3, 1], 7)
FIRST = [Words().encode(label)[0] for label in LABELS]


def rows_of(*labels: str) -> np.ndarray:
    rows = np.zeros((len(labels), 4), np.int32)
    for row, label in zip(rows, labels, strict=True):
        ids = [*Words().encode(label), EOS]
        row[: len(ids)] = ids
    return rows


def attach(model: Any, template: str = "{prompt} {input}") -> TunedModel:
    method = WARP(length=2, template=template, init_population=0)
    context = Context(labels=LABELS, vocabulary=Words())
    return attach_method(model, method, key=jax.random.key(0), context=context)


def first_log_probs(model: Any, prompt: Any) -> np.ndarray:
    """The model's own, of each label's first piece among these pieces."""
    logits_BSV = call(model, SOURCE, np.zeros((3, 1), np.int32), prompt)
    return np.asarray(jax.nn.log_softmax(logits_BSV[:, 0, np.asarray(FIRST)]))


@pytest.mark.parametrize("kind", ["untied", "tied", "int8"])
def test_it_starts_as_the_logits_of_the_labels_first_pieces(kind: str) -> None:
    model = make_t5(TIED if kind == "tied" else ONE_LAYER)
    if kind == "int8":
        quantize_modules(model, "int8")
    attached = attach(model)
    graphdef, params = param_tree.split(attached)
    scores = jax.jit(lambda p, rows: score_labels(param_tree.merge(graphdef, p), SOURCE, rows))
    got = scores(params, rows_of("gh", "zz", "ab", "cd ef"))
    want = first_log_probs(model, attached.method.prompt_PD.get_value())
    np.testing.assert_allclose(got[:, [2, 3, 0]], want, atol=1e-4)
    assert (got[:, 1] < -1e9).all()  # no label of its own: never chosen

    # As many columns as targets have, more or fewer than labels have tokens.
    for width in (4, 6):
        targets = np.pad(rows_of("cd ef", "ab", "zz"), ((0, 0), (0, 2)))[:, :width]
        sums = jax.jit(lambda p, t: param_tree.merge(graphdef, p).token_sums(SOURCE, t))(
            params, targets
        )
        np.testing.assert_allclose(sums.loss, -want[0, 1] - want[1, 0], atol=1e-4)
        assert (sums.tokens, sums.examples) == (2, 2)
        right = int(want[0].argmax() == 1) + int(want[1].argmax() == 0)
        assert sums.correct == right


@pytest.mark.parametrize(
    ("template", "count"), [("{prompt} {input}", 2 + 3), ("{input}", 3), ("a b {input}", 3)]
)
def test_its_parameters_are_counted_and_alone_get_gradients(template: str, count: int) -> None:
    attached = attach(make_t5(ONE_LAYER), template)
    graphdef, params = param_tree.split(attached)
    trainable = param_tree.select(params, attached.method.config.trains)
    assert param_tree.count(trainable) == count * D
    targets = rows_of(*LABELS)

    def loss(own: Any) -> jax.Array:
        merged = param_tree.merge(graphdef, {**params, **own})
        return merged.token_sums(SOURCE, targets).loss

    for name, gradient in jax.jit(jax.grad(loss))(trainable).items():
        assert (np.abs(gradient).max(axis=1) > 0).all(), name


def test_what_it_cannot_do_is_said() -> None:
    model = make_t5(ONE_LAYER)
    graphdef, params = param_tree.split(attach(model))
    with pytest.raises(UserError, match=r"labels and .* no text"):
        write(graphdef, DecodeConfig(), {}, params, SOURCE, jax.random.key(0))
    with pytest.raises(UserError, match=r"set data\.labels"):
        attach_method(model, WARP(), key=jax.random.key(0), context=Context(vocabulary=Words()))
