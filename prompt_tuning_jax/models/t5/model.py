"""The T5 model and its forward pass (Raffel et al. 2020; t5x/examples/t5/network.py)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.models.base import (
    AttentionStack,
    Context,
    DecodeContext,
    Model,
    SelfCache,
    joined,
)
from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections, KeyValues, ModelInput
from prompt_tuning_jax.models.layer_loop import run_layers
from prompt_tuning_jax.models.layers import (
    Embed,
    Linear,
    Mlp,
    Remat,
    RMSNorm,
    dropout,
    split_key,
)
from prompt_tuning_jax.models.output_head import OutputHead
from prompt_tuning_jax.models.t5.attention import (
    Attention,
    RelativePositionBias,
    bias_of,
    pad_in_front,
)
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.typing import Array, DType, FlatParams, HostArray


class EncoderLayer(nnx.Module):
    """Self-attention and mlp, each with a pre-norm and a residual connection."""

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        if config.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(
                config, bidirectional=True, param_dtype=param_dtype, rngs=rngs
            )
        self.pre_attention_layer_norm = _norm(config, dtype=dtype, param_dtype=param_dtype)
        self.attention = Attention(
            config, dtype=dtype, param_dtype=param_dtype, dropout_rate=dropout_rate, rngs=rngs
        )
        self.pre_mlp_layer_norm = _norm(config, dtype=dtype, param_dtype=param_dtype)
        self.mlp = Mlp(
            config,
            config.mlp_activations,
            dtype=dtype,
            param_dtype=param_dtype,
            dropout_rate=dropout_rate,
            rngs=rngs,
        )
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        x_BUD: Array,
        position_bias_1HUU: Array,
        mask_bias_B1UU: Array,
        prefix: KeyValues | None,
        key: Array | None,
    ) -> Array:
        keys = split_key(key, 4)
        y_BUD = self.pre_attention_layer_norm(x_BUD)
        kv = self.attention.keys_values(y_BUD)
        # Add here: the sum is as large as the scores and need not be stored between layers.
        length = position_bias_1HUU.shape[-1]
        bias_BHUU = position_bias_1HUU + pad_in_front(mask_bias_B1UU, to=length)
        y_BUD = self.attention(y_BUD, kv, bias_BHUU, prefix=prefix, key=keys[0])
        x_BUD = x_BUD + dropout(y_BUD, self.dropout_rate, key=keys[1], shared_axis=-2)
        y_BUD = self.mlp(self.pre_mlp_layer_norm(x_BUD), key=keys[2])
        return x_BUD + dropout(y_BUD, self.dropout_rate, key=keys[3], shared_axis=-2)


class DecoderLayer(nnx.Module):
    """Causal self-attention, cross-attention and mlp, each with a pre-norm and a residual."""

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        if config.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(
                config, bidirectional=False, param_dtype=param_dtype, rngs=rngs
            )
        self.pre_self_attention_layer_norm = _norm(config, dtype=dtype, param_dtype=param_dtype)
        self.self_attention = Attention(
            config, dtype=dtype, param_dtype=param_dtype, dropout_rate=dropout_rate, rngs=rngs
        )
        self.pre_cross_attention_layer_norm = _norm(config, dtype=dtype, param_dtype=param_dtype)
        self.encoder_decoder_attention = Attention(
            config, dtype=dtype, param_dtype=param_dtype, dropout_rate=dropout_rate, rngs=rngs
        )
        self.pre_mlp_layer_norm = _norm(config, dtype=dtype, param_dtype=param_dtype)
        self.mlp = Mlp(
            config,
            config.mlp_activations,
            dtype=dtype,
            param_dtype=param_dtype,
            dropout_rate=dropout_rate,
            rngs=rngs,
        )
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        x_BSD: Array,
        cross: KeyValues,
        position_bias_1HSS: Array,
        mask_bias_11SS: Array,
        cross_bias_B11U: Array,
        prefix: KeyValues | None,
        cross_prefix: KeyValues | None,
        key: Array | None,
        cache: SelfCache | None = None,
        position: Array | int = 0,
    ) -> tuple[Array, SelfCache | None]:
        """Applies the layer and returns its output and the updated cache.

        With a cache, ``x_BSD`` holds only the token at ``position``.  Its keys and values are added
        to those of the positions decoded before.
        """
        keys = split_key(key, 6)
        y_BSD = self.pre_self_attention_layer_norm(x_BSD)
        kv = self.self_attention.keys_values(y_BSD)
        if cache is not None:
            cache = cache.written(kv, position)
            kv = cache.key_values
        length = position_bias_1HSS.shape[-1]
        bias_1HSS = position_bias_1HSS + pad_in_front(mask_bias_11SS, to=length)
        y_BSD = self.self_attention(y_BSD, kv, bias_1HSS, prefix=prefix, key=keys[0])
        x_BSD = x_BSD + dropout(y_BSD, self.dropout_rate, key=keys[1], shared_axis=-2)
        y_BSD = self.pre_cross_attention_layer_norm(x_BSD)
        y_BSD = self.encoder_decoder_attention(
            y_BSD, cross, cross_bias_B11U, prefix=cross_prefix, key=keys[2]
        )
        x_BSD = x_BSD + dropout(y_BSD, self.dropout_rate, key=keys[3], shared_axis=-2)
        y_BSD = self.mlp(self.pre_mlp_layer_norm(x_BSD), key=keys[4])
        return x_BSD + dropout(y_BSD, self.dropout_rate, key=keys[5], shared_axis=-2), cache


def _norm(config: T5Config, *, dtype: DType, param_dtype: DType) -> RMSNorm:
    return RMSNorm(
        config.embed_dim, eps=config.layer_norm_eps, dtype=dtype, param_dtype=param_dtype
    )


class Encoder(nnx.Module):
    """The encoder stack, which reads the prompt and the input."""

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        self.relpos_per_layer = config.relpos_per_layer
        if not self.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(
                config, bidirectional=True, param_dtype=param_dtype, rngs=rngs
            )
        self.num_layers = config.num_encoder_layers
        for i in range(self.num_layers):
            setattr(
                self,
                f"layers_{i}",
                EncoderLayer(
                    config,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    dropout_rate=dropout_rate,
                    rngs=rngs,
                ),
            )
        self.encoder_norm = _norm(config, dtype=dtype, param_dtype=param_dtype)
        self.dropout_rate = dropout_rate

    def layer(self, i: int) -> EncoderLayer:
        """Layer ``i``, from 0."""
        return getattr(self, f"layers_{i}")

    def __call__(
        self,
        source: ModelInput,
        *,
        injections: Injections,
        key: Array | None,
        remat: Remat = "none",
        scan: bool = False,
    ) -> Array:
        """Encodes an input that its prompt is part of; returns ``[B, U, D]``."""
        keys = split_key(key, self.num_layers + 2)
        x_BUD, mask_BU = source.embeddings_BUD, source.mask_BU
        positions_U = jnp.arange(x_BUD.shape[1])
        visible_BUU = mask_BU[:, None, :]
        if source.attention_mask_BUU is not None:
            visible_BUU = visible_BUU & source.attention_mask_BUU
        mask_B1UU = bias_of(visible_BUU)
        prefixes = injections.prefixes.get("encoder", (None,) * self.num_layers)
        biases = _shared_biases(self, positions_U, positions_U, prefixes)
        x_BUD = dropout(x_BUD, self.dropout_rate, key=keys[-1], shared_axis=-2)

        def apply(layer: EncoderLayer, x_BUD: Array, given: Any, _: None) -> tuple[Array, None]:
            prompt, prefix, layer_key = given
            x_BUD = prompt.put_into(x_BUD) if prompt else x_BUD
            bias = _position_bias(layer, biases, positions_U, positions_U, prefix)
            return layer(x_BUD, bias, mask_B1UU, prefix, layer_key), None

        no_prompts = (None,) * self.num_layers
        x_BUD, _ = run_layers(
            [self.layer(i) for i in range(self.num_layers)],
            apply,
            x_BUD,
            list(
                zip(
                    injections.layer_prompts or no_prompts,
                    prefixes,
                    keys[: self.num_layers],
                    strict=True,
                )
            ),
            remat=remat,
            scan=scan,
        )
        x_BUD = self.encoder_norm(x_BUD)
        return dropout(x_BUD, self.dropout_rate, key=keys[-2], shared_axis=-2)


class Decoder(nnx.Module):
    """The decoder stack, which sees the prompt only through the encoder's output."""

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        self.relpos_per_layer = config.relpos_per_layer
        if not self.relpos_per_layer:
            self.relpos_bias = RelativePositionBias(
                config, bidirectional=False, param_dtype=param_dtype, rngs=rngs
            )
        self.num_layers = config.num_decoder_layers
        for i in range(self.num_layers):
            setattr(
                self,
                f"layers_{i}",
                DecoderLayer(
                    config,
                    dtype=dtype,
                    param_dtype=param_dtype,
                    dropout_rate=dropout_rate,
                    rngs=rngs,
                ),
            )
        self.decoder_norm = _norm(config, dtype=dtype, param_dtype=param_dtype)
        self.dropout_rate = dropout_rate
        if not config.tie_embeddings:
            self.logits_dense = Linear(
                config.embed_dim,
                config.vocab_size,
                axes=("embed", "vocab"),
                std=config.embed_dim**-0.5,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
                out_dtype=jnp.float32,
            )

    def layer(self, i: int) -> DecoderLayer:
        """Layer ``i``, from 0."""
        return getattr(self, f"layers_{i}")

    def cross_keys_values(self, encoded_BUD: Array) -> tuple[KeyValues, ...]:
        """Computes the cross-attention keys and values of each layer, once per encoded batch."""
        return tuple(
            self.layer(i).encoder_decoder_attention.keys_values(encoded_BUD)
            for i in range(self.num_layers)
        )

    def __call__(
        self,
        x_BSD: Array,
        cross: tuple[KeyValues, ...],
        encoder_mask_BU: Array,
        *,
        injections: Injections,
        key: Array | None,
        remat: Remat = "none",
        scan: bool = False,
        caches: tuple[SelfCache, ...] | None = None,
        position: Array | int = 0,
    ) -> tuple[Array, tuple[SelfCache, ...] | None]:
        keys = split_key(key, self.num_layers + 2)
        query_positions = jnp.arange(x_BSD.shape[1]) + position
        length = x_BSD.shape[1] if caches is None else caches[0].key_BSGK.shape[1]
        key_positions = jnp.arange(length)
        causal_1SS = (key_positions[None, :] <= query_positions[:, None])[None]
        mask_11SS = bias_of(causal_1SS)
        prefixes = injections.prefixes.get("decoder", (None,) * self.num_layers)
        cross_prefixes = injections.prefixes.get("cross", (None,) * self.num_layers)
        biases = _shared_biases(self, query_positions, key_positions, prefixes)
        cross_bias = bias_of(encoder_mask_BU[:, None, :])
        x_BSD = dropout(x_BSD, self.dropout_rate, key=keys[-1], shared_axis=-2)

        def apply(
            layer: DecoderLayer, x_BSD: Array, given: Any, _: None
        ) -> tuple[Array, SelfCache | None]:
            cross, prefix, cross_prefix, layer_key, cache = given
            bias = _position_bias(layer, biases, query_positions, key_positions, prefix)
            return layer(
                x_BSD,
                cross,
                bias,
                mask_11SS,
                cross_bias,
                prefix,
                cross_prefix,
                layer_key,
                cache,
                position,
            )

        no_caches = (None,) * self.num_layers
        x_BSD, new_caches = run_layers(
            [self.layer(i) for i in range(self.num_layers)],
            apply,
            x_BSD,
            list(
                zip(
                    cross,
                    prefixes,
                    cross_prefixes,
                    keys[: self.num_layers],
                    caches or no_caches,
                    strict=True,
                )
            ),
            remat=remat,
            scan=scan,
        )
        x_BSD = self.decoder_norm(x_BSD)
        x_BSD = dropout(x_BSD, self.dropout_rate, key=keys[-2], shared_axis=-2)
        return x_BSD, None if caches is None else tuple(c for c in new_caches if c is not None)


class T5(Model):
    """A T5 1.0 or 1.1 encoder-decoder that accepts a prompt per example.

    Parameters have the same names and layout as in T5X.  The decoder starts from
    ``token_ids.start`` and gets no prompt: it sees the prompt through the encoder's output.
    """

    config: T5Config
    reading_stack: ClassVar[str] = "encoder"
    causal: ClassVar[bool] = False

    def __init__(
        self,
        config: T5Config,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        dropout_rate: float = 0.0,
        vocabulary: Any = None,
    ):
        super().__init__(config, dtype=dtype, vocabulary=vocabulary)
        self.token_embedder = Embed(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.encoder = Encoder(
            config, dtype=dtype, param_dtype=param_dtype, dropout_rate=dropout_rate, rngs=rngs
        )
        self.decoder = Decoder(
            config, dtype=dtype, param_dtype=param_dtype, dropout_rate=dropout_rate, rngs=rngs
        )

    @property
    def stacks(self) -> dict[str, AttentionStack]:
        config = self.config
        decoder = AttentionStack(
            num_layers=config.num_decoder_layers,
            num_kv_heads=config.num_heads,
            head_dim=config.head_dim,
        )
        encoder = replace(decoder, num_layers=config.num_encoder_layers, writes=False)
        return {"encoder": encoder, "decoder": decoder, "cross": decoder}

    def __call__(
        self,
        encoder_input_tokens: Array | HostArray,
        decoder_input_tokens: Array | HostArray,
        prompt: Array | None = None,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """Computes logits ``[B, S, V]`` in float32 from the decoder's inputs, as T5X does.

        Passing a ``key`` enables dropout.
        """
        keys = split_key(key, 2)
        context = self.encode(
            encoder_input_tokens, prompt, injections=injections, key=keys[0], remat=remat
        )
        return self.decode(
            decoder_input_tokens, context, injections=injections, key=keys[1], remat=remat
        )

    def encode(
        self,
        tokens_BT: Array | HostArray,
        prompt: Array | None = None,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Context:
        """Encodes the prompt and the tokens, or ``injections.model_input`` if it is given."""
        source = injections.model_input or self.embed(tokens_BT, prompt)
        return self.read(source, injections=injections, key=key, remat=remat)

    def decode(
        self,
        tokens_BS: Array | HostArray,
        context: Context,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """Computes the logits ``[B, S, V]`` of all positions from the decoder's inputs."""
        hidden_BSD = self._decode(context, tokens_BS, injections=injections, key=key, remat=remat)
        return self.logits(hidden_BSD)

    def read(
        self,
        source: ModelInput,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Context:
        source = joined(source)
        hidden_BUD = self.encoder(
            source, injections=injections, key=key, remat=remat, scan=self.scan_layers
        )
        return Context(
            hidden_BUD=hidden_BUD,
            mask_BU=source.mask_BU,
            keys_values=self.decoder.cross_keys_values(hidden_BUD),
        )

    def write_hidden(
        self,
        context: Context,
        targets_BS: Array | HostArray,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        start = ((0, 0), (1, 0))
        shifted_BS = jnp.pad(targets_BS, start, constant_values=self.token_ids.start)[:, :-1]
        return self._decode(context, shifted_BS, injections=injections, key=key, remat=remat)

    def _decode(
        self,
        context: Context,
        tokens_BS: Array | HostArray,
        *,
        injections: Injections,
        key: Array | None,
        remat: Remat,
    ) -> Array:
        """Computes the decoder's output ``[B, S, D]`` for its inputs."""
        x_BSD, _ = self.decoder(
            self.embed_tokens(tokens_BS),
            context.keys_values,
            context.mask_BU,
            injections=injections,
            key=key,
            remat=remat,
            scan=self.scan_layers,
        )
        return x_BSD

    def start_decoding(
        self, context: Context, max_length: int
    ) -> tuple[DecodeContext, tuple[SelfCache, ...]]:
        shape = (len(context.mask_BU), max_length, self.config.num_heads, self.config.head_dim)
        empty = SelfCache(
            key_BSGK=jnp.zeros(shape, self.dtype), value_BSGK=jnp.zeros(shape, self.dtype)
        )
        kept = DecodeContext(mask_BU=context.mask_BU, keys_values=context.keys_values)
        return kept, (empty,) * self.config.num_decoder_layers

    def decode_step(
        self,
        tokens_B: Array,
        position: Array | int,
        caches: tuple[SelfCache, ...],
        context: DecodeContext,
        *,
        injections: Injections = NO_INJECTIONS,
    ) -> tuple[Array, tuple[SelfCache, ...]]:
        embedded_B1D = self.embed_tokens(tokens_B[:, None])
        x_B1D, new = self.decoder(
            embedded_B1D,
            context.keys_values,
            context.mask_BU,
            injections=injections,
            key=None,
            caches=caches,
            position=position,
        )
        assert new is not None
        return self.logits(x_B1D)[:, 0], new

    def logits(self, hidden: Array) -> Array:
        return self.output_head().logits(hidden)

    def output_head(self) -> OutputHead:
        config = self.config
        if config.tie_embeddings:
            scale = config.embed_dim**-0.5
            return OutputHead(layer=self.token_embedder, vocab_size=config.vocab_size, scale=scale)
        return OutputHead(layer=self.decoder.logits_dense, vocab_size=config.vocab_size)

    def output_vectors(self, tokens_N: Array | HostArray) -> Array:
        if self.config.tie_embeddings:
            rows_ND = self.token_embedder.table()[tokens_N].astype(jnp.float32)
            return rows_ND * self.config.embed_dim**-0.5
        return self.decoder.logits_dense.columns(tokens_N).T

    def keys_values_of(self, tokens_P: Array) -> dict[str, tuple[Array, Array]]:
        graphdef, params = param_tree.split(self)
        shape = (len(tokens_P), self.config.num_heads, self.config.head_dim)

        @jax.jit
        def run(params: FlatParams, tokens_1P: Array) -> dict[str, tuple[Array, Array]]:
            watched: T5 = param_tree.merge(graphdef, params)
            seen: dict[tuple[str, str], list[Array]] = {}

            def watch(attention: Attention, name: str) -> None:
                for part in ("key", "value"):

                    def remember(
                        x: Array, linear: Callable[[Array], Array], part: str = part
                    ) -> Array:
                        y = linear(x)
                        of_heads = y.reshape(shape).astype(jnp.float32)
                        seen.setdefault((name, part), []).append(of_heads)
                        return y

                    getattr(attention, part).adapter = nnx.data(remember)

            for i in range(self.config.num_encoder_layers):
                watch(watched.encoder.layer(i).attention, "encoder")
            for i in range(self.config.num_decoder_layers):
                watch(watched.decoder.layer(i).self_attention, "decoder")
                watch(watched.decoder.layer(i).encoder_decoder_attention, "cross")
            watched(tokens_1P, tokens_1P)
            return {
                name: (jnp.stack(seen[name, "key"]), jnp.stack(seen[name, "value"]))
                for name in ("encoder", "decoder", "cross")
            }

        return run(params, tokens_P[None])


def _shared_biases(
    stack: Encoder | Decoder,
    query_positions: Array,
    key_positions: Array,
    prefixes: Sequence[KeyValues | None],
) -> dict[int, Array]:
    """Returns the position biases that layers share, by the positions before the sequence."""
    if stack.relpos_per_layer:
        return {}
    return {
        before: stack.relpos_bias(query_positions, _with_positions_before(key_positions, before))
        for before in {_positions_before(prefix) for prefix in prefixes}
    }


def _position_bias(
    layer: EncoderLayer | DecoderLayer,
    shared: dict[int, Array],
    query_positions: Array,
    key_positions: Array,
    prefix: KeyValues | None,
) -> Array:
    """Returns the position bias of a layer's self-attention, its own or a shared one."""
    before = _positions_before(prefix)
    if before in shared:
        return shared[before]
    return layer.relpos_bias(query_positions, _with_positions_before(key_positions, before))


def _positions_before(prefix: KeyValues | None) -> int:
    return prefix.key_BPGK.shape[1] if prefix and prefix.before else 0


def _with_positions_before(positions: Array, number: int) -> Array:
    return jnp.concatenate([jnp.arange(-number, 0), positions]) if number else positions
