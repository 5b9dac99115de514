"""Models whose attention is one kernel, against the same models without it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections, KeyValues
from prompt_tuning_jax.models.ops import cudnn_attention, fused_tiles
from prompt_tuning_jax.models.ops.attention_choice import PLAIN, Implementation
from prompt_tuning_jax.models.ops.cudnn_attention import CausalLengths
from tests import micro, tiny_lm, tiny_t5gemma
from tests.micro import normal


@pytest.fixture(autouse=True)
def _few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_tiles, "FEWEST_QUERIES", 2)


def read_with_gradient(
    model: Model,
    implementation: Implementation,
    tokens: Any,
    *,
    prefixes: tuple[KeyValues, ...] = (),
    dropout: bool = False,
) -> tuple[Any, str]:
    """A function of what was read, its gradient with respect to the prompt, and the program."""
    model.attention = dataclasses.replace(PLAIN, implementation=implementation)
    model.scan_layers = True
    graphdef, params = param_tree.split(model)
    injections = NO_INJECTIONS
    if prefixes:
        injections = Injections(prefixes={model.reading_stack: prefixes})

    def loss(prompt: Any, params: Any) -> Any:
        model = param_tree.merge(graphdef, params)
        source = model.embed(tokens, prompt)
        key = jax.random.key(0) if dropout else None
        context = model.read(source, injections=injections, key=key)
        mask = context.mask_BU[..., None]
        return jnp.sum(jnp.where(mask, jnp.sin(3 * context.hidden_BUD), 0.0))

    run = jax.jit(jax.value_and_grad(loss))
    prompt = jnp.asarray(normal(3, model.config.embed_dim))
    return run(prompt, params), str(jax.make_jaxpr(run)(prompt, params))


def require_same(
    model: Model, tokens: Any, *, implementation: Implementation = "pallas", **options: Any
) -> None:
    """Requires what was read, and the gradient, to be the same with and without the kernel."""
    plain, without = read_with_gradient(model, "xla", tokens, **options)
    fused, with_kernel = read_with_gradient(model, implementation, tokens, **options)
    if implementation == "pallas":
        assert "pallas_call" in with_kernel
    assert with_kernel != without
    assert "pallas_call" not in without
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), plain, fused)


@pytest.mark.parametrize("config", [micro.T5_1_1, micro.PER_LAYER])
def test_an_encoder_of_t5_is_the_same(config: Any) -> None:
    config = dataclasses.replace(config, num_encoder_layers=1)
    prefixes = tuple(
        dataclasses.replace(prefix, before=True)
        for prefix in micro.make_prefixes(config, layers=config.num_encoder_layers)
    )
    model = micro.make_t5(config, dropout_rate=0.2)
    require_same(model, micro.token_rows([5, 3]), prefixes=prefixes, dropout=True)


# The second row has padding within and on both sides.
TOKENS = np.array([[5, 3, 8, 9, 4, 7], [-1, 6, -1, 7, 11, -1]])


def test_a_decoder_behind_a_prefix_and_a_prompt_is_the_same() -> None:
    model = tiny_lm.make_lm("gemma", num_kv_heads=3, dropout_rate=0.2)
    config = model.config
    shape = (2, 2, 1, 2, config.num_kv_heads, config.head_dim)
    prefixes = tuple(
        KeyValues(key_BPGK=jnp.asarray(key), value_BPGK=jnp.asarray(value))
        for key, value in normal(*shape, seed=3)
    )
    require_same(model, TOKENS, prefixes=prefixes, dropout=True)


def test_an_encoder_of_t5gemma_is_the_same() -> None:
    require_same(tiny_t5gemma.make_t5gemma(tiny_t5gemma.CONFIGS["t5gemma2"]), TOKENS[:, 1:])


def test_a_decoder_on_a_gpu_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_attention, "IMPLEMENTATION", "xla")
    model = tiny_lm.make_lm("llama", num_layers=2, windows=(3, 0))
    require_same(model, TOKENS, implementation="cudnn")


def test_members_of_a_run_have_a_program_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    # What JAX checks, and how vmap changes the program, needs no GPU.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 0)

    def loss(query: Any, key: Any, length_B: Any, order_BT: Any) -> Any:
        seen = CausalLengths(length_B=length_B, order_BT=order_BT, window=32)
        return jnp.sum(cudnn_attention.cudnn_attention(query, key, key, seen=seen))

    shapes = [(2, 1, 65, 4, 8), (2, 1, 68, 2, 8), (2, 1), (2, 1, 65)]  # an odd number of queries
    dtypes = [jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.int32]
    arguments = map(jax.ShapeDtypeStruct, shapes, dtypes)
    step = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))
    text = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text
