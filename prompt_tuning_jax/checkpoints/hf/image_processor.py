"""``preprocessor_config.json``: how an image becomes the pixels of a model."""

import math
from pathlib import Path
from typing import Any, cast

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.vit.config import ImageProcessing, ViTConfig
from prompt_tuning_jax.untrusted_input import read_json_file

PREPROCESSOR_CONFIG = "preprocessor_config.json"
_LARGEST = 2**20  # bytes
_LARGEST_SIZE = 2**14  # pixels
# Pillow's filters by their numbers.
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


def read_processing(folder: Path, *, image_size: int, num_channels: int) -> ImageProcessing:
    """Returns the processing that the file of a folder says; transformers' default without a file.

    Raises UserError if the result is not of the model's size, and for what is not supported.
    """
    path = folder / PREPROCESSOR_CONFIG
    default = ImageProcessing(mean=(0.5,) * num_channels, std=(0.5,) * num_channels)
    if not path.is_file():
        return default
    raw = read_json_file(path, max_bytes=_LARGEST)
    if not isinstance(raw, dict):
        raise UserError(f"{path} is a {type(raw).__name__} and not a JSON object")
    raw = {key: value for key, value in raw.items() if value is not None}  # null is not set

    def flag(key: str, usual: bool) -> bool:
        value = raw.get(key, usual)
        if not isinstance(value, bool):
            raise UserError(f"{path}: {key} is {_shown(value)} and must be true or false")
        return value

    size = _size(raw.get("size", image_size), "size", path) if flag("do_resize", True) else {}
    resize, pixels = "none", 0
    if "shortest_edge" in size:
        resize, pixels = "shortest_edge", size["shortest_edge"]
    elif size:
        resize, pixels = "exact", size["height"]
        if size["width"] != pixels:
            raise UserError(f"{path}: size is {pixels} x {size['width']}; only squares are read")
    crop = flag("do_center_crop", False)
    if crop:
        cropped = _size(raw.get("crop_size", image_size), "crop_size", path)
        if set(cropped.values()) != {image_size}:
            raise UserError(
                f"{path}: crop_size is {_shown(raw.get('crop_size'))}, but the model reads images "
                f"of {image_size} pixels"
            )
    elif resize != "exact" or pixels != image_size:
        raise UserError(
            f"{path}: size is {_shown(raw.get('size'))} without a center crop, but the model reads "
            f"images of {image_size} x {image_size} pixels"
        )
    resample = raw.get("resample", 2)
    if type(resample) is not int or not 0 <= resample < len(_RESAMPLE):
        raise UserError(f"{path}: resample is {_shown(resample)}; it must be from 0 to 5")
    rescale = 0.0
    if flag("do_rescale", True):
        (rescale,) = _numbers([raw.get("rescale_factor", 1 / 255)], "rescale_factor", path, 1)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    if flag("do_normalize", True):
        mean = _numbers(raw.get("image_mean", list(default.mean)), "image_mean", path, num_channels)
        std = _numbers(raw.get("image_std", list(default.std)), "image_std", path, num_channels)
        if min(std) <= 0:
            raise UserError(f"{path}: image_std is {_shown(list(std))}; it must be above 0")
    return ImageProcessing(
        resize=cast(Any, resize),
        size=0 if pixels == image_size else pixels,
        resample=cast(Any, _RESAMPLE[resample]),
        center_crop=crop,
        rescale=rescale,
        mean=mean,
        std=std,
    )


def described_processing(config: ViTConfig) -> dict[str, Any]:
    """Returns the file's content, for transformers 4 and 5."""
    processing = config.processing
    pixels = processing.size or config.image_size
    square = {"height": config.image_size, "width": config.image_size}
    exact = {"height": pixels, "width": pixels}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": processing.resize != "none",
        "size": {"shortest_edge": pixels} if processing.resize == "shortest_edge" else exact,
        "resample": _RESAMPLE.index(processing.resample),
        "do_center_crop": processing.center_crop,
        "crop_size": square,
        "do_rescale": processing.rescale > 0,
        "rescale_factor": processing.rescale or 1 / 255,
        "do_normalize": bool(processing.mean),
        "image_mean": list(processing.mean) or [0.5] * config.num_channels,
        "image_std": list(processing.std) or [0.5] * config.num_channels,
    }


def _size(value: Any, key: str, path: Path) -> dict[str, int]:
    """Returns a size as height and width, or as the shortest edge."""
    if type(value) is int:
        value = {"height": value, "width": value}
    known = isinstance(value, dict) and set(value) in ({"height", "width"}, {"shortest_edge"})
    if not known or not all(type(n) is int and 0 < n <= _LARGEST_SIZE for n in value.values()):
        raise UserError(
            f"{path}: {key} is {_shown(value)}; it must be a number of pixels up to "
            f"{_LARGEST_SIZE}, height and width, or shortest_edge"
        )
    return dict(value)


def _numbers(value: Any, key: str, path: Path, number: int) -> tuple[float, ...]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = [value] * number
    if (
        not isinstance(value, list)
        or len(value) != number
        or not all(type(n) in (int, float) and math.isfinite(n) for n in value)
    ):
        raise UserError(f"{path}: {key} is {_shown(value)}; it must have {number} numbers")
    return tuple(map(float, value))


def _shown(value: Any) -> str:
    return repr(value)[:80]
