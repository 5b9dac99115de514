"""Numbers recorded from transformers and PEFT, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.methods import PROMPT, PromptTuning, trainable_mask
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.models.losses import token_sums
from prompt_tuning_jax.training.optim import make_optimizer, make_schedule
from prompt_tuning_jax.training.step import init_state, make_train_step

MODELS = ["a_t5_10", "b_t5_11", "c_flan", "d_mt5", "e_byt5"]


@pytest.fixture(scope="module")
def hf(shared):
    return shared / "fixtures/hf"


@functools.cache
def load(folder):
    return load_model(str(folder))


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, source, decoder_input, prompt=None):
    model = param_tree.merge(graphdef, params)
    encoded = model.encode(source, prompt)
    return model.decode(decoder_input, encoded), encoded.hidden_BUD


def targets_of(labels):
    assert not (labels == 0).any()  # padding is -100 there and 0 here
    return np.where(labels == -100, 0, labels)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", ["", "long_", "leftpad_"], ids=["main", "long", "leftpad"])
def test_logits_and_loss(hf, name, case):
    want = np.load(hf / name / "cases.npz")
    of_targets = "" if case == "leftpad_" else case
    labels = want[f"{of_targets}labels"]
    mask = want[f"{case}attention_mask"] != 0
    source = want[f"{case}input_ids"] * mask
    logits, hidden = forward(
        *param_tree.split(load(hf / name)), source, want[f"{of_targets}decoder_input_ids"]
    )
    real = labels != -100
    np.testing.assert_allclose(logits[real], want[f"{case}logits"][real], atol=2e-4)
    sums = token_sums(logits, targets_of(labels))
    np.testing.assert_allclose(sums.loss / sums.tokens, want[f"{case}loss"], rtol=1e-5)
    if case != "leftpad_":
        recorded = want[f"{case}encoder_last_hidden_state"]
        np.testing.assert_allclose(hidden[mask], recorded[mask], atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_peft_prompt(hf, name):
    folder = hf / "peft" / name / "prompt_sub1"
    want, inputs = np.load(folder / "cases.npz"), np.load(hf / name / "cases.npz")
    prompt_PD = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    source = inputs["input_ids"] * inputs["attention_mask"]
    graphdef, params = param_tree.split(load(hf / name))
    real = inputs["labels"] != -100

    @jax.jit
    def gradient(prompt_PD):
        def loss(prompt_PD):
            logits, hidden = forward(
                graphdef, params, source, inputs["decoder_input_ids"], prompt_PD
            )
            sums = token_sums(logits, targets_of(inputs["labels"]))
            return sums.loss / sums.tokens, (logits, hidden)

        return jax.value_and_grad(loss, has_aux=True)(prompt_PD)

    (loss, (logits, hidden)), got = gradient(jnp.asarray(prompt_PD))
    np.testing.assert_allclose(logits[real], want["logits"][real], atol=2e-4)
    np.testing.assert_allclose(loss, want["loss"], rtol=1e-5)
    seen = np.pad(source != 0, ((0, 0), (len(prompt_PD), 0)), constant_values=True)
    np.testing.assert_allclose(hidden[seen], want["encoder_last_hidden_state"][seen], atol=2e-4)
    scale = np.abs(want["prompt_grad"]).max()
    np.testing.assert_allclose(got, want["prompt_grad"], rtol=1e-3, atol=1e-4 * scale)


@pytest.fixture(scope="module")
def sgd(hf):
    """A step of prompt tuning by plain SGD at rate 1, to be scaled: its state and a runner."""
    model = load(hf / "b_t5_11")
    method = PromptTuning(length=8)
    graphdef, params = param_tree.split(with_prompt(model, np.zeros((8, 48), np.float32), method))
    mask = trainable_mask(method, list(params))
    _, frozen = param_tree.partition(params, mask)

    @functools.cache
    def step_at(rate):
        config = Optimizer(name="sgd", learning_rate=rate, weight_decay=0.0)
        optimizer = make_optimizer(config, mask)
        schedule = make_schedule(config, total_steps=10)
        step = make_train_step(
            graphdef, optimizer, schedule, learning_rates=(rate,), seeds=(0,), dropout=False
        )
        return optimizer, step

    def run(prompt_PD, recorded, steps):
        rate = float(recorded["lr"])
        optimizer, step = step_at(rate)
        state = init_state({PROMPT: jnp.asarray(prompt_PD)[None]}, optimizer)
        for s in steps:
            targets = targets_of(recorded["labels"][s])
            batch = {
                "inputs": recorded["input_ids"][s] * recorded["attention_mask"][s],
                "targets": targets,
            }
            batch = {name: array[None] for name, array in batch.items()}
            state, metrics = step(state, frozen, batch)
            yield s, np.asarray(state.trainable[PROMPT][0]), float(metrics.loss_E[0])

    return run


def test_ten_steps_of_sgd(hf, sgd):
    want = np.load(hf / "train_b_sgd/trajectory_lr005.npz")
    for s, prompt_PD, loss in sgd(want["prompt_init"], want, range(10)):
        np.testing.assert_allclose(prompt_PD, want["prompts"][s], atol=5e-5)
        np.testing.assert_allclose(loss, want["loss"][s], rtol=1e-4)


def test_each_step_of_sgd_from_the_recorded_prompt(hf, sgd):
    want = np.load(hf / "train_b_sgd/trajectory.npz")
    starts = [want["prompt_init"], *want["prompts"]]
    for s in range(10):
        ((_, prompt_PD, loss),) = sgd(starts[s], want, [s])
        scale = 0.5 * np.abs(want["grads"][s]).max()
        np.testing.assert_allclose(prompt_PD, want["prompts"][s], atol=max(1e-3 * scale, 2e-6))
        np.testing.assert_allclose(loss, want["loss"][s], rtol=1e-4)
