"""Where the prompt stands and who sees it, against sequences laid out by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.methods import PromptTuning
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.methods.prompt_combine import attention_mask, combine
from prompt_tuning_jax.models.base import joined
from prompt_tuning_jax.models.injections import Injections, ModelInput
from tests.micro import EOS, ONE_LAYER, PER_LAYER, T5_1_1, D, encode, make_t5, normal, token_rows
from tests.tiny_lm import D as LM_WIDTH
from tests.tiny_lm import make_lm

P, PROMPT = 3, "method/prompt_PD"
PLACEMENTS = ("prefix", "after_first", "before_eos")
# Different lengths, full, cut without its end, the end alone, one token without end, nothing.
TOKENS = np.concatenate([token_rows([3, 6, 4, 1]), np.zeros((3, 6), np.int32)])
TOKENS[4] = [9, 8, 7, 6, 5, 4]
TOKENS[5, 0] = 9
VARIANTS = [
    {"prompt_to_input": a, "prompt_to_prompt": b, "input_to_prompt": c}
    for a, b, c in itertools.product((True, False), ("all", "causal", "none"), (True, False))
]


def partitioner(row, placement):
    """Each position as ("prompt" | "input", index); where the prompt goes is spelled out here."""
    real = int((row != 0).sum())
    start = {
        "prefix": 0,
        "after_first": 1,
        "before_eos": real - 1 if real and row[real - 1] == EOS else real,
    }[placement]
    inputs = [("input", i) for i in range(len(row))]
    return [*inputs[:start], *(("prompt", i) for i in range(P)), *inputs[start:]]


def by_hand(prompt_BPD, source, placement):
    embedded = np.asarray(source.embeddings_BUD)
    rows, masks, is_prompt = [], [], []
    for number, tokens in enumerate(TOKENS):
        places = partitioner(tokens, placement)
        of = {"prompt": prompt_BPD[number], "input": embedded[number]}
        rows.append([of[kind][i] for kind, i in places])
        masks.append([kind == "prompt" or tokens[i] != 0 for kind, i in places])
        is_prompt.append([kind == "prompt" for kind, _ in places])
    return np.array(rows), np.array(masks), np.array(is_prompt)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("shape", [(P, D), (len(TOKENS), P, D)], ids=["one", "each"])
def test_placement_is_the_sequence_laid_out_by_hand(placement, shape):
    model = make_t5(ONE_LAYER)
    prompt = normal(*shape, seed=3)
    source = model.embed(TOKENS)
    moved, is_prompt_BU = combine(jnp.asarray(prompt), source, TOKENS, placement=placement)
    moved = joined(moved)
    rows, masks, wanted = by_hand(np.broadcast_to(prompt, (len(TOKENS), P, D)), source, placement)
    np.testing.assert_array_equal(moved.embeddings_BUD, rows)
    np.testing.assert_array_equal(moved.mask_BU, masks)
    np.testing.assert_array_equal(is_prompt_BU, wanted)
    if len(shape) == 2:  # and the model reads it so: positions follow the tokens that moved
        method = with_prompt(model, prompt, PromptTuning(length=P, placement=placement)).method
        given = ModelInput(embeddings_BUD=jnp.asarray(rows), mask_BU=jnp.asarray(masks))
        np.testing.assert_allclose(
            encode(model, TOKENS, injections=method.injections(model, TOKENS)).hidden_BUD,
            encode(model, TOKENS, injections=Injections(model_input=given)).hidden_BUD,
            atol=1e-5,
        )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_padding_stays_last_and_keeps_no_one_waiting(placement):
    """The same rows in a wider batch give the same sequence with more padding behind."""
    model = make_t5(ONE_LAYER)
    prompt, wide = jnp.asarray(normal(P, D)), np.pad(TOKENS, ((0, 0), (0, 4)))
    narrow_out = joined(combine(prompt, model.embed(TOKENS), TOKENS, placement=placement)[0])
    wide_out = joined(combine(prompt, model.embed(wide), wide, placement=placement)[0])
    mask = np.asarray(narrow_out.mask_BU)
    np.testing.assert_array_equal(np.asarray(wide_out.mask_BU)[:, : mask.shape[1]], mask)
    assert not np.asarray(wide_out.mask_BU)[:, mask.shape[1] :].any()
    np.testing.assert_array_equal(
        np.asarray(wide_out.embeddings_BUD)[:, : mask.shape[1]][mask],
        np.asarray(narrow_out.embeddings_BUD)[mask],
    )


def allowed(query, key, variant):
    (q_kind, q), (k_kind, k) = query, key
    if q_kind == "input":
        return k_kind == "input" or variant["input_to_prompt"]
    if k_kind == "input":
        return variant["prompt_to_input"]
    return {"all": True, "causal": k <= q, "none": k == q}[variant["prompt_to_prompt"]]


@pytest.fixture(scope="module")
def influence():
    """How each encoder output depends on each input embedding, within a row; one layer."""
    model = make_t5(ONE_LAYER)

    def seen(x_1UD, mask_1U, attention_mask_1UU):
        source = ModelInput(
            embeddings_BUD=x_1UD, mask_BU=mask_1U, attention_mask_BUU=attention_mask_1UU
        )
        hidden = model.encode(None, injections=Injections(model_input=source)).hidden_BUD
        return jnp.sum(hidden**3, axis=-1)

    def of_row(*args):
        return jnp.abs(jax.jacrev(seen)(*(a[None] for a in args))).sum(axis=-1)[0, :, 0]

    return jax.jit(jax.vmap(of_row))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradients_show_who_sees_whom_in_every_variant(influence, placement):
    model = make_t5(ONE_LAYER)
    rows = TOKENS[:5]
    for variant in VARIANTS:
        attached = with_prompt(
            model, normal(P, D, seed=3), PromptTuning(length=P, placement=placement, **variant)
        )
        source = joined(attached.injections(rows).model_input)
        mask = source.attention_mask_BUU
        if all(v in (True, "all") for v in variant.values()):
            assert mask is None
            mask = jnp.ones((1, 9, 9), bool)
        mask = jnp.broadcast_to(mask, (len(rows), 9, 9))
        got = np.asarray(influence(source.embeddings_BUD, source.mask_BU, mask)) > 0
        for number, tokens in enumerate(rows):
            places = partitioner(tokens, placement)
            real = [kind == "prompt" or tokens[i] != 0 for kind, i in places]
            want = [
                [
                    q == k or (real[k] and allowed(places[q], places[k], variant))
                    for k in range(len(places))
                ]
                for q in range(len(places))
            ]
            # What padding sees has no meaning.
            np.testing.assert_array_equal(got[number][real], np.array(want)[real], str(variant))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_every_position_sees_itself(variant):
    is_prompt_BU = jnp.asarray([[True, True, False, False], [False, True, True, False]])
    mask_BUU = attention_mask(is_prompt_BU, **variant)
    if mask_BUU is not None:
        assert mask_BUU.shape == (2, 4, 4)
        assert np.einsum("buu->bu", mask_BUU).all()


@pytest.mark.parametrize("config", [T5_1_1, PER_LAYER])
@pytest.mark.parametrize("among", ["all", "causal"])
def test_a_prompt_that_sees_no_input_is_read_once(config, among):
    model = make_t5(config)
    method = PromptTuning(length=P, prompt_to_input=False, prompt_to_prompt=among)
    graphdef, params = param_tree.split(with_prompt(model, normal(P, D, seed=3), method))
    targets = token_rows([3, 2, 1, 3, 2])

    def loss(own, params, one_by_one):
        tuned = param_tree.merge(graphdef, {**params, **own})
        source = tuned.injections(TOKENS[:5]).model_input
        assert source.prompt_BPD.shape[0] == 1
        context = tuned.model.read(joined(source) if one_by_one else source)
        logits = tuned.model.write(context, targets)
        hidden = jnp.where(context.mask_BU[..., None], context.hidden_BUD, 0.0)
        return jnp.mean(jnp.sin(logits)) + jnp.mean(jnp.sin(hidden)), hidden

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    own = {PROMPT: params[PROMPT]}
    once, rows = (run(own, params, one_by_one) for one_by_one in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), once, rows)
    flops = [
        run.lower(own, params, one_by_one).compile().cost_analysis()["flops"]
        for one_by_one in (False, True)
    ]
    assert flops[0] < 0.8 * flops[1]


@pytest.mark.parametrize("among", ["causal", "none"])
def test_a_decoder_only_models_prompt_is_read_once(among):
    """It sees no input, whatever ``prompt_to_input`` is."""
    model = make_lm()
    tokens = np.asarray([[3, 4, 5, 6], [7, 8, -1, -1]])
    method = PromptTuning(length=P, prompt_to_prompt=among)
    tuned = with_prompt(model, normal(P, LM_WIDTH, seed=3), method)
    source = tuned.injections(tokens).model_input
    context = model.read(source)
    assert all(len(layer.key_BPGK) == 1 for layer in context.prompt)
    every_row = model.read(joined(source)).hidden_BUD[:, P:]
    real = tokens >= 0
    np.testing.assert_allclose(context.hidden_BUD[real], every_row[real], atol=1e-5)
