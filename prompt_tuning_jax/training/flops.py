"""Counts the FLOPs of the products of a traced function, with every iteration of its loops."""

import math
from typing import Any

import jax
from jax.interpreters import partial_eval

_PRODUCT = "dot_general"


def product_flops(jaxpr: Any) -> float:
    """Returns the multiplications and additions of all matrix products in a closed jaxpr.

    Products whose results are not used do not count: the compiler removes them.  A loop whose
    number of iterations is not known counts once, and a branch as the costliest.
    """
    used, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return _flops(used)


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == _PRODUCT:
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            summed = math.prod(left[axis] for axis in contracted)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * summed
        elif name == "pallas_call":
            estimate = params.get("cost_estimate")
            total += 0.0 if estimate is None else float(estimate.flops)
        elif name == "cond":
            total += max(map(_flops, params["branches"]))
        else:
            total += _times(name, params) * sum(map(_flops, _within(params)))
    return total


def _times(name: str, params: dict[str, Any]) -> int:
    """Returns how often the functions of an equation run."""
    if name == "scan":
        return int(params["length"])
    return int(params["mesh"].size) if name == "shard_map" else 1


def _within(params: dict[str, Any]) -> list[Any]:
    """Returns the jaxprs among the parameters of an equation."""
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
    return [leaf for leaf in leaves if hasattr(leaf, "eqns")]
