"""DePT, ADePT, residual prompts and SuperPos-Prompt compute what their papers say."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.api import generate
from prompt_tuning_jax.methods import (
    ADePT,
    Context,
    DePT,
    MethodConfig,
    PromptTuning,
    ResidualPrompt,
    SuperPosPrompt,
    TunedModel,
    attach_method,
)
from prompt_tuning_jax.methods.superpos_prompt import sampled_tokens
from prompt_tuning_jax.models.base import Model, joined
from prompt_tuning_jax.models.injections import Injections, ModelInput
from prompt_tuning_jax.models.t5.config import PRESETS
from tests.method_cases import LM_SIZES
from tests.micro import ONE_LAYER, D, Words, make_t5, normal, token_rows
from tests.script import load_script
from tests.tiny_lm import make_lm

P, T = 3, 6
SOURCE, TARGET = token_rows([6, 4, 1], T), token_rows([4, 2, 3], 4, seed=1)


def t5() -> Model:
    model: Model = make_t5(ONE_LAYER)
    return model


def lm(family: str = "gemma") -> Model:
    """A decoder-only model, by default with windows and a factor on embeddings."""
    model: Model = make_lm(family, **{**LM_SIZES, "num_layers": 2})
    return model


def trained(model: Model, method: MethodConfig) -> TunedModel:
    """The method as if it had been trained: every array of its own differs from its start."""
    model.vocabulary = Words(model.token_ids)
    context = Context(vocabulary=model.vocabulary)
    attached = attach_method(model, method, key=jax.random.key(3), context=context)
    params = param_tree.split(attached)[1]
    own = [name for name in params if method.trains(name)]
    noise = {n: normal(*params[n].shape, seed=at, scale=0.3) for at, n in enumerate(own)}
    param_tree.fill(attached, {**params, **{n: params[n] + noise[n] for n in own}})
    return attached


def own_arrays(attached: TunedModel) -> dict[str, np.ndarray]:
    params = param_tree.split(attached)[1]
    return {
        name.rpartition("/")[2]: np.asarray(array)
        for name, array in params.items()
        if name.startswith("method/")
    }


def written(module: Any, source: np.ndarray, given: ModelInput | None = None) -> np.ndarray:
    """The logits at real targets, from ``given`` instead of the source if there is one."""
    fill = module.model.token_ids.fill
    inputs, targets = np.where(source == 0, fill, source), np.where(TARGET == 0, fill, TARGET)
    graphdef, params = param_tree.split(module)

    @jax.jit
    def run(params: Any, given: ModelInput | None) -> jax.Array:
        tuned: TunedModel = param_tree.merge(graphdef, params)
        if given is None:
            return tuned(inputs, targets)
        return tuned.model.run(inputs, targets, injections=Injections(model_input=given))

    return np.asarray(run(params, given))[TARGET != 0]


def with_offsets(attached: TunedModel, source: np.ndarray, offsets_BTD: np.ndarray) -> ModelInput:
    """The input as a whole: the prompt is a part of every row."""
    model = attached.model
    embedded = model.embed(np.where(source == 0, model.token_ids.fill, source))
    prompt_BPD = np.broadcast_to(own_arrays(attached)["prompt_PD"], (len(source), P, D))
    moved = ModelInput(
        embeddings_BUD=embedded.embeddings_BUD + offsets_BTD,
        mask_BU=embedded.mask_BU,
        prompt_BPD=jnp.asarray(prompt_BPD),
    )
    return joined(moved)


@pytest.mark.parametrize("make", [t5, lm])
def test_offsets_of_positions_are_the_product(make: Any) -> None:
    """And positions behind the last one with an offset have none."""
    method = DePT(length=P, rank=2, alpha=3.0, max_length=4, init="uniform")
    attached = trained(make(), method)
    own = own_arrays(attached)
    offsets_TD = 3.0 / np.sqrt(2) * own["offset_a_TR"] @ own["offset_b_RD"]
    for length in (T, 3):  # longer and shorter than the rows with an offset
        source = SOURCE[:, :length]
        padded_TD = np.zeros((length, D), np.float32)
        padded_TD[:4] = offsets_TD[:length]
        want = written(attached, source, with_offsets(attached, source, padded_TD[None]))
        np.testing.assert_allclose(written(attached, source), want, atol=2e-5)


@pytest.mark.parametrize("make", [t5, lm])
def test_offsets_of_tokens_are_the_networks_output(make: Any) -> None:
    attached = trained(make(), ADePT(length=P, hidden=5, init="uniform"))
    own, model = own_arrays(attached), attached.model
    x_BTD = np.asarray(model.embed_tokens(np.where(SOURCE == 0, model.token_ids.fill, SOURCE)))
    hidden = np.maximum(x_BTD @ own["offset_in_DM"] + own["offset_in_bias_M"], 0)
    offsets_BTD = hidden @ own["offset_out_MD"] + own["offset_out_bias_D"]
    assert (hidden > 0).any() and (hidden == 0).any()
    want = written(attached, SOURCE, with_offsets(attached, SOURCE, offsets_BTD))
    np.testing.assert_allclose(written(attached, SOURCE), want, atol=2e-5)


@pytest.mark.parametrize("method", [DePT(length=P, rank=2, max_length=4), ADePT(length=P)])
def test_a_decoder_only_model_writes_behind_moved_inputs(method: MethodConfig) -> None:
    """Each token is the most probable one behind those before it, which have no offsets."""
    attached = trained(lm("llama"), method)
    fill = attached.model.token_ids.fill
    source = np.where(SOURCE == 0, fill, SOURCE)
    rows = [row[row != fill].tolist() for row in source]
    ids = generate(attached, rows, max_length=3, min_length=3).ids
    graphdef, params = param_tree.split(attached)
    logits_BSV = np.array(jax.jit(lambda p: param_tree.merge(graphdef, p)(source, ids))(params))
    logits_BSV[:, :2, list(attached.model.token_ids.all_eos)] = -np.inf
    np.testing.assert_array_equal(logits_BSV.argmax(axis=-1), ids)
    bare = generate(attached.model, rows, max_length=3, min_length=3).ids
    assert (bare != ids).any()


@pytest.mark.parametrize("network", ["shared", "separate"])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_a_residual_prompt_is_the_prompt_and_its_network(network: Any, layer_norm: bool) -> None:
    method = ResidualPrompt(
        length=P, network=network, hidden=5, layer_norm=layer_norm, init="uniform"
    )
    attached = trained(t5(), method)
    own = own_arrays(attached)
    want = []
    for p, x_D in enumerate(own["prompt_PD"]):
        n = p if network == "separate" else 0
        y_D = np.maximum(x_D @ own["in_NDM"][n] + own["in_bias_NM"][n], 0)
        y_D = y_D @ own["out_NMD"][n] + own["out_bias_ND"][n]
        if layer_norm:
            y_D = (y_D - y_D.mean()) / np.sqrt(y_D.var() + 1e-5)
            y_D = y_D * own["norm_scale_ND"][n] + own["norm_bias_ND"][n]
        want.append(x_D + y_D)
    kept = attached.for_inference()
    np.testing.assert_allclose(own_arrays(kept)["prompt_PD"], np.stack(want), atol=1e-5)
    assert kept.method.config == PromptTuning(length=P).as_trained()


@pytest.mark.parametrize("trains_embeddings", [False, True])
def test_a_superposition_is_a_sum_of_weighted_embeddings(trains_embeddings: bool) -> None:
    method = SuperPosPrompt(length=P, num_tokens=4, trains_embeddings=trains_embeddings)
    attached = trained(t5(), method)
    own, tokens = own_arrays(attached), sampled_tokens(method, ONE_LAYER.vocab_size)
    table_VD = np.asarray(attached.model.embedding_table()[jnp.arange(ONE_LAYER.vocab_size)])
    embeddings_MD = own["embeddings_MD"] if trains_embeddings else table_VD[list(tokens)]
    want_PD = own["weights_PM"] @ embeddings_MD
    kept = own_arrays(attached.for_inference())
    assert kept.keys() == {"prompt_PD"}
    np.testing.assert_allclose(kept["prompt_PD"], want_PD, atol=1e-5)


def test_a_superposition_starts_at_random_from_tokens_that_all_members_share() -> None:
    model, method = t5(), SuperPosPrompt(length=50, num_tokens=20)
    tokens = sampled_tokens(method, ONE_LAYER.vocab_size)
    assert len({*tokens}) == 20
    table_MD = np.asarray(model.embedding_table()[jnp.asarray(tokens)])
    started = []
    for seed in range(2):
        attached = attach_method(model, method, key=jax.random.key(seed), context=Context())
        assert attached.method.tokens == tokens
        started.append(np.asarray(attached.method.prompt(model)))
        # About as long as embeddings.
        lengths = [np.square(x).sum(axis=1).mean() ** 0.5 for x in (started[-1], table_MD)]
        assert 0.8 < lengths[0] / lengths[1] < 1.25
    assert np.abs(started[0] - started[1]).max() > 0.1
    assert sampled_tokens(SuperPosPrompt(sample_seed=1, num_tokens=20), 60) != tokens
    few = sampled_tokens(SuperPosPrompt(num_tokens=9, init_population=4), 40)
    assert sorted(few) == [0, 1, 2, 3]


def test_the_numbers_of_parameters_are_those_of_the_papers() -> None:
    """On T5-base: tables 1 of DePT and ADePT, and what the code for residual prompts creates."""
    expected = {
        PromptTuning(length=100): 76_800,
        DePT(): 76_800,
        DePT(length=60, rank=30): 76_800,
        ADePT(): 76_051,
        ResidualPrompt(length=10, hidden=800): 1_239_584,
        ResidualPrompt(length=10, hidden=800, network="separate"): 12_326_720,
        SuperPosPrompt(): 1_280,
        SuperPosPrompt(trains_embeddings=True): 99_584,
    }
    found = load_script("plot_parameters").counts_of([*expected], PRESETS["base"])
    assert found == [*expected.values()]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DePT(rank=0), "method.rank is 0; must be at least 1"),
        (DePT(max_length=0), "method.max_length is 0; must be at least 1"),
        (DePT(alpha=float("nan")), "method.alpha is nan"),
        (ADePT(hidden=0), "method.hidden is 0; must be at least 1"),
        (ResidualPrompt(dropout=1.0), "method.dropout is 1.0"),
        (SuperPosPrompt(num_tokens=0), "method.num_tokens is 0; must be at least 1"),
        (SuperPosPrompt(sample_seed=-1), "method.sample_seed is -1; must be at least 0"),
        (ADePT(init="file"), "method.init=file needs method.init_path"),
    ],
)
def test_wrong_fields_are_named(method: MethodConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attach_method(t5(), method, key=jax.random.key(0), context=Context())
