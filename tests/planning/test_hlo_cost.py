"""The cost of a loop's other iterations, against the same program without a loop."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from prompt_tuning_jax.planning.hlo import times
from prompt_tuning_jax.planning.hlo_cost import entry_cost, repeated_cost

LAYERS, WIDTH = 6, 64


def compiled(function: Any, *shapes: tuple[int, ...]) -> Any:
    return (
        jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()
    )


def layer(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.tanh(x @ kernel)


def one_by_one(x: jax.Array, kernels: jax.Array) -> jax.Array:
    for i in range(LAYERS):
        x = layer(x, kernels[i])
    return x


def looped(x: jax.Array, kernels: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, kernel: (layer(x, kernel), None), x, kernels)[0]


def test_a_loop_costs_what_its_layers_cost_one_by_one() -> None:
    shapes = ((WIDTH, WIDTH), (LAYERS, WIDTH, WIDTH))
    plain, loop = (compiled(each, *shapes) for each in (one_by_one, looped))
    assert repeated_cost(plain.as_text()).flops == 0
    repeated = repeated_cost(loop.as_text())
    assert repeated.flops == 2 * WIDTH**3 * (LAYERS - 1)
    # A layer reads its input and its kernel and writes its output, for the product and for tanh.
    assert repeated.bytes == pytest.approx(4 * WIDTH**2 * 7 * (LAYERS - 1), rel=0.4)
    assert entry_cost(plain.as_text()).flops == 2 * WIDTH**3 * LAYERS


BATCHED = "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf"
TPU = """
%condition.1 (counter.1: (s32[], bf16[4,64])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(24)
  %counter.1 = (s32[]{:T(128)}, bf16[4,64]{1,0}) parameter(0)
  %step.1 = s32[]{:T(128)} get-tuple-element(%counter.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%step.1, %limit.1), direction=LT
}

%fused.1 (a.1: bf16[24,8,612,64], b.1: bf16[8,64,612]) -> f32[8,612,612] {
  %a.1 = bf16[24,8,612,64]{3,2,1,0} parameter(0)
  %b.1 = bf16[8,64,612]{2,1,0} parameter(1)
  %at.1 = s32[]{:T(128)} constant(3)
  %own.1 = bf16[1,8,612,64]{3,2,1,0} dynamic-slice(%a.1, %at.1, %at.1)
  %own.2 = bf16[8,612,64]{2,1,0} bitcast(%own.1)
  ROOT %c.1 = f32[8,612,612]{2,1,0:T(8,128)} convolution(%own.2, %b.1), {BATCHED}
}

%body.1 (state.1: (s32[], bf16[4,64])) -> (s32[], bf16[4,64]) {
  %state.1 = (s32[]{:T(128)}, bf16[24,8,612,64], bf16[8,64,612]) parameter(0)
  %all.1 = bf16[24,8,612,64]{3,2,1,0} get-tuple-element(%state.1), index=1
  %keys.1 = bf16[8,64,612]{2,1,0} get-tuple-element(%state.1), index=2
  %scores.1 = f32[8,612,612]{2,1,0:T(8,128)} fusion(%all.1, %keys.1), kind=kOutput, calls=%fused.1
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[4,64]{1,0}) tuple(%scores.1)
}

ENTRY %main.1 (p.1: bf16[4,64]) -> bf16[4,64] {
  %p.1 = bf16[4,64]{1,0} parameter(0)
  ROOT %while.1 = (s32[], bf16[4,64]) while(%p.1), condition=%condition.1, body=%body.1
}
""".replace("{BATCHED}", BATCHED)


def test_products_of_a_tpu_and_slices_of_stacked_layers() -> None:
    assert dict(times(TPU))["body.1"] == 24
    repeated = repeated_cost(TPU)
    assert repeated.flops == 23 * 2 * 8 * 612 * 612 * 64
    read, written = 2 * 2 * 8 * 612 * 64, 4 * 8 * 612 * 612
    assert repeated.bytes == pytest.approx(23 * (read + written), rel=1e-5)  # and a counter
