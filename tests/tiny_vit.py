"""A vision transformer so small that a test compiles in a second, and images for it."""

import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.models.vit.config import ViTConfig
from prompt_tuning_jax.models.vit.model import ViT

LABELS = ("blue", "green", "red")
MICRO = ViTConfig(
    vocab_size=3,
    embed_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=24,
    num_layers=2,
    image_size=8,
    patch_size=4,
    labels=LABELS,
)


def make_vit(config: ViTConfig = MICRO, **kwargs: Any) -> ViT:
    """Weights from numpy (nothing to compile) that make every part matter, norms included."""
    cloned: ViT = nnx.clone(_drawn(config, **kwargs))
    return cloned


@functools.cache
def _drawn(config: ViTConfig, **kwargs: Any) -> ViT:
    words = ClassVocabulary(config)
    model: ViT = nnx.eval_shape(
        lambda: ViT(config, rngs=nnx.Rngs(0), **{"vocabulary": words, **kwargs})
    )
    random = np.random.default_rng(0)
    values = {}
    for name, shape in param_tree.split(model)[1].items():
        drawn = random.normal(size=shape.shape).astype(np.float32)
        if name.endswith("/scale"):
            drawn = 1 + 0.3 * drawn
        elif name.endswith("/kernel"):
            drawn = drawn * shape.shape[0] ** -0.5
        else:
            drawn = 0.3 * drawn
        values[name] = jnp.asarray(drawn, shape.dtype)
    param_tree.fill(model, values)
    return model


def write_vit(folder: Path, config: ViTConfig = MICRO) -> Path:
    """The folder of such a model."""
    params = param_tree.split(make_vit(config))[1]
    write_hf(folder, config, params, dtype="stored")
    return folder


def pixels(rows: int, *, seed: int = 0, size: int = 8) -> np.ndarray:
    """Random images ``[B, T]`` uint8."""
    return np.random.default_rng(seed).integers(0, 256, (rows, size * size * 3), np.uint8)


def colored(label: str, seed: int, size: int = 10) -> np.ndarray:
    """A noisy image in the color of its label."""
    noise = np.random.default_rng(seed).integers(0, 90, (size, size, 3), np.uint8)
    noise[:, :, ("red", "green", "blue").index(label)] += 160
    return noise


def write_images(folder: Path, each: int, *, seed: int = 0) -> Path:
    """A folder for each label, with PNG and JPEG files in turns."""
    from PIL import Image

    for label in LABELS:
        place = folder / label
        place.mkdir(parents=True)
        for number in range(each):
            image = Image.fromarray(colored(label, 100 * seed + number))
            image.save(place / f"{number}.{'jpg' if number % 2 else 'png'}")
    return folder
