"""Checkpoints of T5X's scan-layers models, under the names of a model with a layer per name.

In such a model (t5x/examples/scalable_t5/network.py) the layers of a stack are one array, along
axis 1, at ``encoder/encoder/...`` and ``decoder/decoder/...``; attention kernels keep heads and
their width apart; and every layer has a relative position bias of its own.
"""

import re
from collections.abc import Mapping

import numpy as np

from prompt_tuning_jax.checkpoints.lazy import Index, LazyArray
from prompt_tuning_jax.checkpoints.names import RELPOS
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import HostArray

STACKS = ("encoder", "decoder")
_AXIS = 1
_ATTENTION = re.compile(r".*attention/(query|key|value|out)/kernel")


def is_scanned(names: Mapping[str, object]) -> bool:
    """Whether parameters of these names are a scan-layers model's."""
    return any(name.startswith(f"{stack}/{stack}/") for name in names for stack in STACKS)


def unscanned(params: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The same parameters, a layer per name, kernels [in, out]; nothing but biases is read.

    Relative position biases that are equal in all layers, in the encoder and in the decoder, become
    one per stack, as in T5.  If layers differ, all layers of both stacks keep their own, at
    ``<stack>/layers_<i>/relpos_bias/rel_embedding``.
    """
    flat: dict[str, LazyArray] = {}
    layers: dict[str, int] = {}
    for name, array in params.items():
        stack = name.split("/")[0]
        if stack not in STACKS or not name.startswith(f"{stack}/{stack}/"):
            flat[name] = array
            continue
        if len(array.shape) <= _AXIS:
            raise UserError(f"{array.where}: {list(array.shape)} is no stack of layers")
        count = layers.setdefault(stack, array.shape[_AXIS])
        if count != array.shape[_AXIS]:
            raise UserError(
                f"{array.where}: {array.shape[_AXIS]} layers, and other arrays of the {stack} "
                f"have {count}"
            )
        rest = name.removeprefix(f"{stack}/{stack}/")
        for number in range(count):
            flat[f"{stack}/layers_{number}/{rest}"] = array.layer(number, axis=_AXIS)
    flat = {name: _kernel(name, array) for name, array in flat.items()}
    if layers:  # who gives a layer per name says with the names whose the biases are
        flat = _with_one_bias_per_stack(flat)
    return dict(sorted(flat.items()))


def _kernel(name: str, array: LazyArray) -> LazyArray:
    """Attention kernels [D,H,K] as [D,H*K], and those of the output [H,K,D] as [H*K,D]."""
    if len(array.shape) != 3 or not _ATTENTION.fullmatch(name):
        return array
    return joined(array, axis=0 if name.endswith("/out/kernel") else 1)


def joined(array: LazyArray, *, axis: int) -> LazyArray:
    """``axis`` and the next as one; a part of it reads the entries of ``axis`` that it touches."""
    outer, inner = array.shape[axis], array.shape[axis + 1]
    shape = (*array.shape[:axis], outer * inner, *array.shape[axis + 2 :])

    def read(index: Index) -> HostArray:
        start, stop, _ = index[axis].indices(outer * inner)
        stop = max(start, stop)
        first, last = start // inner, -(-stop // inner)
        touched = (*index[:axis], slice(first, last), slice(None), *index[axis + 1 :])
        part = array.read(touched)
        rows = part.reshape(*part.shape[:axis], (last - first) * inner, *part.shape[axis + 2 :])
        exact = slice(start - first * inner, stop - first * inner)
        return rows[(*(slice(None) for _ in range(axis)), exact)]

    return LazyArray(shape=shape, dtype=array.dtype, where=array.where, read=read)


def _with_one_bias_per_stack(params: dict[str, LazyArray]) -> dict[str, LazyArray]:
    """The parameters with the biases of layers made those of their stacks, if nothing is lost."""
    kept = dict(params)
    for stack in STACKS:
        own = re.compile(rf"{stack}/layers_\d+/{RELPOS}")
        biases = [kept.pop(name) for name in params if own.fullmatch(name)]
        if not biases:
            continue
        first, *others = (array.whole() for array in biases)
        if not all(np.array_equal(first, other) for other in others):
            return params
        kept[f"{stack}/{RELPOS}"] = biases[0]
    return kept
