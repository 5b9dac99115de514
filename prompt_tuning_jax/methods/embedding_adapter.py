"""Adapters of a model's uses of its embedding table: of the rows it reads, and of a tied head.

The computations are those of peft 0.21, ``Embedding`` in tuners/lora/layer.py.
"""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.methods import LoRA
from prompt_tuning_jax.methods.linear_adapter import matching_paths
from prompt_tuning_jax.methods.low_rank import low_rank_update, updated_norms
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.embedding_uses import (
    AnyEmbed,
    EmbeddingUse,
    TiedHead,
    TiedMap,
    whole_table,
)
from prompt_tuning_jax.models.layers import PlainMap, rows_of
from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.typing import Array, HostArray

AnyUse: TypeAlias = EmbeddingUse | TiedHead


def embedding_uses(model: Model) -> dict[str, AnyUse]:
    """Returns the uses of the embedding table that can have adapters, by path, sorted."""
    uses = {
        param_tree.path_name(path): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, AnyUse)
    }
    return dict(sorted(uses.items()))


def find_uses(model: Model, patterns: Sequence[str], *, field: str) -> list[str]:
    """Returns the paths of the uses that match; UserError for a pattern that matches none."""
    return matching_paths(
        embedding_uses(model), patterns, field=field, of="use of the embedding table"
    )


class LowRankRows(nnx.Module):
    """Computes ``embed(tokens) + scale * a[tokens] @ b``.

    As in PEFT, ``a`` is initialized to zero, and ``b`` from a normal distribution.  With DoRA, each
    of the D columns of the table is then scaled to a trained norm, which starts as it was.
    """

    def __init__(self, config: LoRA, path: str, model: Model, *, key: Array):
        table, rank = model.token_embedder.table(), config.rank_of(path)
        rows, width = table.shape
        a_VR = jnp.zeros((rows, rank), jnp.float32)
        b_RD = jax.random.normal(key, (rank, width))
        self.lora_a_VR = nnx.Param(a_VR, logical_axes=("vocab", None))
        self.lora_b_RD = nnx.Param(b_RD, logical_axes=(None, "embed"))
        self.lora_magnitude_D = nnx.data(None)
        self.scale = config.scale_of(path)
        self.dtype = model.dtype
        if config.dora:
            norms_D = updated_norms(whole_table(table), a_VR, b_RD, self.scale)
            self.lora_magnitude_D = nnx.Param(norms_D, logical_axes=("embed",))

    def __call__(self, tokens: Array | HostArray, embed: AnyEmbed) -> Array:
        x, b_RD = embed(tokens), self.lora_b_RD.get_value()
        low = rows_of(self.lora_a_VR.get_value(), tokens, dtype=self.dtype)
        added = matmul.dot(low, b_RD, dtype=self.dtype, out_dtype=jnp.float32)
        changed = x + self.scale * added
        if self.lora_magnitude_D is not None:
            changed = self._factor_D(whole_table(embed.table())) * changed
        return changed.astype(x.dtype)

    def merged(self, table_VD: Array) -> Array:
        """Returns the equivalent table in float32."""
        a_VR, b_RD = self.lora_a_VR.get_value(), self.lora_b_RD.get_value()
        changed_VD = table_VD + low_rank_update(a_VR, b_RD, self.scale)
        if self.lora_magnitude_D is None:
            return changed_VD
        return self._factor_D(table_VD) * changed_VD

    def _factor_D(self, table_VD: Array) -> Array:
        assert self.lora_magnitude_D is not None
        a_VR, b_RD = self.lora_a_VR.get_value(), self.lora_b_RD.get_value()
        norms_D = jax.lax.stop_gradient(updated_norms(table_VD, a_VR, b_RD, self.scale))
        return self.lora_magnitude_D.get_value() / norms_D


class TableCopy(nnx.Module):
    """A trained table ``[V, D]`` in place of the model's, for one use: its rows, or a tied head."""

    def __init__(self, model: Model):
        # A new array even in float32, because the model's is frozen.
        table_VD = jnp.array(whole_table(model.token_embedder.table()))
        self.table_VD = nnx.Param(table_VD, logical_axes=("vocab", "embed"))
        self.dtype = model.dtype

    def merged(self, table_VD: Array) -> Array:
        """Returns the trained table."""
        return self.table_VD.get_value()


class RowsCopy(TableCopy):
    """Embeds tokens with the trained table."""

    def __call__(self, tokens: Array | HostArray, embed: AnyEmbed) -> Array:
        return rows_of(self.table_VD.get_value(), tokens, dtype=self.dtype)


class HeadCopy(TableCopy):
    """Computes logits with the trained table."""

    def __call__(self, x: Array, linear: PlainMap) -> Array:
        table_DV = self.table_VD.get_value().T
        return matmul.dot(x, table_DV, dtype=self.dtype, out_dtype=jnp.float32)


def tied_map(model: Model) -> TiedMap:
    """Returns the output head of a model that has the embedding table as its head."""
    return TiedMap(model.token_embedder)
