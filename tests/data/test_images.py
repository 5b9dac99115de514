"""Labeled images from folders, IDX and npz files, and the batches of them."""

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prompt_tuning_jax.config.experiment import Data, Evaluation, Experiment
from prompt_tuning_jax.data.batching.image_examples import (
    augmentation,
    image_examples,
    require_for_images,
    require_for_text,
)
from prompt_tuning_jax.data.batching.loader import TrainBatches, eval_batches
from prompt_tuning_jax.data.images.augment import augmented
from prompt_tuning_jax.data.images.files import decode_image, read_image
from prompt_tuning_jax.data.images.given import given_images
from prompt_tuning_jax.data.images.processing import processed
from prompt_tuning_jax.data.images.sources import is_image_source, open_images
from prompt_tuning_jax.data.images.task import image_task
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.vit.config import ImageProcessing
from tests.tiny_vit import LABELS, MICRO, colored, write_images

WORDS = ClassVocabulary(MICRO)


def png(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    return content.getvalue()


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def gray(number: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, 6, 5), np.uint8)


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 11)
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("no image")
    assert is_image_source(str(tmp_path / "train")) and not is_image_source(str(tmp_path))
    images = open_images(str(tmp_path / "train"), training=True)
    assert images.classes == LABELS and len(images) == 33
    assert images.names[:3] == ("blue/0.png", "blue/1.jpg", "blue/2.png")
    assert images.names[10] == "blue/10.png"  # numbers in their order
    np.testing.assert_array_equal(images.read(0), colored("blue", 0))
    before = images.digest()
    assert before == open_images(str(tmp_path / "train"), training=True).digest()
    (tmp_path / "train/red/3.jpg").write_bytes(png(colored("red", 7)))
    assert open_images(str(tmp_path / "train"), training=True).digest() != before


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_and_their_labels(tmp_path: Path, ending: str) -> None:
    images_NHW, labels_N = gray(4), np.array([0, 2, 1, 2], np.uint8)
    path = tmp_path / f"train-images-idx3-ubyte{ending}"
    write_idx(path, images_NHW)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{ending}", labels_N)
    images = open_images(str(path), training=True)
    assert images.targets == ("0", "2", "1", "2") and images.classes == ("0", "1", "2")
    np.testing.assert_array_equal(images.read(3), images_NHW[3][..., None])
    named = open_images(str(path), labels=("x", "y", "z"), training=True)
    assert named.targets == ("x", "z", "y", "z")
    with pytest.raises(
        UserError, match=r"label 2, but there are 2 classes, from 0: those of data\.labels"
    ):
        open_images(str(path), labels=("x", "y"), training=True)


def test_an_entry_of_an_npz_file_without_its_suffix(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images", b"")
        archive.writestr("labels.npy", b"")
    with pytest.raises(UserError, match=r"a\.npz is damaged"):
        open_images(str(tmp_path / "a.npz"), training=True)


def test_npz_files_of_one_or_several_splits(tmp_path: Path) -> None:
    images_NHW, labels_N = gray(4), np.array([[1], [0], [1], [2]])
    np.savez_compressed(tmp_path / "one.npz", images=images_NHW, labels=labels_N)
    one = open_images(str(tmp_path / "one.npz"), training=True)
    assert one.targets == ("1", "0", "1", "2")
    np.savez(
        tmp_path / "both.npz",
        train_images=np.repeat(images_NHW[..., None], 3, axis=3),
        train_labels=np.array(["a", "b", "a", "b"]),
        val_images=images_NHW[:1],
        val_labels=np.array(["b"]),
    )
    task = image_task(train=str(tmp_path / "both.npz"), eval=str(tmp_path / "both.npz"))
    assert task.labels == ("a", "b")
    assert [e["targets"] for e in task.load("train")] == ["a", "b", "a", "b"]
    assert [e["targets"] for e in task.load("validation")] == ["b"]


DAMAGE: dict[str, tuple[Callable[[Path], str], str]] = {}


def damage(says: str) -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    def register(make: Callable[[Path], str]) -> Callable[[Path], str]:
        DAMAGE[make.__name__] = (make, says)
        return make

    return register


def test_images_to_predict_need_no_labels(tmp_path: Path) -> None:
    images_NHW = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    np.savez(tmp_path / "alone.npz", images=images_NHW)
    np.savez(tmp_path / "split.npz", x_train=images_NHW[:1], x_test=images_NHW)
    write_idx(tmp_path / "new-images-idx3-ubyte", images_NHW)
    for name in ("alone.npz", "split.npz", "new-images-idx3-ubyte"):
        found = given_images(tmp_path / name)
        assert (len(found), found.targets, found.names[1]) == (2, (), f"{name}#1")
        np.testing.assert_array_equal(found.read(1)[..., 0], images_NHW[1])
    np.savez(tmp_path / "wrong.npz", images=images_NHW.astype(np.float32))
    np.savez(tmp_path / "empty.npz", images=images_NHW[:0])
    np.savez(tmp_path / "other.npz", pictures=images_NHW)
    for name, message in (
        ("wrong.npz", "must be uint8"),
        ("empty.npz", "there are no images"),
        ("other.npz", "there is no images, or .*it holds pictures"),
    ):
        with pytest.raises(UserError, match=message):
            given_images(tmp_path / name)


def _idx(folder: Path, content: bytes) -> str:
    write_idx(folder / "t-labels-idx1-ubyte", np.zeros(2))
    (folder / "t-images-idx3-ubyte").write_bytes(content)
    return str(folder / "t-images-idx3-ubyte")


@damage("claims .* bytes; at most")
def idx_that_claims_too_much(folder: Path) -> str:
    return _idx(folder, bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**20, 2**10, 2**10))


@damage("it has fewer bytes than the 200")
def idx_that_is_cut(folder: Path) -> str:
    return _idx(folder, bytes((0, 0, 8, 3)) + struct.pack(">3I", 2, 10, 10) + bytes(90))


@damage("not an IDX file")
def idx_of_another_kind(folder: Path) -> str:
    return _idx(folder, b"PK\3\4" + bytes(100))


@damage("no labels beside it")
def idx_without_labels(folder: Path) -> str:
    write_idx(folder / "t-images-idx3-ubyte", gray(1))
    return str(folder / "t-images-idx3-ubyte")


@damage("3 images and 2 labels")
def idx_with_other_labels(folder: Path) -> str:
    path = _idx(folder, b"")
    write_idx(Path(path), gray(3))
    return path


@damage("cannot be read")
def gz_that_is_none(folder: Path) -> str:
    write_idx(folder / "t-labels-idx1-ubyte", np.zeros(2))
    (folder / "t-images-idx3-ubyte.gz").write_bytes(b"no gz")
    return str(folder / "t-images-idx3-ubyte.gz")


@damage("not an npz file")
def npz_that_is_none(folder: Path) -> str:
    (folder / "x.npz").write_bytes(b"no zip")
    return str(folder / "x.npz")


@damage("it holds a, b")
def npz_with_other_names(folder: Path) -> str:
    np.savez(folder / "x.npz", a=gray(1), b=np.zeros(1))
    return str(folder / "x.npz")


@damage("of type object, which is not read")
def npz_with_pickles(folder: Path) -> str:
    np.savez(folder / "x.npz", images=gray(1), labels=np.array([{}], object))
    return str(folder / "x.npz")


@damage("claims 1,000,000,000,000 bytes, and has 16")
def npz_that_claims_too_much(folder: Path) -> str:
    content = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1000, 1000)}
    np.lib.format.write_array_header_1_0(content, header)
    with zipfile.ZipFile(folder / "x.npz", "w") as archive:
        archive.writestr("images.npy", content.getvalue() + bytes(16))
        archive.writestr("labels.npy", b"")
    return str(folder / "x.npz")


@damage("the images are float32")
def npz_with_floats(folder: Path) -> str:
    np.savez(folder / "x.npz", images=gray(1).astype(np.float32), labels=np.zeros(1, int))
    return str(folder / "x.npz")


@damage("labels are from -1")
def npz_with_negative_labels(folder: Path) -> str:
    np.savez(folder / "x.npz", images=gray(1), labels=np.array([-1]))
    return str(folder / "x.npz")


@damage("no such file")
def nothing(folder: Path) -> str:
    return str(folder / "x.npz")


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_errors_of_one_line(tmp_path: Path, name: str) -> None:
    make, says = DAMAGE[name]
    path = make(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        open_images(path, training=True)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_image_files_with_other_modes_and_damage(tmp_path: Path) -> None:
    color = colored("red", 0)
    assert decode_image(png(color), of="x").shape == (10, 10, 3)
    with_alpha = np.dstack([color, np.full((10, 10, 1), 200, np.uint8)])
    np.testing.assert_array_equal(decode_image(png(with_alpha), of="x"), color)
    wide = np.arange(100, dtype=np.uint16).reshape(10, 10) * 257
    np.testing.assert_array_equal(decode_image(png(wide), of="x")[..., 0], wide // 257)
    turned = Image.fromarray(color[:4])
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    content = io.BytesIO()
    turned.save(content, "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(content.getvalue(), of="x"), np.rot90(color[:4], -1))
    with pytest.raises(UserError, match="x: this is neither a PNG nor a JPEG file"):
        decode_image(b"GIF89a" + bytes(50), of="x")
    with pytest.raises(UserError, match="x: the image is damaged"):
        decode_image(png(color)[:-30], of="x")
    bomb = bytearray(png(color))
    bomb[16:24] = struct.pack(">2I", 9000, 9000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    with pytest.raises(UserError, match="x: 9000 x 9000 pixels"):
        decode_image(bytes(bomb), of="x")
    with pytest.raises(UserError, match="cannot read the image"):
        read_image(tmp_path / "none.png")


def test_resize_and_crop_are_pillows() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)

    def resized(width: int, height: int, how: Image.Resampling) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((width, height), how))

    exact = processed(image, MICRO)
    np.testing.assert_array_equal(exact, resized(8, 8, Image.Resampling.BILINEAR))
    shortest = ImageProcessing(resize="shortest_edge", size=9, resample="bicubic", center_crop=True)
    got = processed(image, replace(MICRO, processing=shortest))
    want = resized(15, 9, Image.Resampling.BICUBIC)[0:8, 3:11]
    np.testing.assert_array_equal(got, want)
    bare = ImageProcessing(resize="none", center_crop=True)
    small = processed(image[:6, :6], replace(MICRO, processing=bare))
    np.testing.assert_array_equal(small[1:7, 1:7], image[:6, :6])
    assert small.sum() == image[:6, :6].sum()  # the rest is black
    with pytest.raises(UserError, match="12 x 20 pixels, and the model"):
        processed(image, replace(MICRO, processing=replace(bare, center_crop=False)))
    one = replace(MICRO, num_channels=1)
    assert processed(image, one).shape == (8, 8, 1)
    gray_image = image[..., :1]
    three = processed(gray_image, MICRO)
    assert (three[..., 0] == three[..., 2]).all()


def test_batches_of_images_have_the_order_of_texts(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 3)
    task = image_task(train=str(tmp_path / "train"))
    examples = image_examples(task, "train", WORDS)
    batches = TrainBatches(examples, batch_size=4, seeds=(0, 1))
    batch = batches[5]
    assert batch["inputs"].shape == (2, 4, 192) and batch["inputs"].dtype == np.uint8
    assert batch["targets"].shape == (2, 4, 1)
    alone = TrainBatches(examples, batch_size=4, seeds=(1,))
    np.testing.assert_array_equal(alone[5]["inputs"][0], batch["inputs"][1])
    seen = np.concatenate([batches[step]["inputs"][0] for step in range(9)])[:9]
    assert len(np.unique(seen, axis=0)) == 9  # an epoch has each image once
    reds = batch["inputs"].reshape(8, 64, 3).mean(axis=1).argmax(axis=1)
    colors = np.array(["red", "green", "blue"])[reds]
    assert [LABELS[n] for n in batch["targets"].ravel()] == colors.tolist()
    (first, *others) = eval_batches(examples, batch_size=8)
    assert first["inputs"].dtype == np.uint8 and others[0]["row_mask"].sum() == 1
    assert batches.empty_batches(0, 3)[0]["inputs"].dtype == np.uint8


def test_augmentations_depend_on_seed_step_and_row_alone(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 4)
    examples = image_examples(image_task(train=str(tmp_path / "train")), "train", WORDS)
    change = augmentation(Data(augment=("flip", "crop")), WORDS)
    changed = TrainBatches(examples, batch_size=6, seeds=(0, 3), augment=change)
    again = TrainBatches(examples, batch_size=6, seeds=(3,), augment=change)
    np.testing.assert_array_equal(again[7]["inputs"][0], changed[7]["inputs"][1])
    some = TrainBatches(examples, batch_size=6, seeds=(0, 3), augment=change, rows=np.array([1, 4]))
    np.testing.assert_array_equal(some[7]["inputs"], changed[7]["inputs"][:, [1, 4]])
    plain = TrainBatches(examples, batch_size=6, seeds=(0, 3))
    assert (plain[7]["targets"] == changed[7]["targets"]).all()
    assert (plain[7]["inputs"] != changed[7]["inputs"]).any(axis=(0, 2)).sum() >= 3
    images = np.arange(40 * 32, dtype=np.uint8).reshape(40, 32)  # rows of 8 x 4, one channel
    arguments = {"shape": (8, 4, 1), "seed": 1, "step": 2, "rows_B": np.arange(40)}
    flipped = augmented(images, ("flip",), **arguments).reshape(40, 8, 4)
    mirrored = (flipped == images.reshape(40, 8, 4)[:, :, ::-1]).all(axis=(1, 2))
    assert 10 < mirrored.sum() < 30
    assert (flipped[~mirrored] == images.reshape(40, 8, 4)[~mirrored]).all()
    for other in ({"step": 3}, {"seed": 2}):
        changed_NT = augmented(images, ("flip",), **{**arguments, **other})
        assert (changed_NT != flipped.reshape(40, 32)).any()
    moved = augmented(images, ("crop",), **arguments).reshape(40, 8, 4)
    by = moved[:, 4, 1].astype(int) - images.reshape(40, 8, 4)[:, 4, 1]
    assert {*(by % 256)} == {(4 * i + j) % 256 for i in (-1, 0, 1) for j in (-1, 0, 1)}


@pytest.mark.parametrize(
    ("experiment", "says"),
    [
        (Experiment(data=Data(chat=True)), "data.chat is True"),
        (Experiment(data=Data(inputs_length=64)), "data.inputs_length is 64"),
        (Experiment(data=Data(buckets="16,32")), "data.buckets is 16,32"),
        (Experiment(data=Data(objectives=("prefix_lm",))), "data.objectives is prefix_lm"),
        (Experiment(data=Data(inputs_template="{a}")), "data.inputs_template"),
        (Experiment(evaluation=Evaluation(strategy="beam")), "strategy is beam"),
        (Experiment(evaluation=Evaluation(normalize_length=True)), "normalize_length"),
    ],
    ids=lambda value: "" if isinstance(value, Experiment) else value.split(" ")[0],
)
def test_what_is_about_text_is_refused(experiment: Experiment, says: str) -> None:
    with pytest.raises(UserError, match=says):
        require_for_images(experiment)
    require_for_text(experiment)


def test_augmentations_of_texts_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.augment is flip,crop"):
        require_for_text(Experiment(data=Data(augment=("flip", "crop"))))
