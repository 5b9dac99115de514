"""Opens a user's labeled images: a folder with a folder for each class, IDX files, or npz."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from prompt_tuning_jax.data.images.arrays import is_idx, open_idx, open_npz
from prompt_tuning_jax.data.images.files import MAX_FILE_BYTES, is_image_file, read_image
from prompt_tuning_jax.data.images.image_set import ImageSet
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import expanded, natural_order

_LOOKED_AT = 100  # entries of a folder, to tell what it holds


def is_image_source(path: str) -> bool:
    """Returns whether this names images, and not rows of text; a folder is looked into."""
    place = expanded(path)
    if not path or place.suffix == ".npz" or is_idx(place):
        return bool(path)
    if not place.is_dir():
        return False
    classes = (child for child in islice(_entries(place), _LOOKED_AT) if child.is_dir())
    return any(is_image_file(x) for child in classes for x in islice(_entries(child), _LOOKED_AT))


def open_images(path: str, *, labels: Sequence[str] = (), training: bool) -> ImageSet:
    """Opens the images at a path; nothing of a folder's files is read yet.

    Args:
      path: for which ``is_image_source`` is true.
      labels: the names of the classes; for numbered classes in their order.
      training: which split of an npz file with several.

    Raises UserError for files that are missing, damaged or of another form.
    """
    place = expanded(path)
    if not place.exists():
        raise UserError(f"{path}: no such file or folder")
    if place.is_dir():
        return _open_folder(place)
    if is_idx(place):
        return open_idx(place, labels)
    return open_npz(place, labels, training=training)


def images_in(folder: Path) -> list[str]:
    """Returns the image files in a folder and in those below it, in the order of their names."""
    paths = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [str(Path(root, name)) for name in sorted(files, key=natural_order)]
    return [path for path in paths if is_image_file(path) and not Path(path).name.startswith(".")]


def _open_folder(folder: Path) -> ImageSet:
    names: list[str] = []
    targets: list[str] = []
    classes: list[str] = []
    for child in _entries(folder):
        files = images_in(child) if child.is_dir() else []
        if files:
            classes.append(child.name)
            names += [str(Path(file).relative_to(folder)) for file in files]
            targets += [child.name] * len(files)
    if not names:
        raise UserError(f"{folder}: no folder in it has a PNG or JPEG file; a class is a folder")

    def digest() -> str:
        whole = hashlib.sha256()
        for name, target in zip(names, targets, strict=True):
            try:
                with (folder / name).open("rb") as file:
                    content = file.read(MAX_FILE_BYTES)
            except OSError as error:
                raise UserError(f"{folder / name}: cannot be read: {error.strerror}") from None
            whole.update(hashlib.sha256(content).digest() + target.encode() + b"\0")
        return whole.hexdigest()

    return ImageSet(
        title=str(folder),
        names=tuple(names),
        targets=tuple(targets),
        classes=tuple(classes),
        read=lambda number: read_image(folder / names[number]),
        digest=digest,
    )


def _entries(folder: Path) -> Iterator[Path]:
    """Returns the entries of a folder that are not hidden, in the order of their names."""
    try:
        children = sorted(folder.iterdir(), key=lambda child: natural_order(child.name))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
    return (child for child in children if not child.name.startswith("."))
