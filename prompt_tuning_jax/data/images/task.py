"""Tasks of labeled images: an example's text is the name of its image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prompt_tuning_jax.data.images.image_set import ImageSet
from prompt_tuning_jax.data.images.sources import open_images
from prompt_tuning_jax.data.tasks.files import FILE_TASK
from prompt_tuning_jax.data.tasks.metrics import get_metric
from prompt_tuning_jax.data.tasks.task import Example, Source, Task
from prompt_tuning_jax.errors import UserError

_VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class ImageSource(Source):
    """Images by split; a row has the name of an image and its label."""

    images: Mapping[str, ImageSet] = field(default_factory=dict)


def image_task(
    *,
    train: str = "",
    eval: str = "",  # the names of experiment.Data's fields
    train_split: str = "train",
    eval_split: str = "validation",
    labels: Sequence[str] = (),
    metrics: Sequence[str] = (),
) -> Task:
    """Makes a task of one or two sets of images; the arguments are the fields of ``Data``.

    Labels are the classes of the training set unless ``labels`` names them; for IDX files and
    numbered npz files ``labels`` names the classes in their order.  Raises UserError for images
    that are missing or damaged, and for two splits of one name.
    """
    if train and eval and train_split == eval_split:
        raise UserError(
            f"data.train_split and data.eval_split are both {train_split!r}; rename one"
        )
    sets = {}
    if train:
        sets[train_split] = open_images(train, labels=labels, training=True)
        labels = tuple(labels) or sets[train_split].classes
    if eval:
        sets[eval_split] = open_images(eval, labels=labels, training=False)
    source = ImageSource(
        splits=tuple(sets),
        rows=lambda split, data_dir: _rows(sets[split]),
        fingerprint=lambda split, data_dir: sets[split].digest(),
        display_names={split: images.title for split, images in sets.items()},
        images=sets,
    )
    return Task(
        name=FILE_TASK + next(iter(sets.values())).title.rpartition("/")[2],
        source=source,
        labels=tuple(labels),
        metrics=tuple(get_metric(name, labels=labels) for name in metrics or ("accuracy",)),
        description=", ".join(f"{split}: {images.title}" for split, images in sets.items()),
        version=_VERSION,
    )


def _rows(images: ImageSet) -> list[Example]:
    return [
        {"inputs": name, "targets": target}
        for name, target in zip(images.names, images.targets, strict=True)
    ]
