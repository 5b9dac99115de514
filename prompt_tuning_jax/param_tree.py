"""Parameters by path: flattening, selecting, merging, and exact messages about mismatches."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import Array, FlatParams, Mask
from prompt_tuning_jax.untrusted_input import compile_pattern

M = TypeVar("M", bound=nnx.Module)

_LAYER = re.compile(r"((?:.*/)?)layers_(\d+)/(.*)")


def split(module: nnx.Module) -> tuple[nnx.GraphDef[Any], FlatParams]:
    """Splits a module into its static structure and its parameters by path."""
    graphdef, state = nnx.split(module)
    return graphdef, {path_name(path): _value(leaf) for path, leaf in nnx.to_flat_state(state)}


def _value(leaf: Any) -> Array:
    """Returns a parameter's value; a key for dropout is an array by itself."""
    value: Array = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    return value


def merge(graphdef: nnx.GraphDef[M], params: Mapping[str, Array]) -> M:
    """Rebuilds a module from its static structure and parameters; the inverse of ``split``.

    Parameters may be stacked over layers (``stack_layers``), and may be shapes.
    """
    # The structure says what each array is: a parameter with its logical axes, or a key.
    flat: dict[Any, Any] = {path_tuple(name): p for name, p in _unstacked(params)}
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def stack_layers(params: dict[str, Array], stack: Callable[[Sequence[Array]], Array]) -> FlatParams:
    """Stacks the parameters that all layers have: ``a/layers_0/b, ...`` -> ``a/layers/b [L, ...]``.

    Those that only some layers have, or that differ in shape or dtype, stay as they are.
    ``params`` is empty afterwards, so that no array is held twice.
    """
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for name in params:
        if match := _LAYER.fullmatch(name):
            groups.setdefault((match[1], match[3]), {})[int(match[2])] = name
    number = {
        before: 1 + max(max(groups[at]) for at in groups if at[0] == before) for before, _ in groups
    }
    stacked: FlatParams = {}
    for (before, after), names in groups.items():
        kinds = {(params[name].shape, params[name].dtype) for name in names.values()}
        if len(names) == number[before] > 1 and len(kinds) == 1:
            arrays = [params.pop(names[i]) for i in range(number[before])]
            stacked[f"{before}layers/{after}"] = stack(arrays)
            del arrays
    stacked |= params
    params.clear()
    return stacked


def _unstacked(params: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """Inverts ``stack_layers``; in a jitted loop over layers, XLA removes both."""
    for name, array in params.items():
        before, separator, after = name.partition("layers/")
        if separator:
            for i in range(array.shape[0]):
                yield f"{before}layers_{i}/{after}", _layer(array, i)
        else:
            yield name, array


def _layer(array: Any, number: int) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)
    # Dynamic, because jax compiles an index that is static once for each layer.
    return jax.lax.dynamic_index_in_dim(array, number, keepdims=False)


def fill(module: nnx.Module, params: Mapping[str, Array]) -> None:
    """Sets a module's parameters in place; raises UserError unless names and shapes match."""
    leaves = {path_name(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(module))}
    values = {name: leaf.get_value() for name, leaf in leaves.items()}
    require_same_shapes(params, values, of="the checkpoint", and_of="the model")
    for name, value in params.items():
        leaves[name].set_value(value)
    flat: dict[Any, Any] = {path_tuple(name): leaf for name, leaf in leaves.items()}
    nnx.update(module, nnx.from_flat_state(flat))


def path_name(path: tuple[Any, ...]) -> str:
    """Joins a path: ("encoder", "layers_0") -> "encoder/layers_0"."""
    return "/".join(map(str, path))


def path_tuple(name: str) -> tuple[str | int, ...]:
    """Inverts ``path_name``; whole numbers are list positions."""
    return tuple(int(part) if part.isdigit() else part for part in name.split("/"))


def logical_axes(module: nnx.Module) -> dict[str, tuple[str | None, ...]]:
    """Returns the logical axes of every parameter, by path."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {path_name(path): leaf.get_metadata()["logical_axes"] for path, leaf in flat}


def partition(params: Mapping[str, Any], mask: Mask) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits parameters into (trainable, frozen).

    Raises UserError unless the mask has exactly their names.
    """
    require_same_names(params, mask, of="the parameters", and_of="the mask")
    trainable = {name: p for name, p in params.items() if mask[name]}
    frozen = {name: p for name, p in params.items() if not mask[name]}
    return trainable, frozen


def matching(
    params: Mapping[str, Any], pattern: str, *, of: str = "the pattern"
) -> dict[str, bool]:
    """Returns a mask that is true where the whole path matches the regular expression.

    Raises UserError, whose message begins with ``of``, if the expression is invalid or too large.
    """
    expression = compile_pattern(pattern, of=of)
    return {name: expression.fullmatch(name) is not None for name in params}


def select(params: Mapping[str, Any], keep: Callable[[str], bool]) -> dict[str, Any]:
    """Returns the parameters whose paths satisfy ``keep``."""
    return {name: p for name, p in params.items() if keep(name)}


def require_same_names(
    left: Mapping[str, Any], right: Mapping[str, Any], *, of: str, and_of: str
) -> None:
    """Raises UserError, which lists the names missing on each side, if the names differ."""
    only_left, only_right = sorted(left.keys() - right.keys()), sorted(right.keys() - left.keys())
    if only_left or only_right:
        raise UserError(
            f"{of} and {and_of} do not match: only in {of}: {_some(only_left)}; "
            f"only in {and_of}: {_some(only_right)}"
        )


def require_same_shapes(
    left: Mapping[str, Any], right: Mapping[str, Any], *, of: str, and_of: str
) -> None:
    """Raises UserError unless both sides have the same names, each with the same shape."""
    require_same_names(left, right, of=of, and_of=and_of)
    wrong = [
        f"{name} is {tuple(left[name].shape)} in {of} and {tuple(right[name].shape)} in {and_of}"
        for name in sorted(left)
        if tuple(left[name].shape) != tuple(right[name].shape)
    ]
    if wrong:
        raise UserError(f"shapes do not match: {_some(wrong)}")


def count(params: Mapping[str, Any]) -> int:
    """Returns the total number of elements in the parameters."""
    return sum(int(p.size) for p in jax.tree.leaves(dict(params)))


def _some(names: list[str], most: int = 8) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
