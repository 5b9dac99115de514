"""Weights in whole numbers: how close they come, what is derived through them, what is kept.

What a product costs in memory is read from the compiled program: full kernels must not pile up.
"""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.fingerprint import fingerprint
from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
from prompt_tuning_jax.checkpoints.load import abstract_model, load_model, random_model
from prompt_tuning_jax.config import validation
from prompt_tuning_jax.config.experiment import Experiment, Model, Optimizer
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.setup import model_fingerprint, require_trainable
from prompt_tuning_jax.methods import PROMPT, Context, FullTuning, PromptTuning, attach_method
from prompt_tuning_jax.models.ops.quantized import quantized_dot
from prompt_tuning_jax.models.quantization import SCALE, bytes_of, quantize, quantize_modules
from tests import tiny_run
from tests.devices import with_devices
from tests.micro import ONE_LAYER, T5_1_0, D, Trainer, make_batch, make_t5, normal, token_rows

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("int8", "int4")
GROUP, TOP = {"int8": 64, "int4": 32}, {"int8": 127, "int4": 7}


def restored(kernel, scale):
    """The kernel as its numbers say, written down independently."""
    kernel, scale = np.asarray(kernel, np.float64), np.asarray(scale, np.float64)
    return kernel * np.repeat(scale, kernel.shape[0] // scale.shape[0], axis=0)


def full_params(model):
    """A quantized model's parameters as floats, under the names of a model that is not."""
    params = param_tree.split(model)[1]
    found = {}
    for name, array in params.items():
        if name.endswith(SCALE):
            continue
        scale = params.get(name + SCALE)
        if scale is None:
            found[name] = array
        elif name.endswith("embedding"):
            found[name] = jnp.asarray(restored(array.T, scale.T).T, jnp.float32)
        else:
            found[name] = jnp.asarray(restored(array, scale), jnp.float32)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_at_most_half_a_step_off(kind):
    kernel = normal(64, 24) * np.geomspace(1e-3, 10, 24, dtype=np.float32)
    kernel[:, 3] = 0
    whole, scale = quantize(jnp.asarray(kernel), kind)
    assert whole.dtype == kind and whole.shape == kernel.shape
    assert scale.shape == (64 // GROUP[kind], 24)
    assert np.abs(np.asarray(whole, np.int32)).max() == TOP[kind]
    step = np.repeat(np.asarray(scale, np.float32), GROUP[kind], axis=0)
    # A scale in bfloat16 is up to 2**-8 too small for the largest weight.
    slack = TOP[kind] * 2.0**-8 * step if kind == "int4" else 0
    assert (np.abs(restored(whole, scale) - kernel) <= 0.501 * step + slack).all()
    assert not np.asarray(whole, np.int32)[:, 3].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_product_and_its_derivative_are_those_of_the_full_kernel(kind, dtype):
    whole, scale = quantize(jnp.asarray(normal(64, 24)), kind)
    full = restored(whole, scale)
    x, cotangent = normal(2, 5, 64, seed=1), normal(2, 5, 24, seed=2)

    def product(x, whole, scale):
        return quantized_dot(x, whole, scale, dtype=dtype)

    out, derive = jax.vjp(lambda x: product(x, whole, scale), jnp.asarray(x, dtype))
    dx = derive(jnp.asarray(cotangent))[0]
    assert out.dtype == jnp.float32 and dx.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 0.15
    np.testing.assert_allclose(out, x @ full, atol=tolerance)
    np.testing.assert_allclose(np.asarray(dx, np.float32), cotangent @ full.T, atol=tolerance)
    # Members side by side, with one kernel.
    many = jax.vmap(jax.grad(lambda x: product(x, whole, scale).sum()))(jnp.asarray(x, dtype))
    one = jax.grad(lambda x: product(x, whole, scale).sum())(jnp.asarray(x[1], dtype))
    np.testing.assert_allclose(
        np.asarray(many[1], np.float32), np.asarray(one, np.float32), atol=tolerance
    )


@functools.partial(jax.jit, static_argnums=0)
def output_and_derivative(graphdef, params, source, target, prompt):
    def total(prompt):
        logits = param_tree.merge(graphdef, params)(source, target, prompt)
        return logits.sum(), logits

    return jax.grad(total, has_aux=True)(prompt)


@pytest.mark.parametrize(("config", "kind"), [(ONE_LAYER, "int4"), (T5_1_0, "int8")])
def test_a_quantised_model_computes_what_its_numbers_say(config, kind):
    model, plain = make_t5(config), make_t5(config)
    quantize_modules(model, kind)
    param_tree.fill(plain, full_params(model))
    given = token_rows([5, 7]), token_rows([4, 2]), jnp.asarray(normal(3, D))
    own, logits = output_and_derivative(*param_tree.split(model), *given)
    theirs, wanted = output_and_derivative(*param_tree.split(plain), *given)
    np.testing.assert_allclose(logits, wanted, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(own, theirs, rtol=2e-2, atol=2e-2 * np.abs(theirs).max())
    # A prompt starts from the rows as they are used.
    tables = [m.token_embedder.table() for m in (model, plain)]
    np.testing.assert_allclose(tables[0][jnp.arange(9)], tables[1][jnp.arange(9)], rtol=1e-6)
    assert tables[0].shape == tables[1].shape


def test_prompts_train_and_no_frozen_array_moves():
    model = make_t5(ONE_LAYER)
    quantize_modules(model, "int4")
    trainer = Trainer(
        PromptTuning(length=3),
        Optimizer(),
        [normal(3, D, seed=s) for s in (1, 2)],
        model=model,
        seeds=(0, 1),
        dropout=False,
    )
    before = {name: np.asarray(array) for name, array in trainer.frozen.items()}
    kinds = {array.dtype.name for name, array in before.items() if name.endswith("wo/kernel")}
    assert kinds == {"int4"}
    metrics = trainer.run([make_batch(2, seed=0)] * 8)
    assert (metrics[-1].loss_E < metrics[0].loss_E - 0.1).all()
    for name, array in trainer.frozen.items():
        assert array.dtype == before[name].dtype
        np.testing.assert_array_equal(np.asarray(array), before[name])
    assert set(trainer.state.trainable) == {PROMPT}


@pytest.mark.parametrize("kind", KINDS)
def test_full_kernels_are_not_kept_from_forward_to_backward(kind):
    layers, width = 12, 256
    kernel = jax.eval_shape(
        lambda k: quantize(k, kind), jax.ShapeDtypeStruct((width, width), jnp.float32)
    )

    def loss(x, kernels):
        for whole, scale in kernels:
            x = jnp.tanh(quantized_dot(x, whole, scale, dtype=jnp.bfloat16)).astype(jnp.bfloat16)
        return x.astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((8, width), jnp.bfloat16)
    compiled = jax.jit(jax.grad(loss)).lower(x, [kernel] * layers).compile()
    one = width * width * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * one  # all would be 12


def folder(config=tiny_run.CONFIG):
    return str(tiny_run.model_folder(config=config))


@pytest.mark.parametrize(("kind", "param_dtype"), [("int8", "bfloat16"), ("int4", "float32")])
def test_loading_quantises_what_is_stored(kind, param_dtype):
    plain = load_model(folder())
    quantize_modules(plain, kind)
    want = param_tree.split(plain)[1]
    loaded = load_model(folder(), param_dtype=param_dtype, quantization=kind)
    params = param_tree.split(loaded)[1]
    assert params.keys() == want.keys()
    for name, array in params.items():
        quantized = name.endswith(SCALE) or name + SCALE in params
        assert array.dtype == (want[name].dtype if quantized else param_dtype), name
        if quantized:  # from the numbers in the file, whatever the others are held in
            np.testing.assert_array_equal(np.asarray(array), np.asarray(want[name]))
    assert "norm" not in "".join(name for name in params if name.endswith(SCALE))
    for name in ("decoder/logits_dense/kernel", "token_embedder/embedding"):
        assert params[name].dtype == jnp.int8
    # The same model by another measure: prompts go from one to the other.
    original = load_model(folder())
    assert model_fingerprint(loaded) == model_fingerprint(original)
    assert fingerprint(loaded.config, params) != model_fingerprint(original)
    abstract = abstract_model(
        loaded.config, dtype="float32", param_dtype=param_dtype, quantization=kind
    )
    shapes = param_tree.split(abstract)[1]
    assert {n: (s.shape, s.dtype) for n, s in shapes.items()} == {
        n: (p.shape, p.dtype) for n, p in params.items()
    }


def test_bytes_count_two_int4_as_one():
    params = {"a": jnp.zeros((4, 6), jnp.int4), "b": jnp.zeros(3, jnp.bfloat16)}
    assert bytes_of(params) == 12 + 6
    model, plain = random_model("tiny", quantization="int8"), random_model("tiny")
    held = bytes_of(param_tree.split(model)[1])
    assert 1 < held / param_tree.count(param_tree.split(plain)[1]) < 1.05
    assert model_fingerprint(model) == model_fingerprint(plain)


def test_what_would_train_or_write_the_weights_is_refused(tmp_path):
    quantized = Experiment(model=Model(quantization="int8"), method=FullTuning())
    with pytest.raises(UserError, match=r"FullTuning trains the weights.*quantization=none"):
        validation.validate(quantized)
    with pytest.raises(UserError, match=r"model.quantization.*int3.*int8"):
        validation.validate(Experiment(model=Model(quantization="int3")))
    start = Model(random_weights=True, attention_init="mimetic", quantization="int4")
    with pytest.raises(UserError, match=r"model.attention_init needs weights that train"):
        validation.validate(Experiment(model=start))
    validation.validate(dataclasses.replace(quantized, method=PromptTuning()))
    model = load_model(folder(), quantization="int8")
    attached = attach_method(model, FullTuning(), key=jax.random.key(0), context=Context())
    with pytest.raises(UserError, match=r"they are quantized; set model.quantization=none"):
        require_trainable(param_tree.split(attached)[1])
    with pytest.raises(UserError, match="are quantized"):
        write_hf(tmp_path / "m", model.config, param_tree.split(model)[1])
    assert not (tmp_path / "m").exists()


EIGHT_DEVICES = """
import sys
import jax, numpy as np
from prompt_tuning_jax import param_tree
from prompt_tuning_jax.distributed import sharding
from prompt_tuning_jax.checkpoints.load import load_model

path = sys.argv[1]
mesh = sharding.make_mesh(fsdp=2, model=4)
for kind in ("int8", "int4"):
    whole = load_model(path, quantization=kind)
    spread = load_model(path, quantization=kind, mesh=mesh)
    want, params = param_tree.split(whole)[1], param_tree.split(spread)[1]
    for name, array in params.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(want[name]), err_msg=name)
    wi = "encoder/layers_0/mlp/wi_0/kernel"
    assert params[wi].addressable_shards[0].data.shape == (8, 8)
    assert params[wi + "_scale"].addressable_shards[0].data.shape == (1, 8)
    assert spread.original_fingerprint == whole.original_fingerprint != ""
tokens = np.full((8, 4), 7, np.int32)
graphdef = param_tree.split(spread)[0]
run = jax.jit(lambda params: param_tree.merge(graphdef, params)(tokens, tokens))
np.testing.assert_allclose(run(params), run(want), rtol=1e-3, atol=1e-3)
print("fine")
"""


def test_a_mesh_holds_the_same_numbers_each_device_its_part():
    done = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES, folder()],
        cwd=ROOT,
        env=with_devices(8),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "fine" in done.stdout, done.stderr


def test_bfloat16_holds_every_int8():
    whole = np.arange(-127, 128)
    np.testing.assert_array_equal(whole.astype(ml_dtypes.bfloat16).astype(int), whole)
