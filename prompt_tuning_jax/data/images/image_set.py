"""What all sources of images give: names, labels, and images that are read one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from prompt_tuning_jax.data.images.files import read_image

# Pixels from 0 to 255: [H, W, channels] uint8.
Pixels: TypeAlias = np.ndarray


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Labeled images in a fixed order.

    Attributes:
      title: of the set in messages.
      names: of the images, such as ``cat/1.png``.
      targets: the label of each image; empty where there are none.
      classes: all labels that the source names, also those without an image.
      read: the pixels of an image, by its number.
      digest: of all images and labels, in their order.
    """

    title: str
    names: Sequence[str]
    targets: Sequence[str]
    classes: tuple[str, ...]
    read: Callable[[int], Pixels]
    digest: Callable[[], str]

    def __len__(self) -> int:
        return len(self.names)


def files_as_images(paths: Sequence[str]) -> ImageSet:
    """Returns the image files, without labels."""
    return ImageSet(
        title="the images",
        names=tuple(paths),
        targets=(),
        classes=(),
        read=lambda number: read_image(paths[number]),
        digest=lambda: "",
    )
