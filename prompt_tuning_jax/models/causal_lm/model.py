"""Decoder-only language models: one stack of layers reads the prompt and the input, and writes.

The prompt does not depend on the input, so the stack computes its keys and values once for all
rows; the rows then run over their own positions alone.  The result is that of putting the prompt
before every row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.models.base import (
    AttentionStack,
    Context,
    DecodeContext,
    Model,
    SelfCache,
    joined,
)
from prompt_tuning_jax.models.causal_lm.attention import (
    Attention,
    PastKeys,
    attention_bias,
)
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.models.causal_lm.rope import Rotation, rotation
from prompt_tuning_jax.models.injections import (
    NO_INJECTIONS,
    Injections,
    KeyValues,
    LayerPrompt,
    ModelInput,
)
from prompt_tuning_jax.models.layers import (
    Embed,
    LayerNorm,
    Linear,
    Mlp,
    Remat,
    RMSNorm,
    Table,
    dropout,
    normal_param,
    rematerialised,
    split_key,
)
from prompt_tuning_jax.typing import Array, DType, HostArray


class PositionEmbedder(nnx.Module):
    """A learned vector for each position; it is never quantised."""

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


class DecoderLayer(nnx.Module):
    """Causal self-attention and an mlp, with norms before or after each, or both."""

    def __init__(
        self,
        config: CausalLMConfig,
        *,
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
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
        cache: SelfCache | None = None,
        slot: Array | int = 0,
        *,
        last_only: bool = False,
    ) -> tuple[Array, KeyValues]:
        """Applies the layer and returns its output with the keys and values of its positions.

        ``biases`` has one entry for each segment of ``past``, and one for the layer's keys.  With a
        cache, ``x_BTD`` holds a single token, which is written into ``slot``, and the keys are
        those of the cache.  ``last_only`` computes the output of the last position alone.
        """
        keys = split_key(key, 4)
        y_BTD = self.pre_self_attention_layer_norm(x_BTD) if self.pre_norms else x_BTD
        computed = self.self_attention.keys_values(y_BTD, rotated_by)
        if cache is not None:
            computed = KeyValues(
                key_BPGK=_write(cache.key_BSGK, computed.key_BPGK, slot),
                value_BPGK=_write(cache.value_BSGK, computed.value_BPGK, slot),
            )
        if last_only:
            x_BTD, y_BTD = x_BTD[:, -1:], y_BTD[:, -1:]
            rotated_by = rotated_by and (rotated_by[0][:, -1:], rotated_by[1][:, -1:])
            biases = tuple(bias if bias is None else bias[:, -1:] for bias in biases)
        attended_BTD = self.self_attention(
            y_BTD, rotated_by, (*past, computed), biases, key=keys[0]
        )
        if self.post_norms:
            attended_BTD = self.post_self_attention_layer_norm(attended_BTD)
        attended_BTD = dropout(attended_BTD, self.dropout_rate, key=keys[1], shared_axis=-2)
        summed_BTD = x_BTD + attended_BTD
        if not self.shared_norm:
            y_BTD = x_BTD if self.parallel_residual else summed_BTD
            y_BTD = self.pre_mlp_layer_norm(y_BTD) if self.pre_norms else y_BTD
        y_BTD = self.mlp(y_BTD, key=keys[2])
        if self.post_norms:
            y_BTD = self.post_mlp_layer_norm(y_BTD)
        y_BTD = dropout(y_BTD, self.dropout_rate, key=keys[3], shared_axis=-2)
        return summed_BTD + y_BTD, computed


class Decoder(nnx.Module):
    """The stack of layers, from embedded positions to the input of the output head."""

    def __init__(
        self,
        config: CausalLMConfig,
        *,
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dropout_rate = dropout_rate
        for i in range(config.num_layers):
            layer = DecoderLayer(
                config, dtype=dtype, param_dtype=param_dtype, dropout_rate=dropout_rate, rngs=rngs
            )
            setattr(self, f"layers_{i}", layer)
        if config.final_norm:
            self.decoder_norm = make_norm(config, dtype=dtype, param_dtype=param_dtype)
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
                use_bias=config.logits_bias,
            )

    def layer(self, i: int) -> DecoderLayer:
        """Layer ``i``, from 0."""
        layer: DecoderLayer = getattr(self, f"layers_{i}")
        return layer

    def __call__(
        self,
        x_BTD: Array,
        positions_BT: Array,
        past: Sequence[PastKeys] = (),
        *,
        mask_BT: Array | None = None,
        mask_BTT: Array | None = None,
        layer_prompts: Sequence[LayerPrompt | None] | None = None,
        caches: tuple[SelfCache, ...] | None = None,
        slot: Array | int = 0,
        key: Array | None = None,
        remat: Remat = "none",
        last_only: bool = False,
    ) -> tuple[Array, tuple[KeyValues, ...]]:
        """Computes the final hidden states, and each layer's keys and values.

        Every position sees ``past``, itself, and the positions before it; ``mask_BT`` (key) and
        ``mask_BTT`` (query, key) restrict the latter further.  With caches, ``x_BTD`` holds a
        single token, which is written into ``slot`` of each cache; slot 0 has the position
        ``positions_BT - slot``.
        """
        config = self.config
        keys = split_key(key, config.num_layers)
        key_positions_BT = positions_BT
        if caches is not None:
            slots = caches[0].key_BSGK.shape[1]
            key_positions_BT = positions_BT - slot + jnp.arange(slots)
        alibi = config.positions == "alibi"
        biases: dict[int, tuple[Array | None, ...]] = {}
        rotations: dict[bool, Rotation] = {}
        computed: list[KeyValues] = []
        for i in range(config.num_layers):
            window = config.window(i)
            if window not in biases:
                before = tuple(
                    attention_bias(
                        positions_BT,
                        segment.positions_BU,
                        window=window,
                        causal=False,
                        mask_BU=segment.mask_BU,
                        alibi=alibi,
                    )
                    for segment in past
                )
                within = attention_bias(
                    positions_BT,
                    key_positions_BT,
                    window=window,
                    mask_BU=mask_BT,
                    mask_BTU=mask_BTT,
                    alibi=alibi,
                )
                biases[window] = (*before, within)
            local = window > 0
            if config.positions == "rope" and local not in rotations:
                rotations[local] = rotation(positions_BT, config, local=local)
            layer_prompt = layer_prompts[i] if layer_prompts else None
            x_BTD = x_BTD if layer_prompt is None else layer_prompt.put_into(x_BTD)
            layer = self.layer(i)
            # The static argument is bound here: rematerialised functions have array arguments.
            apply = _last_of(layer) if last_only and i == config.num_layers - 1 else layer
            x_BTD, keys_values = rematerialised(apply, remat)(
                x_BTD,
                rotations.get(local),
                tuple(segment.layers[i] for segment in past),
                biases[window],
                keys[i],
                None if caches is None else caches[i],
                slot,
            )
            computed.append(keys_values)
        x_BTD = self.decoder_norm(x_BTD) if config.final_norm else x_BTD
        return x_BTD, tuple(computed)


def _last_of(layer: DecoderLayer) -> Any:
    def apply(*arguments: Any) -> tuple[Array, KeyValues]:
        return layer(*arguments, last_only=True)

    return apply


@dataclass(frozen=True, kw_only=True)
class ScaledTable:
    """An embedding table whose rows are multiplied by a factor when they are read."""

    table: Table
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape

    def __getitem__(self, ids: Any) -> Array:
        rows = self.table[ids]
        return rows * jnp.asarray(self.scale, rows.dtype)


class CausalLM(Model):
    """A decoder-only language model that accepts a prompt per example.

    Positions count the prompt and the real tokens of a row: token t has the position P + t, however
    the row is padded.
    """

    reading_stack: ClassVar[str] = "decoder"
    causal: ClassVar[bool] = True

    config: CausalLMConfig

    def __init__(
        self,
        config: CausalLMConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        dropout_rate: float = 0.0,
        vocabulary: Any = None,
    ):
        super().__init__(config, dtype=dtype, vocabulary=vocabulary)
        self.dropout_rate = dropout_rate
        self.token_embedder = Embed(
            config, dtype=dtype, param_dtype=param_dtype, rngs=rngs, std=config.embed_dim**-0.5
        )
        if config.positions == "learned":
            self.position_embedder = PositionEmbedder(config, param_dtype=param_dtype, rngs=rngs)
        if config.embedding_norm:
            self.embedding_norm = LayerNorm(
                config.embed_dim, eps=config.norm_eps, dtype=dtype, param_dtype=param_dtype
            )
        self.decoder = Decoder(
            config, dtype=dtype, param_dtype=param_dtype, dropout_rate=dropout_rate, rngs=rngs
        )

    @property
    def stacks(self) -> Mapping[str, AttentionStack]:
        config = self.config
        stack = AttentionStack(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        return {"decoder": stack}

    def embed_tokens(self, tokens: Array | HostArray) -> Array:
        x = super().embed_tokens(tokens)
        scale = self.config.embedding_scale
        # Gemma rounds the factor to the dtype of the activations, and so does transformers.
        return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

    def embedding_table(self) -> Table:
        table, scale = self.token_embedder.table(), self.config.embedding_scale
        return table if scale == 1.0 else ScaledTable(table=table, scale=scale)

    def read(
        self,
        source: ModelInput,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Context:
        """Reads an embedded input; ``hidden_BUD`` has the T positions behind the prompt.

        The prompt runs through the stack by itself, once, unless ``attention_mask_BUU`` or a layer
        prompt longer than it makes it depend on the row.  Prefixes come before the prompt.
        """
        keys = split_key(key, 2)
        prefix = tuple(
            KeyValues(
                key_BPGK=prefix.key_BPGK.astype(self.dtype),
                value_BPGK=prefix.value_BPGK.astype(self.dtype),
            )
            for prefix in injections.prefixes.get("decoder", ())
        )
        lengths_B = injections.prefix_lengths_B
        past = [_past(prefix, lengths_B=lengths_B)] if prefix else []
        # A row's positions start behind those of its prefix.
        start = _length(prefix) if lengths_B is None else lengths_B[:, None]
        layer_prompts = injections.layer_prompts
        prompt_length = 0 if source.prompt_BPD is None else source.prompt_BPD.shape[1]
        prompt: tuple[KeyValues, ...] = ()
        last_B1D = None
        if prompt_length and _separable(source, layer_prompts):
            assert source.prompt_BPD is not None
            last_B1D, prompt = self._run(
                _broadcast_for(layer_prompts, source.prompt_BPD),
                _positions(start, prompt_length),
                past,
                layer_prompts=layer_prompts,
                key=keys[0],
                remat=remat,
                last_only=True,
            )
            layer_prompts, prompt_length = None, 0
            past = [*past, _past(prompt, start=start)]
            source = replace(source, prompt_BPD=None)
        whole = joined(source)
        if not whole.embeddings_BUD.shape[
            1
        ]:  # nothing but a prompt is read, to keep its keys and values
            batch, config = len(whole.mask_BU), self.config
            nothing = jnp.zeros((batch, 0, config.num_kv_heads, config.head_dim), self.dtype)
            return Context(
                hidden_BUD=whole.embeddings_BUD,
                mask_BU=whole.mask_BU,
                keys_values=(KeyValues(key_BPGK=nothing, value_BPGK=nothing),) * config.num_layers,
                prompt=_concatenated(prefix, prompt),
            )
        hidden_BUD, keys_values = self._run(
            whole.embeddings_BUD,
            _positions_in(whole.mask_BU, start=start + _length(prompt)),
            past,
            mask_BT=whole.mask_BU,
            mask_BTT=whole.attention_mask_BUU,
            layer_prompts=layer_prompts,
            key=keys[1],
            remat=remat,
        )
        if prompt_length:
            last_B1D = hidden_BUD[:, prompt_length - 1 : prompt_length]
            prompt = tuple(_positions_of(kv, slice(prompt_length)) for kv in keys_values)
            keys_values = tuple(_positions_of(kv, slice(prompt_length, None)) for kv in keys_values)
            hidden_BUD = hidden_BUD[:, prompt_length:]
        if last_B1D is not None and hidden_BUD.shape[1]:
            # A row without tokens continues the prompt.
            empty_B11 = ~jnp.any(source.mask_BU, axis=1)[:, None, None]
            first_B1D = jnp.where(empty_B11, last_B1D, hidden_BUD[:, :1])
            hidden_BUD = jnp.concatenate([first_B1D, hidden_BUD[:, 1:]], axis=1)
        return Context(
            hidden_BUD=hidden_BUD,
            mask_BU=source.mask_BU,
            keys_values=keys_values,
            prompt=_concatenated(prefix, prompt),
            prompt_lengths_B=None if lengths_B is None else lengths_B + _length(prompt),
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
        """Computes the output head's inputs ``[B, S, D]``; ``[:, s]`` predicts target ``s``.

        The context has the prefixes, so ``injections`` need not.
        """
        first_B1D = context.last_BD[:, None]
        if targets_BS.shape[1] == 1:
            return first_B1D
        lengths_B, length = context.prompt_lengths_B, context.mask_BU.shape[1]
        start = _length(context.prompt) if lengths_B is None else lengths_B[:, None]
        past = [_past(context.prompt, lengths_B=lengths_B)] if context.prompt else []
        past.append(_past(context.keys_values, start=start, mask_BU=context.mask_BU))
        start_B1 = start + jnp.sum(context.mask_BU, axis=1, keepdims=True)
        x_BSD, _ = self._run(
            self.embed_tokens(targets_BS[:, :-1]),
            start_B1 + jnp.arange(targets_BS.shape[1] - 1),
            past if length else past[:-1],
            key=key,
            remat=remat,
        )
        return jnp.concatenate([first_B1D, x_BSD], axis=1)

    def start_decoding(
        self, context: Context, max_length: int
    ) -> tuple[DecodeContext, tuple[SelfCache, ...]]:
        batch = context.mask_BU.shape[0]
        prompt = tuple(_of_rows(kv, batch) for kv in context.prompt)
        seen_BP = jnp.ones((batch, _length(context.prompt)), bool)
        if context.prompt_lengths_B is not None:
            seen_BP = jnp.arange(seen_BP.shape[1]) < context.prompt_lengths_B[:, None]
        config = self.config
        empty = jnp.zeros((batch, max_length, config.num_kv_heads, config.head_dim), self.dtype)
        return (
            DecodeContext(
                mask_BU=jnp.concatenate([seen_BP, context.mask_BU], axis=1),
                keys_values=_concatenated(prompt, context.keys_values),
                first_BD=context.last_BD,
            ),
            (SelfCache(key_BSGK=empty, value_BSGK=empty),) * config.num_layers,
        )

    def decode_step(
        self,
        tokens_B: Array,
        position: Array | int,
        caches: tuple[SelfCache, ...],
        context: DecodeContext,
        *,
        injections: Injections = NO_INJECTIONS,
    ) -> tuple[Array, tuple[SelfCache, ...]]:
        """Decodes one token; at position 0 the logits follow from the context alone."""
        assert context.first_BD is not None
        first_BD = context.first_BD

        def first() -> tuple[Array, tuple[SelfCache, ...]]:
            return first_BD, caches

        def later() -> tuple[Array, tuple[SelfCache, ...]]:
            slot = position - 1
            past = _past(context.keys_values, mask_BU=context.mask_BU)
            x_B1D, written = self._run(
                self.embed_tokens(tokens_B[:, None]),
                jnp.sum(context.mask_BU, axis=1, keepdims=True) + slot,
                [past],
                caches=caches,
                slot=slot,
            )
            new = tuple(SelfCache(key_BSGK=kv.key_BPGK, value_BSGK=kv.value_BPGK) for kv in written)
            return x_B1D[:, 0].astype(first_BD.dtype), new

        if isinstance(position, int):
            hidden_BD, caches = first() if position == 0 else later()
        else:
            hidden_BD, caches = jax.lax.cond(position == 0, first, later)
        return self.logits(hidden_BD), caches

    def logits(self, hidden: Array) -> Array:
        if self.config.tie_embeddings:
            logits = self.token_embedder.attend(hidden)
        else:
            logits = self.decoder.logits_dense(hidden)
        cap = self.config.logits_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits

    def output_vectors(self, tokens_N: Array | HostArray) -> Array:
        if self.config.tie_embeddings:
            return self.token_embedder.table()[tokens_N].astype(jnp.float32)
        return self.decoder.logits_dense.columns(tokens_N).T

    def keys_values_of(self, tokens_P: Array) -> dict[str, tuple[Array, Array]]:
        layers = self.read(self.embed(tokens_P[None])).keys_values
        keys_LPGK = jnp.stack([kv.key_BPGK[0] for kv in layers]).astype(jnp.float32)
        values_LPGK = jnp.stack([kv.value_BPGK[0] for kv in layers]).astype(jnp.float32)
        return {"decoder": (keys_LPGK, values_LPGK)}

    def _run(
        self,
        x_BTD: Array,
        positions_BT: Array,
        past: Sequence[PastKeys],
        *,
        mask_BT: Array | None = None,
        mask_BTT: Array | None = None,
        layer_prompts: Sequence[LayerPrompt | None] | None = None,
        caches: tuple[SelfCache, ...] | None = None,
        slot: Array | int = 0,
        key: Array | None = None,
        remat: Remat = "none",
        last_only: bool = False,
    ) -> tuple[Array, tuple[KeyValues, ...]]:
        """Runs the stack over embedded tokens or prompts, which get their positions here."""
        keys = split_key(key, 2)
        if self.config.positions == "learned":
            x_BTD = x_BTD + self.position_embedder(positions_BT).astype(x_BTD.dtype)
        if self.config.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        x_BTD = dropout(x_BTD, self.dropout_rate, key=keys[0], shared_axis=-2)
        return self.decoder(
            x_BTD,
            positions_BT,
            past,
            mask_BT=mask_BT,
            mask_BTT=mask_BTT,
            layer_prompts=layer_prompts,
            caches=caches,
            slot=slot,
            key=keys[1],
            remat=remat,
            last_only=last_only,
        )


def _separable(source: ModelInput, layer_prompts: Sequence[LayerPrompt | None] | None) -> bool:
    """Whether the prompt's keys and values do not depend on the row behind it."""
    assert source.prompt_BPD is not None
    longest = max((p.vectors_BPD.shape[1] for p in layer_prompts or () if p), default=0)
    return source.attention_mask_BUU is None and longest <= source.prompt_BPD.shape[1]


def _broadcast_for(layer_prompts: Sequence[LayerPrompt | None] | None, x_BPD: Array) -> Array:
    """Repeats a prompt of all rows if the prompts of its layers differ between rows."""
    batches = [p.vectors_BPD.shape[0] for p in layer_prompts or () if p is not None]
    return jnp.broadcast_to(x_BPD, (max([x_BPD.shape[0], *batches]), *x_BPD.shape[1:]))


def _past(
    layers: tuple[KeyValues, ...],
    *,
    start: Array | int = 0,
    mask_BU: Array | None = None,
    lengths_B: Array | None = None,
) -> PastKeys:
    """Keys and values from position ``start`` on; ``lengths_B`` of them exist, or all."""
    positions_BU = _positions(start, _length(layers))
    if lengths_B is not None:
        mask_BU = positions_BU < lengths_B[:, None]
    elif mask_BU is not None:
        positions_BU = _positions_in(mask_BU, start=start)
    return PastKeys(layers=layers, positions_BU=positions_BU, mask_BU=mask_BU)


def _positions(start: Array | int, length: int) -> Array:
    return start + jnp.arange(length)[None]


def _positions_in(mask_BU: Array, *, start: Array | int = 0) -> Array:
    """Counts the real positions; a masked one has the position of the real one before it."""
    return start - 1 + jnp.cumsum(mask_BU, axis=1)


def _length(layers: tuple[KeyValues, ...]) -> int:
    return layers[0].key_BPGK.shape[1] if layers else 0


def _of_rows(kv: KeyValues, batch: int) -> KeyValues:
    """Repeats keys and values that all rows share."""
    shape = (batch, *kv.key_BPGK.shape[1:])
    return KeyValues(
        key_BPGK=jnp.broadcast_to(kv.key_BPGK, shape),
        value_BPGK=jnp.broadcast_to(kv.value_BPGK, shape),
    )


def _positions_of(kv: KeyValues, chosen: slice) -> KeyValues:
    return KeyValues(key_BPGK=kv.key_BPGK[:, chosen], value_BPGK=kv.value_BPGK[:, chosen])


def _concatenated(
    first: tuple[KeyValues, ...], second: tuple[KeyValues, ...]
) -> tuple[KeyValues, ...]:
    """Concatenates the positions of two segments, layer by layer."""
    if not (first and second):
        return first or second
    batch = max(first[0].key_BPGK.shape[0], second[0].key_BPGK.shape[0])
    pairs = [(_of_rows(a, batch), _of_rows(b, batch)) for a, b in zip(first, second, strict=True)]
    return tuple(
        KeyValues(
            key_BPGK=jnp.concatenate([a.key_BPGK, b.key_BPGK], axis=1),
            value_BPGK=jnp.concatenate([a.value_BPGK, b.value_BPGK], axis=1),
        )
        for a, b in pairs
    )


def _write(cache_BSGK: Array, new_B1GK: Array, slot: Array | int) -> Array:
    start = (0, slot, 0, 0)
    return jax.lax.dynamic_update_slice(cache_BSGK, new_B1GK.astype(cache_BSGK.dtype), start)
