"""The training and evaluation data of an experiment: its tasks, tokenized, as batches."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.config.overrides import method_to_json
from prompt_tuning_jax.config.text_template import parse_template
from prompt_tuning_jax.data.batching.buckets import FIXED, Buckets
from prompt_tuning_jax.data.batching.image_examples import (
    ImageExamples,
    augmentation,
    image_examples,
    require_for_images,
    require_for_text,
)
from prompt_tuning_jax.data.batching.loader import TrainBatches, eval_padding, eval_plan
from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples, tokenize
from prompt_tuning_jax.data.batching.window import fit_window
from prompt_tuning_jax.data.tasks import demonstrations
from prompt_tuning_jax.data.tasks.files import are_labels
from prompt_tuning_jax.data.tasks.labels import (
    example_weights,
    is_rewritten,
    label_line,
    label_notes,
    listed_counts,
    require_labels_known,
)
from prompt_tuning_jax.data.tasks.metrics import (
    EVALUATION_LOSS,
    LOSS,
    Direction,
    direction_by_name,
    metric_names,
)
from prompt_tuning_jax.data.tasks.selection import NO_EVAL, build_mixture, is_image_data, labels_of
from prompt_tuning_jax.data.tasks.task import Task
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.typing import Batch
from prompt_tuning_jax.untrusted_input import json_text

# Whose padding is counted for the report, or one epoch; whose shapes are compiled beforehand.
_REPORTED_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """The training examples (None for evaluation only), and evaluation examples by task."""

    train: TrainBatches | None
    # By the name of the task that is trained on.
    targets_by_task: Mapping[str, tuple[str, ...]]
    evaluation: Mapping[str, TokenizedExamples]
    labels: tuple[str, ...]
    # Those of each task that is trained on.
    task_labels: tuple[tuple[str, ...], ...]
    best_by: str
    # The direction of ``best_by``; None if it is not known.
    direction: Direction | None
    reports: tuple[str, ...]

    def require_direction(self) -> Direction:
        """Returns the direction of ``best_by``; UserError if it is not known."""
        if self.direction is None:
            raise UserError(
                f"evaluation.best_by: the direction of {self.best_by!r} is not known; set "
                "evaluation.best_mode to max or min"
            )
        return self.direction

    def wants_loss(self, task: Task) -> bool:
        """Returns whether this task's evaluation includes the loss, which takes a forward pass."""
        name, slash, metric = self.best_by.rpartition("/")
        chosen = metric == LOSS and (not slash or name == task.name)
        return EVALUATION_LOSS in task.metrics or chosen

    @property
    def examples_per_epoch(self) -> int | None:
        return None if self.train is None else self.train.examples_per_epoch

    @property
    def train_targets(self) -> tuple[str, ...]:
        """The training targets of all tasks."""
        return tuple(target for targets in self.targets_by_task.values() for target in targets)

    def majority_scores(self, examples: TokenizedExamples) -> dict[str, float]:
        """Scores the most frequent training target of the examples' task as every prediction.

        For a task that is not trained on, that of all tasks.
        """
        targets = self.targets_by_task.get(examples.task.name, self.train_targets)
        return examples.task.majority_scores(examples.texts, targets)

    @property
    def charted(self) -> tuple[str, ...]:
        """The metrics that a run's curves show besides the loss."""
        return (self.best_by,)

    def baselines(self) -> dict[str, float]:
        """Returns scores of ``best_by`` without a model, by name: that of the majority class."""
        if len(self.evaluation) != 1 or not self.labels:
            return {}
        (examples,) = self.evaluation.values()
        scores = self.majority_scores(examples)
        return {"majority class": scores[self.best_by]} if self.best_by in scores else {}

    def digests(self) -> dict[str, str]:
        """Digests of the training and evaluation data that determine scores.

        They cover only contents: files may move, or be rewritten with the same examples.
        """
        train = [] if self.train is None else [self.train.digest(), repr(self.labels)]
        # Metrics compare texts, and several texts may have the same tokens.
        evaluation = [
            part
            for examples in self.evaluation.values()
            for part in (
                examples.digest(),
                repr(examples.task.labels),
                json_text(examples.texts),
            )
        ]
        return {
            name: hashlib.sha256("".join(parts).encode()).hexdigest()
            for name, parts in (("training data", train), ("evaluation data", evaluation))
        }

    def empty_batches(self, steps: int) -> list[Batch]:
        """Returns an empty batch of each shape in the first steps of training, to compile for."""
        if self.train is None:
            return []
        return [*self.train.empty_batches(0, min(steps, _REPORTED_STEPS))]

    def padding(self, start: int, stop: int) -> float | None:
        """Returns the percent of padding in the inputs of steps ``start`` to ``stop - 1``.

        Returns None for images.
        """
        train = self._training_batches()
        return None if train.reads_images else train.padding(start, stop)

    def batches(self, start: int, stop: int, partitioner: Partitioner) -> Iterator[Batch]:
        """Yields the batches ``[E, B, ...]`` of steps ``start`` to ``stop - 1``, sharded by B."""
        train = self._training_batches()
        axes, size = ("ensemble", "batch", "length"), train.batch_size
        rows = partitioner.rows(size)
        for batch in train.iterate(start, stop):
            if partitioner.is_single_device:
                yield batch
                continue
            yield {
                name: partitioner.shard_rows(
                    np.asarray(local), axes[: local.ndim], rows=rows, batch_size=size
                )
                for name, local in batch.items()
            }

    def _training_batches(self) -> TrainBatches:
        if self.train is None:
            raise UserError("there is no training data; set data.task or data.train")
        return self.train


def build_data(
    experiment: Experiment,
    vocabulary: AnyVocabulary,
    *,
    split: str | None = None,
    training: bool = True,
    window: int | None = None,
    prompt_positions: int | None = None,
    has_prompt: bool | None = None,
    partitioner: Partitioner | None = None,
) -> TaskData:
    """Builds the data of the experiment; ``split`` replaces ``data.eval_split``.

    ``window`` is the model's ``max_positions``, in which inputs have to fit; ``prompt_positions``
    are those of loaded prompts, and ``has_prompt`` is whether they are positions of an input, which
    may then be empty (None: the method's).  With a ``partitioner`` over several
    processes, training batches contain only this process's rows.
    """
    words = vocabulary
    if isinstance(words, ClassVocabulary):
        require_for_images(experiment)
    else:
        require_for_text(experiment)
    experiment = fit_window(experiment, window, prompt_positions=prompt_positions)
    if has_prompt is None:
        has_prompt = experiment.method.prompt_positions() > 0
    data = experiment.data
    if data.train and not data.eval and (split or data.eval_split) != data.train_split:
        raise UserError(NO_EVAL)
    mixture = build_mixture(data)

    def examples(tasks: Sequence[Task], split: str) -> list[TokenizedExamples]:
        if isinstance(words, ClassVocabulary):
            return [image_examples(task, split, words) for task in tasks]
        return [
            tokenize(
                task,
                split,
                words,
                inputs_length=data.inputs_length,
                targets_length=data.targets_length,
                data_dir=data.data_dir,
                chat=data.chat,
                use_cache=data.cache,
            )
            for task in tasks
        ]

    eval_split = split or data.eval_split
    evaluated = tuple(
        designed(experiment, task, vocabulary) for task in mixture.evaluated_on(eval_split)
    )
    train_sets = [
        one.drawn(data.max_train_examples, seed=experiment.training.seeds[0])
        for one in (examples(mixture.tasks, data.train_split) if training else [])
    ]
    eval_sets, notes = _labeled(examples(evaluated, eval_split))
    eval_sets = [one.at_most(data.max_eval_examples) for one in eval_sets]
    evaluation = {one.task.name: one for one in eval_sets}
    labels = labels_of(mixture)
    if experiment.evaluation.strategy == "rank":
        for task in evaluated:  # now, and not at the first evaluation
            require_labels(task.labels)
    for one in (*train_sets, *eval_sets):
        require_inputs(one, has_prompt=has_prompt)
    _check_targets(experiment, train_sets, eval_sets)
    targets_by_task = {one.task.name: tuple(e["targets"] for e in one.texts) for one in train_sets}
    if experiment.method.scores_labels or experiment.training.loss != "tokens":
        chooses = (
            type(experiment.method).__name__
            if experiment.method.scores_labels
            else f"training.loss={experiment.training.loss}"
        )
        for target in set().union(*targets_by_task.values()) - set(labels):
            raise UserError(
                f"{chooses} chooses among the labels, but the target {target[:40]!r} is not one of "
                "them; list all labels in data.labels"
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
            augment=augmentation(data, words) if isinstance(words, ClassVocabulary) else None,
            rows=slice(None)
            if partitioner is None
            else partitioner.rows(experiment.training.batch_size),
        )
    best_by = _best_by(experiment.evaluation.best_by, eval_sets)
    task_data = TaskData(
        train=train,
        targets_by_task=targets_by_task,
        evaluation=evaluation,
        labels=labels,
        task_labels=tuple(one.task.labels for one in train_sets),
        best_by=best_by,
        direction=_direction(experiment.evaluation.best_mode, best_by, eval_sets),
        reports=(*notes, *_reports(experiment, train_sets, train, eval_sets, partitioner)),
    )
    if training:
        task_data.require_direction()
    return task_data


def _labeled(
    eval_sets: Sequence[TokenizedExamples],
) -> tuple[list[TokenizedExamples], list[str]]:
    """Returns the examples that can be scored, and notes about the others.

    Raises UserError if a set has none.
    """
    labeled, notes = [], []
    for one in eval_sets:
        if one.task.has_label is None:  # without a look at the texts
            labeled.append(one)
            continue
        numbers = one.task.labeled(one.texts)
        if not numbers:
            raise UserError(
                f"{one.title} has no labels, so nothing can be scored; choose another split "
                "(--split, data.eval_split), or write predictions with predict"
            )
        if without := len(one) - len(numbers):
            notes.append(f"{one.title}: {without:,} examples have no label and do not count")
            one = one.select(np.asarray(numbers))
        labeled.append(one)
    return labeled, notes


def designed(
    experiment: Experiment, task: Task, vocabulary: AnyVocabulary, *, source: Task | None = None
) -> Task:
    """Returns the task with the inputs that the method composes; most methods do not change them.

    Demonstrations are drawn by the first seed from the training split of ``source``, which defaults
    to the task.
    """
    method, data = experiment.method, experiment.data
    if not method.composes_inputs:
        return task
    source = source or task
    drawn: demonstrations.Demonstrations = ()
    if shots := method.num_demonstrations():
        if data.train_split not in source.splits:
            raise UserError(
                f"method=prompt_design takes demonstrations from the split {data.train_split!r}, "
                f"which task {source.name!r} does not have; set data.train to a file, or "
                "method.shots=0"
            )
        drawn = demonstrations.draw(
            list(source.load(data.train_split, data.data_dir)),
            labels=source.labels,
            shots=shots,
            balanced=method.balances_labels(),
            seed=experiment.training.seeds[0],
        )
    return demonstrations.demonstrated(
        task,
        drawn,
        compose=method.compose,
        identity=method_to_json(method),
        vocabulary=vocabulary,
        inputs_length=data.inputs_length,
        chat=data.chat,
    )


def require_inputs(examples: TokenizedExamples, *, has_prompt: bool) -> None:
    """Raises UserError for an input without tokens if there is no prompt either.

    A decoder-only model predicts the first token of a target from the position before it.
    """
    empty = np.flatnonzero(examples.inputs.lengths == 0)
    if len(empty) and not has_prompt:
        raise UserError(
            f"{examples.title}: {len(empty):,} of {len(examples):,} inputs are empty (the first is "
            f"number {empty[0] + 1}), and this model needs a token before its answer: leave them "
            "out, add words with data.inputs_template, or use a prompt"
        )


def draws_of(experiment: Experiment) -> tuple[Experiment, ...]:
    """Returns the experiment once per seed if seeds determine the inputs; otherwise only itself."""
    if not experiment.method.num_demonstrations():
        return (experiment,)
    training = experiment.training
    return tuple(
        dataclasses.replace(experiment, training=dataclasses.replace(training, seeds=(seed,)))
        for seed in training.seeds
    )


def buckets_of(experiment: Experiment) -> Buckets:
    """Returns how the lengths of batches are chosen; some methods need a fixed length."""
    method = experiment.method
    # Descriptions have positions in the inputs, and images have one size.
    if any(method.description_shape()) or is_image_data(experiment.data):
        return FIXED
    return Buckets.from_text(experiment.data.buckets, beside=method.prompt_positions())


def _check_targets(
    experiment: Experiment,
    train_sets: Sequence[TokenizedExamples],
    eval_sets: Sequence[TokenizedExamples],
) -> None:
    """Raises UserError for targets that no prediction can equal, and for unknown label sets."""
    data, strategy = experiment.data, experiment.evaluation.strategy
    uses_files = bool(data.train or data.eval)
    for number, one in enumerate((*train_sets, *eval_sets)):
        labels, evaluated = one.task.labels, number >= len(train_sets)
        if uses_files and not labels and not data.train and data.targets != "text":
            counts = Counter(example["targets"] for example in one.texts)
            likely = strategy in ("auto", "rank") and are_labels(counts)
            if likely or data.targets == "labels":
                raise UserError(
                    f"{one.title}: the set of labels is unknown (the file has "
                    f"{listed_counts(counts)}, but may lack some); list all in data.labels, set "
                    "data.train to the training file, or use a prompt that stores its labels; "
                    "data.targets=text generates text"
                )
        scores_labels = chosen_strategy(strategy, labels) == "rank"
        if labels and (uses_files or (scores_labels and evaluated)):
            require_labels_known(
                one.task, one.title, one.texts, of_training=uses_files and not data.labels
            )
        if not labels and one.rewritten:
            lost = {t for t, back in one.rewritten.items() if not is_rewritten(t, back)}
            if all(example["targets"] in lost for example in one.texts):
                *_, note = one.rewritten_notes()
                raise UserError(
                    f"{note}, and so are all others; use a model with another vocabulary"
                )


def _weights(data: Data, train_sets: Sequence[TokenizedExamples]) -> np.ndarray | None:
    """Returns the weights of all examples, by the labels of their sets; None if all are equal."""
    if not data.class_weights:
        return None
    tasks = [(one.task.labels, [example["targets"] for example in one.texts]) for one in train_sets]
    return example_weights(data.class_weights, tasks, prefix=data.targets_prefix)


def _evaluation_line(experiment: Experiment, task: Task) -> str:
    """Describes how predictions are made; the logged training accuracy is teacher-forced."""
    if task.choices_field:
        return "evaluation ranks the texts that each example chooses between"
    number = len(task.labels)
    strategy = chosen_strategy(experiment.evaluation.strategy, task.labels)
    if strategy == "rank":
        return f"evaluation ranks the {number} label{'s' * (number != 1)} of each example"
    return f"evaluation generates text ({strategy}) and compares it with the target"


def _target_notes(data: Data, one: TokenizedExamples, *, trains: bool) -> Iterator[str]:
    """Yields remarks on the targets and inputs of a set, one line each."""
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
    """Yields a line per set, and the share of padding in batches."""
    yield from dict.fromkeys(note for one in (*train_sets, *eval_sets) for note in one.task.notes)
    for one in train_sets:
        yield one.report()
        yield from _target_notes(experiment.data, one, trains=True)
    if train is not None:
        steps = max(1, min(_REPORTED_STEPS, train.examples_per_epoch // train.batch_size))
        if not train.reads_images:
            yield _padding_report("batches", train.inputs_lengths, train.padding(0, steps))
    method = experiment.method
    yield from dict.fromkeys(_evaluation_line(experiment, one.task) for one in eval_sets)
    for one in eval_sets:
        yield one.report()
        yield from _target_notes(experiment.data, one, trains=False)
        if shots := method.num_demonstrations():
            seed = experiment.training.seeds[0]
            yield demonstrations.report(one, shots=shots, seed=seed)
        if isinstance(one, ImageExamples):
            continue
        parts = 1 if partitioner is None else partitioner.num_batch_shards
        batch_size = eval_batch_size(experiment.evaluation.batch_size, len(one), parts=parts)
        plan = eval_plan(one, batch_size=batch_size, buckets=buckets_of(experiment))
        lengths = sorted({length for _, length in plan})
        yield _padding_report("evaluation batches", lengths, eval_padding(plan, one))


def _padding_report(what: str, lengths: Sequence[int], percent: float) -> str:
    *others, last = map(str, lengths)
    listed = f"{', '.join(others)} or {last}" if others else last
    return f"{what} of inputs padded to {listed} tokens; {percent:.1f} % of that is padding"


def _best_by(best_by: str, eval_sets: list[TokenizedExamples]) -> str:
    """Returns the requested metric, or the first; UserError for one that is not computed."""
    first = eval_sets[0].task
    if not first.metrics:
        raise UserError(f"task {first.name!r} has no metric; set data.metrics")
    names: list[str] = []
    usual = ""
    for one in eval_sets:
        prefix = f"{one.task.name}/" if len(eval_sets) > 1 else ""
        # The names of a metric with several numbers are known only from its result.
        scores = one.task.score(one.texts, [example["targets"] for example in one.texts])
        first_name = one.task.metrics[0].name if one.task.metrics else ""
        if first_name not in (*scores, LOSS):
            first_name = next(iter(scores), LOSS)
        usual = usual or prefix + first_name
        ranked = one.task.ranking_scores(scores)
        names += [prefix + name for name in dict.fromkeys([*scores, *ranked, LOSS])]
    if best_by and best_by not in names:
        known = best_by in metric_names()
        also = f"; add {best_by} to data.metrics" if known else ""
        raise UserError(
            f"evaluation.best_by: no metric {best_by!r}: {suggest(best_by, names)}{also}"
        )
    return best_by or usual


def _direction(
    mode: Literal["auto", "max", "min"], best_by: str, eval_sets: list[TokenizedExamples]
) -> Direction | None:
    """Returns the direction of ``best_by``.

    Returns None if it is not known, UserError for a contradiction.
    """
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
            f"evaluation.best_mode is {mode}, but {less} of {best_by!r} is better; set it to auto"
        )
    return mode


def eval_batch_size(batch_size: int, examples: int, *, parts: int = 1) -> int:
    """Returns the batch size: at most all examples, rounded up to a multiple of ``parts``."""
    return -(-min(batch_size, examples) // parts) * parts


def chosen_strategy(
    strategy: Literal["auto", "rank", "greedy", "beam"], labels: Sequence[str]
) -> Literal["rank", "greedy", "beam"]:
    """Returns the strategy; ``auto`` ranks labels if there are any, and otherwise generates."""
    if strategy == "auto":
        return "rank" if labels else "greedy"
    return strategy


def require_labels(labels: Sequence[str]) -> None:
    """Raises UserError if there are no labels to rank."""
    if not labels:
        raise UserError(
            "evaluation.strategy=rank needs labels, but neither the prompts nor the task have any; "
            "set data.labels=a,b, or evaluation.strategy=greedy"
        )
