"""Frozen weights in 8 or 4 bits, dequantised inside the product that uses them.

Quantisation is symmetric, and the largest weight determines the scale.  An int8 kernel has one
scale per output channel; an int4 kernel has one bfloat16 scale per 32 inputs of an output channel.
Only weights are quantised; activations, their derivatives and all sums keep their precision.  The
embedding table (one scale per row) and the logits kernel are int8 in both modes.  Norms,
biases and the vectors of positions are not quantised.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from prompt_tuning_jax.models.layers import (
    LINEAR,
    Embed,
    Linear,
    LinearAdapter,
    Table,
    WithoutAdapter,
)
from prompt_tuning_jax.models.ops import cpu
from prompt_tuning_jax.typing import Array, DType, HostArray

Quantization: TypeAlias = Literal["none", "int8", "int4"]

GROUP = 32  # inputs that share one scale in int4
KERNEL, TABLE, SCALE = "kernel", "embedding", "_scale"
_LOGITS = "logits_dense"
_POSITIONS = "position_embedder"


def quantized(
    name: str,
    array: Array,
    quantization: Quantization,
    *,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, Array]:
    """Quantises one parameter and returns the parameters that replace it, by name.

    A quantised parameter becomes integers under the same name and scales under ``..._scale``; any
    other parameter is returned unchanged.  An abstract array gives abstract results.
    """
    *path, last = name.split("/")
    if quantization == "none" or last not in (KERNEL, TABLE) or _POSITIONS in path:
        return {name: array}
    kind: Quantization = "int8" if last == TABLE or _LOGITS in path else quantization
    names = (name, name + SCALE)
    layouts = None if shardings is None else tuple(shardings[each] for each in names)
    make = _maker(kind, of_rows=last == TABLE, layouts=layouts)
    abstract = isinstance(array, jax.ShapeDtypeStruct)
    parts = jax.eval_shape(make, array) if abstract else make(array)
    return dict(zip(names, parts, strict=True))


@cache
def _maker(kind: Quantization, *, of_rows: bool, layouts: Any) -> Any:
    """Returns a jitted quantiser, which compiles once per shape (about six in a model)."""

    def make(array: Array) -> tuple[Array, Array]:
        values, scale = quantize(array.T if of_rows else array, kind)
        return (values.T, scale.T) if of_rows else (values, scale)

    return jax.jit(make, out_shardings=layouts)


def quantize_modules(module: nnx.Module, quantization: Quantization, *, path: str = "") -> None:
    """Replaces a model's linear maps and embedding table by quantised layers, one at a time.

    If the model's parameters are abstract, so are those of the quantised layers.
    """
    if quantization == "none":
        return
    for name, child in list(nnx.iter_children(module)):
        inner = f"{path}{name}"
        if isinstance(child, Linear):
            parts = quantized(f"{inner}/{KERNEL}", child.kernel.get_value(), quantization)
            setattr(module, str(name), QuantizedLinear(child, *parts.values()))
        elif isinstance(child, Embed):
            parts = quantized(f"{inner}/{TABLE}", child.embedding.get_value(), quantization)
            setattr(module, str(name), QuantizedEmbed(child, *parts.values()))
        elif isinstance(child, nnx.Module):
            quantize_modules(child, quantization, path=f"{inner}/")


def is_quantized(params: Mapping[str, Any]) -> bool:
    """Returns whether the parameter names are those of a model with quantised weights."""
    return any(name.endswith((KERNEL + SCALE, TABLE + SCALE)) for name in params)


def bytes_of(params: Mapping[str, Any]) -> int:
    """Returns the size of the parameters in bytes; two int4 values share a byte."""
    return sum(p.size * jax.dtypes.itemsize_bits(p.dtype) // 8 for p in params.values())


def quantize(kernel_DF: Array, quantization: Quantization) -> tuple[Array, Array]:
    """Returns integers ``[D, F]`` and their scales ``[groups, F]``; int8 has one group."""
    inputs, outputs = kernel_DF.shape
    group, top, dtype = inputs, 127, jnp.float32
    if quantization == "int4":
        group, top, dtype = math.gcd(inputs, GROUP), 7, jnp.bfloat16
    weights_GIF = kernel_DF.astype(jnp.float32).reshape(-1, group, outputs)
    largest_GF = jnp.max(jnp.abs(weights_GIF), axis=1)
    scale_GF = jnp.where(largest_GF > 0, largest_GF / top, 1.0).astype(dtype)
    # Clip, because the largest weight is out of range if its scale was rounded down.
    whole_GIF = jnp.clip(jnp.round(weights_GIF / scale_GF[:, None]), -top, top)
    return whole_GIF.reshape(inputs, outputs).astype(quantization), scale_GF


def quantized_dot(x: Array, kernel_DF: Array, scale_GF: Array, *, dtype: DType) -> Array:
    """Computes ``[..., D] @ [D, F]`` with operands in ``dtype`` and a float32 result.

    Otherwise it works like ``matmul.dot``.  The kernel is dequantised for this product and again
    for the derivative with respect to x; keeping it would hold the full kernels of all layers in
    memory at once.  There is no derivative with respect to the kernel.
    """
    flat_ND = x.reshape(-1, x.shape[-1]).astype(dtype)
    out_NF = _dot(flat_ND, kernel_DF, scale_GF)
    return out_NF.reshape(*x.shape[:-1], kernel_DF.shape[-1])


def _full(kernel_DF: Array, scale_GF: Array, *, beside: Array) -> Array:
    """Dequantises the kernel in the dtype of ``beside``, the operand it is multiplied with.

    Per-channel scales (int8) are not applied here but to the product, so that the kernel's integers
    are exact in bfloat16.
    """
    dtype = beside.dtype
    groups, outputs = scale_GF.shape
    kernel_DF = _not_before(kernel_DF, beside)
    if groups == 1:
        return kernel_DF.astype(dtype)
    whole_GIF = kernel_DF.astype(dtype).reshape(groups, -1, outputs)
    scale_G1F = _not_before(scale_GF, beside)[:, None].astype(dtype)
    return (whole_GIF * scale_G1F).reshape(kernel_DF.shape)


@jax.custom_vjp
def _dot(x_ND: Array, kernel_DF: Array, scale_GF: Array) -> Array:
    out_NF = cpu.product(x_ND, _full(kernel_DF, scale_GF, beside=x_ND), (1, 0))
    return out_NF * scale_GF if scale_GF.shape[0] == 1 else out_NF


def _dot_forward(
    x_ND: Array, kernel_DF: Array, scale_GF: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    empty_0 = jnp.zeros((0,), x_ND.dtype)  # for its dtype
    return _dot(x_ND, kernel_DF, scale_GF), (kernel_DF, scale_GF, empty_0)


def _dot_backward(
    saved: tuple[Array, Array, Array], cotangent_NF: Array
) -> tuple[Array, None, None]:
    kernel_DF, scale_GF, empty_0 = saved
    if scale_GF.shape[0] == 1:
        cotangent_NF = cotangent_NF * scale_GF
    cotangent_NF = cpu.apart(cotangent_NF.astype(empty_0.dtype))
    full_DF = _full(kernel_DF, scale_GF, beside=cotangent_NF)
    return cpu.product(cotangent_NF, full_DF, (1, 1)).astype(empty_0.dtype), None, None


_dot.defvjp(_dot_forward, _dot_backward)


@jax.custom_batching.custom_vmap
def _not_before(kernel_DF: Array, x_ND: Array) -> Array:
    """Returns the kernel with a dependency on x, so that it is dequantised only after x exists.

    Without the dependency, a compiler may dequantise the kernels of all layers at the start of a
    step, reuse the full kernel of the forward product in the backward product, or hoist it out of a
    loop.  An optimization barrier prevents this, except on CPU, where the compiler removes barriers
    before it eliminates common subexpressions.  On CPU the values depend on x instead: the result
    is zero if the first element of x is infinite.
    """

    def by_numbers(kernel_DF: Array, x_ND: Array) -> Array:
        return jnp.where(x_ND[0, 0] == jnp.inf, jnp.zeros_like(kernel_DF), kernel_DF)

    def by_barrier(kernel_DF: Array, x_ND: Array) -> Array:
        kept_DF: Array = jax.lax.optimization_barrier((kernel_DF, x_ND))[0]
        return kept_DF

    tied_DF: Array = jax.lax.platform_dependent(kernel_DF, x_ND, cpu=by_numbers, default=by_barrier)
    return tied_DF


@_not_before.def_vmap
def _not_before_any(
    axis_size: int, in_batched: list[bool], kernel_DF: Array, x_ND: Array
) -> tuple[Array, bool]:
    # One x of the batch is enough; a dependency on each would give the kernel a batch dimension.
    return _not_before(kernel_DF, x_ND[0] if in_batched[1] else x_ND), in_batched[0]


class QuantizedLinear(nnx.Module):
    """A quantised replacement of ``Linear``: ``[..., in] -> [..., out]``."""

    def __init__(self, linear: Linear, kernel_DF: Array, scale_GF: Array):
        axes = linear.kernel.get_metadata()["logical_axes"]
        self.kernel = nnx.Param(kernel_DF, logical_axes=axes)
        # Groups are sharded along the inputs; a single group is replicated on every device.
        self.kernel_scale = nnx.Param(scale_GF, logical_axes=axes)
        self.bias = nnx.data(linear.bias)
        self.dtype = linear.dtype
        self.out_dtype = linear.out_dtype
        self.adapter: LinearAdapter | None = nnx.data(linear.adapter)

    def __call__(self, x: Array) -> Array:
        return self.plain(x) if self.adapter is None else self.adapter(x, WithoutAdapter(self))

    def plain(self, x: Array) -> Array:
        """Applies the map without its adapter."""
        kernel_DF, scale_GF = self.kernel.get_value(), self.kernel_scale.get_value()
        out = quantized_dot(x, kernel_DF, scale_GF, dtype=self.dtype)
        out = out.astype(self.dtype if self.out_dtype is None else self.out_dtype)
        if self.bias is not None:
            out = out + self.bias.get_value().astype(out.dtype)
        return checkpoint_name(out, LINEAR)

    def columns(self, outputs_N: Array | HostArray | slice) -> Array:
        """Returns the weights ``[in, N]`` of the selected outputs in float32."""
        whole_DN = self.kernel.get_value()[:, outputs_N].astype(jnp.float32)
        scale_GN = self.kernel_scale.get_value()[:, outputs_N].astype(jnp.float32)
        return whole_DN * jnp.repeat(scale_GN, len(whole_DN) // len(scale_GN), axis=0)


class QuantizedEmbed(nnx.Module):
    """A quantised replacement of ``Embed``: token ids ``[...] -> [..., D]``."""

    def __init__(self, embed: Embed, rows_VD: Array, scale_V1: Array):
        axes = embed.embedding.get_metadata()["logical_axes"]
        self.embedding = nnx.Param(rows_VD, logical_axes=axes)
        self.embedding_scale = nnx.Param(scale_V1, logical_axes=axes)
        self.dtype = embed.dtype

    def __call__(self, tokens: Array | HostArray) -> Array:
        return self.table()[tokens].astype(self.dtype)

    def table(self) -> Table:
        """Returns the table, whose rows are dequantised on access."""
        rows_VD, scale_V1 = self.embedding.get_value(), self.embedding_scale.get_value()
        return QuantizedTable(rows_VD=rows_VD, scale_V1=scale_V1)

    def attend(self, x: Array) -> Array:
        """Computes logits ``[..., V]`` in float32 with the embedding table as output head."""
        rows_VD, scale_V1 = self.embedding.get_value(), self.embedding_scale.get_value()
        return quantized_dot(x, rows_VD.T, scale_V1.T, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class QuantizedTable:
    """A table of rows ``[V, D]`` that are dequantised to float32 only when indexed."""

    rows_VD: Array
    scale_V1: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.rows_VD.shape)

    def __getitem__(self, ids: Any) -> Array:
        rows = jnp.take(self.rows_VD, ids, axis=0).astype(jnp.float32)
        return rows * jnp.take(self.scale_V1, ids, axis=0)
