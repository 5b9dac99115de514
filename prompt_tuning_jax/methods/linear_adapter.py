"""The linear maps of a model by their path, and modules put around those that patterns choose."""

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import shallow_copy
from prompt_tuning_jax.models.layers import Linear, LinearAdapter
from prompt_tuning_jax.models.quantization import QuantizedLinear
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.untrusted_input import shown

AnyLinear: TypeAlias = Linear | QuantizedLinear
M = TypeVar("M", bound=nnx.Module)


def linear_maps(model: T5) -> dict[str, AnyLinear]:
    """Every linear map by its path, for instance ``encoder/layers_0/attention/query``, sorted."""
    found = {
        param_tree.path_name(path): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, AnyLinear)
    }
    return dict(sorted(found.items()))


def find_linears(
    model: T5, patterns: Sequence[str], *, field: str = "method.targets"
) -> dict[str, AnyLinear]:
    """Those whose whole path matches one of the regular expressions.

    UserError for a pattern that matches none; ``field`` is where the patterns come from.
    """
    maps = linear_maps(model)
    chosen: set[str] = set()
    for pattern in patterns:
        matching = [
            name
            for name, matches in param_tree.matching(maps, pattern, of=field).items()
            if matches
        ]
        if not matching:
            raise UserError(
                f"{field}: {shown(pattern)} is the path of no linear map; paths are whole, for "
                f"instance {next(reversed(maps))}"
            )
        chosen.update(matching)
    return {name: linear for name, linear in maps.items() if name in chosen}


def wrap_linears(model: T5, make: Callable[[str, AnyLinear], LinearAdapter | None]) -> T5:
    """The model with what ``make`` gives for a path and its map around that map, where it does."""
    copy = shallow_copy(model)
    for name, linear in linear_maps(copy).items():
        if (adapter := make(name, linear)) is not None:
            linear.adapter = adapter
    return copy


def linear_adapters(model: T5, kind: type[M]) -> dict[str, M]:
    """What stands around linear maps and is of this kind, by the maps' paths."""
    return {
        name: linear.adapter
        for name, linear in linear_maps(model).items()
        if isinstance(linear.adapter, kind)
    }
