"""What is served of methods that are no plain prompts: tuned arrays, and what they belong to."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.methods import TunedModel
from prompt_tuning_jax.methods.base import LabelTokens
from prompt_tuning_jax.models.t5.config import TokenIds
from prompt_tuning_jax.typing import HostArray

# Of all that is served, so that what replaces something is told from it.
numbers = itertools.count()


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterSpec:
    """All of an attached method but the numbers in its tuned arrays.

    ``shapes`` and logical ``axes`` are those of the tuned arrays, by path; what they leave out is
    the frozen model's.  ``label_tokens`` are the tokens of labels that the method scores itself,
    if it does; then it writes nothing.
    """

    graphdef: nnx.GraphDef[TunedModel]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    axes: Mapping[str, tuple[str | None, ...]]
    label_tokens: LabelTokens
    token_ids: TokenIds

    @property
    def bytes(self) -> int:
        """Of the tuned arrays of one method."""
        return sum(one.size * one.dtype.itemsize for one in self.shapes.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedMethod:
    """One member's tuned arrays on the host, by path; ``method`` is what a config calls it."""

    name: str
    method: str
    trainable: Mapping[str, HostArray]
    adapter_spec: AdapterSpec
    metadata: PromptMetadata
    number: int = field(default_factory=lambda: next(numbers))

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(array.size for array in self.trainable.values())


class Structures:
    """Each structure once, so that equal ones share their programs."""

    def __init__(self) -> None:
        self._known: dict[Any, AdapterSpec] = {}

    def of(self, attached: TunedModel, trainable: Mapping[str, HostArray]) -> AdapterSpec:
        """The structure of a method with such arrays in place of those of the same paths."""
        graphdef, _ = param_tree.split(attached)
        shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in trainable.items()}
        key = graphdef, tuple((name, s.shape, s.dtype.name) for name, s in sorted(shapes.items()))
        if key not in self._known:
            axes = param_tree.logical_axes(attached)
            self._known[key] = AdapterSpec(
                graphdef=graphdef,
                shapes=shapes,
                axes={name: axes[name] for name in shapes},
                label_tokens=attached.method.label_tokens,
                token_ids=attached.model.token_ids,
            )
        return self._known[key]
