"""Decoder-only models against numbers recorded from transformers and PEFT, in float32."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.models.base import Context, Model
from prompt_tuning_jax.typing import Array

MODELS = [
    "llama_mha",
    "llama_gqa_tied",
    "mistral_sliding",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "bloom",
    "gpt_neox",
    "opt",
]
WITH_ADAPTERS = ["llama_gqa_tied", "gpt2", "bloom", "gemma2", "qwen3"]


@pytest.fixture(scope="module")
def families(shared: Path) -> Path:
    return shared / "fixtures/families"


@functools.cache
def load(folder: Path) -> Model:
    return load_model(str(folder))


def padded(ids: np.ndarray, real: np.ndarray) -> np.ndarray:
    return np.where(real, ids, -1).astype(np.int32)


def split(want: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and the targets of each row, of which the labels are the targets."""
    real, is_target = want["attention_mask"] != 0, want["labels"] != -100
    rows = []
    for chosen in (real & ~is_target, is_target):
        lengths = chosen.sum(axis=1)
        ids = np.full((len(chosen), lengths.max()), -1, np.int32)
        for row, length in enumerate(lengths):
            ids[row, :length] = want["input_ids"][row, chosen[row]]
        rows.append(ids)
    return rows[0], rows[1]


def read(model: Model, tokens_BT: Any, prompt: Any = None) -> Context:
    return model.read(model.embed(tokens_BT, prompt))


@functools.partial(jax.jit, static_argnames="graphdef")
def reading(
    graphdef: Any, params: Any, tokens_BT: Any, prompt: Any = None
) -> tuple[Array, Array, Array]:
    """The hidden states and logits of all positions, and the greedy continuation."""
    model = param_tree.merge(graphdef, params)
    context = read(model, tokens_BT, prompt)
    return context.hidden_BUD, model.logits(context.hidden_BUD), greedy(model, context, 8)


@functools.partial(jax.jit, static_argnames=("graphdef", "new_tokens"))
def continuing(graphdef: Any, params: Any, tokens_BT: Any, new_tokens: int) -> Array:
    """The greedy continuation alone; logits of all positions would cost most of the time."""
    model = param_tree.merge(graphdef, params)
    return greedy(model, read(model, tokens_BT), new_tokens)


def greedy(model: Model, context: Context, new_tokens: int) -> Array:
    decode_context, caches = model.start_decoding(context, new_tokens)

    def step(carried: Any, position: Any) -> Any:
        tokens_B, caches = carried
        logits_BV, caches = model.decode_step(tokens_B, position, caches, decode_context)
        tokens_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return (tokens_B, caches), tokens_B

    first = (jnp.zeros(len(context.mask_BU), jnp.int32), caches)
    greedy_SB = jax.lax.scan(step, first, jnp.arange(new_tokens))[1]
    return greedy_SB.T


@functools.partial(jax.jit, static_argnames=("graphdef", "with_gradient"))
def losses(
    graphdef: Any,
    params: Any,
    prompt: Any,
    inputs_BT: Any,
    targets_BS: Any,
    with_gradient: bool = False,
) -> Any:
    """The mean loss with the log-probability of each target, and the prompt's gradient or None."""
    model = param_tree.merge(graphdef, params)

    def loss(prompt: Any) -> tuple[Array, Array]:
        logits_BSV = model.write(read(model, inputs_BT, prompt), targets_BS)
        log_probs_BSV = jax.nn.log_softmax(logits_BSV)
        at_BS1 = jnp.maximum(targets_BS, 0)[..., None]
        log_probs_BS = jnp.take_along_axis(log_probs_BSV, at_BS1, axis=-1)[..., 0]
        log_probs_BS = jnp.where(targets_BS >= 0, log_probs_BS, 0.0)
        return -jnp.sum(log_probs_BS) / jnp.sum(targets_BS >= 0), log_probs_BS

    if not with_gradient:
        return loss(prompt), None
    return jax.value_and_grad(loss, has_aux=True)(prompt)


def check_greedy(got_BS: Array, want: Mapping[str, np.ndarray], case: str = "") -> None:
    lengths_B = want[f"{case}greedy_len"]
    for got_S, want_S, length in zip(got_BS, want[f"{case}greedy_ids"], lengths_B, strict=True):
        np.testing.assert_array_equal(got_S[:length], want_S[:length])


@pytest.mark.parametrize("name", MODELS)
def test_reading_and_continuing(families, name):
    model, want = load(families / name), np.load(families / name / "cases.npz")
    real_BT, long_BT = want["attention_mask"] != 0, want["long_input_ids"]
    rows, width = real_BT.shape
    # Recorded one batch at a time; the longer rows have three times the window of the models
    # that have one.
    beside = ((0, 0), (0, long_BT.shape[1] - width))
    short_BT = np.pad(padded(want["input_ids"], real_BT), beside, constant_values=-1)
    tokens_BT = np.concatenate([short_BT, long_BT]).astype(np.int32)
    hidden, logits, greedy = reading(*param_tree.split(model), tokens_BT)
    got = logits[:rows, :width]
    np.testing.assert_allclose(got[real_BT], want["logits"][real_BT], atol=2e-4)
    row0 = hidden[0, : len(want["row0_final_hidden"])]
    np.testing.assert_allclose(row0, want["row0_final_hidden"], atol=2e-4)
    check_greedy(greedy[:rows], want)
    np.testing.assert_allclose(logits[rows:], want["long_logits"], atol=2e-4)
    check_greedy(greedy[rows:], want, "long_")


@pytest.mark.parametrize("name", MODELS)
def test_targets(families, name):
    model, want = load(families / name), np.load(families / name / "cases.npz")
    inputs_BT, targets_BS = split(want)
    (loss, log_probs_BS), _ = losses(*param_tree.split(model), None, inputs_BT, targets_BS)
    np.testing.assert_allclose(loss, want["loss"], rtol=1e-5)
    np.testing.assert_allclose(log_probs_BS.sum(axis=1), want["row_logprob_sum"], atol=5e-4)
    np.testing.assert_allclose(
        log_probs_BS[targets_BS >= 0],
        want["target_logprobs"][want["labels"] != -100],
        atol=2e-4,
    )


@pytest.mark.parametrize("name", WITH_ADAPTERS)
def test_prompts_that_differ_by_row(families, name):
    """Prompts and prefixes that rows share are in test_families_peft.py."""
    model = load(families / name)
    want = np.load(families / "peft" / name / "multitask" / "cases.npz")
    prompt, real_BT = jnp.asarray(want["encoded_prompt"]), want["attention_mask"] != 0
    whole_BT = padded(want["input_ids"], real_BT)
    split_model = param_tree.split(model)
    _, logits, greedy = reading(*split_model, whole_BT, prompt)
    np.testing.assert_allclose(logits[real_BT], want["logits"][real_BT], atol=3e-4)
    check_greedy(greedy, want)
    (loss, log_probs_BS), _ = losses(*split_model, prompt, *split(want))
    np.testing.assert_allclose(log_probs_BS.sum(axis=1), want["row_logprob_sum"], atol=5e-4)
    np.testing.assert_allclose(loss, want["loss"], rtol=1e-5)
    _, logits, _ = reading(*split_model, np.full_like(whole_BT, -1), prompt)
    np.testing.assert_allclose(logits[:, 0], want["last_virtual_logits"], atol=3e-4)


@pytest.mark.slow
def test_smollm2(smollm2: Path, families: Path) -> None:
    check_pretrained(smollm2, np.load(families / "smollm2" / "cases.npz"))


@pytest.mark.slow
def test_gemma3_270m(gemma3_270m: Path, families: Path) -> None:
    want = np.load(families / "gemma3_270m" / "cases.npz")
    check_pretrained(gemma3_270m, want)
    # Behind a prompt, which predicts the first token.
    split_model, real_BT = param_tree.split(load(gemma3_270m)), want["attention_mask"] != 0
    prompt, tokens_BT = jnp.asarray(want["prompt_inputs_embeds"]), want["input_ids"]
    empty_BT = np.full_like(tokens_BT[:, :1], -1)
    padded_BT = padded(tokens_BT, real_BT)
    _, log_probs_BT = losses(*split_model, prompt, empty_BT, padded_BT)[0]
    recorded_BT = want["prompted_token_logprobs"]
    np.testing.assert_allclose(log_probs_BT[real_BT], recorded_BT[real_BT], atol=3e-4)
    row_1T = tokens_BT[:1, : real_BT[0].sum()]
    (loss, _), gradient = losses(*split_model, prompt, row_1T[:, :1], row_1T[:, 1:], True)
    np.testing.assert_allclose(loss, want["prompt_loss0"], rtol=1e-4)
    largest = np.abs(want["prompt_grad0"]).max()
    np.testing.assert_allclose(gradient, want["prompt_grad0"], atol=1e-3 * largest)


def check_pretrained(path: Path, want: Mapping[str, np.ndarray]) -> None:
    split_model, real_BT = param_tree.split(load(path)), want["attention_mask"] != 0
    tokens_BT = padded(want["input_ids"], real_BT)
    inputs_BT, targets_BT = tokens_BT[:, :1], tokens_BT[:, 1:]
    _, log_probs_BT = losses(*split_model, None, inputs_BT, targets_BT)[0]
    recorded_BT = want["token_logprobs"][:, 1:]
    np.testing.assert_allclose(log_probs_BT[real_BT[:, 1:]], recorded_BT[real_BT[:, 1:]], atol=3e-4)
    # Gemma's padding, 0, is in no prompt; SmolLM2's may be.
    mask_BT = want["prompt_mask" if "prompt_mask" in want else "prompt_ids"] != 0
    prompts_BT = padded(want["prompt_ids"], mask_BT)
    new_tokens = want["greedy_ids"].shape[1]
    check_greedy(continuing(*split_model, prompts_BT, new_tokens), want)
