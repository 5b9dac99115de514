"""The attention kernel, simulated, against attention by its definition."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.models.ops import fused_attention as kernel
from prompt_tuning_jax.models.ops import fused_tiles
from prompt_tuning_jax.models.ops.attention import MASK_VALUE
from prompt_tuning_jax.models.ops.fused_kernels import rolled
from prompt_tuning_jax.models.ops.fused_tiles import (
    Tiling,
    Visibility,
    visible_keys,
    visible_positions,
)
from tests.devices import with_devices
from tests.micro import normal

H, K = 4, 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """An attention: its sizes, and what its queries see."""

    rows: int = 2
    queries: int
    ahead_of_row: int = 0  # keys before the row's own, such as those of a prompt
    groups: int = H
    window: int = 0
    ahead: int | None = 0
    softcap: float = 0.0
    distance_bias: bool = False
    dropout: bool = False
    dtype: Any = jnp.float32

    @property
    def keys(self) -> int:
        return self.queries + self.ahead_of_row


def operands(case: Case) -> dict[str, Any]:
    """Draws the arguments of the kernel and of ``plain``; masks have holes, or are all false."""
    random = np.random.default_rng(case.queries)
    real_BT = random.random((case.rows, case.queries)) < 0.7
    positions_BT = case.ahead_of_row - 1 + np.cumsum(real_BT, axis=1)
    before = np.broadcast_to(np.arange(case.ahead_of_row), (case.rows, case.ahead_of_row))
    mask_BU = np.concatenate([np.ones(before.shape, bool), real_BT], axis=1)
    if case.rows > 1:
        mask_BU[0] = False  # its queries see nothing
    values: dict[str, Any] = {
        "query_BTHK": jnp.asarray(normal(case.rows, case.queries, H, K, seed=1), case.dtype),
        "key_BUGK": jnp.asarray(normal(case.rows, case.keys, case.groups, K, seed=2), case.dtype),
        "value_BUGK": jnp.asarray(normal(case.rows, case.keys, case.groups, K, seed=3), case.dtype),
        "softcap": case.softcap,
    }
    seen_BTU = np.broadcast_to(mask_BU[:, None], (case.rows, case.queries, case.keys))
    if case.distance_bias:
        values["bias_HN"] = jnp.asarray(normal(H, case.queries + case.keys - 1, seed=4))
        values["seen"] = visible_keys(jnp.asarray(mask_BU), length=case.queries)
    else:
        key_positions_BU = np.concatenate([before, positions_BT], axis=1)
        values["seen"] = visible_positions(
            jnp.asarray(positions_BT),
            jnp.asarray(key_positions_BU),
            mask_BU=jnp.asarray(mask_BU),
            window=case.window,
            ahead=case.ahead,
        )
        distance_BTU = positions_BT[:, :, None] - key_positions_BU[:, None]
        if case.ahead is not None:
            seen_BTU = seen_BTU & (distance_BTU >= -case.ahead)
        if case.window:
            seen_BTU = seen_BTU & (distance_BTU < case.window)
    values["seen_BTU"] = seen_BTU
    if case.dropout:
        keep_TU = (random.random((case.queries, case.keys)) < 0.8) / 0.8
        values["keep_TU"] = jnp.asarray(keep_TU, jnp.float32)
    return values


def plain(query_BTHK: Any, key_BUGK: Any, value_BUGK: Any, **rest: Any) -> jax.Array:
    """Attention by its definition, in float32."""
    query, key, value = (x.astype(jnp.float32) for x in (query_BTHK, key_BUGK, value_BUGK))
    key, value = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (key, value))
    queries, keys = query.shape[1], key.shape[1]
    scores = jnp.einsum("bthk,buhk->bhtu", query, key)
    if rest["softcap"]:
        scores = rest["softcap"] * jnp.tanh(scores / rest["softcap"])
    if "bias_HN" in rest:
        distance = np.arange(keys)[None] - np.arange(queries)[:, None]
        scores += rest["bias_HN"][:, distance + queries - 1]
    scores += jnp.where(rest["seen_BTU"], 0.0, MASK_VALUE)[:, None]
    weights = jax.nn.softmax(scores) * rest.get("keep_TU", 1.0)
    return jnp.einsum("bhtu,buhk->bthk", weights, value)


def fused(seen_BTU: Any, **values: Any) -> jax.Array:
    """The kernel, which has no use for the whole mask."""
    return kernel.fused_attention(**values)


def with_gradients(attend: Any, values: dict[str, Any]) -> list[jax.Array]:
    """The result, and the gradients of queries, keys and values."""
    inputs = {name: x for name, x in values.items() if name.endswith("K")}
    rest = {name: x for name, x in values.items() if name not in (*inputs, "softcap")}

    @jax.jit
    def run(inputs: Any, rest: Any) -> Any:
        def loss(inputs: Any) -> Any:
            out = attend(**inputs, **rest, softcap=values["softcap"]).astype(jnp.float32)
            return jnp.sum(out * jnp.sin(jnp.arange(out.size).reshape(out.shape))), out

        gradients, out = jax.grad(loss, has_aux=True)(inputs)
        return out, *gradients.values()

    return list(run(inputs, rest))


CASES = {
    "T5": Case(queries=5, ahead_of_row=4, distance_bias=True, dropout=True),
    "T5, blocks of queries, shared keys": Case(
        rows=1, queries=130, ahead_of_row=130, groups=2, distance_bias=True, dtype=jnp.bfloat16
    ),
    "Llama: a prompt in front, shared keys": Case(queries=7, ahead_of_row=3, groups=2),
    "Gemma 2: a window, a softcap, tiles": Case(
        queries=150, ahead_of_row=110, groups=2, window=40, softcap=2.0
    ),
    "causal, dropout, blocks and tiles": Case(
        rows=1, queries=130, ahead_of_row=140, dropout=True, dtype=jnp.bfloat16
    ),
    "T5Gemma's encoder": Case(queries=9, groups=1, window=4, ahead=3),
    "both directions, all positions": Case(queries=6, ahead=None, softcap=1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_tiles, "_MOST_SCORES", 128 * 384)
    monkeypatch.setattr(fused_tiles, "_LARGEST_TILE", 128)
    case = CASES[name]
    values = operands(case)
    wanted, got = with_gradients(plain, values), with_gradients(fused, values)
    tolerance = 2e-5 if case.dtype == jnp.float32 else 0.12
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_allclose(
            np.asarray(other, np.float32), np.asarray(one, np.float32), atol=tolerance
        )


def test_chips_without_strided_rolls_get_the_same_bias() -> None:
    x = jnp.asarray(normal(24, 128))
    once, stepwise = (jax.jit(lambda x, s=s: rolled(x, 5, strided=s))(x) for s in (True, False))
    np.testing.assert_array_equal(once, stepwise)
    np.testing.assert_array_equal(once[3], np.roll(np.asarray(x)[3], 8))


def test_the_bias_has_no_derivative() -> None:
    values = operands(Case(rows=1, queries=2, distance_bias=True))

    def loss(bias_HN: Any) -> Any:
        return jnp.sum(fused(**{**values, "bias_HN": bias_HN}))

    with pytest.raises(NotImplementedError, match="bias"):
        jax.grad(loss)(values["bias_HN"])


def test_members_of_a_run_attend_apart() -> None:
    cases = [operands(Case(queries=5, distance_bias=True)) for _ in range(2)]
    cases[1] = {**cases[1], "query_BTHK": 2 * cases[1]["query_BTHK"]}
    del cases[0]["seen_BTU"], cases[1]["seen_BTU"]
    fixed = {"softcap": cases[0].pop("softcap"), "bias_HN": cases[0].pop("bias_HN")}
    varied = [{name: case[name] for name in cases[0]} for case in cases]

    def loss(values: Any) -> Any:
        return jnp.sum(jnp.sin(kernel.fused_attention(**values, **fixed)))

    def gradients(values: Any) -> Any:
        inputs = {name: x for name, x in values.items() if name != "seen"}
        return jax.grad(lambda x: loss({**x, "seen": values["seen"]}))(inputs)

    together = jax.jit(jax.vmap(gradients))(jax.tree.map(lambda *x: jnp.stack(x), *varied))
    apart = jax.jit(gradients)
    for member, values in enumerate(varied):
        got = jax.tree.map(lambda x, member=member: x[member], together)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, apart(values))


def needed(seen: Visibility) -> list[list[list[int]]]:
    """The tiles that each block of each row needs."""
    bits_BI = np.asarray(seen.tiles_B1I)[:, 0]
    return [[[j for j in range(8) if bits >> j & 1] for bits in row] for row in bits_BI.tolist()]


def test_tiles_that_no_query_sees_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_tiles, "_LARGEST_BLOCK", 128)
    monkeypatch.setattr(fused_tiles, "_LARGEST_TILE", 128)

    def tiles(lengths: list[int], window: int = 0) -> Visibility:
        """384 positions of which so many are real, behind a prompt of 128."""
        real_BT = np.arange(384) < np.array(lengths)[:, None]
        positions_BT = jnp.asarray(127 + np.cumsum(real_BT, axis=1))
        before = jnp.broadcast_to(jnp.arange(128), (len(lengths), 128))
        return visible_positions(
            positions_BT,
            jnp.concatenate([before, positions_BT], axis=1),
            mask_BU=jnp.asarray(np.pad(real_BT, ((0, 0), (128, 0)), constant_values=True)),
            window=window,
        )

    causal = tiles([384, 100])
    assert needed(causal) == [[[0, 1], [0, 1, 2], [0, 1, 2, 3]], [[0, 1], [0, 1], [0, 1]]]
    assert causal.tiling.visited() == 9
    windowed = tiles([384], window=130)
    assert needed(windowed) == [[[0, 1], [0, 1, 2], [1, 2, 3]]]
    assert windowed.tiling.visited() == 8


def test_what_a_kernel_costs_is_counted_by_hand() -> None:
    # 300 queries and 400 keys are padded to 384 and 512: blocks of 128 and tiles of 256.
    tiling = Tiling(length=300, keys=400, block=128, tile=256, ahead=0)
    # The last query of each block is at 227, 355 and 399.
    visited = 1 + 2 + 2
    assert tiling.visited() == visited

    rows, heads, groups, width = 2, 4, 2, 64

    def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    inputs = {
        "query": shape(rows, heads, 384, width, dtype=jnp.bfloat16),
        "key": shape(rows, groups, 512, width, dtype=jnp.bfloat16),
        "value": shape(rows, groups, 512, width, dtype=jnp.bfloat16),
        "mask": shape(rows, 1, 512),
        "query_position": shape(rows, 1, 384),
    }
    spec = kernel.Spec(tiling=tiling, softcap=0.0, strided_rolls=True)
    made = kernel.cost_estimate(spec, inputs, [inputs["query"]], products=2)
    # The scores, and what they are multiplied with.
    assert made.flops == 2 * 2 * (rows * heads) * visited * (128 * 256) * width
    assert made.transcendentals == (rows * heads) * visited * (128 * 256)
    queries, keys = 2 * rows * heads * 384 * width, 2 * rows * groups * 512 * width
    masks, positions = 4 * groups * rows * 512, 4 * heads * rows * 384
    assert made.bytes_accessed == queries + 2 * keys + masks + positions + queries


ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np
from prompt_tuning_jax import param_tree
from prompt_tuning_jax.distributed import sharding
from prompt_tuning_jax.distributed.sharding import Partitioner, activation_sharding, make_mesh
from tests import micro
from tests.models.test_fused_attention import Case, fused, operands, plain, with_gradients

partitioner = Partitioner(mesh=make_mesh(data=2, model=2))

def on_mesh(**values):
    with activation_sharding(partitioner):
        return fused(**values)

# The mesh divides the heads of keys, or not.
for groups, biased in ((2, True), (1, False)):
    values = operands(Case(rows=4, queries=3, ahead_of_row=2, groups=groups, distance_bias=biased))
    wanted, got = with_gradients(plain, values), with_gradients(on_mesh, values)
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)

model = micro.make_t5()
params = partitioner.shard(param_tree.split(model)[1], param_tree.logical_axes(model))
stacked = param_tree.stack_layers(dict(params), sharding.stack)
kernel = stacked["encoder/layers/mlp/wo/kernel"]
assert kernel.sharding.spec == jax.P(None, "model", "fsdp"), kernel.sharding
np.testing.assert_array_equal(kernel[1], params["encoder/layers_1/mlp/wo/kernel"])
"""


def test_devices_attend_with_their_rows_and_heads_and_hold_their_part_of_a_stack() -> None:
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", ON_A_MESH], cwd=root, env=with_devices(4), check=True)
