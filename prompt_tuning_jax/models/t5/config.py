"""Configuration of T5 encoder-decoders, and presets of the published sizes."""

from dataclasses import dataclass, replace
from typing import ClassVar

from prompt_tuning_jax.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class T5Config(ModelConfig):
    """The architecture of a T5 (Raffel et al. 2020; t5x/examples/t5/network.py, class T5Config).

    ``mlp_activations`` has one entry per input projection of the mlp: two for a gated mlp (T5 1.1),
    one for T5 1.0.  With ``tie_embeddings`` the logits are the scaled decoder output times the
    embedding table, and there is no ``decoder/logits_dense``.  With ``relpos_per_layer`` every
    self-attention has a separate relative position bias (UMT5, T5X's scanned models) instead of
    one shared by the stack.
    """

    implementation: ClassVar[str] = "prompt_tuning_jax.models.t5.model:T5"

    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    tie_embeddings: bool = False
    relpos_num_buckets: int = 32
    relpos_max_distance: int = 128
    relpos_per_layer: bool = False
    layer_norm_eps: float = 1e-6

    @property
    def num_reading_layers(self) -> int:
        return self.num_encoder_layers

    def forward_flops(
        self, *, rows: int, prompt_length: int, inputs_length: int, targets_length: int
    ) -> float:
        joined, width = self.num_heads * self.head_dim, self.embed_dim
        mlp = (len(self.mlp_activations) + 1) * width * self.mlp_dim
        attention, encoder_length = 4 * width * joined, prompt_length + inputs_length
        read, written = rows * encoder_length, rows * targets_length
        encoder = self.num_encoder_layers * read * (attention + mlp + 2 * joined * encoder_length)
        decoder = self.num_decoder_layers * (
            read * 2 * width * joined  # keys and values of the cross-attention
            + written * (attention + attention / 2 + mlp)
            + written * 2 * joined * (targets_length + encoder_length)
        )
        return 2.0 * (encoder + decoder + written * width * self.vocab_size)


def _t5_1_1(embed_dim: int, num_heads: int, mlp_dim: int, num_layers: int) -> T5Config:
    return T5Config(
        vocab_size=32_128,
        embed_dim=embed_dim,
        num_heads=num_heads,
        head_dim=64,
        mlp_dim=mlp_dim,
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
    )


def _t5_1_0(embed_dim: int, num_heads: int, head_dim: int, mlp_dim: int, layers: int) -> T5Config:
    return replace(
        _t5_1_1(embed_dim, num_heads, mlp_dim, layers),
        head_dim=head_dim,
        mlp_activations=("relu",),
        tie_embeddings=True,
    )


PRESETS: dict[str, T5Config] = {
    # Encoder-heavy: prompts act through the encoder, and ranking labels runs the decoder once per
    # label.  The vocabulary has 6,000 pieces, padded to a multiple of the lane width.
    "tiny": T5Config(
        vocab_size=6_016,
        embed_dim=256,
        num_heads=4,
        head_dim=64,
        mlp_dim=512,
        num_encoder_layers=6,
        num_decoder_layers=3,
    ),
    "small": _t5_1_1(512, 6, 1024, 8),
    "base": _t5_1_1(768, 12, 2048, 12),
    "large": _t5_1_1(1024, 16, 2816, 24),
    "xl": _t5_1_1(2048, 32, 5120, 24),
    "xxl": _t5_1_1(4096, 64, 10_240, 24),
    "t5_1_0_small": _t5_1_0(512, 8, 64, 2048, 6),
    "t5_1_0_base": _t5_1_0(768, 12, 64, 3072, 12),
    "t5_1_0_large": _t5_1_0(1024, 16, 64, 4096, 24),
    "t5_1_0_xl": _t5_1_0(1024, 32, 128, 16_384, 24),
    "t5_1_0_xxl": _t5_1_0(1024, 128, 128, 65_536, 24),
}
