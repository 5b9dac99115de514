"""Numbers recorded from the original code on T5X and Flaxformer, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.methods import PROMPT, PromptTuning, trainable_mask
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.models.losses import token_sums
from prompt_tuning_jax.training.optim import make_optimizer, make_schedule
from prompt_tuning_jax.training.step import init_state, make_train_step

PROMPT_LENGTHS = (5, 20)
STARTS = {"s0": 0, "s1100000": 1_100_000, "sckpt": 3}


@pytest.fixture(scope="module")
def t5x(shared):
    return shared / "fixtures/t5x"


@pytest.fixture(scope="module")
def model(t5x):
    return load_model(str(t5x / "tiny_t5x/checkpoint_3"))


def original_optimizer(initial_step, *, min_dim_size_to_factor=128):
    return Optimizer(
        learning_rate=0.3,
        weight_decay=1e-5,
        initial_step=initial_step,
        min_dim_size_to_factor=min_dim_size_to_factor,
    )


def test_logits_and_encoder_output_without_prompt(model, t5x):
    want = np.load(t5x / "logits_noprompt.npz")
    source, target = want["encoder_input_tokens"], want["decoder_target_tokens"]
    logits = np.asarray(jax.jit(model)(source, want["decoder_input_tokens"]))
    real = target > 0
    np.testing.assert_allclose(logits[0][real[0]], want["logits_row0"][real[0]], atol=2e-4)
    np.testing.assert_allclose(
        logits[..., want["vocab_cols"]][real], want["logits_cols"][real], atol=2e-4
    )
    hidden = np.asarray(jax.jit(lambda source: model.encode(source).hidden_BUD)(source))
    np.testing.assert_allclose(hidden[source > 0], want["encoder_output"][source > 0], atol=2e-4)


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_logits_loss_and_gradient_with_prompt(model, t5x, length, z_loss):
    want = np.load(t5x / "logits_prompt.npz")
    of = f"p{length}_"
    source, target = want["encoder_input_tokens"], want["decoder_target_tokens"]
    z = "z1e-4" if z_loss else "z0"

    def loss(prompt_PD):
        logits = model(source, want["decoder_input_tokens"], prompt_PD)
        return token_sums(logits, target, z_loss=z_loss).loss, logits

    derived = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, logits), gradient = derived(want[of + "prompt"])
    real = target > 0
    np.testing.assert_allclose(
        np.asarray(logits)[..., want["vocab_cols"]][real], want[of + "logits_cols"][real], atol=2e-4
    )
    np.testing.assert_allclose(value, want[f"{of}loss_{z}_lnf_none"], rtol=1e-5)
    expected = want[f"{of}gradprompt_{z}_lnf_none"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_loss_per_real_token_is_the_mean(model, t5x):
    want = np.load(t5x / "logits_noprompt.npz")
    logits = jax.jit(model)(want["encoder_input_tokens"], want["decoder_input_tokens"])
    sums = token_sums(logits, want["decoder_target_tokens"], z_loss=1e-4)
    np.testing.assert_allclose(sums.loss / sums.tokens, want["loss_z1e-4_lnf_real"], rtol=1e-5)


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
@pytest.mark.parametrize("start", STARTS)
def test_thirty_steps_of_the_optimizer_on_recorded_gradients(t5x, length, start):
    want = np.load(t5x / "train_traj.npz")
    of = f"p{length}_{start}_"
    optimizer = make_optimizer(original_optimizer(STARTS[start]), {PROMPT: True})
    params = {PROMPT: jnp.asarray(want[of + "init_prompt"])}
    state = optimizer.init(params)
    for step, gradient in enumerate(want[of + "grads"]):
        updates, state = optimizer.update({PROMPT: gradient}, state, params, learning_rate=0.3)
        params = jax.tree.map(jnp.add, params, updates)
        np.testing.assert_allclose(params[PROMPT], want[of + "prompts"][step], atol=2e-5)


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
@pytest.mark.parametrize("start", STARTS)
def test_thirty_training_steps(model, t5x, length, start):
    want = np.load(t5x / "train_traj.npz")
    of = f"p{length}_{start}_"
    config = original_optimizer(STARTS[start])
    method = PromptTuning(length=length)
    graphdef, params = param_tree.split(with_prompt(model, want[of + "init_prompt"], method))
    mask = trainable_mask(method, list(params))
    trainable, frozen = param_tree.partition(params, mask)
    optimizer = make_optimizer(config, mask)
    state = init_state({name: p[None] for name, p in trainable.items()}, optimizer)
    step = make_train_step(
        graphdef,
        optimizer,
        make_schedule(config, total_steps=30),
        learning_rates=(0.3,),
        seeds=(0,),
        loss_normalization="sum",
        z_loss=1e-4,
        dropout=False,
    )
    names = {"inputs": "encoder_input_tokens", "targets": "decoder_target_tokens"}
    for number in range(30):
        batch = {name: want[f"batch{number % 3}_{own}"][None] for name, own in names.items()}
        tokens = (batch["targets"] > 0).sum()
        state, metrics = step(state, frozen, batch)
        # Recorded with the z-loss in it, as the metric here is.
        np.testing.assert_allclose(
            metrics.loss_E[0] * tokens, want[of + "losses"][number], rtol=1e-3
        )
        # The recorded numbers' own sensitivity: how far a start 1e-6 off drifts.
        drift = 100 * want[of + "sensitivity"][number]
        got, expected = np.asarray(state.trainable[PROMPT][0]), want[of + "prompts"][number]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=max(1e-3 * scale, drift))


@pytest.mark.parametrize("shape", [(100, 160), (127, 160), (128, 160), (150, 128)])
def test_adafactor_factors_as_t5x_does(t5x, shape):
    want = np.load(t5x / "train_traj.npz")
    rows, columns = shape
    starts = [n for n in want.files if n.startswith(f"ada_{rows}x{columns}_s")]
    starts = sorted({int(name.split("_")[2][1:]) for name in starts})
    assert starts
    for start in starts:
        random = np.random.RandomState(1)
        params = {PROMPT: jnp.asarray(random.normal(size=shape).astype(np.float32))}
        optimizer = make_optimizer(original_optimizer(start), {PROMPT: True})
        state = optimizer.init(params)
        for _ in range(10):
            gradient = random.normal(size=shape) * 10.0 ** random.uniform(-4, 0, size=shape)
            gradients = {PROMPT: gradient.astype(np.float32)}
            updates, state = optimizer.update(gradients, state, params, learning_rate=0.3)
            params = jax.tree.map(jnp.add, params, updates)
        expected = want[f"ada_{rows}x{columns}_s{start}_final_cols"]
        np.testing.assert_allclose(params[PROMPT][:, ::8], expected, atol=2e-5)
