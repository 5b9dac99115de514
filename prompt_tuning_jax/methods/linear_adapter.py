"""Finding a model's linear maps by path, and wrapping them with adapters."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import shallow_copy
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.layers import Linear, LinearAdapter
from prompt_tuning_jax.models.quantization import QuantizedLinear
from prompt_tuning_jax.untrusted_input import shown

AnyLinear: TypeAlias = Linear | QuantizedLinear
M = TypeVar("M", bound=nnx.Module)


def linear_maps(model: Model) -> dict[str, AnyLinear]:
    """Returns all linear maps by path (e.g. ``encoder/layers_0/attention/query``), sorted."""
    maps = {
        param_tree.path_name(path): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, AnyLinear)
    }
    return dict(sorted(maps.items()))


def find_linears(
    model: Model, patterns: Sequence[str], *, field: str = "method.targets"
) -> dict[str, AnyLinear]:
    """Returns the linear maps whose whole path matches one of the regular expressions.

    Raises UserError if a pattern matches no path; ``field`` names the source of the patterns in the
    message.
    """
    maps = linear_maps(model)
    chosen = matching_paths(maps, patterns, field=field, of="linear map")
    return {name: maps[name] for name in chosen}


def matching_paths(
    by_path: Mapping[str, object], patterns: Sequence[str], *, field: str, of: str
) -> list[str]:
    """Returns the paths that match one of the regular expressions as a whole, in their order.

    Raises UserError if a pattern matches none; the message calls the things at these paths ``of``.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        matches = param_tree.matching(by_path, pattern, of=field)
        matching = {name for name, matched in matches.items() if matched}
        if not matching:
            known = (
                f"a pattern must match a whole path, for instance {next(reversed(list(by_path)))}"
                if by_path
                else "this model has none"
            )
            raise UserError(f"{field}: {shown(pattern)} matches no {of}; {known}")
        chosen |= matching
    return [name for name in by_path if name in chosen]


def wrap_linears(model: Model, make: Callable[[str, AnyLinear], LinearAdapter | None]) -> Model:
    """Returns a copy of the model with adapters around its linear maps.

    ``make`` receives each path and map, and returns an adapter, or None to leave the map as is.
    """
    copy = shallow_copy(model)
    for name, linear in linear_maps(copy).items():
        if (adapter := make(name, linear)) is not None:
            linear.adapter = adapter
    return copy


def linear_adapters(model: Model, kind: type[M]) -> dict[str, M]:
    """Returns the adapters of type ``kind``, by the paths of their linear maps."""
    return {
        name: linear.adapter
        for name, linear in linear_maps(model).items()
        if isinstance(linear.adapter, kind)
    }
