"""The images that a user gives to predict on: files, folders, array files and arrays."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from prompt_tuning_jax.data.images.arrays import is_idx, open_unlabeled
from prompt_tuning_jax.data.images.image_set import ImageSet, Pixels, files_as_images
from prompt_tuning_jax.data.images.sources import images_in
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import expanded


def given_images(inputs: object) -> ImageSet:
    """Returns the images of a path, of several paths, or of uint8 arrays ``[H, W, channels]``.

    A folder stands for all image files in it and below it, and an IDX or npz file for all its
    images.  Raises UserError for anything else, and for files that do not exist.
    """
    if isinstance(inputs, str | Path):
        place = expanded(inputs)
        if place.is_dir():
            if not (inside := images_in(place)):
                raise UserError(f"{inputs}: there is no PNG or JPEG file in this folder")
            return files_as_images(inside)
        if place.suffix == ".npz" or is_idx(place):
            return open_unlabeled(place)
        inputs = [inputs]
    if not isinstance(inputs, Iterable):
        raise UserError(f"inputs must be images, not {type(inputs).__name__}")
    each = [*inputs]
    if not each:
        raise UserError("there are no inputs")
    if any(isinstance(one, str | Path) for one in each):
        files = []
        for number, one in enumerate(each):
            if not isinstance(one, str | Path):
                raise UserError(f"inputs[{number}] must be a path, as others are")
            files.append(expanded(one))
            if not files[-1].is_file():
                raise UserError(f"{one}: no such image file; this model reads images")
        return files_as_images([*map(str, files)])
    arrays = [_array(one, number) for number, one in enumerate(each)]
    return ImageSet(
        title="the images",
        names=tuple(f"inputs[{number}]" for number in range(len(arrays))),
        targets=(),
        classes=(),
        read=lambda number: arrays[number],
        digest=lambda: "",
    )


def _array(given: object, number: int) -> Pixels:
    array = np.asarray(given) if hasattr(given, "__array__") else np.zeros(0)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise UserError(
            f"inputs[{number}] must be the path of an image, or its pixels as uint8 [H, W] or "
            f"[H, W, 1 or 3]; got {type(given).__name__}"
        )
    return array
