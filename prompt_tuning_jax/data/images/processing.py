"""Makes the pixels of a model from an image: channels, resize and crop, as its config says."""

import numpy as np

from prompt_tuning_jax.data.images.files import pillow
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.vit.config import ImageProcessing, ViTConfig


def processed(image: np.ndarray, config: ViTConfig) -> np.ndarray:
    """Returns ``[image_size, image_size, num_channels]`` uint8 of ``[H, W, channels]`` uint8.

    Resizing is Pillow's, as in the image processors of transformers 4.  Those of transformers 5 use
    torchvision, whose pixels differ by one of 255 steps here and there.
    """
    array = _with_channels(image, config.num_channels)
    array = _resized(array, config.processing, config.image_size)
    if config.processing.center_crop:
        array = _center_crop(array, config.image_size)
    size = (config.image_size, config.image_size)
    if array.shape[:2] != size:
        raise UserError(
            f"an image has {array.shape[0]} x {array.shape[1]} pixels, and the model, which does "
            f"not resize, reads {size[0]} x {size[1]}"
        )
    return array


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    present = image.shape[2]
    if present == channels:
        return image
    if channels == 1:
        gray = pillow().fromarray(image).convert("L")
        return np.asarray(gray, np.uint8)[:, :, None]
    if present == 1:
        return np.repeat(image, channels, axis=2)
    raise UserError(f"an image has {present} channels, and the model reads {channels}")


def _resized(image: np.ndarray, processing: ImageProcessing, image_size: int) -> np.ndarray:
    height, width = image.shape[:2]
    size = processing.size or image_size
    if processing.resize == "none":
        return image
    wanted = (size, size)
    if processing.resize == "shortest_edge":
        shortest = min(height, width)
        wanted = (height * size // shortest, width * size // shortest)
    if wanted == (height, width):
        return image
    Image = pillow()
    gray = image.shape[2] == 1
    whole = Image.fromarray(image[:, :, 0] if gray else image)
    filter_ = getattr(Image.Resampling, processing.resample.upper())
    array = np.asarray(whole.resize(wanted[::-1], filter_), np.uint8)
    return array[:, :, None] if gray else array


def _center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the middle out of the image, behind black borders where it is smaller."""
    for axis in (0, 1):
        missing = size - image.shape[axis]
        if missing > 0:
            pads = [(0, 0)] * 3
            pads[axis] = ((missing + 1) // 2, missing // 2)
            image = np.pad(image, pads)
    top, left = ((n - size) // 2 for n in image.shape[:2])
    return image[top : top + size, left : left + size]
