"""Tables between this project's parameter names and those of transformers, for one family each."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from prompt_tuning_jax.checkpoints.causal_parameters import HEAD
from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray, concatenated
from prompt_tuning_jax.typing import HostArray

_LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.*)")
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclass(frozen=True, kw_only=True)
class NameTable:
    """The names of a family's tensors.

    Attributes:
      prefixes: what precedes the names of all tensors but the head's: as written, and as other
        files have it; ``""`` for files of the model without its head.
      outside: our modules outside the layers, and theirs.
      arrays: our arrays that are in no module, and their names without a prefix.
      layers: what precedes a layer's number, in the decoder.
      encoder_layers: the same in the encoder, if there is one.
      inside: other names of a module, with which tensors may begin behind the prefix, and its name.
      copies: their tensors, without a prefix, that are copies of others in a tied model.
      layer: our modules in a layer, and theirs.
      head: their output head.
      fused: their modules that hold several of ours, in this order.
      fused_by_head: whether a fused tensor has the parts of the first head, then of the second
        (BLOOM, GPT-NeoX), and not one part after the other (GPT-2).
      kernels_as_here: whether kernels of layers are ``[in, out]`` (GPT-2); torch's, and that of
        any output head, are ``[out, in]``.
      unused: the names of tensors that are not parameters here, without a prefix: old buffers,
        frequencies of positions, and vision towers.
    """

    prefixes: tuple[str, ...]
    outside: Mapping[str, str]
    arrays: Mapping[str, str] = field(default_factory=dict)
    layers: str = "layers"
    encoder_layers: str = ""
    inside: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    layer: Mapping[str, str]
    head: str = "lm_head"
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused_by_head: bool = False
    kernels_as_here: bool = False
    unused: str = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"

    def tensor(self, name: str) -> str:
        """Returns their name of a parameter; several of ours may be in one fused tensor."""
        module, _, leaf = name.rpartition("/")
        if module == HEAD:
            return f"{self.head}.{_LEAVES[leaf]}"
        if name in self.arrays:
            return f"{self.prefixes[0]}{self.arrays[name]}"
        match = _LAYER.fullmatch(module)
        if match is None:
            return f"{self.prefixes[0]}{self.outside[module]}.{_LEAVES[leaf]}"
        theirs = self.layer.get(match[3]) or next(
            fused for fused, parts in self.fused.items() if match[3] in parts
        )
        layers = self._layers(match[1])
        return f"{self.prefixes[0]}{layers}.{match[2]}.{theirs}.{_LEAVES[leaf]}"

    def layer_of(self, tensor: str, stack: str = "decoder") -> int | None:
        """Returns the number of the layer of one of their tensors.

        Returns None outside the stack's layers.
        """
        layers = re.escape(f"{self.prefixes[0]}{self._layers(stack)}.")
        match = re.match(layers + r"(\d{1,5})\.", tensor)
        return int(match[1]) if match else None

    def _layers(self, stack: str) -> str:
        return self.encoder_layers if stack == "encoder" else self.layers

    def is_unused(self, tensor: str) -> bool:
        """Returns whether a tensor of a file, with any prefix, is not a parameter here."""
        return any(
            tensor.startswith(prefix) and re.fullmatch(self.unused, tensor.removeprefix(prefix))
            for prefix in self.prefixes
        )

    def with_prefix(self, tensor: str) -> str:
        """Returns the name of a file's tensor with the prefix that this table has."""
        module, _, leaf = tensor.rpartition(".")
        if f".{module}".endswith(f".{self.head}"):
            return f"{self.head}.{leaf}"
        longest_first = sorted(self.prefixes, key=len, reverse=True)
        prefix = next((p for p in longest_first if tensor.startswith(p)), "")
        rest = tensor.removeprefix(prefix)
        other = next((begin for begin in self.inside if rest.startswith(begin)), "")
        return self.prefixes[0] + self.inside.get(other, "") + rest.removeprefix(other)

    def read(
        self, name: str, tensor: LazyArray, shapes: Mapping[str, tuple[int, ...]], head_dim: int
    ) -> LazyArray:
        """Returns our parameter from their tensor, of which only its part is read."""
        transposed = self.is_transposed(name)
        array = tensor.transposed() if transposed else tensor
        parts = self.parts(name)
        if len(parts) > 1:
            widths = [shapes[part][-1] for part in parts]
            if array.shape[-1] == sum(widths):  # otherwise, a message tells the shapes
                order = self.order(widths, head_dim)[parts.index(name)]
                array = array.taken(order, axis=len(array.shape) - 1)
        return array

    def write(self, params: Mapping[str, LazyArray], head_dim: int) -> dict[str, LazyArray]:
        """Returns their tensors of all our parameters."""
        tensors: dict[str, LazyArray] = {}
        for name in params:
            theirs = self.tensor(name)
            if theirs in tensors:
                continue
            parts = [params[part] for part in self.parts(name)]
            array, axis = parts[0], len(parts[0].shape) - 1
            if len(parts) > 1:
                orders = self.order([part.shape[axis] for part in parts], head_dim)
                array = concatenated(parts, axis=axis)
                array = array.taken(np.argsort(np.concatenate(orders)), axis=axis)
            transposed = self.is_transposed(name)
            tensors[theirs] = array.transposed() if transposed else array
        return tensors

    def is_transposed(self, name: str) -> bool:
        """Returns whether their tensor of this parameter of ours is transposed."""
        module, _, leaf = name.rpartition("/")
        return leaf == "kernel" and not (self.kernels_as_here and _LAYER.fullmatch(module))

    def parts(self, name: str) -> tuple[str, ...]:
        """Returns all our parameters in the tensor of this one."""
        module, _, leaf = name.rpartition("/")
        match = _LAYER.fullmatch(module)
        inside = match[3] if match else ""
        for parts in self.fused.values():
            if inside in parts:
                stem = module.removesuffix(inside)
                return tuple(f"{stem}{part}/{leaf}" for part in parts)
        return (name,)

    def order(self, widths: list[int], head_dim: int) -> list[HostArray]:
        """Returns for each part of a fused tensor the numbers of its entries there."""
        total, count = sum(widths), len(widths)
        if self.fused_by_head:
            by_head = np.arange(total).reshape(-1, count, head_dim)
            return [by_head[:, i].ravel() for i in range(count)]
        return list(np.split(np.arange(total), np.cumsum(widths)[:-1]))
