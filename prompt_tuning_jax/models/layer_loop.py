"""Runs the layers of a stack, one by one or as a loop that is compiled once for equal layers."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.models.layers import Remat, rematerialized
from prompt_tuning_jax.typing import Array

L = TypeVar("L", bound=nnx.Module)

_LONGEST_PERIOD = 8  # layers; Gemma 3 and T5Gemma 2 repeat after six


def run_layers(
    layers: Sequence[L],
    apply: Callable[..., tuple[Array, Any]],
    x: Array,
    inputs: Sequence[Any],
    *,
    kinds: Sequence[Hashable] | None = None,
    remat: Remat = "none",
    scan: bool = False,
) -> tuple[Array, list[Any]]:
    """Runs layers and returns the last one's output and what each returned beside it.

    Args:
      layers: the layers, first to last.
      apply: ``(layer, x, input, kind) -> (x, output)``; ``input`` and ``output`` are pytrees.
      x: the first layer's input; every layer's output has its shape and dtype.
      inputs: for each layer the pytree that it alone gets, such as its prefix and its key.
      kinds: for each layer what ``apply`` needs to know while it is traced; by default None.
      remat: what each layer stores for its backward pass.
      scan: whether layers that repeat in structure run as one ``jax.lax.scan``.  The program is
        then as large as one repetition, and their parameters are stacked.
    """
    kinds = kinds or (None,) * len(layers)
    if not scan:
        outputs = []
        for layer, given, kind in zip(layers, inputs, kinds, strict=True):
            x, output = _applied(layer, apply, kind, remat)(x, given)
            outputs.append(output)
        return x, outputs

    parts = [param_tree.split(layer) for layer in layers]
    # Layers repeat if their structure, their kind and the structure of their inputs do.
    keys = [
        (graphdef, kind, jax.tree.structure(given), _shapes((params, given)))
        for (graphdef, params), kind, given in zip(parts, kinds, inputs, strict=True)
    ]
    outputs = []
    for start, period, times in repetitions(keys):
        block = range(start, start + period)

        def body(x: Array, own: Any, block: range = block) -> tuple[Array, Any]:
            returned = []
            for i, (params, given) in zip(block, own, strict=True):
                layer = param_tree.merge(parts[i][0], params)
                x, output = _applied(layer, apply, kinds[i], remat)(x, given)
                returned.append(output)
            return x, returned

        def own_of(time: int, block: range = block, period: int = period) -> Any:
            return [(parts[i + time * period][1], inputs[i + time * period]) for i in block]

        if times == 1:
            x, returned = body(x, own_of(0))
            outputs += returned
            continue
        stacked = jax.tree.map(lambda *each: jnp.stack(each), *map(own_of, range(times)))
        x, returned = jax.lax.scan(body, x, stacked)
        for time in range(times):
            outputs += jax.tree.map(lambda each, time=time: each[time], returned)
    return x, outputs


def repetitions(keys: Sequence[Any]) -> Iterator[tuple[int, int, int]]:
    """Yields ``(start, period, times)`` that cover a sequence: its longest repetitions in turn.

    Where nothing repeats, one element is a repetition of one.
    """
    start = 0
    while start < len(keys):
        best = (1, 1)
        for period in range(1, min(_LONGEST_PERIOD, (len(keys) - start) // 2) + 1):
            end = start + period
            while end < len(keys) and keys[end] == keys[end - period]:
                end += 1
            times = (end - start) // period
            if times > 1 and times * period > best[0] * best[1]:
                best = (period, times)
        yield start, *best
        start += best[0] * best[1]


def _applied(layer: L, apply: Callable[..., Any], kind: Hashable, remat: Remat) -> Any:
    return rematerialized(lambda x, given: apply(layer, x, given, kind), remat)


def _shapes(tree: Any) -> tuple[Any, ...]:
    return tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))
