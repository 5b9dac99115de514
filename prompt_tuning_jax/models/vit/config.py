"""Configuration of vision transformers, and of how an image becomes their pixels."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from prompt_tuning_jax.models.config import ModelConfig, TokenIds

# No class is padding or an end, so that every id from 0 is a class.
CLASS_IDS = TokenIds(pad=-1, eos=-1, start=-1)


@dataclass(frozen=True, kw_only=True)
class ImageProcessing:
    """From an image file to the pixels of a model: resize, crop, then rescale and normalize.

    Attributes:
      resize: ``exact`` resizes to ``size`` by ``size``, ``shortest_edge`` the shorter side to
        ``size``; ``none`` does not resize.
      size: in pixels; 0 is the model's image size.
      resample: Pillow's filter.
      center_crop: cut (or pad with black) to the model's image size around the center.
      rescale: a factor on pixels from 0 to 255; 0 does not rescale.
      mean: subtracted from each channel after that; empty for none.
      std: divides each channel after that; empty for none.
    """

    resize: Literal["exact", "shortest_edge", "none"] = "exact"
    size: int = 0
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bilinear"
    center_crop: bool = False
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ModelConfig):
    """The architecture of a vision transformer (Dosovitskiy et al. 2021).

    Attributes:
      num_layers: the number of layers L.
      image_size: height and width of an image, in pixels.
      patch_size: height and width of a patch.
      num_channels: 3 for colors, 1 for gray.
      mlp_activations: of the mlp; a single one.
      norm_eps: added to the variance before the root.
      qkv_bias: biases of queries, keys and values.
      labels: the names of the classes, in the order of the logits; empty for a model without a
        classifier.
      processing: how an image becomes pixels.
    """

    implementation: ClassVar[str] = "prompt_tuning_jax.models.vit.model:ViT"
    model_type: ClassVar[str] = "vit"  # Hugging Face's name of the architecture
    reads_images: ClassVar[bool] = True

    num_layers: int
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    mlp_activations: tuple[str, ...] = ("gelu_exact",)
    norm_eps: float = 1e-12
    qkv_bias: bool = True
    labels: tuple[str, ...] = ()
    processing: ImageProcessing = ImageProcessing()
    token_ids: TokenIds = CLASS_IDS

    @property
    def num_reading_layers(self) -> int:
        return self.num_layers

    @property
    def num_patches(self) -> int:
        """The number N of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_pixels(self) -> int:
        """The numbers in an image: height, width and channels."""
        return self.image_size**2 * self.num_channels

    def input_positions(self, length: int) -> int:
        """Returns 1 + N: the class token and the patches."""
        return 1 + self.num_patches

    def forward_flops(
        self, *, rows: int, prompt_length: int, inputs_length: int, targets_length: int
    ) -> float:
        width, joined = self.embed_dim, self.num_heads * self.head_dim
        positions = prompt_length + self.input_positions(inputs_length)
        layer = 4 * width * joined + 2 * width * self.mlp_dim + 2 * joined * positions
        patches = self.num_patches * self.patch_size**2 * self.num_channels * width
        row = self.num_layers * positions * layer + patches + width * self.vocab_size
        return 2.0 * rows * row
