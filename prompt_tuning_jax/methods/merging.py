"""What stands around linear maps, merged into their weights and taken out again."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.config.methods import METHODS
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import TunedModel, shallow_copy
from prompt_tuning_jax.methods.linear_adapter import AnyLinear, linear_maps
from prompt_tuning_jax.models.layers import LinearAdapter
from prompt_tuning_jax.models.quantization import QuantizedLinear
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array

# For messages: what a config calls those that can be merged.
MERGEABLE = ", ".join(sorted(name for name, method in METHODS.items() if method.mergeable))


@runtime_checkable
class Mergeable(Protocol):
    """Something around a linear map that another kernel ``[D, F]`` could do alone."""

    def merged(self, kernel_DF: Array) -> Array: ...

    def unmerged(self, kernel_DF: Array) -> Array: ...


def merge(attached: TunedModel) -> T5:
    """A plain T5 that computes what the model with its method does.

    Kernels are computed in float32 and rounded to the dtype that they have; ``attached`` stays as
    it is.  Raises UserError for quantised weights, and for a method that weights cannot hold.
    """
    if jax.tree.leaves(nnx.state(attached.method)):
        raise UserError(
            "what this method adds to what the model reads cannot be merged into its weights; "
            f"methods that can are {MERGEABLE}"
        )
    model = shallow_copy(attached.model)
    for name, linear in linear_maps(model).items():
        if linear.adapter is not None:
            _replace_kernel(name, linear, _mergeable(name, linear.adapter).merged)
            linear.adapter = None
    return model


def unmerge(model: T5, attached: TunedModel) -> T5:
    """The plain T5 from before, of one that ``merge`` made of ``attached``.

    Within rounding of float32, or of the dtype of the kernels where that is narrower.  Raises
    UserError as ``merge`` does, and where a scale is zero.
    """
    model = shallow_copy(model)
    adapter_of = {name: linear.adapter for name, linear in linear_maps(attached.model).items()}
    for name, linear in linear_maps(model).items():
        if (adapter := adapter_of[name]) is not None:
            _replace_kernel(name, linear, _mergeable(name, adapter).unmerged)
    return model


def _mergeable(name: str, adapter: LinearAdapter) -> Mergeable:
    if not isinstance(adapter, Mergeable):
        raise UserError(
            f"{type(adapter).__name__} around {name} is no linear map, and cannot be merged into "
            f"its weights; methods that can are {MERGEABLE}"
        )
    return adapter


def _replace_kernel(name: str, linear: AnyLinear, change: Callable[[Array], Array]) -> None:
    if isinstance(linear, QuantizedLinear):
        raise UserError(
            f"the weights of {name} are quantised, and what is merged into them would be lost in "
            "rounding; set model.quantization=none"
        )
    kernel_DF = linear.kernel.get_value()
    changed_DF = change(kernel_DF.astype(jnp.float32)).astype(kernel_DF.dtype)
    # Another variable: this one's value may be that of the model that was given.
    linear.kernel = nnx.Param(changed_DF, **linear.kernel.get_metadata())
