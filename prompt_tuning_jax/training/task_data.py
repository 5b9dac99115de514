"""What an experiment trains and evaluates on: its tasks, tokenised, as batches."""

import dataclasses
import importlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prompt_tuning_jax.checkpoints.prompt_file import TrainedTask
from prompt_tuning_jax.config.experiment import NOT_IMPORTED, Data, Experiment
from prompt_tuning_jax.config.overrides import method_to_json
from prompt_tuning_jax.data.batching.buckets import FIXED, Buckets
from prompt_tuning_jax.data.batching.class_weights import example_weights
from prompt_tuning_jax.data.batching.loader import TrainBatches, eval_padding, eval_plan
from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples, tokenize
from prompt_tuning_jax.data.tasks import demonstrations
from prompt_tuning_jax.data.tasks.files import are_labels, check_file_columns, file_task
from prompt_tuning_jax.data.tasks.metrics import (
    EVALUATION_LOSS,
    LOSS,
    Direction,
    direction_by_name,
    get_metric,
    metric_names,
)
from prompt_tuning_jax.data.tasks.target_checks import (
    is_rewritten,
    label_line,
    label_notes,
    listed_counts,
    require_labels_known,
)
from prompt_tuning_jax.data.tasks.task import Mixture, Task, as_mixture, get_mixture, tasks_known_as
from prompt_tuning_jax.data.tasks.text_template import parse_template
from prompt_tuning_jax.data.tasks.wording import template_of, template_of_column
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.distributed.partitioner import Partitioner
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.methods import (
    DescribedPrompts,
    PromptDesign,
)
from prompt_tuning_jax.pretraining.label_objective import NO_BLOCK, PromptBlock
from prompt_tuning_jax.pretraining.text_data import TextData, open_text_data
from prompt_tuning_jax.training.evaluate import (
    chosen_strategy,
    eval_batch_size,
    require_labels,
)
from prompt_tuning_jax.training.step import (
    Batch,
)

# Whose padding is counted for the report, or one epoch; whose shapes are compiled beforehand.
_REPORTED_STEPS = 200
_NO_EVAL = "data.eval is empty; name a file of examples to evaluate on (--eval_data)"


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Examples to train on (None where only evaluation is wanted) and to evaluate on, by task."""

    train: TrainBatches | None
    train_targets: tuple[str, ...]
    evaluation: Mapping[str, TokenizedExamples]
    labels: tuple[str, ...]
    best_by: str
    # Whether the largest or the smallest of it is best; None where that is not known.
    direction: Direction | None
    reports: tuple[str, ...]

    def require_direction(self) -> Direction:
        """What is better of ``best_by``; UserError that asks for it where it is not known."""
        if self.direction is None:
            raise UserError(
                f"evaluation.best_by: whether more or less of {self.best_by!r} is better is not "
                "known; set evaluation.best_mode to max or min"
            )
        return self.direction

    def wants_loss(self, task: Task) -> bool:
        """Whether the evaluation of this task includes the loss, which takes another forward."""
        name, slash, metric = self.best_by.rpartition("/")
        chosen = metric == LOSS and (not slash or name == task.name)
        return EVALUATION_LOSS in task.metrics or chosen

    def one_of_each_shape(self, steps: int) -> list[Batch]:
        """An empty batch of each shape that the first steps of training have."""
        if self.train is None:
            return []
        return [*self.train.empty_batches(0, min(steps, _REPORTED_STEPS))]

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        if self.train is None:
            raise UserError("there is no training data; give data.task or data.train")
        return self.train.iterate(start, stop)


def build_mixture(data: Data) -> Mixture:
    """The task or mixture that the data fields name, or the one that a user's own files make."""
    if data.train or data.eval:
        return as_mixture(
            file_task(
                **_file_fields(data),
                targets=data.targets,
                allow_empty_targets=data.allow_empty_targets,
                labels=data.labels,
                metrics=data.metrics,
            )
        )
    if data.module:
        import_module(data.module, task=data.task)
    if data.data_dir and "seqio" in sys.modules:
        from prompt_tuning_jax.data.tasks.seqio_bridge import set_data_dir

        set_data_dir(data.data_dir)
    mixture = get_mixture(data.task)
    if not data.labels and not data.metrics:
        return mixture

    def changed(task: Task) -> Task:
        if data.labels and task.labels and not set(data.labels) & set(task.labels):
            raise UserError(
                f"data.labels is {', '.join(data.labels)} and the labels of {task.name} are "
                f"{', '.join(task.labels)}; leave data.labels empty for the task's own"
            )
        labels = data.labels or task.labels
        metrics = tuple(get_metric(name, labels=labels) for name in data.metrics) or task.metrics
        return dataclasses.replace(task, labels=labels, metrics=metrics)

    return dataclasses.replace(
        mixture,
        tasks=tuple(map(changed, mixture.tasks)),
        evaluated=tuple(map(changed, mixture.evaluated)),
    )


def labels_of(mixture: Mixture) -> tuple[str, ...]:
    """The labels of all its tasks."""
    members = (*mixture.tasks, *mixture.evaluated)
    return tuple(dict.fromkeys(label for task in members for label in task.labels))


def trained_tasks(data: Data) -> tuple[str, ...]:
    """The names of the tasks that are trained on together; none where it is one alone."""
    if data.train or data.eval or data.objectives or not data.task:
        return ()
    names = tuple(task.name for task in build_mixture(data).tasks)
    return names if len(names) > 1 else ()


def inputs_template_of(data: Data) -> str:
    """The template that words the inputs of these data; empty where a task's own code does.

    Of a mixture the one that all its tasks have.
    """
    if data.train or data.eval:
        return data.inputs_template or template_of_column(data.inputs_column)
    templates = {_template_of(task) for task in tasks_known_as(data.task)}
    return templates.pop() if len(templates) == 1 else ""


def mixture_of(data: Data) -> tuple[TrainedTask, ...]:
    """The tasks trained on together, for the metadata of a prompt; none where it is one alone."""
    tasks = () if data.train or data.eval or data.objectives else tasks_known_as(data.task)
    if len(tasks) < 2:
        return ()
    return tuple(
        TrainedTask(
            name=task.name, labels=data.labels or task.labels, inputs_template=_template_of(task)
        )
        for task in tasks
    )


def _template_of(task: Task) -> str:
    return "" if task.from_text is None else template_of(task.from_text)


def build_data(
    experiment: Experiment,
    vocabulary: AnyVocabulary,
    *,
    split: str | None = None,
    training: bool = True,
    partitioner: Partitioner | None = None,
) -> TaskData | TextData:
    """The examples of the experiment; ``split`` replaces ``data.eval_split``.

    With a ``partitioner`` over several processes training batches have the rows of this one alone.
    """
    data = experiment.data
    if data.objectives:
        method = experiment.method
        block = NO_BLOCK
        if isinstance(method, DescribedPrompts):
            block = PromptBlock(positions=method.positions, words=method.words)
        return open_text_data(
            data,
            vocabulary,
            batch_size=experiment.training.batch_size,
            seeds=experiment.training.seeds,
            block=block,
        )
    if data.train and not data.eval and (split or data.eval_split) != data.train_split:
        raise UserError(_NO_EVAL)
    mixture = build_mixture(data)

    def examples(tasks: Sequence[Task], split: str) -> list[TokenizedExamples]:
        return [
            tokenize(
                task,
                split,
                vocabulary,
                inputs_length=data.inputs_length,
                targets_length=data.targets_length,
                data_dir=data.data_dir,
                use_cache=data.cache,
            )
            for task in tasks
        ]

    eval_split = split or data.eval_split
    evaluated = tuple(
        designed(experiment, task, vocabulary) for task in mixture.evaluated_on(eval_split)
    )
    train_sets = examples(mixture.tasks, data.train_split) if training else []
    eval_sets = [one.at_most(data.max_eval_examples) for one in examples(evaluated, eval_split)]
    evaluation = {one.task.name: one for one in eval_sets}
    labels = labels_of(mixture)
    if experiment.evaluation.strategy == "rank":
        for task in evaluated:  # now, and not at the first evaluation
            require_labels(task.labels)
    _check_targets(experiment, train_sets, eval_sets)
    train_targets = tuple(e["targets"] for one in train_sets for e in one.texts)
    if experiment.method.scores_labels:
        for target in set(train_targets) - set(labels):
            raise UserError(
                f"{type(experiment.method).__name__} chooses among the labels, and the target "
                f"{target[:40]!r} is none of them; name all in data.labels"
            )
    train = None
    if train_sets:
        train = TrainBatches(
            train_sets,
            batch_size=experiment.training.batch_size,
            seeds=experiment.training.seeds,
            rates=mixture.rates if len(mixture.rates) > 1 else (),
            buckets=buckets_of(experiment),
            weights=_weights(data, train_sets),
            rows=slice(None)
            if partitioner is None
            else partitioner.rows(experiment.training.batch_size),
        )
    best_by = _best_by(experiment.evaluation.best_by, eval_sets)
    found = TaskData(
        train=train,
        train_targets=train_targets,
        evaluation=evaluation,
        labels=labels,
        best_by=best_by,
        direction=_direction(experiment.evaluation.best_mode, best_by, eval_sets),
        reports=tuple(_reports(experiment, train_sets, train, eval_sets, partitioner)),
    )
    if training:
        found.require_direction()
    return found


def designed(
    experiment: Experiment, task: Task, vocabulary: AnyVocabulary, *, source: Task | None = None
) -> Task:
    """The task as the method words its inputs, which most methods leave as they are.

    Demonstrations are drawn from the training split of ``source``, the task's own unless given, by
    the first seed.
    """
    method, data = experiment.method, experiment.data
    if not isinstance(method, PromptDesign):
        return task
    source = source or task
    drawn: demonstrations.Demonstrations = ()
    if method.shots:
        if data.train_split not in source.splits:
            raise UserError(
                f"method=prompt_design takes demonstrations from the split {data.train_split!r}, "
                f"and task {source.name!r} has none; name a file in data.train, or set "
                "method.shots=0"
            )
        drawn = demonstrations.draw(
            list(source.load(data.train_split, data.data_dir)),
            labels=source.labels,
            shots=method.shots,
            balanced=method.balance == "balanced",
            seed=experiment.training.seeds[0],
        )
    return demonstrations.demonstrated(
        task,
        drawn,
        compose=method.compose,
        identity=method_to_json(method),
        vocabulary=vocabulary,
        inputs_length=data.inputs_length,
    )


def draws_of(experiment: Experiment) -> tuple[Experiment, ...]:
    """The experiment once for each of its seeds where these decide the inputs, else alone."""
    if not isinstance(experiment.method, PromptDesign) or not experiment.method.shots:
        return (experiment,)
    training = experiment.training
    return tuple(
        dataclasses.replace(experiment, training=dataclasses.replace(training, seeds=(seed,)))
        for seed in training.seeds
    )


def buckets_of(experiment: Experiment) -> Buckets:
    """How the lengths of batches are chosen; fixed for the methods that ask for it."""
    method = experiment.method
    if isinstance(method, DescribedPrompts):  # descriptions stand in the inputs, at their places
        return FIXED
    return Buckets.from_text(experiment.data.buckets, beside=method.prompt_positions())


def sharded_batches(
    data: TaskData | TextData, partitioner: Partitioner, start: int, stop: int
) -> Iterator[Batch]:
    """The batches ``[E, B, ...]`` of steps start to stop - 1, with B divided over the mesh."""
    axes = ("ensemble", "batch", "length")
    for batch in data.batches(start, stop):
        if partitioner.is_single_device:
            yield batch
        elif isinstance(data, TextData):
            yield partitioner.shard_batch(batch, axes)
        else:
            assert data.train is not None
            size = data.train.batch_size
            rows = partitioner.rows(size)
            yield {
                name: partitioner.shard_rows(
                    np.asarray(local), axes[: local.ndim], rows=rows, batch_size=size
                )
                for name, local in batch.items()
            }


def import_module(name: str, *, task: str = "") -> None:
    """Imports a module that registers tasks: from the current folder too, if it is nowhere else.

    A module that a run's folder names (``NOT_IMPORTED``) is left alone where ``task`` is known
    without it.  Raises UserError for one that is needed, and for one that cannot be imported.
    """
    if name.startswith(NOT_IMPORTED):
        if not tasks_known_as(task):
            name = name.removeprefix(NOT_IMPORTED)
            raise UserError(
                f"task {task!r} comes from the module {name!r}, which only the run's folder names: "
                f"name it to import it, with --set data.module={name} (from Python: import {name})"
            )
        return
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(
            f"data.module is {name!r}; name a module as in an import statement: my_tasks for "
            "my_tasks.py"
        )
    # The installed command does not look in the current folder, unlike python -m.  Last, so that
    # no file there hides a library.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"data.module: cannot import {name!r}: {error}; modules are looked for in the current "
            "folder, beside the config file and where packages are installed"
        ) from None


def check_files(experiment: Experiment) -> None:
    """UserError unless the files that the experiment names are there and hold what is asked for.

    Looks at the first row of data files; cheap, so that it comes before whatever takes long.
    """
    data, method = experiment.data, experiment.method
    inits = experiment.training.inits or (getattr(method, "init", ""),)
    path = getattr(method, "init_path", "")
    if path and {"file", "source"} & set(inits) and not Path(path).expanduser().exists():
        raise UserError(f"method.init_path: cannot read the prompt: {path}: there is no such file")
    if data.objectives:
        return
    if data.train and not data.eval and data.eval_split != data.train_split:
        raise UserError(_NO_EVAL)
    if data.train or data.eval:
        check_file_columns(**_file_fields(data))


def _file_fields(data: Data) -> dict[str, Any]:
    """The fields that say where rows are and how they become text."""
    names = ("train", "eval", "train_split", "eval_split", "header", "columns", "separator")
    sides = ("inputs_column", "targets_column", "inputs_template", "targets_template")
    return {name: getattr(data, name) for name in (*names, *sides)}


def _check_targets(
    experiment: Experiment,
    train_sets: Sequence[TokenizedExamples],
    eval_sets: Sequence[TokenizedExamples],
) -> None:
    """UserError for targets that no prediction can equal, and for labels that nobody has named."""
    data, asked = experiment.data, experiment.evaluation.strategy
    own_files = bool(data.train or data.eval)
    for number, one in enumerate((*train_sets, *eval_sets)):
        labels, evaluated = one.task.labels, number >= len(train_sets)
        if own_files and not labels and not data.train and data.targets == "auto":
            counts = Counter(example["targets"] for example in one.texts)
            if asked in ("auto", "rank") and are_labels(counts):
                raise UserError(
                    f"{one.title}: nothing says which labels there are to choose between (the file "
                    f"has {listed_counts(counts)}, and need not have all); name all in "
                    "data.labels, name the training file in data.train, or use a prompt that knows "
                    "its labels; data.targets=text generates text"
                )
        scores_labels = chosen_strategy(asked, labels) == "rank"
        if labels and (own_files or (scores_labels and evaluated)):
            require_labels_known(
                one.task, one.title, one.texts, of_training=own_files and not data.labels
            )
        if not labels and one.rewritten:
            lost = {t for t, back in one.rewritten.items() if not is_rewritten(t, back)}
            if all(example["targets"] in lost for example in one.texts):
                *_, note = one.rewritten_notes()
                raise UserError(f"{note}, and so are all; take a model of another vocabulary")


def _weights(data: Data, train_sets: Sequence[TokenizedExamples]) -> np.ndarray | None:
    """The weight of every example, of each set by its own labels; None where all count alike."""
    if not data.class_weights:
        return None
    parts = [
        example_weights(
            data.class_weights,
            labels=one.task.labels,
            targets=[example["targets"] for example in one.texts],
        )
        for one in train_sets
    ]
    return np.concatenate(parts)


def _evaluation_line(experiment: Experiment, task: Task) -> str:
    """How predictions come about, beside which the log's training accuracy is another thing."""
    number = len(task.labels)
    strategy = chosen_strategy(experiment.evaluation.strategy, task.labels)
    if strategy == "rank":
        return f"evaluation ranks the {number} label{'s' * (number != 1)} of each example"
    return f"evaluation writes text ({strategy}) and compares it with the target"


def _target_notes(data: Data, one: TokenizedExamples, *, trains: bool) -> Iterator[str]:
    """What a user should know about the targets and inputs of a set, a line each."""
    counts = Counter(example["targets"] for example in one.texts)
    if trains and one.task.labels:
        yield label_line(counts, one.task.labels)
        yield from (f"note: {note}" for note in label_notes(counts, one.task.labels))
    yield from (f"note: {note}" for note in one.rewritten_notes())
    blank = data.inputs_template if data.train or data.eval else ""
    if blank:
        template = parse_template(blank, field="data.inputs_template")
        blank = template.render(dict.fromkeys(template.columns, ""))
    empty = sum(example["inputs"].split() == blank.split() for example in one.texts)
    if empty:
        yield f"note: {one.title}: {empty:,} of {len(one):,} inputs are empty"


def _reports(
    experiment: Experiment,
    train_sets: list[TokenizedExamples],
    train: TrainBatches | None,
    eval_sets: list[TokenizedExamples],
    partitioner: Partitioner | None,
) -> Iterator[str]:
    """A line for each set, and what of the batches is padding."""
    yield from dict.fromkeys(note for one in (*train_sets, *eval_sets) for note in one.task.notes)
    for one in train_sets:
        yield one.report()
        yield from _target_notes(experiment.data, one, trains=True)
    if train is not None:
        steps = max(1, min(_REPORTED_STEPS, train.examples_per_epoch // train.batch_size))
        yield _padding_report("batches", train.inputs_lengths, train.padding(0, steps))
    method = experiment.method
    yield from dict.fromkeys(_evaluation_line(experiment, one.task) for one in eval_sets)
    for one in eval_sets:
        yield one.report()
        yield from _target_notes(experiment.data, one, trains=False)
        if isinstance(method, PromptDesign) and method.shots:
            seed = experiment.training.seeds[0]
            yield demonstrations.report(one, shots=method.shots, seed=seed)
        parts = 1 if partitioner is None else partitioner.num_batch_shards
        batch_size = eval_batch_size(experiment.evaluation.batch_size, len(one), parts=parts)
        plan = eval_plan(one, batch_size=batch_size, buckets=buckets_of(experiment))
        lengths = sorted({length for _, length in plan})
        yield _padding_report("evaluation batches", lengths, eval_padding(plan, one))


def _padding_report(what: str, lengths: Sequence[int], percent: float) -> str:
    *others, last = map(str, lengths)
    listed = f"{', '.join(others)} or {last}" if others else last
    return f"{what} of inputs padded to {listed} tokens; {percent:.1f} % of that is padding"


def _best_by(asked: str, eval_sets: list[TokenizedExamples]) -> str:
    """The metric asked for, or the first; UserError for one that evaluations will not have."""
    first = eval_sets[0].task
    if not first.metrics:
        raise UserError(f"task {first.name!r} has no metric; name one in data.metrics")
    names: list[str] = []
    usual = ""
    for one in eval_sets:
        prefix = f"{one.task.name}/" if len(eval_sets) > 1 else ""
        # A metric may give several numbers, of names that only its result tells.
        scores = one.task.score(one.texts, [example["targets"] for example in one.texts])
        first_name = one.task.metrics[0].name if one.task.metrics else ""
        if first_name not in (*scores, LOSS):
            first_name = next(iter(scores), LOSS)
        usual = usual or prefix + first_name
        names += [prefix + name for name in dict.fromkeys([*scores, LOSS])]
    if asked and asked not in names:
        known = asked in metric_names()
        also = f"; add {asked} to data.metrics to have it computed" if known else ""
        raise UserError(f"evaluation.best_by: no metric {asked!r}: {suggest(asked, names)}{also}")
    return asked or usual


def _direction(
    mode: Literal["auto", "max", "min"], best_by: str, eval_sets: list[TokenizedExamples]
) -> Direction | None:
    """What is better of ``best_by``; None where it is not known, UserError for a contradiction."""
    task_name, slash, metric = best_by.rpartition("/") if len(eval_sets) > 1 else ("", "", best_by)
    declared: Direction | None = None
    for one in eval_sets:
        if not slash or one.task.name == task_name:
            declared = declared or one.task.declared_direction(metric)
    if mode == "auto":
        return declared or direction_by_name(metric)
    if declared not in (None, mode):
        less = "less" if declared == "min" else "more"
        raise UserError(
            f"evaluation.best_mode is {mode}, and {less} of {best_by!r} is better; leave it at auto"
        )
    return mode
