"""Position-wise layers: linear map, embedding, norms, mlp, dropout, and rematerialization."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from prompt_tuning_jax.distributed.sharding import for_cpu, with_logical_constraint
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.typing import Array, DType, HostArray

LINEAR = "linear"  # the checkpoint name of linear outputs, used by the remat policy

# What each layer stores for the backward pass.  "none" stores everything; "dots" stores the outputs
# of linear maps and recomputes the rest, mainly attention scores; "full" stores only the input.
Remat: TypeAlias = Literal["none", "dots", "full"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}


def normal_param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    std: float,
    dtype: DType,
) -> nnx.Param[Array]:
    """Creates a parameter with logical axes, drawn from a normal distribution.

    The axes are stored under a custom metadata key: flax acts on the keys it knows, and the model
    must also be buildable without a mesh.
    """
    value = (jax.random.normal(rngs.params(), shape, jnp.float32) * std).astype(dtype)
    return nnx.Param(value, logical_axes=axes)


class PlainMap(Protocol):
    """A linear map ``[..., in] -> [..., out]`` without its adapter, as an adapter sees it."""

    def __call__(self, x: Array) -> Array: ...

    def kernel_DF(self) -> Array:
        """Returns the weights ``[in, out]`` in float32."""

    def bias_F(self) -> Array | None:
        """Returns the bias, or None if the map has none."""


class LinearAdapter(Protocol):
    """A wrapper that a method puts around a linear map.

    It receives the input and the map, ``linear``, and may call the map or not.  Instances are
    modules, and their parameters are stored under ``.../adapter/`` next to those of the map.
    """

    def __call__(self, x: Array, linear: PlainMap) -> Array: ...


class LinearMap(Protocol):
    """What ``Linear`` and its quantized replacement have in common."""

    bias: nnx.Param[Array] | None

    def plain(self, x: Array) -> Array: ...

    def columns(self, outputs_N: Array | HostArray | slice) -> Array: ...


@dataclass(frozen=True)
class WithoutAdapter:
    """A linear map without its adapter: a ``PlainMap``."""

    linear: LinearMap

    def __call__(self, x: Array) -> Array:
        return self.linear.plain(x)

    def kernel_DF(self) -> Array:
        return self.linear.columns(slice(None))

    def bias_F(self) -> Array | None:
        return None if self.linear.bias is None else self.linear.bias.get_value()


class Linear(nnx.Module):
    """A linear map ``[..., in] -> [..., out]``; methods may set ``adapter``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str, str],
        std: float,
        dtype: DType,
        param_dtype: DType,
        rngs: nnx.Rngs,
        out_dtype: DType | None = None,
        use_bias: bool = False,
    ):
        shape = (in_features, out_features)
        self.kernel = normal_param(rngs, shape, axes, std=std, dtype=param_dtype)
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(out_features, param_dtype), logical_axes=axes[1:])
        self.dtype = dtype
        self.out_dtype = out_dtype
        self.adapter: LinearAdapter | None = nnx.data(None)

    def __call__(self, x: Array) -> Array:
        return self.plain(x) if self.adapter is None else self.adapter(x, WithoutAdapter(self))

    def plain(self, x: Array) -> Array:
        """Applies the map without its adapter."""
        kernel_DF = self.kernel.get_value()
        y = matmul.dot(x, kernel_DF, dtype=self.dtype, out_dtype=self.out_dtype)
        if self.bias is not None:
            y = y + self.bias.get_value().astype(y.dtype)
        return checkpoint_name(y, LINEAR)

    def columns(self, outputs_N: Array | HostArray | slice) -> Array:
        """Returns the weights ``[in, N]`` of the selected outputs in float32."""
        return self.kernel.get_value()[:, outputs_N].astype(jnp.float32)


def make_head(
    config: ModelConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs, use_bias: bool = False
) -> Linear:
    """Makes an output head apart from the embedding table."""
    return Linear(
        config.embed_dim,
        config.vocab_size,
        axes=("embed", "vocab"),
        std=config.embed_dim**-0.5,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
        out_dtype=jnp.float32,
        use_bias=use_bias,
    )


def linear_from(kernel_DF: Array, like: Callable[[], Linear]) -> Linear:
    """Returns a map with these weights; ``like`` makes one of its kind and shape."""
    linear: Linear = nnx.eval_shape(like)
    linear.kernel = nnx.Param(kernel_DF, **linear.kernel.get_metadata())
    return linear


class Table(Protocol):
    """A table of rows ``[V, D]`` that can be indexed, regardless of how they are stored."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, ids: Any) -> Array: ...


@dataclass(frozen=True, kw_only=True)
class ScaledTable:
    """An embedding table whose rows are multiplied by a factor when they are read.

    ``dtype`` is that of the activations, to which a model rounds the factor.
    """

    table: Table
    scale: float
    dtype: DType

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape

    def __getitem__(self, ids: Any) -> Array:
        rows = self.table[ids]
        factor = jnp.asarray(self.scale, self.dtype).astype(jnp.float32)
        return (rows * factor).astype(rows.dtype)


class Embed(nnx.Module):
    """Embeds token ids, ``[...] -> [..., D]``; initialized with std 1 by default, as in T5."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DType,
        param_dtype: DType,
        rngs: nnx.Rngs,
        std: float = 1.0,
    ):
        shape = (config.vocab_size, config.embed_dim)
        axes = ("vocab", "embed")
        self.embedding = normal_param(rngs, shape, axes, std=std, dtype=param_dtype)
        self.dtype = dtype

    def __call__(self, tokens: Array | HostArray) -> Array:
        return rows_of(self.embedding.get_value(), tokens, dtype=self.dtype)

    def table(self) -> Table:
        """Returns the embedding rows ``[V, D]``."""
        return self.embedding.get_value()

    def attend(self, x: Array) -> Array:
        """Computes logits ``[..., V]`` in float32 with the embedding table as output head."""
        table_DV = self.embedding.get_value().T
        return matmul.dot(x, table_DV, dtype=self.dtype, out_dtype=jnp.float32)


def rows_of(table_VD: Array, tokens: Array | HostArray, *, dtype: DType) -> Array:
    """Returns the rows ``[..., D]`` of an embedding table."""
    # The table's own sharding would split x along its width, but x must be split by batch.
    table_VD = with_logical_constraint(table_VD, ("vocab", None))
    x = jnp.take(table_VD, tokens, axis=0).astype(dtype)
    return with_logical_constraint(x, ("batch", *[None] * (x.ndim - 1)))


def put_in_front(first: Array, second: Array) -> Array:
    """Concatenates positions, axis 1, in the dtype of ``second``; a batch of 1 is repeated."""
    rows = max(len(first), len(second))
    both = (jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in (first, second))
    return jnp.concatenate([x.astype(second.dtype) for x in both], axis=1)


class RMSNorm(nnx.Module):
    """Normalizes by the root mean square, computed in float32, without mean or bias.

    With ``plus_one`` the factor is ``1 + scale``, as in Gemma.
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float,
        dtype: DType,
        param_dtype: DType,
        plus_one: bool = False,
    ):
        initial = jnp.full((features,), 0.0 if plus_one else 1.0, param_dtype)
        self.scale = nnx.Param(initial, logical_axes=("norm",))
        self.eps = eps
        self.dtype = dtype
        self.plus_one = plus_one

    def __call__(self, x: Array) -> Array:
        scale_D = self.scale.get_value()
        if self.plus_one:
            # Add in float32: a narrow dtype would round 1 + scale.
            scale_D = 1.0 + scale_D.astype(jnp.float32)
        return _rms_norm(x, scale_D, self.eps).astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rms_norm(x: Array, scale_D: Array, eps: float) -> Array:
    return _normed(x, eps)[0] * scale_D.astype(jnp.float32)


def _normed(x: Array, eps: float) -> tuple[Array, Array]:
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return x32 * inverse_rms, inverse_rms


def _rms_norm_forward(x: Array, scale_D: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    return _rms_norm(x, scale_D, eps), (x, scale_D)


def _rms_norm_backward(
    eps: float, saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    x, scale_D = saved
    normed, inverse_rms = _normed(x, eps)
    scaled = cotangent * scale_D.astype(jnp.float32)
    share = matmul.inner(scaled, normed)[..., None] / x.shape[-1]
    dx = inverse_rms * (scaled - normed * share)
    dscale_D = jnp.sum((cotangent * normed).reshape(-1, x.shape[-1]), axis=0)
    return dx.astype(x.dtype), dscale_D.astype(scale_D.dtype)


_rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class LayerNorm(nnx.Module):
    """Normalizes by mean and variance, computed in float32, with weights and biases by default."""

    def __init__(
        self,
        features: int,
        *,
        eps: float,
        dtype: DType,
        param_dtype: DType,
        use_weights: bool = True,
    ):
        self.scale, self.bias = nnx.data(None), nnx.data(None)
        if use_weights:
            self.scale = nnx.Param(jnp.ones((features,), param_dtype), logical_axes=("norm",))
            self.bias = nnx.Param(jnp.zeros((features,), param_dtype), logical_axes=("norm",))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        normed = centered * jax.lax.rsqrt(variance + self.eps)
        if self.scale is not None:
            normed = normed * self.scale.get_value().astype(jnp.float32)
        if self.bias is not None:
            normed = normed + self.bias.get_value().astype(jnp.float32)
        return normed.astype(self.dtype)


class Mlp(nnx.Module):
    """Computes ``wo(act_0(wi_0 x) * act_1(wi_1 x))``, or ``wo(act(wi x))`` for one activation."""

    def __init__(
        self,
        config: ModelConfig,
        activations: tuple[str, ...],
        *,
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
        use_bias: bool = False,
    ):
        embed, mlp = config.embed_dim, config.mlp_dim
        gated = len(activations) > 1
        self.names = tuple(f"wi_{i}" if gated else "wi" for i in range(len(activations)))
        self.activations = activations
        self.dropout_rate = dropout_rate
        for name in self.names:
            wi = Linear(
                embed,
                mlp,
                axes=("embed", "mlp"),
                std=embed**-0.5,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
                use_bias=use_bias,
            )
            setattr(self, name, wi)
        self.wo = Linear(
            mlp,
            embed,
            axes=("mlp", "embed"),
            std=mlp**-0.5,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            use_bias=use_bias,
        )

    def __call__(self, x_BTD: Array, *, key: Array | None = None) -> Array:
        # The backward pass computes the gate again: it would store several float32 arrays of it.
        gate = self._gate if for_cpu() else jax.checkpoint(self._gate, prevent_cse=False)
        hidden_BTF = gate(*(getattr(self, name)(x_BTD) for name in self.names))
        hidden_BTF = dropout(hidden_BTF, self.dropout_rate, key=key, shared_axis=-2)
        return self.wo(hidden_BTF)

    def _gate(self, *inputs_BTF: Array) -> Array:
        # Use float32: a narrow gelu is five times slower on CPU, and TPUs fuse the cast.
        branches_BTF = [
            ACTIVATIONS[activation](x_BTF.astype(jnp.float32))
            for activation, x_BTF in zip(self.activations, inputs_BTF, strict=True)
        ]
        return math.prod(branches_BTF[1:], start=branches_BTF[0])


def softcap(x: Array, cap: float) -> Array:
    """Keeps values between minus ``cap`` and ``cap``, smoothly; 0 does not."""
    return cap * jnp.tanh(x / cap) if cap else x


def rematerialized(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """Wraps a layer so that it stores for its backward pass only what ``remat`` specifies."""
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    kept = policies.save_only_these_names(LINEAR) if remat == "dots" else policies.nothing_saveable
    checkpointed: Callable[..., Any] = jax.checkpoint(layer, policy=kept)
    return checkpointed


def dropout(x: Array, rate: float, *, key: Array | None, shared_axis: int | None = None) -> Array:
    """Zeroes a fraction ``rate`` of x and scales up the rest; the identity if ``key`` is None.

    All positions along ``shared_axis`` share one mask, as T5X does along the length
    (t5x/examples/t5/network.py, ``broadcast_dims=(-2,)``).  This regularizes equally well and is
    cheaper.
    """
    if key is None or rate == 0.0:
        return x
    shape = list(x.shape)
    if shared_axis is not None:
        shape[shared_axis] = 1
    keep = jax.random.bernoulli(key, 1.0 - rate, tuple(shape))
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def split_key(key: Array | None, count: int) -> list[Array | None]:
    """Splits a key into ``count`` independent keys; returns ``count`` Nones if it is None."""
    return [None] * count if key is None else list(jax.random.split(key, count))
