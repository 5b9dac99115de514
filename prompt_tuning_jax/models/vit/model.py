"""Vision transformers: read the patches of an image behind a class token, and choose a class."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NoReturn, Self

import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.base import (
    AttentionStack,
    Context,
    DecodeContext,
    Model,
    with_prompt,
)
from prompt_tuning_jax.models.injections import (
    NO_INJECTIONS,
    Injections,
    KeyValues,
    LayerPrompt,
    ModelInput,
)
from prompt_tuning_jax.models.layer_loop import run_layers
from prompt_tuning_jax.models.layers import (
    LayerNorm,
    Linear,
    Mlp,
    Remat,
    Table,
    dropout,
    linear_from,
    normal_param,
    put_in_front,
    split_key,
)
from prompt_tuning_jax.models.quantization import QuantizedLinear
from prompt_tuning_jax.models.t5.attention import Attention
from prompt_tuning_jax.models.vit.config import ViTConfig
from prompt_tuning_jax.typing import Array, DType, HostArray


class EncoderLayer(nnx.Module):
    """Self-attention and an mlp, each behind a norm."""

    def __init__(
        self,
        config: ViTConfig,
        *,
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        kind: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.pre_attention_layer_norm = LayerNorm(config.embed_dim, eps=config.norm_eps, **kind)
        self.attention = Attention(
            config,
            dropout_rate=dropout_rate,
            rngs=rngs,
            query_scale=config.head_dim**-0.5,
            qkv_bias=config.qkv_bias,
            out_bias=True,
            **kind,
        )
        self.pre_mlp_layer_norm = LayerNorm(config.embed_dim, eps=config.norm_eps, **kind)
        self.mlp = Mlp(
            config,
            config.mlp_activations,
            dropout_rate=dropout_rate,
            rngs=rngs,
            use_bias=True,
            **kind,
        )
        self.dropout_rate = dropout_rate

    def __call__(self, x_BUD: Array, prefix: KeyValues | None, key: Array | None) -> Array:
        keys = split_key(key, 4)
        y_BUD = self.pre_attention_layer_norm(x_BUD)
        kv = self.attention.keys_values(y_BUD)
        y_BUD = self.attention(y_BUD, kv, None, prefix=prefix, key=keys[0])
        x_BUD = x_BUD + dropout(y_BUD, self.dropout_rate, key=keys[1], shared_axis=-2)
        y_BUD = self.mlp(self.pre_mlp_layer_norm(x_BUD), key=keys[2])
        return x_BUD + dropout(y_BUD, self.dropout_rate, key=keys[3], shared_axis=-2)


class Encoder(nnx.Module):
    """The stack of layers, and the norm behind the last."""

    def __init__(
        self,
        config: ViTConfig,
        *,
        dtype: DType,
        param_dtype: DType,
        dropout_rate: float,
        rngs: nnx.Rngs,
    ):
        self.num_layers = config.num_layers
        for i in range(config.num_layers):
            layer = EncoderLayer(
                config, dtype=dtype, param_dtype=param_dtype, dropout_rate=dropout_rate, rngs=rngs
            )
            setattr(self, f"layers_{i}", layer)
        self.encoder_norm = LayerNorm(
            config.embed_dim, eps=config.norm_eps, dtype=dtype, param_dtype=param_dtype
        )

    def __call__(
        self,
        x_BUD: Array,
        *,
        injections: Injections,
        key: Array | None,
        remat: Remat = "none",
        scan: bool = False,
    ) -> Array:
        none = (None,) * self.num_layers
        prefixes = injections.prefixes.get("encoder", none)
        prompts = injections.layer_prompts or none

        def apply(layer: EncoderLayer, x_BUD: Array, given: Any, _: None) -> tuple[Array, None]:
            prompt, prefix, layer_key = given
            return layer(_behind_class(x_BUD, prompt), prefix, layer_key), None

        x_BUD, _ = run_layers(
            [getattr(self, f"layers_{i}") for i in range(self.num_layers)],
            apply,
            x_BUD,
            list(zip(prompts, prefixes, split_key(key, self.num_layers), strict=True)),
            remat=remat,
            scan=scan,
        )
        return self.encoder_norm(x_BUD)


def _behind_class(x_BUD: Array, prompt: LayerPrompt | None) -> Array:
    """Puts a layer's prompt into the positions 1 to P, behind the class token."""
    if prompt is None:
        return x_BUD
    return jnp.concatenate([x_BUD[:, :1], prompt.put_into(x_BUD[:, 1:])], axis=1)


class ViT(Model):
    """A vision transformer that accepts a prompt per example.

    An input is an image ``[B, H, W, channels]``, or the same numbers as ``[B, H * W * channels]``:
    whole numbers are pixels from 0 to 255, which ``config.processing`` rescales and normalizes, and
    other numbers are pixels that are normalized already.  The sequence is the class token, the
    prompt and the patches (Jia et al. 2022).  A target is the number of a class ``[B, 1]``.
    """

    reading_stack: ClassVar[str] = "encoder"
    causal: ClassVar[bool] = False

    config: ViTConfig

    def __init__(
        self,
        config: ViTConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        dropout_rate: float = 0.0,
        vocabulary: Any = None,
    ):
        super().__init__(config, dtype=dtype, vocabulary=vocabulary)
        self.dropout_rate = dropout_rate
        width = config.embed_dim
        inputs = config.patch_size**2 * config.num_channels
        self.patch_embedder = Linear(
            inputs,
            width,
            axes=("patch", "embed"),
            std=inputs**-0.5,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            use_bias=True,
        )
        small: dict[str, Any] = {"std": 0.02, "dtype": param_dtype}
        self.cls_token = normal_param(rngs, (1, width), (None, "embed"), **small)
        positions = (1 + config.num_patches, width)
        self.position_embedding = normal_param(rngs, positions, (None, "embed"), **small)
        self.encoder = Encoder(
            config, dtype=dtype, param_dtype=param_dtype, dropout_rate=dropout_rate, rngs=rngs
        )
        if config.labels:
            self.classifier = _classifier(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    @property
    def stacks(self) -> Mapping[str, AttentionStack]:
        config = self.config
        stack = AttentionStack(
            num_layers=config.num_layers, num_kv_heads=config.num_heads, head_dim=config.head_dim
        )
        return {"encoder": stack}

    def for_labels(self, labels: Sequence[str], *, key: Array) -> Self:
        """Returns the model with a new classifier; the one that it has if that has these labels."""
        labels = tuple(labels)
        copy: Self = nnx.merge(*nnx.split(self))
        if labels == self.config.labels:
            if isinstance(self.classifier, QuantizedLinear):
                copy.classifier = _dequantized(self.classifier, self.config)
            return copy
        copy.config = replace(self.config, labels=labels, vocab_size=len(labels))
        copy.classifier = _classifier(
            copy.config, dtype=self.dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(key)
        )
        return copy

    def prompt_bound(self) -> float:
        patch = self.config.patch_size**2 * self.config.num_channels
        return math.sqrt(6 / (patch + self.config.embed_dim))

    def embed(self, tokens_BT: Array | HostArray, prompt: Array | None = None) -> ModelInput:
        """Embeds the class token and the patches of images, with their positions."""
        patches_BNJ = self._patches(jnp.asarray(tokens_BT)).astype(self.dtype)
        positions_UD = self.position_embedding.get_value().astype(self.dtype)
        x_BND = self.patch_embedder(patches_BNJ) + positions_UD[1:]
        cls_1D = self.cls_token.get_value().astype(self.dtype) + positions_UD[:1]
        cls_B1D = jnp.broadcast_to(cls_1D, (len(x_BND), *cls_1D.shape))
        x_BUD = jnp.concatenate([cls_B1D, x_BND.astype(self.dtype)], axis=1)
        source = ModelInput(embeddings_BUD=x_BUD, mask_BU=jnp.ones(x_BUD.shape[:2], bool))
        return source if prompt is None else with_prompt(source, prompt)

    def _patches(self, pixels: Array) -> Array:
        """Cuts normalized images into patches ``[B, N, channels * patch * patch]``."""
        config = self.config
        size, channels, patch = config.image_size, config.num_channels, config.patch_size
        shape = (size, size, channels)
        if pixels.shape[1:] not in (shape, (config.num_pixels,)):
            raise UserError(
                f"an image of this model is {list(shape)} or [{config.num_pixels}] numbers; got "
                f"{list(pixels.shape[1:])}"
            )
        is_raw = jnp.issubdtype(pixels.dtype, jnp.integer)
        x_BHWC = pixels.reshape(-1, *shape).astype(jnp.float32)
        processing = config.processing
        if is_raw and processing.rescale:
            x_BHWC = x_BHWC * processing.rescale
        if is_raw and processing.mean:
            x_BHWC = (x_BHWC - jnp.asarray(processing.mean)) / jnp.asarray(processing.std)
        across = size // patch
        x = x_BHWC.reshape(-1, across, patch, across, patch, channels)
        # Channels first, as torch's convolution has its weights.
        return x.transpose(0, 1, 3, 5, 2, 4).reshape(-1, across**2, channels * patch**2)

    def read(
        self,
        source: ModelInput,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Context:
        """Reads an embedded image; ``hidden_BUD`` has class token, prompt and patches in turn."""
        keys = split_key(key, 2)
        x_BUD = dropout(source.embeddings_BUD, self.dropout_rate, key=keys[0], shared_axis=-2)
        if source.prompt_BPD is not None:
            behind_BUD = put_in_front(source.prompt_BPD, x_BUD[:, 1:])
            x_BUD = jnp.concatenate([x_BUD[:, :1], behind_BUD], axis=1)
        hidden_BUD = self.encoder(
            x_BUD, injections=injections, key=keys[1], remat=remat, scan=self.scan_layers
        )
        mask_BU = jnp.ones(hidden_BUD.shape[:2], bool)
        return Context(hidden_BUD=hidden_BUD, mask_BU=mask_BU, keys_values=())

    def write_hidden(
        self,
        context: Context,
        targets_BS: Array | HostArray,
        *,
        injections: Injections = NO_INJECTIONS,
        key: Array | None = None,
        remat: Remat = "none",
    ) -> Array:
        """Returns the class token's hidden state ``[B, 1, D]``."""
        return context.hidden_BUD[:, :1]

    def logits(self, hidden: Array) -> Array:
        if not self.config.labels:
            raise UserError(
                "this model has no classifier: tune it on labeled images, and give what was tuned "
                "(--prompt)"
            )
        logits: Array = self.classifier(hidden)
        return logits

    def output_vectors(self, tokens_N: Array | HostArray) -> Array:
        return self.classifier.columns(tokens_N).T

    def embed_tokens(self, tokens: Array | HostArray) -> Array:
        _require_text("has no embeddings of words")

    def embedding_table(self) -> Table:
        _require_text("has no embeddings of words")

    def keys_values_of(self, tokens_P: Array) -> dict[str, tuple[Array, Array]]:
        _require_text("has no keys and values of a text")

    def start_decoding(
        self, context: Context, max_length: int
    ) -> tuple[DecodeContext, tuple[KeyValues, ...]]:
        _require_text("writes no text")

    def decode_step(
        self,
        tokens_B: Array,
        position: Array | int,
        caches: tuple[KeyValues, ...],
        context: DecodeContext,
        *,
        injections: Injections = NO_INJECTIONS,
    ) -> tuple[Array, tuple[KeyValues, ...]]:
        _require_text("writes no text")


def _require_text(lacks: str) -> NoReturn:
    raise UserError(f"this model reads images and {lacks}: it only chooses among classes")


def _classifier(config: ViTConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs) -> Linear:
    return Linear(
        config.embed_dim,
        config.vocab_size,
        axes=("embed", "vocab"),
        std=0.02,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
        out_dtype=jnp.float32,
        use_bias=True,
    )


def _dequantized(linear: QuantizedLinear, config: ViTConfig) -> Linear:
    """Returns the classifier with weights that can be trained."""

    def like() -> Linear:
        rngs = nnx.Rngs(0)
        return _classifier(config, dtype=linear.dtype, param_dtype=jnp.float32, rngs=rngs)

    plain = linear_from(linear.columns(slice(None)), like)
    assert plain.bias is not None and linear.bias is not None
    plain.bias.set_value(linear.bias.get_value().astype(jnp.float32))
    return plain
