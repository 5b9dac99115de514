"""LoRA, IA3 and adapters: what stands around linear maps, by formulas, and merged into them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import (
    IA3,
    Adapters,
    Context,
    FullTuning,
    LoRA,
    MethodConfig,
    PatternTuning,
    PromptTuning,
    TunedModel,
    attach_method,
    trainable_mask,
)
from prompt_tuning_jax.methods.linear_adapter import linear_maps
from prompt_tuning_jax.methods.merging import merge
from prompt_tuning_jax.models.quantization import quantize_modules
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.training.step import Microbatching
from tests.micro import ONE_LAYER, T5_1_0, D, Trainer, make_batch, make_t5, normal, token_rows

SOURCE, TARGET = token_rows([5, 3], 7), token_rows([4, 6], 6, seed=1)
QUERY = "encoder/layers_0/attention/query"
EVERYWHERE = LoRA(rank=3, alpha=6.0, targets=(".*",))


def attach(model: T5, method: MethodConfig, *, drawn: bool = True, seed: int = 0) -> TunedModel:
    """With tuned arrays that matter, or as at the start."""
    attached = attach_method(model, method, key=jax.random.key(seed), context=Context())
    if drawn:
        # A copy: where weights of the model train, the given one's variables are in it.
        attached = nnx.clone(attached)
        params = param_tree.split(attached)[1]
        names = [n for n, trains in trainable_mask(method, list(params)).items() if trains]
        own = {
            n: params[n] + normal(*params[n].shape, seed=i, scale=0.2) for i, n in enumerate(names)
        }
        param_tree.fill(attached, {**params, **own})
    return attached


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: Any, params: Any, key: Any = None) -> jax.Array:
    module = param_tree.merge(graphdef, params)
    of_targets = module if isinstance(module, TunedModel) else module.run
    logits: jax.Array = of_targets(SOURCE, TARGET, key=key)
    return logits


def logits(module: TunedModel | T5, key: Any = None) -> np.ndarray:
    return np.asarray(_logits(*param_tree.split(module), key))


def adapter(attached: TunedModel, path: str) -> Any:
    return linear_maps(attached.model)[path].adapter


def test_lora_adds_its_scaled_product() -> None:
    x, model = normal(4, D), make_t5(ONE_LAYER)
    for method, scale in (
        (LoRA(rank=4, alpha=6.0), 1.5),
        (LoRA(rank=4, alpha=6.0, rank_stabilized=True), 3.0),
    ):
        attached = attach(model, method)
        pair = adapter(attached, QUERY)
        a_DR, b_RF = pair.lora_a_DR.get_value(), pair.lora_b_RF.get_value()
        want = x @ param_tree.split(model)[1][f"{QUERY}/kernel"] + scale * x @ a_DR @ b_RF
        got = linear_maps(attached.model)[QUERY](x)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_fresh_pairs_differ_between_maps_and_seeds() -> None:
    pairs = [
        np.asarray(p)
        for seed in (0, 1)
        for name, p in param_tree.split(attach(make_t5(), LoRA(), drawn=False, seed=seed))[
            1
        ].items()
        if name.endswith("lora_a_DR")
    ]
    assert len({p.tobytes() for p in pairs}) == len(pairs) == 2 * 2 * 6
    for p in pairs:  # uniform in +-1/sqrt(D)
        assert 0.8 * D**-0.5 < np.abs(p).max() <= D**-0.5


def test_lora_drops_on_its_branch_alone_with_a_mask_for_each_map() -> None:
    model, key = make_t5(ONE_LAYER), jax.random.key(3)
    method = LoRA(rank=4, dropout=0.5)
    attached = attach(model, method)
    kept = attached.method.with_dropout(attached.model, key=key)
    x = jnp.ones((4, D))
    plain = param_tree.split(model)[1]
    masks = []
    for path in (QUERY, "encoder/layers_0/attention/value"):
        pair = adapter(attached, path)
        product_DF = pair.scale * pair.lora_a_DR.get_value() @ pair.lora_b_RF.get_value()
        branch = linear_maps(kept)[path](x) - x @ plain[f"{path}/kernel"]
        # Of full rank it is not: what was dropped is what solves it with entries 0 and 2.
        drawn = 2.0 * jax.random.bernoulli(linear_maps(kept)[path].adapter.key, 0.5, x.shape)
        np.testing.assert_allclose(branch, drawn @ product_DF, atol=1e-4)
        assert 0 < float(drawn.mean()) < 2
        masks.append(np.asarray(drawn))
    assert (masks[0] != masks[1]).any()
    assert linear_maps(attached.model)[QUERY].adapter.key is None  # the given one keeps no key
    np.testing.assert_array_equal(logits(attached), logits(attached))
    assert np.abs(logits(attached, key) - logits(attached)).max() > 1e-3


def test_what_is_dropped_depends_on_member_and_step() -> None:
    """Under vmap over members, scan over parts and checkpointing, as the real step does."""
    method = LoRA(rank=4, alpha=32.0, dropout=0.5)
    still = Optimizer(name="sgd", learning_rate=0.0, weight_decay=0.0)
    twice = {name: np.concatenate([x, x]) for name, x in make_batch(1).items()}
    losses = []
    for remat in ("none", "full"):
        made = Trainer(
            method,
            still,
            model=make_t5(ONE_LAYER),
            seeds=(0, 1),
            dropout=True,
            remat=remat,
            microbatching=Microbatching(num_microbatches=2),
        )
        trainable = {
            name: jnp.concatenate([p + normal(*p.shape[1:], seed=i, scale=0.3)] * 2)
            for i, (name, p) in enumerate(made.state.trainable.items())
        }
        made.state = dataclasses.replace(made.state, trainable=trainable)
        losses.append(np.stack([m.loss_E for m in made.run([twice, twice])]))
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)
    assert len(set(losses[0].ravel().tolist())) == 4  # 2 members at 2 steps


def test_ia3_scales_outputs_and_inputs() -> None:
    model = make_t5(ONE_LAYER)
    attached, plain = attach(model, IA3()), param_tree.split(model)[1]
    for path, inputs in (
        ("decoder/layers_0/self_attention/key", D),
        ("encoder/layers_0/mlp/wo", 32),
    ):
        x, kernel, module = normal(3, inputs), plain[f"{path}/kernel"], adapter(attached, path)
        if path.endswith("wo"):
            want = (x * module.scale_D.get_value()) @ kernel
        else:
            want = (x @ kernel) * module.scale_F.get_value()
        np.testing.assert_allclose(linear_maps(attached.model)[path](x), want, atol=1e-5)
    for path in (QUERY, "encoder/layers_0/mlp/wi_0", "decoder/logits_dense"):
        assert adapter(attached, path) is None


@pytest.mark.parametrize("biases", [True, False])
def test_adapters_add_their_bottleneck(biases: bool) -> None:
    model = make_t5(ONE_LAYER)
    attached = attach(model, Adapters(width=5, activation="relu", biases=biases))
    path = "decoder/layers_0/encoder_decoder_attention/out"
    module, x = adapter(attached, path), normal(3, D)
    y = x @ param_tree.split(model)[1][f"{path}/kernel"]
    low, added = y @ module.down_DR.get_value(), 0.0
    if biases:
        low, added = low + module.down_bias_R.get_value(), module.up_bias_D.get_value()
    want = y + np.maximum(low, 0) @ module.up_RD.get_value() + added
    np.testing.assert_allclose(linear_maps(attached.model)[path](x), want, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "ends"), [("houlsby", ("out", "wo")), ("pfeiffer", ("wo",))], ids=str
)
def test_adapters_stand_behind_whole_sublayers(kind: Any, ends: tuple[str, ...]) -> None:
    attached = attach(make_t5(T5_1_0), Adapters(kind=kind, width=2), drawn=False)
    for path, linear in linear_maps(attached.model).items():
        assert (linear.adapter is not None) == path.endswith(ends)


def test_patterns_choose_parameters_of_the_model_alone() -> None:
    names = [*(f"model/{name}" for name in param_tree.split(make_t5())[1]), "method/scale"]
    trained = {n for n, trains in trainable_mask(PatternTuning(), names).items() if trains}
    assert trained == {
        n for n in names if n.startswith("model/") and n.endswith(("/scale", "/rel_embedding"))
    }
    one = PatternTuning(patterns=(r"encoder/layers_\d/mlp/wo/kernel",))
    assert sum(trainable_mask(one, names).values()) == 2


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (LoRA(targets=("query",)), "method.targets: 'query' matches no linear map"),
        (IA3(outputs=(".*/keys",)), "method.outputs: '.*/keys' matches no linear map"),
        (IA3(inputs=(".*/value", ".*/wo")), "both match"),
        (PatternTuning(patterns=(".*/bias",)), "method.patterns: '.*/bias' matches no parameter"),
    ],
)
def test_patterns_that_choose_nothing_or_twice_are_refused(method: MethodConfig, said: str) -> None:
    with pytest.raises(UserError) as caught:
        attach(make_t5(), method)
    assert said in str(caught.value) and "\n" not in str(caught.value)


MERGED = {
    "lora": EVERYWHERE,
    "ia3": IA3(),
    "pattern": PatternTuning(),
    "full": FullTuning(),
}


@pytest.mark.parametrize("name", MERGED)
def test_merged_weights_do_the_same_alone(name: str) -> None:
    model = make_t5(T5_1_0 if name == "ia3" else ONE_LAYER)
    before = {n: np.array(p) for n, p in param_tree.split(model)[1].items()}
    attached = attach(model, MERGED[name])
    plain = merge(attached)
    params = param_tree.split(plain)[1]
    assert params.keys() == before.keys()
    assert {n: p.shape for n, p in params.items()} == {n: p.shape for n, p in before.items()}
    # Axes too: it can be laid out over a mesh, tuned and merged again.
    assert param_tree.logical_axes(plain) == param_tree.logical_axes(model)
    np.testing.assert_allclose(logits(plain), logits(attached), atol=2e-4)
    assert np.abs(logits(plain) - logits(model)).max() > 0.05
    for n, p in param_tree.split(model)[1].items():
        np.testing.assert_array_equal(p, before[n])
    if name == "lora":
        assert adapter(attached, QUERY) is not None  # what was merged is as it was


def test_what_cannot_be_merged_is_refused() -> None:
    model = make_t5(ONE_LAYER)
    quantized = make_t5(ONE_LAYER)
    quantize_modules(quantized, "int8")
    prompted = PromptTuning(length=2, init="uniform")
    for do, said in (
        (lambda: merge(attach(quantized, LoRA())), "quantized"),
        (lambda: merge(attach(model, Adapters(width=2))), "Bottleneck around"),
        (lambda: merge(attach(model, prompted)), "adds to what the model reads"),
    ):
        with pytest.raises(UserError) as caught:
            do()
        assert said in str(caught.value) and "\n" not in str(caught.value)


def test_weights_are_merged_in_the_dtype_that_they_have() -> None:
    model = make_t5(ONE_LAYER, param_dtype=jnp.bfloat16)
    attached = attach(model, LoRA(rank=2))
    kernel = linear_maps(merge(attached))[QUERY].kernel.get_value()
    assert kernel.dtype == jnp.bfloat16
    pair = adapter(attached, QUERY)
    want = linear_maps(model)[QUERY].kernel.get_value().astype(jnp.float32) + pair.scale * (
        pair.lora_a_DR.get_value() @ pair.lora_b_RF.get_value()
    )
    np.testing.assert_allclose(kernel.astype(jnp.float32), want, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "quantization"),
    [(LoRA(rank=4), "int4"), (IA3(), "int8"), (Adapters(width=4), "none")],
    ids=["lora beside int4", "ia3 beside int8", "adapters"],
)
def test_it_trains_in_bfloat16_and_beside_narrow_weights(
    method: MethodConfig, quantization: Any
) -> None:
    model = make_t5(ONE_LAYER, dtype=jnp.bfloat16)
    quantize_modules(model, quantization)
    adam = Optimizer(name="adamw", learning_rate=0.03, weight_decay=0.0)
    made = Trainer(method, adam, model=model, dropout=False)
    assert {p.dtype for p in made.state.trainable.values()} == {jnp.dtype("float32")}
    assert any(p.dtype != jnp.float32 for p in made.frozen.values()) == (quantization != "none")
    losses = [float(m.loss_E[0]) for m in made.run([make_batch(1)] * 15)]
    assert losses[-1] < losses[0] - 0.2
