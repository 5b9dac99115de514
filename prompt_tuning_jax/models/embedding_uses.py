"""The places where a model uses its embedding table, which methods may adapt one by one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.models.layers import LinearAdapter, Table
from prompt_tuning_jax.typing import Array, HostArray

E = TypeVar("E", bound="AnyEmbed")


def whole_table(table: Table) -> Array:
    """Returns all rows ``[V, D]`` in float32."""
    rows_VD = table if isinstance(table, jax.Array) else table[jnp.arange(table.shape[0])]
    return rows_VD.astype(jnp.float32)


class AnyEmbed(Protocol):
    """What ``Embed`` and its quantized replacement have in common."""

    def __call__(self, tokens: Array | HostArray) -> Array: ...

    def table(self) -> Table: ...

    def attend(self, x: Array) -> Array: ...


class EmbeddingAdapter(Protocol):
    """A wrapper that a method puts around one use of the embedding table.

    It receives the tokens and the embedding.  Instances are modules, and their parameters are
    stored under ``.../adapter/``.
    """

    def __call__(self, tokens: Array | HostArray, embed: AnyEmbed) -> Array: ...

    def merged(self, table_VD: Array) -> Array:
        """Returns the table of a plain embedding that computes the same, in float32."""


class EmbeddingUse(nnx.Module):
    """One place where a model embeds tokens; methods may set ``adapter``.

    The table belongs to the model, which may use it elsewhere too.
    """

    def __init__(self) -> None:
        self.adapter: EmbeddingAdapter | None = nnx.data(None)

    def __call__(self, tokens: Array | HostArray, embed: AnyEmbed) -> Array:
        return embed(tokens) if self.adapter is None else self.adapter(tokens, embed)


@dataclass(frozen=True)
class TiedMap:
    """The embedding table as an output head: a ``PlainMap``."""

    embed: AnyEmbed

    def __call__(self, x: Array) -> Array:
        return self.embed.attend(x)

    def kernel_DF(self) -> Array:
        return whole_table(self.embed.table()).T

    def bias_F(self) -> Array | None:
        return None


class TiedHead(nnx.Module):
    """An output head that is the embedding table; methods may set ``adapter``."""

    def __init__(self) -> None:
        self.adapter: LinearAdapter | None = nnx.data(None)

    def __call__(self, x: Array, embed: AnyEmbed) -> Array:
        return embed.attend(x) if self.adapter is None else self.adapter(x, TiedMap(embed))

    def layer(self, embed: E) -> E | Callable[[Array], Array]:
        """Returns the table itself, or this head where it has an adapter."""
        return embed if self.adapter is None else partial(self, embed=embed)
