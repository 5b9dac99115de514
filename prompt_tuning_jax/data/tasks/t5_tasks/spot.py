"""The tasks of SPoT (Vu et al. 2022) under the names of google-research/prompt-tuning.

Source tasks for prompts that others start from; all are in the ordinary form.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from prompt_tuning_jax.data.tasks.t5_tasks import metrics
from prompt_tuning_jax.data.tasks.t5_tasks.glue_tables import GLUE
from prompt_tuning_jax.data.tasks.t5_tasks.postprocess import question_answers
from prompt_tuning_jax.data.tasks.t5_tasks.preprocess import (
    collapsed,
    label_name,
    mrqa,
    with_task_word,
)
from prompt_tuning_jax.data.tasks.t5_tasks.registry import make_task
from prompt_tuning_jax.data.tasks.t5_tasks.split_rows import Part, with_parts
from prompt_tuning_jax.data.tasks.t5_tasks.t5_task import T5Task
from prompt_tuning_jax.data.tasks.task import Example, Mixture, Row, Task

_NLI = ("entailment", "neutral", "contradiction")
_TRAIN_VALIDATION = ("train", "validation")


def text_pair(
    row: Row, *, task_word: str, fields: tuple[str, str], labels: tuple[str, ...]
) -> list[Example]:
    """{fields, label} -> "task_word field1: text1 field2: text2" and the label's name.

    A label may be a number or its digits; -1 gives "<unk>".
    """
    named = [f"{field}: {row[field]}" for field in fields]
    label = int(row.get("label", -1))
    targets = label_name({**row, "label": label}, labels=labels)
    return [{"inputs": collapsed(" ".join([task_word, *named])), "targets": targets}]


def generation(row: Row, *, task_word: str, source: str, target: str) -> list[Example]:
    """{source, target} -> "task_word summarize: source" and the target."""
    return [{"inputs": f"{task_word} summarize: {row[source]}", "targets": row[target]}]


def _pairs() -> Iterator[T5Task]:
    by_round = {f"anli_r{n}": (f"anli/r{n}:0.1.0", "context", _NLI) for n in (1, 2, 3)}
    others = {
        "doc_nli": ("doc_nli:1.0.0", "premise", ("not_entailment", "entailment")),
        "snli": ("snli:1.1.0", "premise", _NLI),
    }
    for short, (tfds, premise, labels) in {**by_round, **others}.items():
        yield T5Task(
            name=f"spot_{short}_{_version(tfds)}",
            benchmark="spot",
            short=short,
            tfds=tfds,
            preprocess=partial(
                text_pair, task_word=short, fields=("hypothesis", premise), labels=labels
            ),
            labels=labels,
            metrics=(metrics.ACCURACY,),
            description="does the premise entail the hypothesis?",
        )


def _questions() -> Iterator[T5Task]:
    sets = ("squad", "news_qa", "trivia_qa", "search_qa", "hotpot_qa", "natural_questions")
    for short in sets:
        yield T5Task(
            name=f"spot_mrqa_{short}_v100",
            benchmark="spot",
            short=short,
            tfds=f"mrqa/{short}:1.0.0",
            splits=_TRAIN_VALIDATION,
            preprocess=partial(with_task_word, preprocess=mrqa, task_word=short),
            postprocess=question_answers,
            metrics=(metrics.SQUAD,),
            description="a span of the passage that answers the question (MRQA)",
        )


_SUMMARIES = {
    "aeslc": ("aeslc:1.0.0", "email_body", "subject_line", "the subject of an e-mail"),
    "billsum": ("billsum:3.0.0", "text", "summary", "a bill in short"),
    "gigaword": ("gigaword:1.2.0", "document", "summary", "the headline of a sentence"),
    "cnn_dailymail": ("cnn_dailymail:3.2.0", "article", "highlights", "news in some highlights"),
    "multi_news": ("multi_news:1.0.0", "document", "summary", "several articles in short"),
    "samsum": ("samsum:1.0.0", "dialogue", "summary", "a chat in short"),
    "newsroom": ("newsroom:1.0.0", "text", "summary", "a news article in short"),
}


def _summaries() -> Iterator[T5Task]:
    for short, (tfds, source, target, description) in _SUMMARIES.items():
        splits = (
            ("train", "test", "ca_test") if short == "billsum" else ("train", "validation", "test")
        )
        yield T5Task(
            name=f"spot_{short}_{_version(tfds)}",
            benchmark="spot",
            short=short,
            tfds=tfds,
            splits=splits,
            preprocess=partial(generation, task_word=short, source=source, target=target),
            metrics=(metrics.ROUGE,),
            description=description,
        )


def _version(tfds: str) -> str:
    return f"v{tfds.partition(':')[2].replace('.', '')}"


def _glue() -> Iterator[T5Task]:
    for task in GLUE:
        if not task.name.endswith("_v200") or task.short == "ax":
            continue
        if not task.short.startswith("mnli"):
            yield replace(task, name=f"spot_{task.name}", index=None)
        elif task.short == "mnli":
            yield replace(task, name="spot_glue_mnli_train_v200", splits=("train",), index=None)


def _mnli_validation() -> Iterator[Task]:
    (mnli,) = (task for task in GLUE if task.name == "glue_mnli_v200")
    for genres in ("matched", "mismatched"):
        split = f"validation_{genres}"
        task = make_task(replace(mnli, name=f"spot_glue_mnli_{split}_v200"), "ordinary")
        yield replace(task, source=with_parts(task.source, {"validation": Part(split=split)}))


T5_TASKS = (*_glue(), *_pairs(), *_questions(), *_summaries())
_MNLI = tuple(_mnli_validation())
_TASKS = tuple(make_task(task, "ordinary") for task in T5_TASKS)
_MNLI_TRAIN = next(task for task in _TASKS if task.name == "spot_glue_mnli_train_v200")

# For data.tasks.registry, which imports this module on the first lookup of a task.
TASKS: tuple[Task | Mixture, ...] = (
    *_TASKS,
    *_MNLI,
    Mixture(
        name="spot_glue_mnli_and_dev_v200",
        tasks=(_MNLI_TRAIN,),
        rates=(1.0,),
        evaluated=_MNLI,
        description="MNLI, evaluated on both development sets",
    ),
)
