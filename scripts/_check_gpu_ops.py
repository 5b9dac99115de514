"""Checks of ``check_gpu``: each operation on the device against NumPy in float64."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from _check_gpu_report import Report
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.models.layer_loop import run_layers
from prompt_tuning_jax.models.layers import Embed, Linear, dropout, linear_from
from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.models.ops.quantized import quantized_dot
from prompt_tuning_jax.models.output_head import LazyLogits, OutputHead

Arrays = tuple[Any, ...]
THREADS = 6  # which make checks side by side
_EQUATIONS = (
    "BTHK,BUHK->BHTU",  # scores, and weighted values, of T5
    "BHTU,BUHK->BTHK",
    "GBTRK,BUGK->GBTRU",  # of decoder-only models, whose heads share keys
    "GBTRU,UGK->GBTRK",
)
_SIZES = {"B": 3, "T": 29, "U": 37, "H": 4, "K": 64, "G": 2, "R": 3}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How products are computed, and the largest relative error of their results.

    ``matmul`` is JAX's ``default_matmul_precision``; None leaves it, and NVIDIA's matrix units then
    round float32 to TF32, which has 10 bits behind the point.
    """

    name: str
    dtype: str
    matmul: str | None
    most: float

    def applied(self) -> Any:
        """Returns a context in which functions are traced with this precision."""
        return nullcontext() if self.matmul is None else jax.default_matmul_precision(self.matmul)


PRECISIONS = (
    Precision(name="bfloat16", dtype="bfloat16", matmul=None, most=2e-2),
    Precision(name="float32", dtype="float32", matmul="highest", most=1e-5),
    Precision(name="float32 by default", dtype="float32", matmul=None, most=2e-3),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A function of JAX arrays, and the same function in NumPy.

    Arrays in float64 are rounded to the dtype of the precision first, for both; ``exact`` gets all
    of them in float64.
    """

    name: str
    run: Callable[..., Arrays]
    exact: Callable[..., Arrays]
    arrays: Arrays


def run(report: Report) -> None:
    """Makes all checks of operations."""
    rng = np.random.default_rng(0)
    small = report.options.small
    cases = [*_products(rng), *_softmaxes(rng), *_quantized(rng, small=small)]
    cases += [*_heads(rng), _layer_loop(rng)]
    precisions = PRECISIONS[:1] if small else PRECISIONS

    def check(case: Case) -> None:
        with report.guarded(case.name):
            found = {p.name: (_error_of(case, p), p.most) for p in precisions}
            report.errors(case.name, found)

    # Most of a check is compiling, which threads do side by side.
    with ThreadPoolExecutor(1 if small else THREADS) as threads:
        list(threads.map(check, cases))
    with report.guarded("random numbers"):
        report.check("random numbers", _same_random_numbers(), "dropout draws the CPU's mask")


def _error_of(case: Case, precision: Precision) -> float:
    """Returns the largest relative error of the results."""
    rounded = [
        x.astype(np.dtype(precision.dtype)) if x.dtype == np.float64 else x for x in case.arrays
    ]
    with precision.applied():
        found = jax.jit(case.run)(*map(jnp.asarray, rounded))
    exact = case.exact(*(x.astype(np.float64) for x in rounded))
    return max(map(relative_error, found, exact))


def relative_error(found: Any, exact: Any) -> float:
    """Returns ``|found - exact| / |exact|`` by the Euclidean norm; NaN unless all are finite."""
    found, exact = np.asarray(found).astype(np.float64), np.asarray(exact).astype(np.float64)
    if found.shape != exact.shape:
        raise ValueError(f"the result has shape {found.shape} instead of {exact.shape}")
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def _with_derivatives(function: Callable[..., Any], *arguments: Any) -> Arrays:
    """Returns the result and the derivatives; the last argument is the result's cotangent."""
    *inputs, cotangent = arguments
    result, derive = jax.vjp(function, *inputs)
    return result, *derive(cotangent.astype(result.dtype))


def _products(rng: np.random.Generator) -> Iterator[Case]:
    def dot(x: Any, kernel_DF: Any) -> Any:
        return matmul.dot(x, kernel_DF, dtype=x.dtype)

    def exact_dot(x: Any, kernel_DF: Any, cotangent: Any) -> Arrays:
        return (
            x @ kernel_DF,
            cotangent @ kernel_DF.T,
            np.einsum("ETD,ETF->DF", x, cotangent),
        )

    arrays = (rng.normal(size=(3, 37, 512)), rng.normal(size=(512, 384)))
    arrays = (*arrays, rng.normal(size=(3, 37, 384)))
    yield Case(
        name="dot, with derivatives",
        run=partial(_with_derivatives, dot),
        exact=exact_dot,
        arrays=arrays,
    )
    yield Case(
        name="dot of several members",
        run=lambda x, k, g: _with_derivatives(
            lambda x, k: jax.vmap(dot, in_axes=(0, None))(x, k), x, k, g
        ),
        exact=exact_dot,
        arrays=arrays,
    )

    def product(equation: str, left: Any, right: Any) -> Any:
        return matmul.einsum(equation, left, right, dtype=left.dtype)

    def exact_product(equation: str, left: Any, right: Any, cotangent: Any) -> Arrays:
        operands, out = equation.split("->")
        first, second = operands.split(",")
        return (
            np.einsum(equation, left, right),
            np.einsum(f"{out},{second}->{first}", cotangent, right),
            np.einsum(f"{first},{out}->{second}", left, cotangent),
        )

    for equation in _EQUATIONS:
        names = equation.replace("->", ",").split(",")
        yield Case(
            name=f"einsum {equation}",
            run=partial(_with_derivatives, partial(product, equation)),
            exact=partial(exact_product, equation),
            arrays=tuple(rng.normal(size=[_SIZES[axis] for axis in name]) for name in names),
        )


def _softmaxes(rng: np.random.Generator) -> Iterator[Case]:
    def exact(*arrays: Any) -> Arrays:
        parts, cotangents = arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]
        x, cotangent = np.concatenate(parts, -1), np.concatenate(cotangents, -1)
        weights = np.exp(x - x.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        inner = (weights * cotangent).sum(-1, keepdims=True)
        at = np.cumsum([part.shape[-1] for part in parts])[:-1]
        results = (np.split(y, at, -1) for y in (weights, weights * (cotangent - inner)))
        return tuple(part for parts in results for part in parts)

    def joint(*arrays: Any) -> Arrays:
        parts, cotangents = arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]
        weights, derive = jax.vjp(lambda *parts: matmul.joint_softmax(parts), *parts)
        return *weights, *derive(tuple(c.astype(jnp.float32) for c in cotangents))

    sizes = ((2, 3, 5, 229), (2, 3, 5, 100))
    parts = tuple(3 * rng.normal(size=size) for size in sizes)
    cotangents = tuple(rng.normal(size=size) for size in sizes)
    yield Case(
        name="softmax, with derivative",
        run=partial(_with_derivatives, matmul.softmax),
        exact=exact,
        arrays=(parts[0], cotangents[0]),
    )
    yield Case(name="softmax of two parts", run=joint, exact=exact, arrays=(*parts, *cotangents))


def _quantized(rng: np.random.Generator, *, small: bool) -> Iterator[Case]:
    def exact(inputs: int, x: Any, cotangent: Any, whole: Any, scale: Any, *minimum: Any) -> Arrays:
        times = whole.shape[inputs] // scale.shape[inputs]
        kernel = whole * np.repeat(scale, times, axis=inputs)
        if minimum:
            kernel += np.repeat(minimum[0], times, axis=inputs)
        kernel_DF = kernel.T if inputs else kernel
        return x @ kernel_DF, cotangent @ kernel_DF.T

    def run(inputs: int, x: Any, cotangent: Any, *kernel: Any) -> Arrays:
        def of(x: Any) -> Any:
            return quantized_dot(x, *kernel, dtype=x.dtype, inputs_last=inputs == 1)

        return _with_derivatives(of, x, cotangent)

    # The last one has so many numbers that a part of them is dequantized at a time.
    large = (256, 192) if small else (1024, 16_500)
    for name, bits, groups, dtype, inputs, width, outputs in (
        ("int8", 8, 1, np.float32, 0, 256, 192),
        ("int4 in groups", 4, 8, ml_dtypes.bfloat16, 0, 256, 192),
        ("int4 in blocks with minimums", 4, 8, np.float16, 0, 256, 192),
        ("int8, a table", 8, 1, np.float32, 1, *large),
    ):
        top = 2 ** (bits - 1) - 1
        shape = (outputs, width) if inputs else (width, outputs)
        whole = rng.integers(-top, top + 1, shape, np.int8)
        of_groups = (outputs, groups) if inputs else (groups, outputs)
        kernel: Arrays = (
            whole.astype(ml_dtypes.int4) if bits == 4 else whole,
            rng.uniform(0.01, 0.02, of_groups).astype(dtype),
        )
        if "minimums" in name:
            kernel = (*kernel, rng.uniform(-0.1, 0.1, of_groups).astype(dtype))
        yield Case(
            name=f"product with {name}",
            run=partial(run, inputs),
            exact=partial(exact, inputs),
            arrays=(rng.normal(size=(21, width)), rng.normal(size=(21, outputs)), *kernel),
        )


class _Sizes:
    vocab_size, embed_dim = 3001, 64


def _heads(rng: np.random.Generator) -> Iterator[Case]:
    words, width = _Sizes.vocab_size, _Sizes.embed_dim
    targets = rng.integers(0, words, (5, 7))
    hidden, weight = rng.normal(size=(5, 7, width)), rng.normal(size=(5, 7))

    def exact(table_VD: Any, hidden: Any, weight: Any) -> Arrays:
        logits = hidden @ table_VD.T
        largest = logits.max(-1)
        log_z = largest + np.log(np.exp(logits - largest[..., None]).sum(-1))
        share = np.exp(logits - log_z[..., None]) - np.eye(words)[targets]
        target = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return log_z, target, largest, (weight[..., None] * share) @ table_VD

    def run(tied: bool, mb: float, table_VD: Any, hidden: Any, weight: Any) -> Arrays:
        dtypes: Any = {"dtype": hidden.dtype, "param_dtype": hidden.dtype}

        def untied() -> Linear:
            common = {"out_dtype": jnp.float32, "rngs": nnx.Rngs(0), **dtypes}
            return Linear(width, words, axes=("embed", "vocab"), std=1.0, **common)

        if tied:
            embed = nnx.eval_shape(lambda: Embed(_Sizes, rngs=nnx.Rngs(0), **dtypes))
            layer: Any = param_tree.merge(param_tree.split(embed)[0], {"embedding": table_VD})
        else:
            layer = linear_from(table_VD.T, untied)

        def loss(hidden: Any) -> Any:
            head = OutputHead(layer=layer, vocab_size=words)
            found = LazyLogits(hidden=hidden, head=head, max_mb=mb).statistics(targets)
            return jnp.sum(weight * (found.log_z - found.target)), found

        derivative, found = jax.grad(loss, has_aux=True)(hidden)
        rows = table_VD[found.best].astype(jnp.float32)
        best = jnp.sum(hidden.astype(jnp.float32) * rows, axis=-1)
        return found.log_z, found.target, best, derivative

    arrays = (0.3 * rng.normal(size=(words, width)), hidden, weight)
    part = 4 * targets.size * words / 5.5 / 1e6  # six parts, the last one smaller
    for name, tied, mb in (
        ("whole", True, 64.0),
        ("in parts, tied", True, part),
        ("in parts, untied", False, part),
    ):
        yield Case(
            name=f"output head {name}", run=partial(run, tied, mb), exact=exact, arrays=arrays
        )


def _layer_loop(rng: np.random.Generator) -> Case:
    number, width = 6, 96

    def like() -> Linear:
        common: Any = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
        return Linear(width, width, axes=("embed", "mlp"), std=1.0, **common)

    def run(x: Any, kernels_LDF: Any, cotangent: Any) -> Arrays:
        def apply(layer: Linear, x: Any, given: Any, kind: Any) -> Any:
            return x + jnp.tanh(matmul.dot(x, layer.kernel.get_value(), dtype=x.dtype)), None

        def stack(x: Any) -> Any:
            layers = [linear_from(kernels_LDF[i], like) for i in range(number)]
            return run_layers(layers, apply, x, [None] * number, scan=True)[0]

        return _with_derivatives(stack, x, cotangent)

    def exact(x: Any, kernels_LDF: Any, cotangent: Any) -> Arrays:
        activations = []
        for kernel in kernels_LDF:
            activations.append(np.tanh(x @ kernel))
            x = x + activations[-1]
        for kernel, activation in zip(kernels_LDF[::-1], activations[::-1], strict=True):
            cotangent = cotangent + (cotangent * (1 - activation**2)) @ kernel.T
        return x, cotangent

    kernels = rng.normal(size=(number, width, width)) / math.sqrt(width)
    shape = (4, 17, width)
    arrays = (rng.normal(size=shape), kernels, rng.normal(size=shape))
    return Case(name="layers as a loop", run=run, exact=exact, arrays=arrays)


def _same_random_numbers() -> bool:
    def draw() -> np.ndarray:
        drawn = jax.jit(lambda: dropout(jnp.ones((64, 64)), 0.1, key=jax.random.key(1)))()
        return np.asarray(drawn) > 0

    found = draw()
    with jax.default_device(jax.devices("cpu")[0]):
        return bool(np.array_equal(found, draw()))
