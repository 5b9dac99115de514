"""Defines the tasks of the T5 and prompt tuning papers, without their rows."""

from dataclasses import dataclass

from prompt_tuning_jax.data.tasks.metrics import Metric
from prompt_tuning_jax.data.tasks.task import Postprocess, Preprocess

TRAIN_VALIDATION_TEST = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class T5Task:
    """A task in its ordinary form: what it reads, how a row becomes text, how it is scored.

    Attributes: name: in the 2021 code, without prefix and ``_examples``; unique.  benchmark:
    super_glue, glue, dpr, squad, mrqa or summarization.  short: its name within the benchmark
    (usually the last part of the TFDS name).  tfds: data set, configuration and version of
    TensorFlow Datasets.  Rows have its fields, with text as str.  splits: those of the original.
    preprocess: row -> examples.  postprocess: as in ``data.tasks.task.Task``; None: texts are
    compared unchanged.  labels: what a classifier chooses between, in the order of the class ids;
    for a transfer task, the labels of the task that the prompt was trained on.  Empty for free
    text.  metrics: with the names and values of the original.  index: the task's number in the task
    index form; None: there is no such form.  rate: its weight in a proportional mixture, the number
    of its training examples; 0 for tasks that are only evaluated.  has_task_word: whether the
    inputs start with a word for the task, which taskless drops.  description: one line.
    """

    name: str
    benchmark: str
    short: str
    tfds: str
    splits: tuple[str, ...] = TRAIN_VALIDATION_TEST
    preprocess: Preprocess
    postprocess: Postprocess | None = None
    labels: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = ()
    index: int | None = None
    rate: int = 0
    has_task_word: bool = True
    description: str = ""
