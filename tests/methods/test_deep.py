"""Deep prompts: each layer reads its own vectors at the first positions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import Context, DeepPrompts, TunedModel, attach_method
from prompt_tuning_jax.models.base import joined
from prompt_tuning_jax.models.t5.attention import bias_of
from tests.micro import D, call, make_t5, shifted, token_rows

SOURCE = token_rows([5, 3], 7)
TARGET = token_rows([4, 6], 6, seed=1)


def attach(method: DeepPrompts) -> TunedModel:
    return attach_method(make_t5(), method, key=jax.random.key(0), context=Context())


def logits(attached: Any, **kwargs: Any) -> np.ndarray:
    graphdef, params = param_tree.split(attached)
    return np.asarray(
        jax.jit(lambda p: param_tree.merge(graphdef, p)(SOURCE, TARGET, **kwargs))(params)
    )


@pytest.mark.parametrize("lengths", [(), (3, 1)])
@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("hidden", [0, 4])
def test_the_second_layer_reads_them(lengths: Any, mode: Any, hidden: int) -> None:
    method = DeepPrompts(length=3, lengths=lengths, mode=mode, hidden=hidden, init_population=0)
    attached = attach(method)
    first, second = attached.method.layers()
    assert (len(first), len(second)) == (lengths or (3, 3))
    second = second + 1.0  # "add" starts from zeros
    attached.method.layers = lambda: [first, second]
    got = jax.jit(lambda: attached.read(SOURCE)[0].hidden_BUD)()

    @jax.jit
    def by_hand() -> jax.Array:
        encoder = attached.model.encoder
        source = joined(attached.model.embed(SOURCE, first))
        positions = jnp.arange(source.mask_BU.shape[1])
        bias = encoder.relpos_bias(positions, positions)
        mask = bias_of(source.mask_BU[:, None, :])
        x_BUD = encoder.layer(0)(source.embeddings_BUD, bias, mask, None, None)[0]
        own = second if mode == "replace" else x_BUD[:, : len(second)] + second
        own = jnp.broadcast_to(own, (2, len(second), D))
        x_BUD = jnp.concatenate([own, x_BUD[:, len(second) :]], axis=1)
        return encoder.encoder_norm(encoder.layer(1)(x_BUD, bias, mask, None, None)[0])

    np.testing.assert_allclose(got, by_hand(), atol=1e-5)


def test_without_more_than_the_first_it_is_prompt_tuning() -> None:
    for method in (DeepPrompts(lengths=(3, 0)), DeepPrompts(length=3, mode="add")):
        attached = attach(method)
        want = call(make_t5(), SOURCE, shifted(TARGET), attached.method.layers()[0])
        np.testing.assert_allclose(logits(attached), want, atol=1e-5)


@pytest.mark.parametrize("lengths", [(), (3, 1)])
def test_folding_and_rematerialisation_change_nothing(lengths: Any) -> None:
    method = DeepPrompts(length=3, lengths=lengths, hidden=4)
    attached = attach(method)
    for_inference = attached.for_inference()
    kept = for_inference.method.config
    own = param_tree.select(param_tree.split(for_inference)[1], kept.trains)
    assert param_tree.count(own) == sum(lengths or (3, 3)) * D
    want = logits(attached)
    np.testing.assert_allclose(logits(for_inference), want, atol=1e-5)
    np.testing.assert_allclose(logits(attached, remat="full"), want, atol=1e-5)
    encoded, _ = jax.eval_shape(lambda: attached.read(SOURCE))
    assert encoded.hidden_BUD.shape[1] == 3 + SOURCE.shape[1]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [((2, 3), "none may be larger"), ((0, 0), "at least 1"), ((2, -1), "at least 0")],
)
def test_wrong_lengths_are_refused(lengths: Any, message: str) -> None:
    (complaint,) = DeepPrompts(lengths=lengths).config_errors()
    assert message in complaint


def test_lengths_for_another_model_are_refused() -> None:
    with pytest.raises(UserError, match="3 entries and the encoder 2 layers"):
        attach(DeepPrompts(lengths=(3, 2, 1)))
