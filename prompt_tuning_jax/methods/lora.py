"""LoRA: a trained product of two low-rank matrices added to linear maps (Hu et al. 2022).

DoRA (Liu et al. 2024) also trains the norm of each output's weights.  The computations are those of
peft 0.21, tuners/lora/layer.py and dora.py.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.methods import LoRA
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule, shallow_copy
from prompt_tuning_jax.methods.embedding_adapter import (
    HeadCopy,
    LowRankRows,
    RowsCopy,
    embedding_uses,
    find_uses,
    tied_map,
)
from prompt_tuning_jax.methods.linear_adapter import (
    AnyLinear,
    find_linears,
    linear_adapters,
    matching_paths,
    wrap_linears,
)
from prompt_tuning_jax.methods.low_rank import low_rank_update, updated_norms
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.embedding_uses import EmbeddingUse
from prompt_tuning_jax.models.layers import PlainMap, WithoutAdapter, dropout
from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.typing import Array, DType


class LowRankPair(nnx.Module):
    """Computes ``linear(x) + scale * (dropout(x) @ a) @ b``.

    ``a`` is initialized randomly as in PEFT, and ``b`` is initialized to zero.  With DoRA, the
    weights of each output are then scaled to a trained norm, which starts as it was; the norm that
    it replaces counts as a constant in derivatives (Liu et al. 2024, section 4.3).
    """

    def __init__(
        self,
        config: LoRA,
        path: str,
        linear: PlainMap,
        *,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        dtype: DType,
        key: Array,
    ):
        (inputs, outputs), rank = shape, config.rank_of(path)
        limit = inputs**-0.5
        a_DR = jax.random.uniform(key, (inputs, rank), minval=-limit, maxval=limit)
        b_RF = jnp.zeros((rank, outputs), jnp.float32)
        self.lora_a_DR = nnx.Param(a_DR, logical_axes=(axes[0], None))
        self.lora_b_RF = nnx.Param(b_RF, logical_axes=(None, axes[1]))
        self.lora_magnitude_F = nnx.data(None)
        self.scale = config.scale_of(path)
        if config.dora:
            norms_F = updated_norms(linear.kernel_DF(), a_DR, b_RF, self.scale)
            self.lora_magnitude_F = nnx.Param(norms_F, logical_axes=(axes[1],))
        self.dropout_rate = config.dropout
        self.dtype = dtype
        self.key: Array | None = nnx.data(None)

    def __call__(self, x: Array, linear: PlainMap) -> Array:
        y = linear(x)
        kept = dropout(x, self.dropout_rate, key=self.key)
        low = matmul.dot(kept, self.lora_a_DR.get_value(), dtype=self.dtype)
        added = matmul.dot(low, self.lora_b_RF.get_value(), dtype=self.dtype, out_dtype=jnp.float32)
        added = self.scale * added
        if self.lora_magnitude_F is None:
            return (y + added).astype(y.dtype)
        bias_F = linear.bias_F()
        unbiased = (y if kept is x else linear(kept)).astype(jnp.float32)
        if bias_F is not None:
            unbiased = unbiased - bias_F.astype(jnp.float32)
        factor_F = self._factor_F(linear.kernel_DF())
        return (y + (factor_F - 1) * unbiased + factor_F * added).astype(y.dtype)

    def merged(self, kernel_DF: Array, bias_F: Array | None) -> tuple[Array, Array | None]:
        """Returns the equivalent kernel in float32, and the bias."""
        changed_DF = kernel_DF + self._update_DF()
        if self.lora_magnitude_F is not None:
            changed_DF = self._factor_F(kernel_DF) * changed_DF
        return changed_DF, bias_F

    def _update_DF(self) -> Array:
        return low_rank_update(self.lora_a_DR.get_value(), self.lora_b_RF.get_value(), self.scale)

    def _factor_F(self, kernel_DF: Array) -> Array:
        assert self.lora_magnitude_F is not None
        a_DR, b_RF = self.lora_a_DR.get_value(), self.lora_b_RF.get_value()
        norms_F = jax.lax.stop_gradient(updated_norms(kernel_DF, a_DR, b_RF, self.scale))
        return self.lora_magnitude_F.get_value() / norms_F


class LoRAModule(TuningModule[LoRA]):
    """Wraps the maps that the config selects; the model holds the matrix pairs."""

    @classmethod
    def attach(cls, config: LoRA, model: Model, *, key: Array, context: Context) -> TunedModel:
        numbers = {name: n for n, name in enumerate(find_linears(model, config.targets))}

        def pair(name: str, linear: AnyLinear) -> LowRankPair | None:
            if name not in numbers:
                return None
            return LowRankPair(
                config,
                name,
                WithoutAdapter(linear),
                shape=linear.kernel.shape,
                axes=linear.kernel.get_metadata()["logical_axes"],
                dtype=linear.dtype,
                key=jax.random.fold_in(key, numbers[name]),
            )

        adapted = wrap_linears(model, pair)
        uses = _adapt_uses(config, adapted, key=jax.random.fold_in(key, len(numbers)))
        _require_used(config, model, [*numbers, *uses])
        return TunedModel(adapted, cls(config))

    def with_dropout(self, model: Model, *, key: Array) -> Model:
        if not any(pair.dropout_rate for pair in _pairs(model)):
            return model
        copy = shallow_copy(model)
        pairs = _pairs(copy)
        # The fold keeps these keys distinct from the model's dropout keys, split from the same key.
        keys = jax.random.split(jax.random.fold_in(key, 0x10BA), len(pairs))
        for pair_key, pair in zip(keys, pairs, strict=True):
            pair.key = pair_key
        return copy


def _pairs(model: Model) -> list[LowRankPair]:
    heads = [use.adapter for use in embedding_uses(model).values()]
    linears = linear_adapters(model, LowRankPair).values()
    return [*linears, *(head for head in heads if isinstance(head, LowRankPair))]


def _adapt_uses(config: LoRA, model: Model, *, key: Array) -> list[str]:
    """Puts adapters around uses of the embedding table, in place; returns those of low rank."""
    low_rank = find_uses(model, config.embeddings, field="method.embeddings")
    copied = find_uses(model, config.copies, field="method.copies")
    for path in set(low_rank) & set(copied):
        raise UserError(
            f"method.embeddings and method.copies both match {path}; remove it from one of them"
        )
    uses = embedding_uses(model)
    for number, path in enumerate([*low_rank, *copied]):
        use, own_key = uses[path], jax.random.fold_in(key, number)
        if path in copied:
            use.adapter = RowsCopy(model) if isinstance(use, EmbeddingUse) else HeadCopy(model)
        elif isinstance(use, EmbeddingUse):
            use.adapter = LowRankRows(config, path, model, key=own_key)
        else:
            rows, width = model.token_embedder.table().shape
            use.adapter = LowRankPair(
                config,
                path,
                tied_map(model),
                shape=(width, rows),
                axes=("embed", "vocab"),
                dtype=model.dtype,
                key=own_key,
            )
    return low_rank


def _require_used(config: LoRA, model: Model, adapted: list[str]) -> None:
    """Raises UserError for a pattern that matches nothing."""
    for field, entries in (("ranks", config.ranks), ("alphas", config.alphas)):
        patterns = [entry.rpartition("=")[0] for entry in entries]
        matching_paths(
            dict.fromkeys(adapted), patterns, field=f"method.{field}", of="map with an update"
        )
    params = param_tree.split(model)[1]
    matching_paths(params, config.parameters, field="method.parameters", of="parameter")
