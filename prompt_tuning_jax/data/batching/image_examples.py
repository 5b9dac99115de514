"""Labeled images as examples: rows of pixels in place of tokens, numbers of classes as targets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from prompt_tuning_jax.config.experiment import Data, Evaluation, Experiment
from prompt_tuning_jax.data.batching.example_cache import make_ragged
from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples
from prompt_tuning_jax.data.images.augment import augmented
from prompt_tuning_jax.data.images.image_set import ImageSet
from prompt_tuning_jax.data.images.processing import processed
from prompt_tuning_jax.data.images.task import ImageSource
from prompt_tuning_jax.data.tasks.task import Task
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.vit.config import ViTConfig
from prompt_tuning_jax.typing import HostArray

_KEPT_BYTES = 2**30  # of pixels that are decoded once and kept
# Fields of the data that are about text.
_OF_TEXT = (
    *("objectives", "chat", "buckets", "inputs_template", "targets_template", "targets"),
    *("inputs_column", "targets_column", "header", "columns", "separator", "allow_empty_targets"),
)
_LENGTHS = ("inputs_length", "targets_length")


class PixelRows:
    """The pixels ``[N, T]`` of a set of images, read when they are asked for.

    It stands where ``Ragged`` has the tokens of texts; every row has the same length T.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, images: ImageSet, config: ViTConfig, numbers_N: HostArray | None = None):
        self._images, self._config = images, config
        self._numbers_N = np.arange(len(images)) if numbers_N is None else numbers_N
        self._kept: dict[int, HostArray] = {}
        self._keeps = len(self._numbers_N) * config.num_pixels <= _KEPT_BYTES

    def __len__(self) -> int:
        return len(self._numbers_N)

    @property
    def lengths(self) -> HostArray:
        """[N] int64: T for each image."""
        return np.full(len(self), self._config.num_pixels)

    def num_longer_than(self, length: int) -> int:
        """No image is cut."""
        return 0

    def padded(self, indices_B: HostArray, length: int, *, padding: int = 0) -> HostArray:
        """Gathers images -> [B, T] uint8."""
        return np.stack([self._pixels(int(self._numbers_N[i])) for i in indices_B])

    def select(self, indices: HostArray) -> "PixelRows":
        """Returns the images at ``indices``, in that order."""
        return PixelRows(self._images, self._config, self._numbers_N[indices])

    def _pixels(self, number: int) -> HostArray:
        pixels_T = self._kept.get(number)
        if pixels_T is None:
            try:
                pixels_T = processed(self._images.read(number), self._config).reshape(-1)
            except UserError as error:
                name = self._images.names[number]
                raise UserError(str(error) if name in str(error) else f"{name}: {error}") from None
            if self._keeps:
                self._kept[number] = pixels_T
        return pixels_T


@dataclass(frozen=True, kw_only=True)
class ImageExamples(TokenizedExamples):
    """A split of labeled images."""

    images_digest: Callable[[], str] = lambda: ""

    def report(self) -> str:
        """Returns one line with the number of images."""
        return f"{self.title}: {len(self):,} image{'s' * (len(self) != 1)}"

    def digest(self) -> str:
        """Returns a digest of the images and their labels, in their order."""
        return self.images_digest()

    def with_classes(self, vocabulary: ClassVocabulary) -> "ImageExamples":
        """Returns the examples with the numbers that a model's classifier has for their labels."""
        rows = vocabulary.encode_targets([example["targets"] for example in self.texts])
        return replace(self, targets=make_ragged(rows))

    def at_most(self, number: int) -> "ImageExamples":
        chosen: Any = super().at_most(number)
        if chosen is self:
            return self
        whole = self.images_digest
        return replace(chosen, images_digest=lambda: f"{whole()} {number}")

    def drawn(self, number: int, *, seed: int) -> "ImageExamples":
        chosen: Any = super().drawn(number, seed=seed)
        if chosen is self:
            return self
        whole = self.images_digest
        return replace(chosen, images_digest=lambda: f"{whole()} {number} drawn with {seed}")


def image_examples(task: Task, split: str, vocabulary: ClassVocabulary) -> ImageExamples:
    """Returns the images of a split, with the numbers of their labels among the task's.

    Raises UserError for a split that does not exist or is empty, and for a task of texts.
    """
    source = task.source
    if not isinstance(source, ImageSource):
        raise UserError(
            f"task {task.name!r} has texts, and this model reads images: set data.train to a "
            "folder of images with a folder for each class, or to an IDX or npz file"
        )
    texts = list(task.load(split))
    images = source.images[split]
    if not texts:
        raise UserError(f"{images.title}: there are no images")
    numbers = {label: number for number, label in enumerate(task.labels)}
    config = vocabulary.images
    return ImageExamples(
        task=task,
        split=split,
        inputs=PixelRows(images, config),  # type: ignore[arg-type]  # has what batches use
        # An unknown label is an error once all are compared.
        targets=make_ragged([[numbers.get(example["targets"], -1)] for example in texts]),
        inputs_length=config.num_pixels,
        targets_length=1,
        load_texts=lambda: texts,
        token_ids=vocabulary.token_ids,
        images_digest=images.digest,
    )


def unlabeled_examples(images: ImageSet, vocabulary: ClassVocabulary) -> ImageExamples:
    """Images to predict the labels of."""
    texts = [{"inputs": name, "targets": ""} for name in images.names]
    source = ImageSource(
        splits=("predict",), rows=lambda split, data_dir: texts, fingerprint=lambda split, _: ""
    )
    return ImageExamples(
        task=Task(name="images", source=source),
        split="predict",
        inputs=PixelRows(images, vocabulary.images),  # type: ignore[arg-type]
        targets=make_ragged([[-1]] * len(images)),
        inputs_length=vocabulary.images.num_pixels,
        targets_length=1,
        load_texts=lambda: texts,
        token_ids=vocabulary.token_ids,
    )


def augmentation(
    data: Data, vocabulary: ClassVocabulary
) -> Callable[[HostArray, int, int, HostArray], HostArray] | None:
    """Returns the changes of ``data.augment`` as (images, seed, step, rows) -> images."""
    if not data.augment:
        return None
    config = vocabulary.images
    shape = (config.image_size, config.image_size, config.num_channels)

    def change(pixels_BT: HostArray, seed: int, step: int, rows_B: HostArray) -> HostArray:
        return augmented(pixels_BT, data.augment, shape=shape, seed=seed, step=step, rows_B=rows_B)

    return change


def require_for_images(experiment: Experiment, *, lengths: bool = True) -> None:
    """Raises UserError for the first field that is about text, if the model reads images.

    ``lengths=False`` allows lengths in tokens, which a default for texts may have.
    """
    for error in _errors(experiment, _OF_TEXT + (_LENGTHS if lengths else ())):
        raise UserError(f"{error}, and this model reads images; drop it")


def require_for_text(experiment: Experiment) -> None:
    """Raises UserError for the first field that is about images, if the model reads text."""
    if experiment.data.augment:
        raise UserError(
            f"data.augment is {','.join(experiment.data.augment)}, which changes images, and this "
            "model reads text; drop it"
        )


def _errors(experiment: Experiment, names: tuple[str, ...]) -> Iterator[str]:
    data, usual = experiment.data, {f.name: f.default for f in fields(Data)}
    for name in names:
        if (value := getattr(data, name)) != usual[name]:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            yield f"data.{name} is {shown}, which is about text"
    evaluation = experiment.evaluation
    if evaluation.strategy in ("greedy", "beam"):
        yield f"evaluation.strategy is {evaluation.strategy}, which generates text"
    for name in ("normalize_length", "min_length", "repetition_penalty", "no_repeat_ngram_size"):
        if getattr(evaluation, name) != getattr(Evaluation(), name):
            yield f"evaluation.{name} is {getattr(evaluation, name)}, which is about text"
