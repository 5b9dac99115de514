"""A stack of layers with rotary or other positions: the encoder or the decoder of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.models.causal_lm.attention import Attention, attention_bias, mask_bias
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig, Window
from prompt_tuning_jax.models.causal_lm.past_keys import PastKeys
from prompt_tuning_jax.models.causal_lm.rope import Rotation, rotation
from prompt_tuning_jax.models.causal_lm.whole_attention import Whole, seen_keys
from prompt_tuning_jax.models.injections import KeyValues, LayerPrompt
from prompt_tuning_jax.models.layer_loop import run_layers
from prompt_tuning_jax.models.layers import (
    LayerNorm,
    Mlp,
    Remat,
    RMSNorm,
    dropout,
    make_head,
    normal_param,
    split_key,
)
from prompt_tuning_jax.models.ops.attention_choice import Implementation
from prompt_tuning_jax.typing import Array, DType


class PositionEmbedder(nnx.Module):
    """A learned vector for each position; it is never quantized."""

    def __init__(self, config: CausalLMConfig, *, param_dtype: DType, rngs: nnx.Rngs):
        rows = config.max_positions + config.position_offset
        self.embedding = normal_param(
            rngs,
            (rows, config.embed_dim),
            (None, "embed"),
            std=config.embed_dim**-0.5,
            dtype=param_dtype,
        )
        self.offset = config.position_offset

    def __call__(self, positions_BT: Array) -> Array:
        # Padding may be behind the last position that the table has.
        return jnp.take(self.embedding.get_value(), positions_BT + self.offset, axis=0, mode="clip")


def make_norm(config: CausalLMConfig, *, dtype: DType, param_dtype: DType) -> RMSNorm | LayerNorm:
    """Creates the norm of the model's hidden states."""
    width, eps = config.embed_dim, config.norm_eps
    if config.norm in ("rms", "rms_plus_one"):
        plus_one = config.norm == "rms_plus_one"
        return RMSNorm(width, eps=eps, dtype=dtype, param_dtype=param_dtype, plus_one=plus_one)
    weights = config.norm == "layer"
    return LayerNorm(width, eps=eps, dtype=dtype, param_dtype=param_dtype, use_weights=weights)


class Layer(nnx.Module):
    """Self-attention and an mlp, with norms before or after each, or both.

    With ``cross_features``, the width of what it attends to, there is a cross-attention between the
    two.
    """

    def __init__(
        self,
        config: CausalLMConfig,
        *,
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
        cross_features: int | None = None,
    ):
        self.pre_norms, self.post_norms = config.pre_norms, config.post_norms
        self.parallel_residual, self.shared_norm = config.parallel_residual, config.shared_norm
        self.dropout_rate = dropout_rate

        def norm() -> RMSNorm | LayerNorm:
            return make_norm(config, dtype=dtype, param_dtype=param_dtype)

        if self.pre_norms:
            self.pre_self_attention_layer_norm = norm()
        self.self_attention = Attention(
            config, dtype=dtype, param_dtype=param_dtype, dropout_rate=dropout_rate, rngs=rngs
        )
        if self.post_norms:
            self.post_self_attention_layer_norm = norm()
        self.has_cross = cross_features is not None
        if self.has_cross:
            if self.pre_norms:
                self.pre_cross_attention_layer_norm = norm()
            self.encoder_decoder_attention = Attention(
                config,
                dtype=dtype,
                param_dtype=param_dtype,
                dropout_rate=dropout_rate,
                rngs=rngs,
                kv_features=cross_features,
            )
            if self.post_norms:
                self.post_cross_attention_layer_norm = norm()
        if self.pre_norms and not self.shared_norm:
            self.pre_mlp_layer_norm = norm()
        self.mlp = Mlp(
            config,
            config.mlp_activations,
            dtype=dtype,
            param_dtype=param_dtype,
            dropout_rate=dropout_rate,
            rngs=rngs,
            use_bias=config.mlp_bias,
        )
        if self.post_norms:
            self.post_mlp_layer_norm = norm()

    def __call__(
        self,
        x_BTD: Array,
        rotated_by: Rotation | None,
        past: tuple[KeyValues, ...],
        biases: tuple[Array | None, ...],
        key: Array | None,
        cache: KeyValues | None = None,
        slot: Array | int = 0,
        cross: tuple[KeyValues, ...] = (),
        cross_biases: tuple[Array | None, ...] = (),
        *,
        whole: Whole | None = None,
        last_only: bool = False,
    ) -> tuple[Array, KeyValues]:
        """Applies the layer and returns its output with the keys and values of its positions.

        ``biases`` has one entry for each segment of ``past``, and one for the layer's keys;
        ``cross_biases`` has one for each segment of ``cross``.  With a cache, ``x_BTD`` holds a
        single token, which is written into ``slot``, and the keys are those of the cache.
        ``whole`` replaces ``biases`` where one kernel attends to all keys.  ``last_only`` computes
        the output of the last position alone.
        """
        keys = split_key(key, 6 if self.has_cross else 4)
        y_BTD = self.pre_self_attention_layer_norm(x_BTD) if self.pre_norms else x_BTD
        computed = self.self_attention.keys_values(y_BTD, rotated_by)
        if cache is not None:
            computed = cache.written(computed, slot)
        if last_only:
            x_BTD, y_BTD = x_BTD[:, -1:], y_BTD[:, -1:]
            rotated_by = rotated_by and (rotated_by[0][:, -1:], rotated_by[1][:, -1:])
            biases = tuple(bias if bias is None else bias[:, -1:] for bias in biases)
        attended_BTD = self.self_attention(
            y_BTD, rotated_by, (*past, computed), biases, key=keys[0], whole=whole
        )
        if self.post_norms:
            attended_BTD = self.post_self_attention_layer_norm(attended_BTD)
        attended_BTD = dropout(attended_BTD, self.dropout_rate, key=keys[1], shared_axis=-2)
        summed_BTD = x_BTD + attended_BTD
        if self.has_cross:
            summed_BTD = self._attend_across(summed_BTD, cross, cross_biases, keys[4:])
        if not self.shared_norm:
            y_BTD = x_BTD if self.parallel_residual else summed_BTD
            y_BTD = self.pre_mlp_layer_norm(y_BTD) if self.pre_norms else y_BTD
        y_BTD = self.mlp(y_BTD, key=keys[2])
        if self.post_norms:
            y_BTD = self.post_mlp_layer_norm(y_BTD)
        y_BTD = dropout(y_BTD, self.dropout_rate, key=keys[3], shared_axis=-2)
        return summed_BTD + y_BTD, computed

    def _attend_across(
        self,
        x_BTD: Array,
        segments: tuple[KeyValues, ...],
        biases: tuple[Array | None, ...],
        keys: Sequence[Array | None],
    ) -> Array:
        y_BTD = self.pre_cross_attention_layer_norm(x_BTD) if self.pre_norms else x_BTD
        y_BTD = self.encoder_decoder_attention(y_BTD, None, segments, biases, key=keys[0])
        if self.post_norms:
            y_BTD = self.post_cross_attention_layer_norm(y_BTD)
        return x_BTD + dropout(y_BTD, self.dropout_rate, key=keys[1], shared_axis=-2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _LayerInput:
    """What one layer alone gets: its deep prompt, keys and values to attend to, and dropout key."""

    prompt: LayerPrompt | None
    past: tuple[KeyValues, ...]
    cross: tuple[KeyValues, ...]
    key: Array | None
    cache: KeyValues | None


class Stack(nnx.Module):
    """The layers, from embedded positions to normed hidden states.

    ``name`` is ``encoder`` or ``decoder``.  ``windows`` says which positions a layer's queries see
    (``CausalLMConfig.windows`` by default).
    """

    def __init__(
        self,
        config: CausalLMConfig,
        *,
        name: Literal["encoder", "decoder"],
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
        windows: tuple[Window, ...] | None = None,
        cross_features: int | None = None,
    ):
        self.config = config
        self.name = name
        self.windows = config.causal_windows() if windows is None else windows
        self.dropout_rate, self.dtype = dropout_rate, dtype
        for i in range(config.num_layers):
            layer = Layer(
                config,
                dtype=dtype,
                param_dtype=param_dtype,
                dropout_rate=dropout_rate,
                rngs=rngs,
                cross_features=cross_features,
            )
            setattr(self, f"layers_{i}", layer)
        if config.final_norm:
            norm = make_norm(config, dtype=dtype, param_dtype=param_dtype)
            setattr(self, f"{name}_norm", norm)
        if name == "decoder" and not config.tie_embeddings:
            self.logits_dense = make_head(
                config,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
                use_bias=config.logits_bias,
            )

    def layer(self, i: int) -> Layer:
        """Returns layer ``i``, from 0."""
        layer: Layer = getattr(self, f"layers_{i}")
        return layer

    def __call__(
        self,
        x_BTD: Array,
        positions_BT: Array,
        past: Sequence[PastKeys] = (),
        *,
        cross: Sequence[PastKeys] = (),
        mask_BT: Array | None = None,
        mask_BTT: Array | None = None,
        layer_prompts: Sequence[LayerPrompt | None] | None = None,
        caches: tuple[KeyValues, ...] | None = None,
        slot: Array | int = 0,
        key: Array | None = None,
        remat: Remat = "none",
        scan: bool = False,
        attention: Implementation = "xla",
        last_only: bool = False,
    ) -> tuple[Array, tuple[KeyValues, ...]]:
        """Computes the final hidden states, and each layer's keys and values.

        Every position sees ``past``, and those of the stack's own positions that the layer's window
        has: in a decoder itself and those before it.  ``mask_BT`` (key) and ``mask_BTT`` (query,
        key) restrict the latter further.  Cross-attention sees ``cross``.  With caches, ``x_BTD``
        holds a single token, which is written into ``slot`` of each cache; slot 0 has the position
        ``positions_BT - slot``.  ``scan`` runs equal layers as a loop, except with caches.
        ``attention`` names what computes self-attention where it can; products and softmax apart,
        ``xla``, always can.
        """
        config = self.config
        keys = split_key(key, config.num_layers)
        key_positions_BT = positions_BT
        if caches is not None:
            slots = caches[0].key_BPGK.shape[1]
            key_positions_BT = positions_BT - slot + jnp.arange(slots)
        alibi = config.positions == "alibi"
        cross_biases = tuple(mask_bias(segment.mask_BU) for segment in cross)
        biases: dict[Window, tuple[Array | None, ...]] = {}
        whole: dict[Window, Whole | None] = {}
        for window in dict.fromkeys(self.windows):
            before = tuple(
                _past_bias(positions_BT, segment, back=window.back, alibi=alibi) for segment in past
            )
            within = attention_bias(
                positions_BT,
                key_positions_BT,
                window=window.back,
                ahead=window.ahead,
                mask_BU=mask_BT,
                mask_BTU=mask_BTT,
                alibi=alibi,
            )
            biases[window] = (*before, within)
            if attention != "xla" and not (alibi or caches is not None or mask_BTT is not None):
                whole[window] = seen_keys(
                    attention,
                    positions_BT,
                    past,
                    mask_BT=mask_BT,
                    window=window,
                    rows=x_BTD.shape[0],
                    head_dim=config.head_dim,
                    dtype=self.dtype,
                    dropout=key is not None and self.dropout_rate > 0,
                )
        rotations: dict[bool, Rotation] = {}
        if config.positions == "rope":
            for local in dict.fromkeys(window.back > 0 for window in self.windows):
                rotations[local] = rotation(positions_BT, config, local=local)

        def apply(
            layer: Layer, x_BTD: Array, given: _LayerInput, kind: tuple[Window, bool]
        ) -> tuple[Array, KeyValues]:
            window, last = kind
            if given.prompt is not None:
                x_BTD = given.prompt.put_into(x_BTD)
            return layer(
                x_BTD,
                rotations.get(window.back > 0),
                given.past,
                biases[window],
                given.key,
                given.cache,
                slot,
                given.cross,
                cross_biases,
                whole=None if last else whole.get(window),
                last_only=last,
            )

        layers = range(config.num_layers)
        given = [
            _LayerInput(
                prompt=layer_prompts[i] if layer_prompts else None,
                past=tuple(segment.layers[i] for segment in past),
                cross=tuple(segment.layers[i] for segment in cross),
                key=keys[i],
                cache=caches[i] if caches else None,
            )
            for i in layers
        ]
        x_BTD, computed = run_layers(
            [self.layer(i) for i in layers],
            apply,
            x_BTD,
            given,
            kinds=[(self.windows[i], last_only and i == layers[-1]) for i in layers],
            remat=remat,
            scan=scan and caches is None,
        )
        x_BTD = getattr(self, f"{self.name}_norm")(x_BTD) if config.final_norm else x_BTD
        return x_BTD, tuple(computed)


def _past_bias(positions_BT: Array, segment: PastKeys, *, back: int, alibi: bool) -> Array | None:
    if segment.positions_BU is None:
        return mask_bias(segment.mask_BU)
    return attention_bias(
        positions_BT,
        segment.positions_BU,
        window=back,
        ahead=None,
        mask_BU=segment.mask_BU,
        alibi=alibi,
    )
