"""Reads image files (PNG and JPEG), with limits on what they may unpack to."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")
_FORMATS = ("PNG", "JPEG")
MAX_FILE_BYTES = 2**26
_MAX_PIXELS = 2**26  # 8192 x 8192
_ORIENTATION = 0x0112  # the tag that says how a camera was held


def is_image_file(path: str | Path) -> bool:
    """Returns whether this is the name of an image file."""
    return Path(path).suffix.lower() in SUFFIXES


def pillow() -> Any:
    """Returns the module ``PIL.Image``; UserError if Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError(
            "reading images needs Pillow; run: pip install 'prompt_tuning_jax[vision]'"
        ) from None
    return Image


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image file as ``[H, W, 3]`` or, if it is gray, ``[H, W, 1]``.

    Raises UserError for a file that is missing, too large, damaged, or neither PNG nor JPEG.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot read the image: {error.strerror}") from None
    return decode_image(content, of=str(path))


def decode_image(content: bytes, *, of: str) -> np.ndarray:
    """Decodes the bytes of an image file; ``of`` names it in messages.  See ``read_image``."""
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"{of}: an image file has at most {MAX_FILE_BYTES:,} bytes")
    Image = pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            # Only these decoders: Pillow has dozens, of formats that nobody checks.
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > _MAX_PIXELS:
                    raise UserError(
                        f"{of}: {width} x {height} pixels; at most {_MAX_PIXELS:,} in all are read"
                    )
                return _as_array(image)
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{of}: this is neither a PNG nor a JPEG file") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        why = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{of}: the image is damaged: {why}") from None


def _as_array(image: Any) -> np.ndarray:
    from PIL import ImageOps

    if image.mode.startswith("I") or image.mode == "F":  # 16 bits for each pixel
        wide = np.asarray(image, np.float64)
        return np.clip(wide / 257.0 + 0.5, 0, 255).astype(np.uint8)[:, :, None]
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    is_gray = image.mode in ("1", "L", "LA")
    array = np.asarray(image.convert("L" if is_gray else "RGB"), np.uint8)
    return array[:, :, None] if is_gray else array
