"""Images in array files: IDX, as MNIST is distributed, and npz."""

import gzip
import hashlib
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from prompt_tuning_jax.data.images.image_set import ImageSet
from prompt_tuning_jax.errors import UserError

_IDX = re.compile(r"(.*)images([.-])idx3-ubyte(\.gz)?")
_IDX_BYTES = 0x08  # the type of unsigned bytes
_MAX_BYTES = 2**32
_MAX_LABELS = 100_000
# The names of a file's splits: those of Keras, MedMNIST and others.
_PARTS = {True: ("train",), False: ("validation", "val", "test")}


def is_idx(path: Path) -> bool:
    """Returns whether this is the name of an IDX file of images."""
    return _IDX.fullmatch(path.name) is not None


def open_idx(path: Path, labels: Sequence[str]) -> ImageSet:
    """Returns the images ``*images-idx3-ubyte`` with the labels beside them.

    Either file may have the suffix ``.gz``.

    ``labels`` name the classes 0, 1, ...; without them the numbers are the names.
    """
    match = _IDX.fullmatch(path.name)
    assert match is not None
    beside = path.with_name(f"{match[1]}labels{match[2]}idx1-ubyte")
    files = [beside, beside.with_name(beside.name + ".gz")]
    labels_file = next((file for file in files if file.is_file()), None)
    if labels_file is None:
        raise UserError(f"{path}: there are no labels beside it; expected {beside.name}")
    images_NHW, numbers_N = _read_idx(path, 3), _read_idx(labels_file, 1)
    return _numbered(images_NHW[..., None], numbers_N, labels, path=path)


def open_npz(path: Path, labels: Sequence[str], *, training: bool) -> ImageSet:
    """Returns the arrays ``images`` and ``labels`` of an npz file, or those of the training split.

    Images are uint8 ``[N, H, W]`` or ``[N, H, W, channels]``; labels are whole numbers or texts.
    The arrays of a split are ``train_images`` and ``train_labels`` (validation, val, test), or
    ``x_train`` and ``y_train``.
    """
    images, targets = _read_npz(path, [("images", "labels"), *_names_of_split(training)])
    images_NHWC = _pixels(images, path)
    targets_N = targets[:, 0] if targets.ndim == 2 and targets.shape[1] == 1 else targets
    if targets_N.ndim != 1 or targets_N.dtype.kind not in "iuU":
        raise UserError(
            f"{path}: the labels are {targets.dtype} {list(targets.shape)}; they must be whole "
            "numbers or texts [N]"
        )
    if targets_N.dtype.kind != "U":
        return _numbered(images_NHWC, targets_N, labels, path=path)
    texts = tuple(str(text) for text in targets_N)
    return _image_set(images_NHWC, texts, tuple(sorted(set(texts))), path=path)


def open_unlabeled(path: Path) -> ImageSet:
    """Returns the images of an IDX or npz file alone; it needs no labels.

    Those of an npz file with several splits are from the one that evaluates.
    """
    if is_idx(path):
        images_NHWC = _read_idx(path, 3)[..., None]
    else:
        names = ["images", *(name for name, _ in _names_of_split(training=False))]
        (images,) = _read_npz(path, [(name,) for name in names])
        images_NHWC = _pixels(images, path)
    if not len(images_NHWC):
        raise UserError(f"{path}: there are no images")
    return _image_set(images_NHWC, None, (), path=path)


def _pixels(images: np.ndarray, path: Path) -> np.ndarray:
    """Returns the images as ``[N, H, W, channels]``."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise UserError(
            f"{path}: the images are {images.dtype} {list(images.shape)}; they must be uint8 "
            "[N, H, W] or [N, H, W, channels]"
        )
    images_NHWC = images[..., None] if images.ndim == 3 else images
    if images_NHWC.shape[3] not in (1, 3):
        raise UserError(f"{path}: the images have {images_NHWC.shape[3]} channels; 1 or 3 are read")
    return images_NHWC


def _numbered(
    images_NHWC: np.ndarray, numbers_N: np.ndarray, labels: Sequence[str], *, path: Path
) -> ImageSet:
    """Returns the set with labels for the numbers of classes."""
    if len(images_NHWC) != len(numbers_N):
        raise UserError(f"{path}: {len(images_NHWC):,} images and {len(numbers_N):,} labels")
    if not len(numbers_N):
        raise UserError(f"{path}: there are no images")
    low, high = int(numbers_N.min()), int(numbers_N.max())
    if low < 0 or high >= _MAX_LABELS:
        raise UserError(f"{path}: labels are from {low} to {high}; they must be from 0")
    if labels and high >= len(labels):
        raise UserError(
            f"{path}: there is a label {high}, but there are {len(labels)} classes, from 0: those "
            "of data.labels or of the training images"
        )
    names = tuple(labels) or tuple(map(str, range(high + 1)))
    return _image_set(images_NHWC, [names[int(n)] for n in numbers_N], names, path=path)


def _image_set(
    images_NHWC: np.ndarray, targets: Sequence[str] | None, classes: tuple[str, ...], *, path: Path
) -> ImageSet:
    if targets is not None and len(images_NHWC) != len(targets):
        raise UserError(f"{path}: {len(images_NHWC):,} images and {len(targets):,} labels")

    def digest() -> str:
        digest = hashlib.sha256(repr((images_NHWC.shape, tuple(targets or ()))).encode())
        digest.update(np.ascontiguousarray(images_NHWC).data)
        return digest.hexdigest()

    return ImageSet(
        title=str(path),
        names=tuple(f"{path.name}#{number}" for number in range(len(images_NHWC))),
        targets=tuple(targets or ()),
        classes=classes,
        read=lambda number: images_NHWC[number],
        digest=digest,
    )


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    def damaged(why: str) -> UserError:
        return UserError(f"{path} is damaged, or not an IDX file: {why}")

    with _open_file(path) as file:
        header = file.read(4)
        if header != bytes((0, 0, _IDX_BYTES, dimensions)):
            raise damaged(f"it must start with {bytes((0, 0, _IDX_BYTES, dimensions)).hex()}")
        sizes = file.read(4 * dimensions)
        if len(sizes) < 4 * dimensions:
            raise damaged("it ends in its header")
        shape = struct.unpack(f">{dimensions}I", sizes)
        number = prod(shape)
        if number > _MAX_BYTES:
            raise damaged(f"it claims {number:,} bytes; at most {_MAX_BYTES:,} are read")
        # A little more than there should be; in pieces, so that a false claim costs no memory.
        content = b"".join(_pieces(file, number + 1))
    if len(content) != number:
        more = "more" if len(content) > number else "fewer"
        raise damaged(f"it has {more} bytes than the {number:,} of {list(shape)}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _pieces(file: Any, number: int) -> Iterator[bytes]:
    while number > 0 and (piece := file.read(min(number, 2**24))):
        number -= len(piece)
        yield piece


@contextmanager
def _open_file(path: Path) -> Iterator[Any]:
    open_: Callable[[Path], Any] = gzip.open if path.suffix == ".gz" else _open_plain
    try:
        with open_(path) as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read: {why}") from None


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb")


def _names_of_split(training: bool) -> list[tuple[str, str]]:
    pairs = []
    for part in _PARTS[training]:
        pairs += [(f"{part}_images", f"{part}_labels"), (f"x_{part}", f"y_{part}")]
    return pairs


def _read_npz(path: Path, choices: Sequence[tuple[str, ...]]) -> list[np.ndarray]:
    """Returns the arrays of the first choice of names that are in the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            chosen = next((each for each in choices if names.issuperset(each)), None)
            if chosen is None:
                wanted = ", or ".join(" and ".join(each) for each in choices)
                listed = ", ".join(sorted(names))[:200]
                raise UserError(f"{path}: there is no {wanted}; it holds {listed or 'nothing'}")
            return [_read_npy(archive, f"{name}.npy", path) for name in chosen]
    # RuntimeError: an encrypted file; KeyError: an entry without the suffix .npy.
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, KeyError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
        raise UserError(f"{path} is damaged, or not an npz file: {why}") from None


def _read_npy(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    """Returns an array whose header is checked against its size before any of it is read."""
    size = archive.getinfo(name).file_size
    if size > _MAX_BYTES:
        raise UserError(f"{path}: {name} has {size:,} bytes; at most {_MAX_BYTES:,} are read")
    with archive.open(name) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(file, max_header_size=10_000)
        except (ValueError, KeyError) as error:
            why = " ".join(str(error).split())[:100]
            raise UserError(f"{path}: {name} is not a numpy array: {why}") from None
        if any(size < 0 for size in shape):
            raise UserError(f"{path}: {name} has the shape {list(shape)}")
        if dtype.hasobject or dtype.kind not in "iuUf":
            raise UserError(f"{path}: {name} is of type {dtype}, which is not read")
        number = prod(shape) * dtype.itemsize
        content = b"".join(_pieces(file, size))
    if len(content) != number:
        raise UserError(f"{path}: {name} claims {number:,} bytes, and has {len(content):,}")
    array = np.frombuffer(content, dtype)
    return array.reshape(shape, order="F" if fortran else "C")
