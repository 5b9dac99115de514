"""Registers every task name of the 2021 code: tasks in three forms, their aliases, and mixtures.

Names are ``[taskless_|task_index_]NAME``, where NAME is one of ``tables.T5_TASKS``.  The ordinary
form has no prefix, the taskless form drops the task word from the inputs, and the task index form
puts a token for the task before them.  Names that end in ``_examples`` are aliases (in the 2021
code the suffix chose what was logged).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, TypeAlias, get_args

from prompt_tuning_jax.data.tasks.t5_tasks.preprocess import has_label
from prompt_tuning_jax.data.tasks.t5_tasks.sources import source_of
from prompt_tuning_jax.data.tasks.t5_tasks.t5_task import T5Task
from prompt_tuning_jax.data.tasks.t5_tasks.tables import T5_TASKS
from prompt_tuning_jax.data.tasks.task import Example, Mixture, Preprocess, Row, Task

# Forms are named after the prefix of the tasks' names; the ordinary form has no prefix.
Form: TypeAlias = Literal["ordinary", "taskless", "task_index"]


def without_task_word(inputs: str) -> str:
    """Removes everything up to and including the first blank; without a blank, nothing.

    >>> without_task_word("boolq passage: ...")
    'passage: ...'
    """
    before, blank, rest = inputs.partition(" ")
    return rest if blank else before


def preprocess_in_form(
    preprocess: Preprocess, form: Form, *, has_task_word: bool = True, index: int | None = None
) -> Preprocess:
    """Converts a preprocessor of the ordinary form to ``form``.

    Args: preprocess: of the ordinary form.  form: "taskless" and "task_index" drop the task word;
    examples of the latter have ``task_index``, for the token before the inputs (``task_index_id``).
    has_task_word: False leaves the inputs unchanged in every form.  index: the task's number,
    required for "task_index"; ValueError otherwise.
    """
    if form == "ordinary":
        return preprocess
    if form == "taskless":
        return partial(_taskless, preprocess=preprocess) if has_task_word else preprocess
    if index is None:
        raise ValueError("a task in the task_index form needs an index")
    taskless = preprocess_in_form(preprocess, "taskless", has_task_word=has_task_word)
    return partial(_indexed, preprocess=taskless, index=index)


def _taskless(row: Row, *, preprocess: Preprocess) -> list[Example]:
    return [
        {**example, "inputs": without_task_word(example["inputs"])} for example in preprocess(row)
    ]


def _indexed(row: Row, *, preprocess: Preprocess, index: int) -> list[Example]:
    return [{**example, "task_index": index} for example in preprocess(row)]


FORMS: tuple[Form, ...] = get_args(Form)

_SUFFIX = "_examples"


def name_in_form(name: str, form: Form) -> str:
    """Returns the name of a base task or mixture in a form."""
    return name if form == "ordinary" else f"{form}_{name}"


def forms_of(task: T5Task) -> tuple[Form, ...]:
    """Returns the forms of a base task."""
    return FORMS if task.index is not None else tuple(f for f in FORMS if f != "task_index")


def form_of(name: str) -> tuple[Form, str]:
    """Splits a task's name into its form and the name of its base task."""
    for form in FORMS[1:]:
        if name.startswith(f"{form}_"):
            return form, name.removeprefix(f"{form}_")
    return "ordinary", name


def make_task(task: T5Task, form: Form) -> Task:
    """Makes the task for a form of a base task, under its full name."""
    return Task(
        name=name_in_form(task.name, form),
        source=source_of(task),
        preprocess=preprocess_in_form(
            task.preprocess, form, has_task_word=task.has_task_word, index=task.index
        ),
        labels=task.labels,
        metrics=task.metrics,
        postprocess=task.postprocess,
        index=task.index if form == "task_index" else None,
        description=task.description,
        has_label=has_label,
    )


def _tasks() -> Iterator[Task]:
    for task in T5_TASKS.values():
        for form in forms_of(task):
            yield make_task(task, form)


_TASKS: Mapping[str, Task] = {task.name: task for task in _tasks()}

_WSC = ("super_glue_wsc_v102_simple_train", "super_glue_wsc_v102_simple_eval")
_DPR = "dpr_v001_simple"
_SUPER_GLUE = (
    *_WSC,
    *(
        f"super_glue_{short}_v102"
        for short in ("boolq", "cb", "copa", "multirc", "record", "rte", "wic")
    ),
)
_DIAGNOSTICS = ("super_glue_axb_v102", "super_glue_axg_v102")
_GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")
_GLUE_EVALUATED = ("mnli_mismatched", "mnli_matched", "ax")
# The original's mixtures of the other forms hold the ordinary tasks, by mistake.
_MIXED_FORMS = dict.fromkeys(
    ("taskless", "task_index"),
    " (in the 2021 code a mixture of ordinary tasks by mistake, which is glue_mnli_and_dev_{})",
)
_MRQA = ("bio_asq", "drop", "duo_rc", "race", "relation_extraction", "textbook_qa")


def _mixture(
    name: str,
    members: Sequence[str],
    description: str,
    *,
    form: Form = "ordinary",
    proportional: bool = False,
) -> Mixture:
    """Makes a mixture; members without a training split are only evaluated."""
    trained = [m for m in members if "train" in T5_TASKS[m].splits and T5_TASKS[m].rate]
    if not proportional:
        trained = [m for m in members if "train" in T5_TASKS[m].splits]
    return Mixture(
        name=name_in_form(name, form),
        tasks=tuple(_TASKS[name_in_form(m, form)] for m in trained),
        rates=tuple(float(T5_TASKS[m].rate) if proportional else 1.0 for m in trained),
        evaluated=tuple(_TASKS[name_in_form(m, form)] for m in members if m not in trained),
        description=description,
    )


def _mixtures() -> Iterator[Mixture]:
    yield _mixture(
        "super_glue_v102_proportional",
        (_DPR, *_SUPER_GLUE, *_DIAGNOSTICS),
        "T5's: SuperGLUE and DPR by size, with diagnostics",
        proportional=True,
    )
    yield _mixture(
        "wsc_dpr_simple_proportional", (_DPR, *_WSC), "WSC and DPR by size", proportional=True
    )
    for target in (*_MRQA, "mrqa"):
        members = _MRQA if target == "mrqa" else (target,)
        yield _mixture(
            f"squad_to_{target}",
            ("squad_v010_allanswers", *(f"mrqa_{member}_v100" for member in members)),
            "train on SQuAD, evaluate out of domain",
        )
    for form in FORMS:
        yield from _mixtures_in(form)


def _mixtures_in(form: Form) -> Iterator[Mixture]:
    yield _mixture(
        "super_glue_v102_examples_proportional",
        _SUPER_GLUE,
        "SuperGLUE by size",
        form=form,
        proportional=True,
    )
    yield _mixture(
        "super_glue_with_dpr_v102_examples_proportional",
        (_DPR, *_SUPER_GLUE),
        "SuperGLUE and DPR by size",
        form=form,
        proportional=True,
    )
    yield _mixture(
        "super_glue_wsc_and_dev_v102_simple", _WSC, "WSC, trained and evaluated", form=form
    )
    for version in ("v002", "v200"):
        yield _mixture(
            f"glue_mnli_and_dev_{version}",
            tuple(f"glue_{s}_{version}" for s in ("mnli", "mnli_mismatched", "mnli_matched")),
            "MNLI, evaluated on both development sets" + _MIXED_FORMS.get(form, "").format(version),
            form=form,
        )
        yield _mixture(
            f"glue_{version}_proportional",
            tuple(f"glue_{short}_{version}" for short in (*_GLUE, *_GLUE_EVALUATED)),
            "GLUE but WNLI by size, with diagnostics",
            form=form,
            proportional=True,
        )
    for to, source in (("mrpc", "qqp"), ("qqp", "mrpc")):
        yield _mixture(
            f"glue_{to}_from_{source}_zeroshot_v002",
            (f"glue_{source}_v002", f"glue_{to}_from_{source}_v002"),
            f"train on {source.upper()}, evaluate on {to.upper()}, too",
            form=form,
        )


_MIXTURES: Mapping[str, Mixture] = {mixture.name: mixture for mixture in _mixtures()}


def _aliases() -> Iterator[tuple[str, str]]:
    known = {**_TASKS, **_MIXTURES}
    for name in known:
        if _SUFFIX not in name:
            yield name + _SUFFIX, name
        elif (short := name.replace(_SUFFIX, "")) not in known:
            yield short, name


# For data.tasks.registry, which imports this module on the first lookup of a task.
TASKS: tuple[Task | Mixture, ...] = (*_TASKS.values(), *_MIXTURES.values())
ALIASES: Mapping[str, str] = dict(_aliases())
