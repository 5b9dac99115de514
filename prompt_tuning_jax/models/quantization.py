"""Frozen weights in 8 or 4 bits, dequantized inside the product that uses them.

Quantization is symmetric, and the largest weight determines the scale.  An int8 kernel has one
scale per output channel; an int4 kernel has one bfloat16 scale per 32 inputs of an output channel.
Only weights are quantized; activations, their derivatives and all sums keep their precision.  The
embedding table (one scale per row) and the logits kernel are int8 in both modes.  Norms,
biases and the vectors of positions are not quantized.

Weights that a file stores in blocks may stay as they are: int8 or int4 with a float16 scale, and
for some types a float16 minimum, per block of inputs.  They have exactly the values that
dequantizing them gives.
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
from prompt_tuning_jax.models.ops.quantized import quantized_dot
from prompt_tuning_jax.typing import Array, HostArray

Quantization: TypeAlias = Literal["none", "int8", "int4"]

GROUP = 32  # inputs that share one scale in int4
KERNEL, TABLE, SCALE, MINIMUM = "kernel", "embedding", "_scale", "_min"
_LOGITS = "logits_dense"
_POSITIONS = "position_embedder"


def quantized(
    name: str,
    array: Array,
    quantization: Quantization,
    *,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, Array]:
    """Quantizes one parameter and returns the parameters that replace it, by name.

    A quantized parameter becomes integers under the same name and scales under ``..._scale``; any
    other parameter is returned unchanged.  An abstract array gives abstract results.
    """
    *path, last = name.split("/")
    if quantization == "none" or not is_quantizable(name):
        return {name: array}
    kind: Quantization = "int8" if last == TABLE or _LOGITS in path else quantization
    names = (name, name + SCALE)
    layouts = None if shardings is None else tuple(shardings[each] for each in names)
    make = _maker(kind, of_rows=last == TABLE, layouts=layouts)
    abstract = isinstance(array, jax.ShapeDtypeStruct)
    parts = jax.eval_shape(make, array) if abstract else make(array)
    return dict(zip(names, parts, strict=True))


def is_quantizable(name: str) -> bool:
    """Returns whether quantized weights of this name can be used as they are."""
    *path, last = name.split("/")
    return last in (KERNEL, TABLE) and _POSITIONS not in path


@cache
def _maker(kind: Quantization, *, of_rows: bool, layouts: Any) -> Any:
    """Returns a jitted quantiser, which compiles once per shape (about six in a model)."""

    def make(array: Array) -> tuple[Array, Array]:
        values, scale = quantize(array.T if of_rows else array, kind)
        return (values.T, scale.T) if of_rows else (values, scale)

    return jax.jit(make, out_shardings=layouts)


def quantize_modules(module: nnx.Module, quantization: Quantization, *, path: str = "") -> None:
    """Replaces a model's linear maps and embedding table by quantized layers, one at a time.

    If the model's parameters are abstract, so are those of the quantized layers.
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


def keep_blocks(
    module: nnx.Module, blocks: Mapping[str, Mapping[str, Array]], *, path: str = ""
) -> None:
    """Replaces linear maps and tables by quantized layers with the parameters that a file has.

    ``blocks`` has the integers, scales and minimums of a parameter by its name, as ``quantized``
    returns them; they may be abstract.
    """
    for name, child in list(nnx.iter_children(module)):
        inner = f"{path}{name}"
        kept = blocks.get(f"{inner}/{KERNEL}") or blocks.get(f"{inner}/{TABLE}")
        if kept is None:
            if isinstance(child, nnx.Module):
                keep_blocks(child, blocks, path=f"{inner}/")
        elif isinstance(child, Linear):
            setattr(module, str(name), QuantizedLinear(child, *kept.values()))
        elif isinstance(child, Embed):
            setattr(module, str(name), QuantizedEmbed(child, *kept.values()))


def is_quantized(params: Mapping[str, Any]) -> bool:
    """Returns whether the parameter names are those of a model with quantized weights."""
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


class QuantizedLinear(nnx.Module):
    """A quantized replacement of ``Linear``: ``[..., in] -> [..., out]``."""

    def __init__(
        self, linear: Linear, kernel_DF: Array, scale_GF: Array, minimum_GF: Array | None = None
    ):
        axes = linear.kernel.get_metadata()["logical_axes"]
        self.kernel = nnx.Param(kernel_DF, logical_axes=axes)
        # Groups are sharded along the inputs; a single group is replicated on every device.
        self.kernel_scale = nnx.Param(scale_GF, logical_axes=axes)
        self.kernel_min = nnx.data(None)
        if minimum_GF is not None:
            self.kernel_min = nnx.Param(minimum_GF, logical_axes=axes)
        self.bias = nnx.data(linear.bias)
        self.dtype = linear.dtype
        self.out_dtype = linear.out_dtype
        self.adapter: LinearAdapter | None = nnx.data(linear.adapter)

    def __call__(self, x: Array) -> Array:
        return self.plain(x) if self.adapter is None else self.adapter(x, WithoutAdapter(self))

    def plain(self, x: Array) -> Array:
        """Applies the map without its adapter."""
        kernel_DF, scale_GF = self.kernel.get_value(), self.kernel_scale.get_value()
        out = quantized_dot(x, kernel_DF, scale_GF, _value(self.kernel_min), dtype=self.dtype)
        out = out.astype(self.dtype if self.out_dtype is None else self.out_dtype)
        if self.bias is not None:
            out = out + self.bias.get_value().astype(out.dtype)
        return checkpoint_name(out, LINEAR)

    def columns(self, outputs_N: Array | HostArray | slice) -> Array:
        """Returns the weights ``[in, N]`` of the selected outputs in float32."""
        minimum_GF = _value(self.kernel_min)
        return _dequantized(
            self.kernel.get_value()[:, outputs_N],
            self.kernel_scale.get_value()[:, outputs_N],
            None if minimum_GF is None else minimum_GF[:, outputs_N],
            inputs=0,
        )


class QuantizedEmbed(nnx.Module):
    """A quantized replacement of ``Embed``: token ids ``[...] -> [..., D]``."""

    def __init__(
        self, embed: Embed, rows_VD: Array, scale_VG: Array, minimum_VG: Array | None = None
    ):
        axes = embed.embedding.get_metadata()["logical_axes"]
        self.embedding = nnx.Param(rows_VD, logical_axes=axes)
        self.embedding_scale = nnx.Param(scale_VG, logical_axes=axes)
        self.embedding_min = nnx.data(None)
        if minimum_VG is not None:
            self.embedding_min = nnx.Param(minimum_VG, logical_axes=axes)
        self.dtype = embed.dtype

    def __call__(self, tokens: Array | HostArray) -> Array:
        return self.table()[tokens].astype(self.dtype)

    def table(self) -> Table:
        """Returns the table, whose rows are dequantized on access."""
        return QuantizedTable(
            rows_VD=self.embedding.get_value(),
            scale_VG=self.embedding_scale.get_value(),
            minimum_VG=_value(self.embedding_min),
        )

    def attend(self, x: Array) -> Array:
        """Computes logits ``[..., V]`` in float32 with the embedding table as output head."""
        return quantized_dot(
            x,
            self.embedding.get_value(),
            self.embedding_scale.get_value(),
            _value(self.embedding_min),
            dtype=self.dtype,
            inputs_last=True,
        )


@dataclass(frozen=True, kw_only=True)
class QuantizedTable:
    """A table of rows ``[V, D]`` that are dequantized to float32 only when indexed."""

    rows_VD: Array
    scale_VG: Array
    minimum_VG: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.rows_VD.shape)

    def __getitem__(self, ids: Any) -> Array:
        minimum_VG = self.minimum_VG
        return _dequantized(
            jnp.take(self.rows_VD, ids, axis=0),
            jnp.take(self.scale_VG, ids, axis=0),
            None if minimum_VG is None else jnp.take(minimum_VG, ids, axis=0),
            inputs=-1,
        )


def _value(param: nnx.Param[Array] | None) -> Array | None:
    return None if param is None else param.get_value()


def _dequantized(whole: Array, scale: Array, minimum: Array | None, *, inputs: int) -> Array:
    """Returns a part of a kernel or table in float32; ``inputs`` is the axis that groups divide."""
    number = whole.shape[inputs] // scale.shape[inputs]
    full = whole.astype(jnp.float32) * _repeated(scale, number, axis=inputs)
    return full if minimum is None else full + _repeated(minimum, number, axis=inputs)


def _repeated(x: Array, number: int, *, axis: int) -> Array:
    return jnp.repeat(x.astype(jnp.float32), number, axis=axis)
