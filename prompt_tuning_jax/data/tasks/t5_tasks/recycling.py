"""The tasks of prompt recycling (Lester et al. 2022) under the names of the original code.

Each data set has a task to train on, whose validation split is the end of the training data, a task
to test by generation, and one that ranks the labels (``_rc``).  Mixtures put them together.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from prompt_tuning_jax.data.tasks.metrics import Metric
from prompt_tuning_jax.data.tasks.t5_tasks import metrics
from prompt_tuning_jax.data.tasks.t5_tasks.glue_tables import GLUE
from prompt_tuning_jax.data.tasks.t5_tasks.postprocess import class_id
from prompt_tuning_jax.data.tasks.t5_tasks.preprocess import labeled_text, record
from prompt_tuning_jax.data.tasks.t5_tasks.registry import make_task
from prompt_tuning_jax.data.tasks.t5_tasks.split_rows import Part, with_parts
from prompt_tuning_jax.data.tasks.t5_tasks.t5_task import T5Task
from prompt_tuning_jax.data.tasks.t5_tasks.tables import SUPER_GLUE
from prompt_tuning_jax.data.tasks.task import Example, Mixture, Row, Task

_UNLABELED = "UNK"
# What a label is called, for IMDB and for QQP, by class.
_IMDB_LABELS = (("0", "1"), ("negative", "positive"))
_QQP_LABELS = (
    ("not_duplicate", "duplicate"),
    ("0", "1"),
    ("unique", "duplicate"),
    ("not duplicate", "duplicate"),
)
_SENTIMENTS = ("positive", "negative")
_RANKED = (metrics.ACCURACY, metrics.F1_WITH_INVALID)


def review(row: Row, *, labels: Sequence[str]) -> list[Example]:
    """{text, label} -> the text as it is, and the label's name; "UNK" for -1."""
    label = int(row["label"])
    return [{"inputs": row["text"], "targets": _UNLABELED if label == -1 else labels[label]}]


def gap(row: Row) -> list[Example]:
    """Returns one example for a gap in a passage.

    It has all answers and entities, to rank the entities.
    """
    (first, *_) = record(row)
    return [{**first, "entities": [str(entity) for entity in row["entities"]]}]


def one_of_answers(text: str, example: Example, is_target: bool) -> list[str] | str:
    """Returns all answers of the example for targets, and the unchanged text for predictions."""
    return list(example["answers"]) if is_target else text


def rank_accuracy(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> float:
    """Returns the percent of predictions that are among the right texts of their example."""
    right = sum(text in accepted for accepted, text in zip(targets, predictions, strict=True))
    return 100.0 * right / len(targets)


def _split(task: Task, name: str, *, last: int) -> Task:
    """Returns a task that trains on all but the last training rows, and validates on these."""
    parts = {
        "train": Part(split="train", without_last=last),
        "validation": Part(split="train", last=last),
    }
    return replace(
        task,
        name=name,
        source=with_parts(task.source, parts),
        description=f"{task.description} (validation: the last {last:,} training rows)",
    )


def _test(task: Task, name: str, *, split: str = "validation") -> Task:
    """Returns a task that is only evaluated."""
    return replace(
        task, name=name, source=with_parts(task.source, {"validation": Part(split=split)})
    )


def _ranked(task: Task, name: str, *, normalized: bool = False) -> Task:
    """Returns a task that ranks its labels, as the original's rank classification does."""
    how = "labels are ranked" + (" by the mean over their tokens" if normalized else "")
    return replace(
        task,
        name=name,
        ranks=True,
        normalize_length=normalized,
        metrics=_RANKED,
        description=f"{task.description}; {how}",
    )


def _mixtures(name: str, trained: Task, evaluated: Sequence[Task]) -> Iterator[Mixture]:
    """Yields the mixture to train on, with early stopping, and the one of the tests alone."""
    yield Mixture(
        name=name,
        tasks=(trained,),
        rates=(1.0,),
        evaluated=tuple(evaluated),
        description=f"{trained.name}, also tested by generation and by ranking",
    )
    yield Mixture(
        name=f"{name}_eval",
        tasks=tuple(evaluated),
        rates=(1.0,) * len(evaluated),
        description="the tests alone; for eval",
    )


def _sst2() -> Iterator[Task | Mixture]:
    (base,) = (task for task in GLUE if task.name == "glue_sst2_v200")
    taskless = make_task(base, "taskless")
    name = "pr:glue_sst2_v200"
    trained = _split(taskless, f"{name}_train", last=1000)
    test = _test(taskless, f"{name}_test")
    ranked = _ranked(test, f"{name}_test_rc")
    yield from (trained, test, ranked)
    yield from _mixtures(name, trained, (test, ranked))


def _imdb() -> Iterator[Task | Mixture]:
    for labels in _IMDB_LABELS:
        base = T5Task(
            name="imdb",
            benchmark="imdb",
            short="imdb_reviews",
            tfds="imdb_reviews/plain_text:1.0.0",
            splits=("train", "test"),
            preprocess=partial(review, labels=labels),
            postprocess=partial(class_id, labels=labels),
            labels=labels,
            metrics=(metrics.ACCURACY,),
            has_task_word=False,
            description=f"is a film review positive? ({' or '.join(labels)})",
        )
        task = make_task(base, "ordinary")
        name = f"pr:imdb_v100_{'_'.join(labels)}_verbalizers"
        trained = _split(task, f"{name}_train", last=1000)
        test = _test(task, f"{name}_test", split="test")
        ranked = _ranked(test, f"{name}_test_rc")
        yield from (trained, test, ranked)
        yield from _mixtures(name, trained, (test, ranked))


def _qqp() -> Iterator[Task | Mixture]:
    (base,) = (task for task in GLUE if task.name == "glue_qqp_v200")
    for labels in _QQP_LABELS:
        preprocess = partial(
            labeled_text, task_word="qqp", fields=("question1", "question2"), labels=labels
        )
        task = make_task(
            replace(
                base,
                preprocess=preprocess,
                postprocess=partial(class_id, labels=labels),
                labels=labels,
                description=f"are two questions the same? ({' or '.join(labels)})",
            ),
            "taskless",
        )
        words = "_".join("_spc_".join(label.split()) for label in labels)
        name = f"pr:glue_qqp_v200_{words}_verbalizers"
        trained = _split(task, f"{name}_training", last=10_000)
        test = _test(task, f"{name}_test")
        ranked = _ranked(test, f"{name}_rc")
        normed = _ranked(test, f"{name}_rc_normed", normalized=True)
        yield from (trained, test, ranked, normed)
        yield from _mixtures(name, trained, (ranked, normed, test))


def _record() -> Iterator[Task | Mixture]:
    (base,) = (task for task in SUPER_GLUE if task.short == "record")
    taskless = make_task(base, "taskless")
    name = "pr:super_glue_record_v102"
    trained = _split(taskless, f"{name}_training", last=10_000)
    test = _test(taskless, f"{name}_test")
    ranked = replace(
        _test(make_task(replace(base, preprocess=gap), "taskless"), f"{name}_rc"),
        postprocess=one_of_answers,
        metrics=(Metric(name="accuracy", fn=rank_accuracy),),
        choices_field="entities",
        description=f"{base.description}; each example's own entities are ranked",
    )
    yield from (trained, test, ranked)
    yield from _mixtures(name, trained, (test, ranked))


def random_sentiment(row: Row) -> list[Example]:
    """{text} -> its beginning, up to a random word, and one of the labels at random.

    Both depend on the text alone.  The original splits tokens, and draws anew in each epoch.
    """
    draw = int.from_bytes(hashlib.sha256(row["text"].encode()).digest()[:8], "big")
    words = row["text"].split(" ")
    inputs = " ".join(words[: 1 + (draw >> 1) % len(words)])
    return [{"inputs": inputs, "targets": _SENTIMENTS[draw % 2]}]


def _c4() -> Task:
    base = T5Task(
        name="c4_v220_random_positive_negative_targets",
        benchmark="c4",
        short="c4",
        tfds="c4/en:2.2.0",
        splits=("train", "validation"),
        preprocess=random_sentiment,
        postprocess=None,
        labels=_SENTIMENTS,
        metrics=(metrics.ACCURACY,),
        has_task_word=False,
        description="the beginning of a web page, and a random label (a baseline of recycling)",
    )
    return make_task(base, "ordinary")


# For data.tasks.registry, which imports this module on the first lookup of a task.
TASKS: tuple[Task | Mixture, ...] = (*_sst2(), *_imdb(), *_qqp(), *_record(), _c4())
