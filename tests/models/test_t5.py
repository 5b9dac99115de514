"""The forward pass: who sees whom, caches, types, dropout, names and sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.distributed.sharding import RULES
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.base import Context, joined
from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections, ModelInput
from prompt_tuning_jax.models.layers import Linear
from prompt_tuning_jax.models.t5.config import PRESETS
from prompt_tuning_jax.models.t5.model import T5
from tests.micro import (
    PER_LAYER,
    T5_1_0,
    T5_1_1,
    D,
    V,
    call,
    encode,
    make_t5,
    normal,
    shifted,
    token_rows,
)

CONFIGS = pytest.mark.parametrize(
    "config", [T5_1_1, T5_1_0, PER_LAYER], ids=["1.1", "1.0", "per layer"]
)
SOURCE = token_rows([5, 3], 7)
TARGET = shifted(token_rows([4, 6], 6, seed=1))
PROMPT = normal(3, D, seed=2)


def influence(function, x_BUD):
    """How far output position ``[b, q]`` depends on input position ``[c, k]``: ``[B, Q, B, K]``."""
    width = jax.eval_shape(function, x_BUD).shape[-1]
    # A quadratic form: a linear one may be blind, as to what a norm takes out.
    weight = normal(width, seed=9)

    def seen(x):
        y = function(x)
        return jnp.sum(y * weight + y * y, axis=-1)

    jacobian = jax.jit(jax.jacrev(seen))(jnp.asarray(x_BUD))
    return np.abs(np.asarray(jacobian)).sum(axis=-1)


def only_within_a_row(influence_BQBK):
    """The diagonal over the batch, and that nothing else is seen."""
    batch = influence_BQBK.shape[0]
    for b in range(batch):
        for c in range(batch):
            assert b == c or not influence_BQBK[b, :, c].any()
    return np.stack([influence_BQBK[b, :, b] for b in range(batch)])


def with_hidden(model, context, hidden_BUD):
    """What the model had read if its final hidden states were these."""
    keys_values = model.decoder.cross_keys_values(hidden_BUD)
    return Context(hidden_BUD=hidden_BUD, mask_BU=context.mask_BU, keys_values=keys_values)


@CONFIGS
def test_a_logit_depends_on_no_later_decoder_token_and_on_all_earlier(config):
    model = make_t5(config)
    encoded = encode(model, SOURCE, PROMPT)

    def logits(x_BSD):
        cross, mask_BU = encoded.keys_values, encoded.mask_BU
        return model.logits(
            model.decoder(x_BSD, cross, mask_BU, injections=NO_INJECTIONS, key=None)[0]
        )

    seen_BQK = only_within_a_row(influence(logits, model.token_embedder(TARGET)))
    np.testing.assert_array_equal(seen_BQK > 0, np.tril(np.ones((6, 6), bool))[None].repeat(2, 0))


@CONFIGS
def test_every_encoder_position_sees_the_prompt_and_all_tokens_but_no_padding(config):
    model = make_t5(config)
    source = joined(model.embed(SOURCE, jnp.asarray(PROMPT)))

    def hidden(x_BUD):
        given = dataclasses.replace(source, embeddings_BUD=x_BUD)
        return model.encode(SOURCE, injections=Injections(model_input=given)).hidden_BUD

    seen_BQK = only_within_a_row(influence(hidden, source.embeddings_BUD))
    real_BU = np.concatenate([np.ones((2, 3), bool), SOURCE != 0], axis=1)
    np.testing.assert_array_equal(source.mask_BU, real_BU)
    # A hidden position still sees itself, through the residual.
    expected = real_BU[:, None, :] | np.eye(10, dtype=bool)
    np.testing.assert_array_equal(seen_BQK > 0, expected)


def test_every_logit_sees_the_whole_encoder_output_but_its_padding():
    model = make_t5()
    encoded = encode(model, SOURCE, PROMPT)

    def logits(hidden_BUD):
        return model.decode(TARGET, with_hidden(model, encoded, hidden_BUD))

    seen_BQK = only_within_a_row(influence(logits, encoded.hidden_BUD))
    expected = np.broadcast_to(np.asarray(encoded.mask_BU)[:, None, :], seen_BQK.shape)
    np.testing.assert_array_equal(seen_BQK > 0, expected)


@pytest.mark.parametrize("config", [T5_1_1, PER_LAYER], ids=["1.1", "per layer"])
def test_longer_padding_and_other_rows_change_nothing(config):
    model = make_t5(config)
    logits = call(model, SOURCE, TARGET, PROMPT)
    padded = call(model, np.pad(SOURCE, ((0, 0), (0, 5))), TARGET, PROMPT)
    np.testing.assert_allclose(padded, logits, atol=1e-5)
    for row in range(2):
        alone = call(model, SOURCE[row : row + 1], TARGET[row : row + 1], PROMPT)
        np.testing.assert_allclose(alone[0], logits[row], atol=1e-5)


def test_what_is_at_padded_positions_changes_nothing():
    model = make_t5()
    source = model.embed(SOURCE)
    noise = jnp.where(source.mask_BU[..., None], 0.0, 100 * normal(2, 7, D, seed=5))

    @jax.jit
    def logits(x_BUD):
        given = ModelInput(embeddings_BUD=x_BUD, mask_BU=source.mask_BU)
        encoded = model.encode(SOURCE, injections=Injections(model_input=given))
        noisy = with_hidden(model, encoded, encoded.hidden_BUD + noise)
        return encoded.hidden_BUD, model.decode(TARGET, encoded), model.decode(TARGET, noisy)

    hidden, want, noisy_output = logits(source.embeddings_BUD)
    other_hidden, noisy_input, _ = logits(source.embeddings_BUD + noise)
    real = SOURCE != 0
    np.testing.assert_array_equal(hidden[real], other_hidden[real])
    np.testing.assert_array_equal(want, noisy_output)
    np.testing.assert_array_equal(want, noisy_input)


@CONFIGS
def test_a_prompt_of_word_embeddings_is_those_words_in_front_of_the_encoder_input_alone(config):
    model = make_t5(config)
    words = np.array([17, 40, 5], np.int32)
    in_front = np.concatenate([np.broadcast_to(words, (2, 3)), SOURCE], axis=1)
    prompt = model.token_embedder(words)
    want, logits = call(model, in_front, TARGET), call(model, SOURCE, TARGET, prompt)
    assert logits.shape == (2, 6, V)
    np.testing.assert_allclose(logits, want, atol=1e-5)
    np.testing.assert_allclose(
        encode(model, SOURCE, prompt).hidden_BUD, encode(model, in_front).hidden_BUD, atol=1e-5
    )
    assert np.abs(logits - call(model, SOURCE, TARGET)).max() > 0.1


def test_one_prompt_per_example_reaches_that_example_alone():
    model = make_t5()
    prompts_BPD = jnp.asarray(normal(2, 3, D, seed=4))
    logits = call(model, SOURCE, TARGET, prompts_BPD)
    for row in range(2):
        alone = call(model, SOURCE, TARGET, prompts_BPD[row])
        np.testing.assert_allclose(alone[row], logits[row], atol=1e-5)

    def of_first_row(prompts_BPD):
        return jnp.sum(model(SOURCE, TARGET, prompts_BPD)[0] ** 2)

    gradient = jax.jit(jax.grad(of_first_row))(prompts_BPD)
    assert np.abs(gradient[0]).min() > 0
    assert not gradient[1].any()


@pytest.mark.parametrize("shape", [(3, D + 1), (D,), (1, 2, 3, D)])
def test_a_prompt_of_another_shape_is_refused(shape):
    with pytest.raises(UserError, match=r"a prompt for this model has shape \[P, 16\]") as error:
        make_t5()(SOURCE, TARGET, jnp.zeros(shape))
    assert str(list(shape)) in str(error.value) and "\n" not in str(error.value)


@CONFIGS
def test_parameters_have_the_names_of_t5x(config):
    names = set(param_tree.split(make_t5(config))[1])
    gated = len(config.mlp_activations) == 2
    attention = [f"{part}/kernel" for part in ("query", "key", "value", "out")]
    mlp = [f"mlp/{part}/kernel" for part in (("wi_0", "wi_1") if gated else ("wi",))]
    mlp.append("mlp/wo/kernel")
    expected = {"token_embedder/embedding"}
    for stack, sublayers in {
        "encoder": {"attention_layer_norm": "attention"},
        "decoder": {
            "self_attention_layer_norm": "self_attention",
            "cross_attention_layer_norm": "encoder_decoder_attention",
        },
    }.items():
        layers = [f"{stack}/layers_{i}" for i in range(2)]
        biased = layers if config.relpos_per_layer else [stack]
        expected |= {f"{place}/relpos_bias/rel_embedding" for place in biased}
        expected.add(f"{stack}/{stack}_norm/scale")
        for layer in layers:
            expected |= {f"{layer}/{name}" for name in [*mlp, "pre_mlp_layer_norm/scale"]}
            for norm, name in sublayers.items():
                expected.add(f"{layer}/pre_{norm}/scale")
                expected |= {f"{layer}/{name}/{part}" for part in attention}
    if not config.tie_embeddings:
        expected.add("decoder/logits_dense/kernel")
    assert names == expected


@CONFIGS
def test_every_parameter_has_logical_axes_that_the_table_knows(config):
    model = nnx.eval_shape(lambda: T5(config, rngs=nnx.Rngs(0)))
    axes, shapes = param_tree.logical_axes(model), param_tree.split(model)[1]
    assert axes.keys() == shapes.keys()
    for name, own in axes.items():
        assert len(own) == len(shapes[name].shape), name
        assert all(axis in RULES for axis in own), name
    assert axes == param_tree.logical_axes(make_t5(config))  # kept when weights are filled in


PUBLISHED = {
    "small": 76_961_152,
    "base": 247_577_856,
    "large": 783_150_080,
    "xl": 2_849_757_184,
    "xxl": 11_135_332_352,
    "t5_1_0_small": 60_506_624,
    "t5_1_0_base": 222_903_552,
    "t5_1_0_large": 737_668_096,
    "t5_1_0_xl": 2_851_598_336,
    "t5_1_0_xxl": 11_307_321_344,
}


def abstract_size(config):
    model = nnx.eval_shape(lambda: T5(config, rngs=nnx.Rngs(0)))
    return param_tree.count(param_tree.split(model)[1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = PRESETS[name]
    layers = config.num_encoder_layers
    assert config.num_decoder_layers == layers
    # All layers are alike: two sizes tell the rest, in a tenth of the time.
    one, two = (
        abstract_size(dataclasses.replace(config, num_encoder_layers=n, num_decoder_layers=n))
        for n in (1, 2)
    )
    assert one + (layers - 1) * (two - one) == PUBLISHED[name]
    if name == "small":
        assert abstract_size(config) == PUBLISHED[name]


def test_every_preset_but_the_bundled_one_is_published():
    assert PRESETS.keys() == {*PUBLISHED, "tiny"}


@pytest.mark.parametrize("config", [T5_1_1, T5_1_0], ids=["1.1", "1.0"])
def test_bfloat16_compute_is_close_to_float32(config):
    logits = call(make_t5(config), SOURCE, TARGET, PROMPT)
    model = make_t5(config, dtype=jnp.bfloat16)
    low = call(model, SOURCE, TARGET, PROMPT)
    assert low.dtype == jnp.float32
    assert encode(model, SOURCE, PROMPT).hidden_BUD.dtype == jnp.bfloat16
    assert {p.dtype for p in param_tree.split(model)[1].values()} == {jnp.dtype(jnp.float32)}
    error = np.linalg.norm(low - logits) / np.linalg.norm(logits)
    assert 0 < error < 0.03


def test_bfloat16_parameters_are_held_and_used_as_they_are():
    model = make_t5(param_dtype=jnp.bfloat16)
    graphdef, params = param_tree.split(model)
    assert {p.dtype for p in params.values()} == {jnp.dtype(jnp.bfloat16)}
    drawn = nnx.eval_shape(lambda: T5(T5_1_1, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    assert {p.dtype for p in param_tree.split(drawn)[1].values()} == {jnp.dtype(jnp.bfloat16)}
    # The same numbers in float32 give the same logits: nothing is rounded on the way.
    wide = param_tree.merge(graphdef, {name: p.astype(jnp.float32) for name, p in params.items()})
    held = call(model, SOURCE, TARGET, PROMPT)
    np.testing.assert_allclose(held, call(wide, SOURCE, TARGET, PROMPT), atol=1e-5)


def test_dropout_is_off_without_a_key_and_follows_the_key():
    one, other = jax.random.key(0), jax.random.key(1)
    model, plain = make_t5(dropout_rate=0.3), make_t5()
    exact = call(plain, SOURCE, TARGET, PROMPT)
    np.testing.assert_allclose(call(model, SOURCE, TARGET, PROMPT), exact, atol=1e-5)
    np.testing.assert_allclose(call(plain, SOURCE, TARGET, PROMPT, key=one), exact, atol=1e-5)
    first = call(model, SOURCE, TARGET, PROMPT, key=one)
    np.testing.assert_array_equal(first, call(model, SOURCE, TARGET, PROMPT, key=one))
    assert np.abs(first - call(model, SOURCE, TARGET, PROMPT, key=other)).max() > 0.1
    assert np.abs(first - exact).max() > 0.1


def test_dropout_acts_at_each_of_its_places_and_nowhere_twice_with_one_key(monkeypatch):
    from prompt_tuning_jax.models import layers
    from prompt_tuning_jax.models.ops import attention
    from prompt_tuning_jax.models.t5 import decoder, encoder

    axes = []

    @jax.jit
    def keys_used(key):
        used = []

        def spy(x, rate, *, key, shared_axis=None):
            used.append(jax.random.key_data(key))
            axes.append(shared_axis)
            return x

        for module in (attention, layers, encoder, decoder):
            monkeypatch.setattr(module, "dropout", spy)
        make_t5(dropout_rate=0.5)(SOURCE, TARGET, key=key)
        return jnp.stack(used)

    keys = np.asarray(keys_used(jax.random.key(3)))
    # Each stack: its input and output; each attention: weights and output; each mlp: hidden and
    # output.  All but the attention weights share one decision along the length.
    assert len(keys) == (2 + 2 * 4) + (2 + 2 * 6) == len(np.unique(keys, axis=0))
    assert axes.count(None) == 2 + 2 * 2
    assert set(axes) == {None, -2}


class Scaled(nnx.Module):
    """A low-rank method's way in: calls what it replaces and adds a share of it."""

    def __init__(self, replaced: Linear, share: float):
        self.replaced = replaced
        self.share = nnx.Param(jnp.float32(share))

    def __call__(self, x):
        y = self.replaced(x)
        return y + (self.share.get_value() * y).astype(y.dtype)


def with_scaled_linears(model):
    paths = [path for path, module in nnx.iter_modules(model) if isinstance(module, Linear)]
    for *above, name in paths:
        parent = model
        for part in above:
            parent = getattr(parent, part)
        setattr(parent, name, Scaled(getattr(parent, name), 0.0))
    return ["/".join(map(str, path)) for path in paths]


@CONFIGS
def test_a_module_put_in_the_place_of_any_linear_is_used(config):
    want = call(make_t5(config), SOURCE, TARGET)
    model = make_t5(config)
    replaced = with_scaled_linears(model)
    kernels = [name for name in param_tree.split(make_t5(config))[1] if name.endswith("/kernel")]
    assert {f"{name}/kernel" for name in replaced} == set(kernels)
    graphdef, params = param_tree.split(model)
    shares = {name: p for name, p in params.items() if name.endswith("/share")}
    assert len(shares) == len(replaced)

    def loss(shares):
        logits = param_tree.merge(graphdef, {**params, **shares})(SOURCE, TARGET)
        return jnp.sum(logits * normal(2, 6, V, seed=7)), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(shares)
    np.testing.assert_allclose(logits, want, atol=1e-5)
    assert all(abs(float(g)) > 1e-4 for g in gradients.values()), gradients
