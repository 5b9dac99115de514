"""The T5 model and its forward pass (Raffel et al. 2020; t5x/examples/t5/network.py)."""

from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.models.base import (
    AttentionStack,
    Context,
    DecodeContext,
    Model,
    joined,
    stacked,
)
from prompt_tuning_jax.models.injections import NO_INJECTIONS, Injections, KeyValues, ModelInput
from prompt_tuning_jax.models.layers import (
    Embed,
    Linear,
    Remat,
    linear_from,
    make_head,
    put_in_front,
    split_key,
)
from prompt_tuning_jax.models.ops.attention_choice import AttentionTraits
from prompt_tuning_jax.models.output_head import OutputHead
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.models.t5.decoder import Decoder
from prompt_tuning_jax.models.t5.encoder import Encoder
from prompt_tuning_jax.typing import Array, DType, HostArray


class T5(Model):
    """A T5 1.0 or 1.1 encoder-decoder that accepts a prompt per example.

    Parameters have the same names and layout as in T5X.  The decoder starts from
    ``token_ids.start`` and sees the prompt through the encoder's output; it may have a prompt of
    its own (``Injections.decoder_prompt``).
    """

    config: T5Config
    reading_stack: ClassVar[str] = "encoder"
    causal: ClassVar[bool] = False
    has_decoder_prompts: ClassVar[bool] = True

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

    def embed_tokens(self, tokens: Array | HostArray) -> Array:
        return self._embedded(tokens, self.encoder.embed_tokens)

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

    @property
    def attention_traits(self) -> AttentionTraits:
        return AttentionTraits(
            name="encoder",
            head_dim=self.config.head_dim,
            dtype=jnp.dtype(self.dtype).name,
            causal=False,
            bias="distance",
        )

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
        if _separable(source, injections):
            context = self._read_apart(source, injections, key=key, remat=remat)
        else:
            source = joined(source)
            hidden_BUD, _ = self._encode(source, injections, key=key, remat=remat)
            context = Context(
                hidden_BUD=hidden_BUD,
                mask_BU=source.mask_BU,
                keys_values=self.decoder.cross_keys_values(hidden_BUD),
            )
        if injections.decoder_prompt is None:
            return context
        return self._with_decoder_prompt(context, injections, key=key, remat=remat)

    def _encode(
        self,
        source: ModelInput,
        injections: Injections,
        *,
        key: Array | None,
        remat: Remat,
        returns_keys_values: bool = False,
    ) -> tuple[Array, list[KeyValues | None]]:
        return self.encoder(
            source,
            injections=injections,
            key=key,
            remat=remat,
            scan=self.scan_layers,
            fuse=self.attention.implementation == "pallas",
            returns_keys_values=returns_keys_values,
        )

    def _read_apart(
        self, source: ModelInput, injections: Injections, *, key: Array | None, remat: Remat
    ) -> Context:
        """Reads a prompt that sees none of the input once, and each row behind it.

        The result is that of putting the prompt before every row.
        """
        assert source.prompt_BPD is not None
        assert source.prompt_mask_PP is not None
        keys = split_key(key, 2)
        prompt = ModelInput(
            embeddings_BUD=source.prompt_BPD,
            mask_BU=jnp.ones(source.prompt_BPD.shape[:2], bool),
            attention_mask_BUU=source.prompt_mask_PP[None],
        )
        prompt_BPD, seen = self._encode(
            prompt, injections, key=keys[0], remat=remat, returns_keys_values=True
        )
        before = tuple(replace(each, before=True) for each in seen if each is not None)
        behind = replace(injections, prefixes={**injections.prefixes, "encoder": before})
        rows = replace(source, prompt_BPD=None, prompt_mask_PP=None)
        hidden_BTD, _ = self._encode(rows, behind, key=keys[1], remat=remat)
        cross = (self.decoder.cross_keys_values(x) for x in (prompt_BPD, hidden_BTD))
        return Context(
            hidden_BUD=put_in_front(prompt_BPD, hidden_BTD),
            mask_BU=jnp.pad(
                source.mask_BU, ((0, 0), (prompt_BPD.shape[1], 0)), constant_values=True
            ),
            keys_values=jax.tree.map(put_in_front, *cross),
        )

    def _with_decoder_prompt(
        self, context: Context, injections: Injections, *, key: Array | None, remat: Remat
    ) -> Context:
        """Runs the decoder over its prompt, whose keys and values are before all targets.

        They depend on the row, because the prompt attends to the encoder's output.
        """
        prompt = injections.decoder_prompt
        assert prompt is not None
        rows = len(context.mask_BU)
        prompt_BPD = jnp.broadcast_to(prompt, (rows, *prompt.shape[-2:])).astype(self.dtype)
        decoder_injections = self.injections_for_writing(injections)
        _, caches = self.decoder(
            prompt_BPD,
            context.keys_values,
            context.mask_BU,
            injections=decoder_injections,
            # The fold keeps this key distinct from those of the encoder and the targets.
            key=None if key is None else jax.random.fold_in(key, 0xDEC0),
            remat=remat,
            scan=self.scan_layers,
            caches=self._empty_caches(rows, prompt_BPD.shape[1]),
        )
        assert caches is not None
        return replace(context, prompt=tuple(replace(cache, before=True) for cache in caches))

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
            self._embedded(tokens_BS, self.decoder.embed_tokens),
            context.keys_values,
            context.mask_BU,
            injections=_behind_prompt(injections, context.prompt),
            key=key,
            remat=remat,
            scan=self.scan_layers,
        )
        return x_BSD

    def decode_step(
        self,
        tokens_B: Array,
        position: Array | int,
        caches: tuple[KeyValues, ...],
        context: DecodeContext,
        *,
        injections: Injections = NO_INJECTIONS,
    ) -> tuple[Array, tuple[KeyValues, ...]]:
        embedded_B1D = self._embedded(tokens_B[:, None], self.decoder.embed_tokens)
        x_B1D, new = self.decoder(
            embedded_B1D,
            context.keys_values,
            context.mask_BU,
            injections=_behind_prompt(injections, context.prompt),
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
            layer = self.decoder.tied_logits.layer(self.token_embedder)
            return OutputHead(layer=layer, vocab_size=config.vocab_size, scale=scale)
        return OutputHead(layer=self.decoder.logits_dense, vocab_size=config.vocab_size)

    def untie(self, head_VD: Array) -> None:
        def like() -> Linear:
            return make_head(
                self.config, dtype=self.dtype, param_dtype=head_VD.dtype, rngs=nnx.Rngs(0)
            )

        # A tied head reads hidden states that are scaled down.
        kernel_DV = (head_VD.T * self.config.embed_dim**-0.5).astype(head_VD.dtype)
        self.decoder.logits_dense = linear_from(kernel_DV, like)
        self.config = replace(self.config, tie_embeddings=False)

    def output_vectors(self, tokens_N: Array | HostArray) -> Array:
        if self.config.tie_embeddings:
            rows_ND = self.token_embedder.table()[tokens_N].astype(jnp.float32)
            return rows_ND * self.config.embed_dim**-0.5
        return self.decoder.logits_dense.columns(tokens_N).T

    def keys_values_of(self, tokens_P: Array) -> dict[str, tuple[Array, Array]]:
        source = self.embed(tokens_P[None])
        hidden_1PD, read = self._encode(
            source, NO_INJECTIONS, key=None, remat="none", returns_keys_values=True
        )
        cross = self.decoder.cross_keys_values(hidden_1PD)
        _, written = self.decoder(
            self._embedded(tokens_P[None], self.decoder.embed_tokens),
            cross,
            source.mask_BU,
            injections=NO_INJECTIONS,
            key=None,
            caches=self._empty_caches(1, len(tokens_P)),
        )
        assert written is not None
        return {"encoder": stacked(read), "decoder": stacked(written), "cross": stacked(cross)}


def _separable(source: ModelInput, injections: Injections) -> bool:
    """Returns whether the prompt's keys and values do not depend on the row behind it."""
    free = not injections.layer_prompts and not injections.prefixes.get("encoder")
    return source.prompt_mask_PP is not None and source.attention_mask_BUU is None and free


def _behind_prompt(injections: Injections, prompt: tuple[KeyValues, ...]) -> Injections:
    """Puts the decoder's prompt before its self-attention."""
    if not prompt:
        return injections
    return replace(injections, prefixes={**injections.prefixes, "decoder": prompt})
