"""Decoder-only models against plain numpy, and reading, writing and decoding against each other."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.models.base import Context
from prompt_tuning_jax.models.causal_lm.model import CausalLM
from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections, KeyValues, LayerPrompt
from prompt_tuning_jax.models.quantization import is_quantized, quantize_modules, quantized
from tests.tiny_lm import FAMILIES, D, L, V, make_lm, reference_logits

# All tests have the same shapes, because most of a test's time is compilation.
P, T, S = 6, 8, 4
LENGTHS, TARGETS = (5, 1, 4), (3, 4, 1)


def tokens(lengths: tuple[int, ...], width: int, *, seed: int = 0) -> np.ndarray:
    """Rows of real tokens, 0 included, filled up with -1."""
    random = np.random.default_rng(seed)
    rows = np.full((len(lengths), width), -1, np.int32)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = random.integers(0, V, length)
    return rows


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


INPUTS_BT, TARGETS_BS, PROMPT_PD = tokens(LENGTHS, T), tokens(TARGETS, S, seed=1), normal(P, D)


# One family for each way of counting positions.
POSITIONS = ("llama", "gemma", "gpt2", "bloom")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def run(function: Any, model: CausalLM, *arguments: Any, **options: Any) -> Any:
    """Calls a compiled ``function(model, ...)``; equal shapes and options share a program.

    Waits for the result: until then JAX may read the caller's own NumPy arrays.
    """
    graphdef, params = param_tree.split(model)
    result = _run(function, graphdef, params, arguments, tuple(sorted(options.items())))
    return jax.block_until_ready(result)


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _run(function: Any, graphdef: Any, params: Any, arguments: Any, options: Any) -> Any:
    return function(param_tree.merge(graphdef, params), *arguments, **dict(options))


def read(
    model: CausalLM,
    inputs_BT: Any,
    prompt: Any,
    injections: Injections = NO_INJECTIONS,
    *,
    prepend: bool = False,
    key: Any = None,
    remat: Any = "none",
) -> Context:
    """Reads tokens behind a prompt; ``prepend`` makes the prompt a part of every row."""
    source = model.embed(inputs_BT, prompt)
    if prepend:
        length = prompt.shape[-2] + inputs_BT.shape[1]
        mask_1UU = jnp.ones((1, length, length), bool)
        source = dataclasses.replace(source, attention_mask_BUU=mask_1UU)
    return model.read(source, injections=injections, key=key, remat=remat)


def all_logits(
    model: CausalLM,
    inputs_BT: Any,
    targets_BS: Any,
    prompt: Any = None,
    injections: Injections = NO_INJECTIONS,
    *,
    how: str = "scalar",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logits of reading ``[B, T, V]`` and of writing and decoding targets ``[B, S, V]``."""
    context = read(model, inputs_BT, prompt, injections)
    decode_context, caches = model.start_decoding(context, targets_BS.shape[1])
    tokens_SB = jnp.concatenate([jnp.full((1, len(inputs_BT)), -1), targets_BS.T[:-1]])

    def step(caches: Any, at: Any) -> Any:
        position, tokens_B = at
        return model.decode_step(tokens_B, position, caches, decode_context)[::-1]

    def row_step(caches: Any, at: Any) -> Any:
        position_B = jnp.full(len(inputs_BT), at[0])
        return step_rows(model, at[1], position_B, caches, decode_context)[::-1]

    if how == "python":
        steps = []
        for position, tokens_B in enumerate(tokens_SB):
            caches, logits_BV = step(caches, (position, tokens_B))
            steps.append(logits_BV)
        steps_SBV = jnp.stack(steps)
    else:
        used = step if how == "scalar" else row_step
        steps_SBV = jax.lax.scan(used, caches, (jnp.arange(len(tokens_SB)), tokens_SB))[1]
    written = model.write(context, targets_BS)
    return model.logits(context.hidden_BUD), written, steps_SBV.swapaxes(0, 1)


def step_rows(model: CausalLM, tokens_B: Any, position_B: Any, caches: Any, context: Any) -> Any:
    """A step in which each row has a position, as in a server."""

    def of_row(token: Any, position: Any, *rest: Any) -> Any:
        cache, row = jax.tree.map(lambda x: x[None], rest)
        decoded = model.decode_step(token[None], position, cache, row)
        return jax.tree.map(lambda x: x[0], decoded)

    return jax.vmap(of_row)(tokens_B, position_B, caches, context)


def loss_and_gradient(
    model: CausalLM, prompt: Any, inputs_BT: Any, targets_BS: Any, *rest: Any, **options: Any
) -> Any:
    """The summed loss with the logits and what was read, and its gradient."""

    def loss(prompt: Any) -> Any:
        context = read(model, inputs_BT, prompt, *rest, **options)
        logits_BSV = model.write(context, targets_BS, remat=options.get("remat", "none"))
        at_BS1 = jnp.maximum(targets_BS, 0)[..., None]
        log_probs_BSV = jax.nn.log_softmax(logits_BSV)
        log_probs_BS = jnp.take_along_axis(log_probs_BSV, at_BS1, axis=-1)[..., 0]
        return -jnp.sum(log_probs_BS, where=targets_BS >= 0), (logits_BSV, context)

    return jax.value_and_grad(loss, has_aux=True)(prompt)


def test_each_row_has_the_logits_of_a_plain_implementation(family):
    model = make_lm(family)
    logits_BTV = run(all_logits, model, INPUTS_BT, TARGETS_BS, PROMPT_PD)[0]
    for row, length in enumerate(LENGTHS):
        want_TV = reference_logits(model, INPUTS_BT[row, :length], PROMPT_PD)
        np.testing.assert_allclose(logits_BTV[row, :length], want_TV, atol=2e-5)
        assert np.ptp(want_TV) > 1  # the model says something


def test_writing_and_decoding_are_reading_what_is_written(family):
    model = make_lm(family)
    _, written, steps = run(all_logits, model, INPUTS_BT, TARGETS_BS, PROMPT_PD)
    real_BS = TARGETS_BS >= 0
    np.testing.assert_allclose(steps[real_BS], written[real_BS], atol=1e-5)
    whole_BT = INPUTS_BT.copy()
    for row, (n, s) in enumerate(zip(LENGTHS, TARGETS, strict=True)):
        whole_BT[row, n : n + s] = TARGETS_BS[row, :s]
    logits_BTV = run(all_logits, model, whole_BT, TARGETS_BS, PROMPT_PD)[0]
    for row, (n, s) in enumerate(zip(LENGTHS, TARGETS, strict=True)):
        np.testing.assert_allclose(written[row, :s], logits_BTV[row, n - 1 : n - 1 + s], atol=1e-5)


def test_padding_changes_no_row_wherever_it_is(family):
    model = make_lm(family)
    want = run(all_logits, model, INPUTS_BT, TARGETS_BS, PROMPT_PD)[1:]
    # In front, as where prompts of unequal lengths share a batch, and inside.
    for order in ([5, 6, 0, 1, 2, 3, 4, 7], [0, 5, 1, 2, 6, 7, 3, 4]):
        got = run(all_logits, model, INPUTS_BT[:, order], TARGETS_BS, PROMPT_PD)[1:]
        for got_BSV, want_BSV in zip(got, want, strict=True):
            real_BS = TARGETS_BS >= 0
            np.testing.assert_allclose(got_BSV[real_BS], want_BSV[real_BS], atol=1e-5)


def test_what_a_row_says_depends_on_no_other_row_and_on_nothing_later(family):
    model, inputs_BT = make_lm(family), tokens((T, T, T), T)
    want = run(all_logits, model, inputs_BT, TARGETS_BS, PROMPT_PD)[0]
    inputs_BT[1, 3] = (inputs_BT[1, 3] + 1) % V
    got = run(all_logits, model, inputs_BT, TARGETS_BS, PROMPT_PD)[0]
    difference_BT = np.abs(got - want).max(axis=-1)
    assert (difference_BT[[0, 2]] < 1e-6).all() and (difference_BT[1, :3] < 1e-6).all()
    assert (difference_BT[1, 3:5] > 1e-4).all()


def test_an_empty_input_continues_the_prompt(family):
    model = make_lm(family)
    empty_BT = tokens((0, 1, 0), T)
    written, steps = run(all_logits, model, empty_BT, TARGETS_BS, PROMPT_PD)[1:]
    want = reference_logits(model, TARGETS_BS[0, :2], PROMPT_PD, with_prompt=True)[P - 1 :]
    np.testing.assert_allclose(written[0, :3], want, atol=2e-5)
    np.testing.assert_allclose(steps[0, :3], want, atol=2e-5)


# Each case is the prompt's batch, how deep prompts enter (if they do), and their batch.
@pytest.mark.parametrize(
    "family, batch, deep, deep_batch",
    [
        *((family, 1, "", 0) for family in POSITIONS),
        ("gemma", 3, "replace", 1),
        ("gpt2", 1, "add", 3),
    ],
)
def test_a_prompt_computed_once_is_a_prompt_before_every_row(family, batch, deep, deep_batch):
    model = make_lm(family)
    injections = NO_INJECTIONS
    if deep:
        layers = [
            LayerPrompt(vectors_BPD=normal(deep_batch, P - i, D, seed=i), add=deep == "add")
            for i in range(1, L)
        ]
        injections = Injections(layer_prompts=(None, *layers))
    prompt = PROMPT_PD if batch == 1 else normal(batch, P, D)
    arguments = (prompt, INPUTS_BT, TARGETS_BS, injections)
    (once, (logits_BSV, context)), gradient = run(loss_and_gradient, model, *arguments)
    (loss, (want_BSV, _)), want = run(loss_and_gradient, model, *arguments, prepend=True)
    np.testing.assert_allclose(once, loss, rtol=1e-5)
    np.testing.assert_allclose(logits_BSV, want_BSV, atol=1e-5)
    np.testing.assert_allclose(gradient, want, atol=1e-5 * np.abs(want).max())
    # It is computed once indeed, unless the prompt or the layers' prompts differ by row.
    assert {kv.key_BPGK.shape[0] for kv in context.prompt} == {max(batch, deep_batch)}
    assert {kv.key_BPGK.shape[1] for kv in context.keys_values} == {T}


def test_layer_prompts_without_an_embedded_prompt_take_the_first_tokens():
    model, inputs_BT = make_lm(), tokens((5, 4, 5), T)
    layers = Injections(layer_prompts=(LayerPrompt(vectors_BPD=normal(1, 2, D)), *[None] * (L - 1)))
    got = run(all_logits, model, inputs_BT, TARGETS_BS, None, layers)[1]
    assert np.abs(got - run(all_logits, model, inputs_BT, TARGETS_BS)[1]).max() > 1e-2
    inputs_BT[:, :2] = 7
    want = run(all_logits, model, inputs_BT, TARGETS_BS, None, layers)[1]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_layer_prompts_longer_than_the_prompt_reach_the_rows():
    model, prompt = make_lm(), normal(2, D)
    longer = LayerPrompt(vectors_BPD=normal(1, 4, D, seed=3))
    cut = dataclasses.replace(longer, vectors_BPD=longer.vectors_BPD[:, :2])
    hidden = []
    for layer_prompt, prepend in ((longer, False), (longer, True), (cut, False)):
        injections = Injections(layer_prompts=(None, layer_prompt, *[None] * (L - 2)))
        context = run(read, model, INPUTS_BT, prompt, injections, prepend=prepend)
        hidden.append(context.hidden_BUD)
    np.testing.assert_array_equal(hidden[0], hidden[1])
    assert np.abs(hidden[0] - hidden[2]).max() > 1e-2


@pytest.mark.parametrize("family, how", [("gemma", "rows"), ("gpt2", "rows"), ("gemma", "python")])
def test_positions_may_be_numbers_or_differ_by_row(family, how):
    model = make_lm(family)
    _, written, steps = run(all_logits, model, INPUTS_BT, TARGETS_BS, PROMPT_PD, how=how)
    real_BS = TARGETS_BS >= 0
    np.testing.assert_allclose(steps[real_BS], written[real_BS], atol=1e-5)


def test_rows_that_start_at_different_times():
    """One row is at its second token while another is at its fourth."""
    model, targets_BS = make_lm("gemma"), tokens((S, S, S), S, seed=1)
    want = run(all_logits, model, INPUTS_BT, targets_BS, PROMPT_PD)[1]
    context, caches = model.start_decoding(run(read, model, INPUTS_BT, PROMPT_PD), S)
    starts, rows = np.array([0, 2, 1]), np.arange(3)  # in which round a row starts
    for turn in range(S + 2):
        position_B = np.clip(turn - starts, 0, S - 1)
        last_B = jnp.asarray(targets_BS[rows, position_B - 1])
        logits_BV, caches = run(step_rows, model, last_B, jnp.asarray(position_B), caches, context)
        np.testing.assert_allclose(logits_BV, want[rows, position_B], atol=1e-5)


def each_label(model: CausalLM, inputs_BT: Any, labels_CBS: Any, prompt: Any) -> Any:
    context = read(model, inputs_BT, prompt)
    return jax.vmap(lambda targets_BS: model.write(context, targets_BS))(labels_CBS)


@pytest.mark.parametrize("family", ["gemma", "bloom"])
def test_labels_together_are_labels_one_by_one(family):
    model = make_lm(family)
    labels_CBS = np.stack([tokens((S, S, S), S, seed=seed) for seed in range(5)])
    together = run(each_label, model, INPUTS_BT, labels_CBS, PROMPT_PD)
    for label, targets_BS in enumerate(labels_CBS):
        want = run(all_logits, model, INPUTS_BT, targets_BS, PROMPT_PD)[1]
        np.testing.assert_allclose(together[label], want, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_labels_share_the_keys_of_what_was_read(dtype):
    """No array holds the keys of the input for each label, or those of the prompt for each row."""
    model, rows, length, prompt_length, labels = make_lm(dtype=dtype), 7, 17, 23, 13
    inputs_BT = jnp.asarray(tokens((length,) * rows, length))
    labels_CBS = jnp.asarray(np.stack([tokens((S,) * rows, S)] * labels))
    jaxpr = jax.make_jaxpr(functools.partial(each_label, model))(
        inputs_BT, labels_CBS, normal(prompt_length, D)
    )
    shapes = [set(shape) for shape in _shapes(jaxpr.jaxpr)]
    width = model.config.head_dim
    assert any({labels, length} <= shape for shape in shapes)  # scores have such axes
    assert not any({labels, length, width} <= shape for shape in shapes)
    assert not any({labels, prompt_length, width} <= shape for shape in shapes)
    assert not any({rows, prompt_length, width} <= shape for shape in shapes)


def _shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _shapes(inner)


@pytest.mark.parametrize("family", POSITIONS)
def test_a_cached_text_as_prefix_is_that_text_before_the_input(family):
    model = make_lm(family)
    text_P = tokens((P,), P, seed=5)[0]
    keys_LPGK, values_LPGK = run(CausalLM.keys_values_of, model, text_P)["decoder"]
    stack = model.stacks["decoder"]
    assert keys_LPGK.shape == (stack.num_layers, P, stack.num_kv_heads, stack.head_dim)
    prefix = tuple(
        KeyValues(key_BPGK=keys_PGK[None], value_BPGK=values_PGK[None])
        for keys_PGK, values_PGK in zip(keys_LPGK, values_LPGK, strict=True)
    )
    injections = Injections(prefixes={"decoder": prefix})
    text_PD = model.embed_tokens(text_P)
    want = run(all_logits, model, INPUTS_BT, TARGETS_BS, text_PD)
    got = run(all_logits, model, INPUTS_BT, TARGETS_BS, None, injections)
    real = (INPUTS_BT >= 0, TARGETS_BS >= 0, TARGETS_BS >= 0)
    for got_BTV, want_BTV, real_BT in zip(got, want, real, strict=True):
        np.testing.assert_allclose(got_BTV[real_BT], want_BTV[real_BT], atol=1e-5)
    if family == "gemma":  # A prompt comes after the prefix.
        prompt = normal(3, D)
        got = run(all_logits, model, INPUTS_BT, TARGETS_BS, prompt, injections)
        both = jnp.concatenate([text_PD, prompt])
        want = run(all_logits, model, INPUTS_BT, TARGETS_BS, both)
        for got_BTV, want_BTV, real_BT in zip(got, want, real, strict=True):
            np.testing.assert_allclose(got_BTV[real_BT], want_BTV[real_BT], atol=1e-5)


def test_a_mask_hides_the_prompt_from_the_input():
    model = make_lm()
    is_prompt_U = np.arange(P + T) < P
    seen_1UU = ~(is_prompt_U[None, :] & ~is_prompt_U[:, None])[None]
    source = dataclasses.replace(model.embed(INPUTS_BT, PROMPT_PD), attention_mask_BUU=seen_1UU)
    # Rotary positions are relative, so a hidden prompt has no effect.
    got = run(CausalLM.read, model, source).hidden_BUD
    want = run(read, model, INPUTS_BT, None).hidden_BUD
    real_BT = INPUTS_BT >= 0
    np.testing.assert_allclose(got[real_BT], want[real_BT], atol=1e-5)


def cost(function: Any, model: CausalLM, *arguments: Any, **options: Any) -> tuple[float, int]:
    """The compiled program's operations, and the bytes that it needs for the time being."""
    graphdef, params = param_tree.split(model)
    fixed = tuple(sorted(options.items()))
    compiled = _run.lower(function, graphdef, params, arguments, fixed).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def hidden(model: CausalLM, prompt: Any, inputs_BT: Any, **options: Any) -> Any:
    return read(model, inputs_BT, prompt, **options).hidden_BUD


@pytest.mark.parametrize("function", [hidden, loss_and_gradient])
def test_a_batch_behind_a_prompt_costs_its_tokens_alone(function):
    # The maps are wide, as in a real model, so that attention to the prompt costs less than they.
    width, rows = 128, 32
    model = make_lm(embed_dim=width, mlp_dim=4 * width, num_layers=1)
    prompt = normal(100, width)
    batch = [tokens((16,) * rows, 16), tokens((2,) * rows, 2)][: 2 if function is not hidden else 1]
    once, once_bytes = cost(function, model, prompt, *batch)
    joined, joined_bytes = cost(function, model, prompt, *batch, prepend=True)
    short, _ = cost(function, model, prompt[:1], *batch)
    # Linear maps see 100 + 32 * 16 positions, and 32 * 116 in the other case.
    assert once < 2 * short
    assert joined > 3.5 * once
    assert joined_bytes > 3 * once_bytes


def test_rematerialisation_changes_no_gradient():
    model, arguments = make_lm(), (PROMPT_PD, INPUTS_BT, TARGETS_BS, NO_INJECTIONS)
    want = run(loss_and_gradient, model, *arguments)[1]
    for remat in ("dots", "full"):
        got = run(loss_and_gradient, model, *arguments, remat=remat)[1]
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def dropped(model: CausalLM, key: Any) -> tuple[Context, jax.Array]:
    keys = [None, None] if key is None else jax.random.split(key)
    context = read(model, INPUTS_BT, PROMPT_PD, key=keys[0])
    return context, model.write(context, TARGETS_BS, key=keys[1])


def test_dropout_needs_a_key_and_a_rate():
    model, plain = make_lm(dropout_rate=0.3), make_lm()
    context, want = run(dropped, plain, None)
    np.testing.assert_array_equal(run(dropped, model, None)[1], want)
    np.testing.assert_array_equal(run(dropped, plain, jax.random.key(0))[1], want)
    results = [run(dropped, model, jax.random.key(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(results[0][1], results[1][1])
    assert np.abs(results[0][1] - results[2][1]).max() > 1e-2
    # The embedded prompt is dropped, too, and its layers.
    for kept, changed in zip(context.prompt, results[0][0].prompt, strict=True):
        assert not np.allclose(kept.key_BPGK, changed.key_BPGK)


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_narrow_activations_give_nearly_the_same(family):
    narrow = make_lm(family, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    want = run(all_logits, make_lm(family), INPUTS_BT, TARGETS_BS, PROMPT_PD)[1]
    arguments = (PROMPT_PD, INPUTS_BT, TARGETS_BS, NO_INJECTIONS)
    (_, (got, context)), gradient = run(loss_and_gradient, narrow, *arguments)
    kept = jax.tree.leaves((context.prompt, context.keys_values))
    assert {array.dtype for array in kept} == {jnp.dtype(jnp.bfloat16)}
    assert got.dtype == jnp.float32
    size = np.abs(want).mean()
    assert np.abs(got - want).mean() < 0.03 * size
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-2
    real_BS = TARGETS_BS >= 0
    steps = run(all_logits, narrow, INPUTS_BT, TARGETS_BS, PROMPT_PD)[2]
    assert np.abs(steps - got)[real_BS].mean() < 0.03 * size


@pytest.mark.parametrize("family, quantization", [("gpt2", "int8"), ("gemma", "int4")])
def test_quantised_weights_give_nearly_the_same_and_positions_stay(family, quantization):
    model = make_lm(family)
    want = run(all_logits, model, INPUTS_BT, TARGETS_BS, PROMPT_PD)[1]
    params = param_tree.split(model)[1]
    quantize_modules(model, quantization)
    names = set(param_tree.split(model)[1])
    assert is_quantized(dict.fromkeys(names))
    # The same by name, as when a checkpoint is read.
    assert names == {new for name, p in params.items() for new in quantized(name, p, quantization)}
    assert not [name for name in names if "position" in name and name.endswith("_scale")]
    got = run(all_logits, model, INPUTS_BT, TARGETS_BS, PROMPT_PD)[1]
    assert 0 < np.abs(got - want).mean() < {"int8": 0.05, "int4": 0.5}[quantization]


def test_tokens_as_a_prompt_are_rows_of_the_table(family):
    model = make_lm(family)
    text_1P = tokens((2,), 2, seed=3)
    table = model.embedding_table()
    assert tuple(table.shape) == (V, D)
    np.testing.assert_allclose(table[text_1P], model.embed_tokens(text_1P), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_a_scaled_table_are_as_long_as_embedded_tokens(dtype):
    """The factor is rounded to the dtype of the activations: 25.298 to 25.25 in bfloat16."""
    model = make_lm("gemma", embedding_scale=25.298, dtype=dtype)
    ids_BT = np.arange(V)[None]
    rows, embedded = (
        np.asarray(x, np.float32).ravel()
        for x in (model.embedding_table()[ids_BT], model.embed_tokens(ids_BT))
    )
    assert rows @ embedded / (embedded @ embedded) == pytest.approx(1, abs=4e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_output_vectors_give_logits(family):
    model = make_lm(family)
    hidden_ND, chosen = normal(5, D), np.array([3, 0, 30])
    products = hidden_ND @ model.output_vectors(chosen).T
    cap = model.config.logits_softcap
    want = cap * np.tanh(products / cap) if cap else products
    logits_NV = run(CausalLM.logits, model, hidden_ND)
    np.testing.assert_allclose(logits_NV[:, chosen], want, atol=1e-5)
