"""Greedy and beam outputs against those recorded from T5X and from transformers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.inference.decoding import HuggingFaceRule, T5XRule, beam_search, greedy

EOS = 1
T5X_WIDTH = 12 + 20  # encoder positions of the longest recorded prompt
T5X_LENGTH = 16
HF_LENGTH = 12
HF_MODELS = ["a_t5_10", "b_t5_11", "c_flan", "d_mt5", "e_byt5"]
LOGITS = "decoder/logits_dense/kernel"


@partial(jax.jit, static_argnums=0)
def encode(graphdef, params, tokens_BT, prompt_PD=None):
    return param_tree.merge(graphdef, params).encode(tokens_BT, prompt_PD)


@partial(jax.jit, static_argnums=0, static_argnames=("max_length", "num_beams", "rule"))
def decode(graphdef, params, context, *, max_length, num_beams=0, rule=None, hf_penalty=None):
    """Beams, or greedy ids with no ``num_beams``.  ``hf_penalty`` is traced, so compiled once."""
    if hf_penalty is not None:
        rule = HuggingFaceRule(length_penalty=hf_penalty)
    model = param_tree.merge(graphdef, params)
    size = {"num_rows": context.mask_BU.shape[0], "max_length": max_length}
    kept, cache = model.start_decoding(context, max_length)
    kept = jax.tree.map(lambda x: jnp.repeat(x, max(num_beams, 1), axis=0), kept)

    def step(tokens_N, position, cache):
        return model.decode_step(tokens_N, position, cache, kept)

    if num_beams:
        return beam_search(step, cache, num_beams=num_beams, rule=rule, **size)
    return greedy(step, cache, **size)


@pytest.fixture(scope="module")
def t5x(shared):
    folder = shared / "fixtures" / "t5x"
    model = load_model(str(folder / "tiny_t5x" / "checkpoint_3"), relpos_max_distance=8)
    return param_tree.split(model), dict(np.load(folder / "decode.npz"))


def t5x_case(t5x, prompt_name, *, eos):
    (graphdef, params), recorded = t5x
    prompts = {"nop": None, "p5": recorded["prompt5"], "p20": recorded["prompt20"]}
    context = encode(graphdef, params, recorded["encoder_input_tokens"], prompts[prompt_name])
    # Hidden positions up to a common width, so that all cases share what is compiled.
    missing = T5X_WIDTH - context.mask_BU.shape[1]
    context = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2))), context
    )
    if eos:  # as stored the model never ends within the recorded length
        column_D = recorded["eos_variant_logits_dense_col1"]
        params = {**params, LOGITS: params[LOGITS].at[:, EOS].set(column_D)}
    return partial(decode, graphdef, params, context, max_length=T5X_LENGTH)


@pytest.mark.parametrize("eos", [False, True], ids=["endless", "ending"])
@pytest.mark.parametrize("prompt_name", ["nop", "p5", "p20"])
def test_t5x(t5x, prompt_name, eos):
    run = t5x_case(t5x, prompt_name, eos=eos)
    recorded = t5x[1]
    case = f"{'eos_' if eos else ''}{prompt_name}"
    np.testing.assert_array_equal(run().ids_NS, recorded[f"{case}_greedy_ids"][:, 0])
    for name, num_beams, alpha in [("beam4", 4, 0.6), ("beam4_alpha0", 4, 0.0), ("beam1", 1, 0.6)]:
        beams = run(num_beams=num_beams, rule=T5XRule(alpha=alpha))
        # Recorded from the worst to the best.
        np.testing.assert_array_equal(beams.ids_NKS, recorded[f"{case}_{name}_ids"][:, ::-1])
        np.testing.assert_allclose(
            beams.scores_NK, recorded[f"{case}_{name}_scores"][:, ::-1], atol=1e-3
        )


@pytest.mark.parametrize("name", HF_MODELS)
def test_hugging_face(shared, name):
    folder = shared / "fixtures" / "hf" / name
    graphdef, params = param_tree.split(load_model(str(folder)))
    recorded = np.load(folder / "cases.npz")
    context = encode(graphdef, params, recorded["input_ids"] * recorded["attention_mask"])
    run = partial(decode, graphdef, params, context, max_length=HF_LENGTH)
    assert_same_ids(run().ids_NS, recorded["greedy_ids"])
    for case, length_penalty in [("beam_lp06", 0.6), ("beam_lp10", 1.0)]:
        beams = run(num_beams=4, hf_penalty=length_penalty)
        assert_same_ids(beams.ids_NKS, recorded[f"{case}_ids"])
        np.testing.assert_allclose(beams.scores_NK, recorded[f"{case}_scores"], atol=1e-3)


def assert_same_ids(ids, recorded):
    """Recorded ids begin with the start token, end with the longest, and pad beams with EOS."""
    expected = np.zeros(ids.shape, np.int32)
    expected[..., : recorded.shape[-1] - 1] = recorded[..., 1:]
    ends_before = np.cumsum(expected == EOS, axis=-1) - (expected == EOS)
    np.testing.assert_array_equal(ids, np.where(ends_before > 0, 0, expected))
