"""Shapes of vision transformers by name."""

from dataclasses import replace

from prompt_tuning_jax.models.vit.config import ImageProcessing, ViTConfig


def _vit(
    embed_dim: int, num_heads: int, num_layers: int, *, patch_size: int, image_size: int = 224
) -> ViTConfig:
    return ViTConfig(
        vocab_size=0,
        embed_dim=embed_dim,
        num_heads=num_heads,
        head_dim=embed_dim // num_heads,
        mlp_dim=4 * embed_dim,
        num_layers=num_layers,
        image_size=image_size,
        patch_size=patch_size,
    )


_GRAY = ImageProcessing(mean=(0.5,), std=(0.5,))

PRESETS: dict[str, ViTConfig] = {
    # For gray images of 28 x 28 pixels, such as MNIST's: 16 patches.
    "vit_tiny": replace(
        _vit(96, 4, 6, patch_size=7, image_size=28), num_channels=1, processing=_GRAY
    ),
    "vit_s16": _vit(384, 6, 12, patch_size=16),
    "vit_b16": _vit(768, 12, 12, patch_size=16),
    "vit_b32": _vit(768, 12, 12, patch_size=32),
    "vit_l16": _vit(1024, 16, 24, patch_size=16),
    "vit_h14": _vit(1280, 16, 32, patch_size=14),
}
