"""Merging adapters of linear maps into the weights, and undoing the merge."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.methods import METHODS
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import TunedModel, shallow_copy
from prompt_tuning_jax.methods.embedding_adapter import HeadCopy, embedding_uses
from prompt_tuning_jax.methods.linear_adapter import AnyLinear, linear_maps
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.embedding_uses import TiedHead, whole_table
from prompt_tuning_jax.models.layers import LinearAdapter
from prompt_tuning_jax.models.quantization import QuantizedEmbed, QuantizedLinear
from prompt_tuning_jax.typing import Array

# For messages: the config names of the methods that can be merged.
MERGEABLE = ", ".join(sorted(name for name, method in METHODS.items() if method.mergeable))


@runtime_checkable
class Mergeable(Protocol):
    """An adapter whose effect on a linear map can be folded into its kernel and its bias.

    ``bias_F`` is None if the map has none.
    """

    def merged(self, kernel_DF: Array, bias_F: Array | None) -> tuple[Array, Array | None]: ...


def merge(attached: TunedModel) -> Model:
    """Returns a plain model that computes the same function as the model with its method.

    The kernels are computed in float32 and rounded to their dtype.  ``attached`` is not modified.
    A model whose embedding table is also its output head gets a head of its own if only one of
    the two changes.  Raises UserError if a wrapped weight is quantized, or if the method cannot be
    merged, as where an encoder and a decoder would embed the same tokens differently.
    """
    if jax.tree.leaves(nnx.state(attached.method)):
        raise UserError(
            "what this method adds to what the model reads cannot be merged into its weights; "
            f"methods that can are {MERGEABLE}"
        )
    model = shallow_copy(attached.model)
    for name, linear in linear_maps(model).items():
        if linear.adapter is not None:
            _replace_weights(name, linear, _mergeable(name, linear.adapter).merged)
            linear.adapter = None
    _merge_uses(model)
    left = [name for name in param_tree.split(model)[1] if "/adapter/" in name]
    if left:
        raise UserError(
            f"{left[0]} cannot be merged into a weight; methods that can are {MERGEABLE}"
        )
    return model


def _merge_uses(model: Model) -> None:
    """Merges the adapters of the embedding table's uses, in place."""
    uses = embedding_uses(model)
    if all(use.adapter is None for use in uses.values()):
        return
    embed = model.token_embedder
    if isinstance(embed, QuantizedEmbed):
        raise UserError(
            "the embedding table is quantized, and what is merged into it would be lost in "
            "rounding; set model.quantization=none"
        )
    before = embed.embedding.get_value()
    table_VD = whole_table(before)
    rows, heads = {}, {}
    for path, use in uses.items():
        if isinstance(use, TiedHead):
            heads[path] = _merged_head(path, use, table_VD)
        else:
            rows[path] = table_VD if use.adapter is None else use.adapter.merged(table_VD)
        use.adapter = None
    (first, new_VD), *others = rows.items()
    for path, other_VD in others:
        if not bool(jnp.array_equal(new_VD, other_VD)):
            raise UserError(
                f"{first} and {path} would have different tables, and a plain model has one for "
                "both; keep the adapter as it is, or train the two alike"
            )
    embed.embedding = nnx.Param(new_VD.astype(before.dtype), **embed.embedding.get_metadata())
    for head_VD in heads.values():
        if not bool(jnp.array_equal(new_VD, head_VD)):
            model.untie(head_VD.astype(before.dtype))


def _merged_head(path: str, head: TiedHead, table_VD: Array) -> Array:
    if head.adapter is None:
        return table_VD
    if isinstance(head.adapter, HeadCopy):
        return head.adapter.merged(table_VD)
    return _mergeable(path, head.adapter).merged(table_VD.T, None)[0].T


def _mergeable(name: str, adapter: LinearAdapter) -> Mergeable:
    if not isinstance(adapter, Mergeable):
        raise UserError(
            f"{type(adapter).__name__} around {name} is not a linear map, and cannot be merged "
            f"into its weights; methods that can are {MERGEABLE}"
        )
    return adapter


def _replace_weights(
    name: str,
    linear: AnyLinear,
    change: Callable[[Array, Array | None], tuple[Array, Array | None]],
) -> None:
    if isinstance(linear, QuantizedLinear):
        raise UserError(
            f"the weights of {name} are quantized, and what is merged into them would be lost in "
            "rounding; set model.quantization=none and model.weights=dequantized"
        )
    kernel_DF = linear.kernel.get_value()
    bias_F = None if linear.bias is None else linear.bias.get_value().astype(jnp.float32)
    changed_DF, changed_F = change(kernel_DF.astype(jnp.float32), bias_F)
    # Create new variables, because the old ones may be shared with the caller's model.
    linear.kernel = nnx.Param(changed_DF.astype(kernel_DF.dtype), **linear.kernel.get_metadata())
    if linear.bias is not None and changed_F is not None:
        dtype = linear.bias.get_value().dtype
        linear.bias = nnx.Param(changed_F.astype(dtype), **linear.bias.get_metadata())
