"""Prefix tuning: prefixes are keys and values as the model has them, made by an MLP or plain."""

from typing import Any

import jax
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import Cartridge, Context, PrefixTuning, TunedModel, attach_method
from prompt_tuning_jax.models.t5.model import T5
from tests.micro import ONE_LAYER, T5_1_1, D, Words, call, make_t5, token_rows

WORDS = "ab cd ef"
TOKENS = np.asarray([Words().encode(WORDS)], np.int32)
SOURCE = token_rows([5, 3], 7)
TARGET = token_rows([4, 6], 6, seed=1)


def attach(method: PrefixTuning, labels: tuple[str, ...] = (WORDS,)) -> TunedModel:
    context = Context(labels=labels, vocabulary=Words())
    return attach_method(make_t5(), method, key=jax.random.key(0), context=context)


def logits(attached: Any, source: Any, target: Any) -> np.ndarray:
    graphdef, params = param_tree.split(attached)

    def logits(params: Any) -> jax.Array:
        module = param_tree.merge(graphdef, params)
        return (module if isinstance(module, TunedModel) else module.run)(source, target)

    return np.asarray(jax.jit(logits)(params))


def test_from_words_they_are_what_the_model_would_remember_of_them() -> None:
    """A target that goes on behind the words, as if the words had been written before it."""
    method = PrefixTuning(length=3, encoder=False, cross=False, before=True)
    rest = token_rows([4], 4, seed=1)
    whole = np.concatenate([TOKENS, rest], axis=1)
    want = call(make_t5(), TOKENS, whole)[:, TOKENS.shape[1] :]

    def from_decoder_inputs(attached: TunedModel) -> np.ndarray:
        graphdef, params = param_tree.split(attached)

        def logits(params: Any) -> jax.Array:
            tuned = param_tree.merge(graphdef, params)
            context, injections = tuned.read(TOKENS)
            return tuned.model.decode(rest, context, injections=injections)

        return np.asarray(jax.jit(logits)(params))

    np.testing.assert_allclose(from_decoder_inputs(attach(method)), want, atol=2e-5)
    nowhere = PrefixTuning(length=3, encoder=False, cross=False)
    assert np.abs(from_decoder_inputs(attach(nowhere)) - want).max() > 1e-3


def test_labels_come_first_and_sampled_pieces_fill_up() -> None:
    long, short = attach(PrefixTuning(length=8)), attach(PrefixTuning(length=2))
    for attached, length in ((long, 8), (short, 2)):
        key_LPHK = attached.method.encoder.key_LPHK.get_value()
        assert key_LPHK.shape == (2, length, 2, 8)
    # The first layer's keys see no context.
    np.testing.assert_allclose(
        long.method.encoder.key_LPHK.get_value()[0, :2],
        short.method.encoder.key_LPHK.get_value()[0],
        atol=1e-5,
    )


@pytest.mark.parametrize("chosen", [("encoder",), ("decoder", "cross"), ("cross",)])
@pytest.mark.parametrize("hidden", [0, 5])
def test_attentions_are_chosen_and_each_is_counted(chosen: tuple[str, ...], hidden: int) -> None:
    flags = {name: name in chosen for name in ("encoder", "decoder", "cross")}
    attached = attach(PrefixTuning(length=3, hidden=hidden, **flags))
    injections = attached.injections(SOURCE)
    assert set(injections.prefixes) == set(chosen)
    trained = param_tree.select(param_tree.split(attached)[1], attached.method.config.trains)
    joined = T5_1_1.num_heads * T5_1_1.head_dim
    plain = 2 * 3 * joined * 2
    made = 3 * D + (D + 1) * 5 + (5 + 1) * 2 * 2 * joined
    assert param_tree.count(trained) == len(chosen) * (made if hidden else plain)


def test_folding_two_layers_changes_nothing() -> None:
    attached = attach(PrefixTuning(length=3, hidden=5, before=True))
    for_inference = attached.for_inference()
    method = for_inference.method.config
    assert method == PrefixTuning(length=3, before=True).as_trained()
    want = logits(attached, SOURCE, TARGET)
    np.testing.assert_allclose(logits(for_inference, SOURCE, TARGET), want, atol=1e-5)
    assert np.abs(logits(make_t5(), SOURCE, TARGET) - want).max() > 1e-2


def test_none_chosen_is_refused() -> None:
    with pytest.raises(UserError, match=r"method\.cross are all false"):
        attach(PrefixTuning(encoder=False, decoder=False, cross=False))


@pytest.mark.parametrize("method", [PrefixTuning(length=2), Cartridge(length=2)])
def test_the_model_is_compiled_once_for_what_all_members_start_from(method, monkeypatch):
    traced, of = [], T5.keys_values_of
    monkeypatch.setattr(T5, "keys_values_of", lambda *args: traced.append(args) or of(*args))
    model, context = make_t5(ONE_LAYER), Context(vocabulary=Words())
    for seed in range(3):
        attach_method(model, method, key=jax.random.key(seed), context=context)
    assert len(traced) <= 1
