"""Tables of the tasks of the T5 and prompt tuning papers, one entry per task.

``T5_TASKS`` lists the tasks in their ordinary form, under the names of the 2021 code.  ``registry``
derives the other names of that code:

- ``taskless_NAME``: ``preprocess_in_form(task.preprocess, "taskless", ...)`` drops the leading task
  word of the inputs.  Question answering has none, so its two forms are equal.
- ``task_index_NAME``: the text of the taskless form, with one token id before the inputs' ids,
  ``task_index_id(vocabulary.size, task.index)``.  The examples have ``task_index``.  Tasks whose
  ``index`` is None have no such form.
- ``..._examples``: the same task; in the original, the suffix chose what was logged.

A mixture that the original calls proportional draws from each task at its ``rate``.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from prompt_tuning_jax.data.tasks.t5_tasks import metrics, preprocess
from prompt_tuning_jax.data.tasks.t5_tasks.glue_tables import GLUE, TRANSFER, labeled_task
from prompt_tuning_jax.data.tasks.t5_tasks.postprocess import (
    multirc_answer,
    question_answers,
    record_answers,
    wsc_referent,
)
from prompt_tuning_jax.data.tasks.t5_tasks.preprocess import mrqa, squad, summarize
from prompt_tuning_jax.data.tasks.t5_tasks.t5_task import TRAIN_VALIDATION_TEST, T5Task

__all__ = [
    "DPR",
    "GLUE",
    "QUESTION_ANSWERING",
    "SUMMARIZATION",
    "SUPER_GLUE",
    "T5_TASKS",
    "TRAIN_VALIDATION_TEST",
    "TRANSFER",
    "T5Task",
]

_FALSE_TRUE = ("False", "True")
_ENTAILMENT = ("entailment", "not_entailment")
_ACCURACY = (metrics.ACCURACY,)


def _super_glue(
    short: str,
    *,
    fields: tuple[str, ...] = (),
    labels: tuple[str, ...] = _FALSE_TRUE,
    **changes: Any,
) -> T5Task:
    return labeled_task(
        "super_glue",
        short,
        versions=("v102", "1.0.2"),
        task_word=short,
        fields=fields,
        labels=labels,
        **changes,
    )


_WSC = T5Task(
    name="super_glue_wsc_v102_simple_train",
    benchmark="super_glue",
    short="wsc",
    tfds="super_glue/wsc.fixed:1.0.2",
    splits=("train",),
    preprocess=preprocess.wsc_simple_positives,
    postprocess=wsc_referent,
    metrics=_ACCURACY,
    index=7,
    rate=259,
    description="who is the marked pronoun? Training examples: those with the right referent",
)

SUPER_GLUE = (
    _super_glue(
        "boolq",
        fields=("passage", "question"),
        index=0,
        rate=9_427,
        description="a yes-no question about a passage",
    ),
    _super_glue(
        "cb",
        fields=("hypothesis", "premise"),
        labels=("entailment", "contradiction", "neutral"),
        metrics=(metrics.mean_multiclass_f1(3), metrics.ACCURACY),
        index=1,
        rate=250,
        description="does the premise's speaker believe the hypothesis?",
    ),
    _super_glue(
        "copa",
        fields=("choice1", "choice2", "premise", "question"),
        labels=("choice1", "choice2"),
        index=2,
        rate=400,
        description="which of two is the cause or effect?",
    ),
    _super_glue(
        "multirc",
        preprocess=partial(preprocess.multirc, labels=_FALSE_TRUE),
        postprocess=partial(multirc_answer, labels=_FALSE_TRUE),
        metrics=(metrics.MULTIRC_F1, metrics.MULTIRC_EXACT_MATCH),
        index=3,
        rate=27_243,
        description="is an answer to a question about a paragraph right?",
    ),
    _super_glue(
        "record",
        preprocess=preprocess.record,
        postprocess=record_answers,
        labels=(),
        metrics=(metrics.RECORD,),
        index=4,
        rate=138_854,
        description="which entity of the passage fills the gap?",
    ),
    _super_glue(
        "rte",
        fields=("hypothesis", "premise"),
        labels=_ENTAILMENT,
        index=5,
        rate=2_490,
        description="does the premise entail the hypothesis?",
    ),
    _super_glue(
        "wic",
        fields=("sentence1", "sentence2", "word"),
        index=6,
        rate=5_428,
        description="does a word mean the same in two sentences?",
    ),
    _WSC,
    replace(
        _WSC,
        name="super_glue_wsc_v102_simple_eval",
        splits=("validation", "test"),
        preprocess=preprocess.wsc_simple,
        rate=0,
        description="is the marked pronoun's referent produced where it is the right one?",
    ),
    _super_glue(
        "wsc",
        preprocess=partial(preprocess.wsc_marked, labels=_FALSE_TRUE),
        index=7,
        description="do two marked spans mean the same? (Not in the original's mixtures)",
    ),
    _super_glue(
        "axb",
        splits=("test",),
        preprocess=partial(preprocess.axb, labels=_ENTAILMENT),
        labels=_ENTAILMENT,
        metrics=(metrics.ACCURACY, metrics.MATTHEWS),
        index=5,
        description="RTE's broad-coverage diagnostics",
    ),
    _super_glue(
        "axg",
        splits=("test",),
        preprocess=partial(
            preprocess.labeled_text,
            task_word="rte",
            fields=("hypothesis", "premise"),
            labels=_ENTAILMENT,
        ),
        labels=_ENTAILMENT,
        index=5,
        description="RTE's diagnostics of gender bias (Winogender)",
    ),
)


DPR = (
    T5Task(
        name="dpr_v001_simple",
        benchmark="dpr",
        short="dpr",
        tfds="definite_pronoun_resolution:1.1.0",
        splits=("train", "test"),
        preprocess=preprocess.dpr_simple,
        metrics=_ACCURACY,
        # The original gives it the index of WSC, because it has the same format.
        index=7,
        rate=1_322,
        description="who is the marked pronoun? More training examples for WSC",
    ),
)

_OUT_OF_DOMAIN = {
    "bio_asq": "BioASQ (biomedical articles)",
    "drop": "DROP (counting and comparing)",
    "duo_rc": "DuoRC (films)",
    "race": "RACE (school exams)",
    "relation_extraction": "RelationExtraction (Wikipedia)",
    "textbook_qa": "TextbookQA (school books)",
}
_IN_DOMAIN = {
    "hotpot_qa": "HotpotQA",
    "natural_questions": "NaturalQuestions",
    "news_qa": "NewsQA",
    "search_qa": "SearchQA",
    "trivia_qa": "TriviaQA",
}

QUESTION_ANSWERING = (
    T5Task(
        name="squad_v010_allanswers",
        benchmark="squad",
        short="squad",
        tfds="squad/v1.1:3.0.0",
        splits=("train", "validation"),
        preprocess=squad,
        postprocess=question_answers,
        metrics=(metrics.SQUAD,),
        has_task_word=False,
        description="a span of the passage that answers the question (Wikipedia)",
    ),
    *(
        T5Task(
            name=f"mrqa_{short}_v100",
            benchmark="mrqa",
            short=short,
            tfds=f"mrqa/{short}:1.0.0",
            splits=splits,
            preprocess=mrqa,
            postprocess=question_answers,
            metrics=(metrics.SQUAD,),
            has_task_word=False,
            description=f"MRQA's {kind} {title}",
        )
        for kind, splits, display_names in (
            ("out-of-domain set", ("validation",), _OUT_OF_DOMAIN),
            ("in-domain set", ("train", "validation"), _IN_DOMAIN),
        )
        for short, title in display_names.items()
    ),
)

SUMMARIZATION = (
    T5Task(
        name="xsum_v110",
        benchmark="summarization",
        short="xsum",
        tfds="xsum:1.1.0",
        preprocess=partial(summarize, article="document", summary="summary"),
        metrics=(metrics.ROUGE,),
        description="a news article in one sentence (BBC)",
    ),
    T5Task(
        name="cnn_dailymail_v310",
        benchmark="summarization",
        short="cnn_dailymail",
        tfds="cnn_dailymail:3.1.0",
        preprocess=partial(summarize, article="article", summary="highlights"),
        metrics=(metrics.ROUGE,),
        description="a news article in some highlights",
    ),
)

T5_TASKS: Mapping[str, T5Task] = {
    task.name: task
    for task in (*SUPER_GLUE, *GLUE, *TRANSFER, *DPR, *QUESTION_ANSWERING, *SUMMARIZATION)
}
