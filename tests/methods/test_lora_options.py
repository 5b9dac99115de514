"""LoRA's ranks by pattern, DoRA, the embedding table's uses, and other parameters of the model."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference import api
from prompt_tuning_jax.methods import Context, LoRA, TunedModel, attach_method
from prompt_tuning_jax.methods.linear_adapter import linear_maps
from prompt_tuning_jax.methods.low_rank import low_rank_update, updated_norms
from prompt_tuning_jax.methods.merging import merge
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.layers import Linear
from prompt_tuning_jax.models.quantization import quantize_modules
from tests.micro import ONE_LAYER, D, V, make_t5, normal, token_rows
from tests.tiny_lm import make_lm

SOURCE, TARGET = token_rows([5, 3], 6), token_rows([4, 2], 4, seed=1)
TIED = replace(ONE_LAYER, tie_embeddings=True)
USES = (".*/embed_tokens", ".*/tied_logits")


def moved(model: Model, method: LoRA, *, alike: bool = False) -> TunedModel:
    """Away from where training begins; ``alike`` moves all rows of the table in the same way."""
    attached = attach_method(model, method, key=jax.random.key(0), context=Context())
    graphdef, params = param_tree.split(attached)
    own: dict[str, Any] = {}
    same: dict[str, Any] = {}
    for number, name in enumerate(name for name in params if method.trains(name)):
        array = params[name] + normal(*params[name].shape, seed=number, scale=0.3)
        rows = alike and "/embed_tokens/" in name
        own[name] = same.setdefault(name.rpartition("/")[2], array) if rows else array
    merged: TunedModel = param_tree.merge(graphdef, {**params, **own})
    return merged


def logits(model: Any) -> np.ndarray:
    if isinstance(getattr(model, "model", model), type(make_lm())):
        return np.asarray(api.logits(model, [[5, 7, 9], [4, 3]]))
    return np.asarray(api.logits(model, SOURCE, TARGET))


def test_ranks_and_alphas_are_those_of_the_first_pattern_that_matches() -> None:
    method = LoRA(
        rank=2,
        alpha=6,
        ranks=("encoder/.*/query=3", "encoder/.*=4"),
        alphas=("decoder/.*=1.5",),
        rank_stabilized=True,
    )
    assert [*method.config_errors()] == []
    attached = attach_method(make_t5(), method, key=jax.random.key(0), context=Context())
    maps = linear_maps(attached.model)
    for path, rank, scale in (
        ("encoder/layers_0/attention/query", 3, 6 / 3**0.5),
        ("encoder/layers_1/attention/value", 4, 6 / 4**0.5),
        ("decoder/layers_0/self_attention/query", 2, 1.5 / 2**0.5),
    ):
        pair: Any = maps[path].adapter
        assert pair.lora_a_DR.shape == (D, rank) and pair.scale == pytest.approx(scale)


def test_norms_are_those_of_the_updated_weights() -> None:
    kernel_DF, a_DR, b_RF = normal(9, 7), normal(9, 3, seed=1), normal(3, 7, seed=2)
    changed_DF = kernel_DF + np.asarray(low_rank_update(a_DR, b_RF, 0.7))
    want_F = np.linalg.norm(changed_DF, axis=0)
    np.testing.assert_allclose(updated_norms(kernel_DF, a_DR, b_RF, 0.7), want_F, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_scales_directions_to_trained_norms(family: str) -> None:
    """As weights that are changed beforehand, and with norms that count as constants."""
    model, path = make_lm(family), "decoder/layers_0/self_attention/query"
    method = LoRA(rank=2, dora=True, targets=(path,))
    attached = moved(model, method)
    graphdef, params = param_tree.split(attached)
    x, adapter = normal(4, 12), f"model/{path}/adapter"
    own = {name: array for name, array in params.items() if name.startswith(adapter)}
    kernel_DF, bias_F = params[f"model/{path}/kernel"], params.get(f"model/{path}/bias", 0.0)

    def direct(own: Any) -> Any:
        product_DF = own[f"{adapter}/lora_a_DR"] @ own[f"{adapter}/lora_b_RF"]
        changed_DF = kernel_DF + method.scale_of(path) * product_DF
        norms_F = jax.lax.stop_gradient(jnp.linalg.norm(changed_DF, axis=0))
        return x @ (changed_DF / norms_F * own[f"{adapter}/lora_magnitude_F"]) + bias_F

    def ours(own: Any) -> Any:
        return linear_maps(param_tree.merge(graphdef, {**params, **own}).model)[path](x)

    want, want_back = jax.vjp(direct, own)
    got, back = jax.vjp(ours, own)
    np.testing.assert_allclose(got, want, atol=1e-5)
    (want_own,), (got_own,) = want_back(weights := jnp.asarray(normal(4, 24))), back(weights)
    assert len(got_own) == 3
    for name, array in want_own.items():
        np.testing.assert_allclose(got_own[name], array, atol=1e-4)


def test_dora_drops_inputs_where_peft_does() -> None:
    """Of the directions' products, and not of the frozen map itself."""
    model, path = make_lm(), "decoder/layers_0/self_attention/query"
    attached = moved(model, LoRA(rank=2, dora=True, dropout=0.5, targets=(path,)))
    linear = linear_maps(attached.method.with_dropout(attached.model, key=jax.random.key(3)))[path]
    assert isinstance(linear, Linear)
    pair: Any = linear.adapter
    x, kernel_DF = normal(4, 12), linear.kernel.get_value()
    kept = x * 2.0 * jax.random.bernoulli(pair.key, 0.5, x.shape)
    update_DF = low_rank_update(pair.lora_a_DR.get_value(), pair.lora_b_RF.get_value(), pair.scale)
    factor_F = pair.lora_magnitude_F.get_value() / jnp.linalg.norm(kernel_DF + update_DF, axis=0)
    want = x @ kernel_DF + (factor_F - 1) * (kept @ kernel_DF) + factor_F * (kept @ update_DF)
    np.testing.assert_allclose(linear(x), want, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["t5", "gpt2", "gemma"])
def test_a_head_that_is_no_longer_the_table_is_merged_into_a_model_with_two(
    family: str, dora: bool
) -> None:
    model: Model = make_t5(TIED) if family == "t5" else make_lm(family)
    method = LoRA(rank=2, dora=dora, embeddings=USES)
    attached = moved(model, method, alike=True)
    merged = merge(attached)
    assert not merged.config.tie_embeddings and model.config.tie_embeddings
    np.testing.assert_allclose(logits(merged), logits(attached), atol=2e-4)
    assert np.abs(logits(merged) - logits(model)).max() > 0.1
    assert "decoder/logits_dense/kernel" in param_tree.split(merged)[1]


def test_copies_replace_the_table_where_they_say() -> None:
    model = make_t5(TIED)
    attached = moved(model, LoRA(rank=2, copies=("decoder/.*",), targets=(".*/key",)))
    merged_targets = merge(moved(model, LoRA(rank=2, targets=(".*/key",))))
    assert np.abs(logits(attached) - logits(merged_targets)).max() > 0.1
    with pytest.raises(UserError, match="decoder/embed_tokens and encoder/embed_tokens would have"):
        merge(attached)
    # A head of its own leaves the rows alone.
    head = moved(model, LoRA(rank=2, copies=(".*/tied_logits",)))
    np.testing.assert_allclose(logits(merge(head)), logits(head), atol=2e-4)


def test_quantised_weights_are_updated_beside_themselves() -> None:
    """As the weights that they stand for."""
    model = make_t5(ONE_LAYER)
    quantize_modules(model, "int8")
    method = LoRA(rank=2, dora=True, embeddings=(".*/embed_tokens",), targets=(".*/query",))
    attached = moved(model, method)
    linear = linear_maps(attached.model)["encoder/layers_0/attention/query"]
    pair: Any = linear.adapter
    whole_DF = linear.columns(slice(None))
    merged_DF, _ = pair.merged(whole_DF, None)
    x = normal(3, D)
    np.testing.assert_allclose(linear(x), x @ merged_DF, atol=2e-4)
    use = attached.model.encoder.embed_tokens  # type: ignore[attr-defined]
    table_VD = model.token_embedder.table()[jnp.arange(V)]
    got = use(np.arange(V), attached.model.token_embedder)
    np.testing.assert_allclose(got, use.adapter.merged(table_VD), atol=1e-4)
    with pytest.raises(UserError, match="quantized"):
        merge(attached)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"ranks": ("q",)}, r"method\.ranks: 'q' is not REGEX=NUMBER"),
        ({"ranks": ("q=1.5",)}, r"method\.ranks has 1\.5; must be a whole number"),
        ({"ranks": ("(=2",)}, r"method\.ranks: '\(' is not a valid regular expression"),
        ({"alphas": ("q=nan",)}, r"method\.alphas: 'q=nan' is not"),
        ({"ranks": (".*/wi=2",)}, r"method\.ranks: '\.\*/wi' matches no map with an update"),
        ({"embeddings": ("shared",)}, r"'shared' matches no use of the embedding table;"),
        ({"copies": (".*/tied_logits",)}, "matches no use of the embedding table"),
        ({"parameters": ("bias",)}, r"method\.parameters: 'bias' matches no parameter"),
        ({"embeddings": (".*",), "copies": ("decoder/.*",)}, "both match decoder/embed_tokens"),
        ({"targets": ()}, r"method\.targets is empty"),
    ],
)
def test_options_that_mean_nothing_are_refused(fields: Any, said: str) -> None:
    method = LoRA(**fields)
    with pytest.raises(UserError, match=said):
        attach_method(make_t5(), method, key=jax.random.key(0), context=Context())
