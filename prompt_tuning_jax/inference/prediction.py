"""Predicts for texts and for the rows of a data file, with prompts or other tuned methods."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np

from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    for_task,
    listed,
    shared_labels,
    tasks_of,
)
from prompt_tuning_jax.config.config_file import run_config
from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.data.batching import task_data
from prompt_tuning_jax.data.batching.buckets import FIXED, few_lengths
from prompt_tuning_jax.data.batching.image_examples import require_for_images, unlabeled_examples
from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples, tokenize
from prompt_tuning_jax.data.batching.window import fit_window
from prompt_tuning_jax.data.images.given import given_images
from prompt_tuning_jax.data.images.image_set import ImageSet
from prompt_tuning_jax.data.tasks.registry import get_task, tasks_known_as
from prompt_tuning_jax.data.tasks.row_files import RowFile, value_text
from prompt_tuning_jax.data.tasks.selection import build_mixture
from prompt_tuning_jax.data.tasks.task import Source, Task, TrainedTask
from prompt_tuning_jax.data.tasks.wording import (
    AS_IT_IS,
    Given,
    Wording,
    shared_wording,
    template_of,
    template_of_column,
    wording_of,
)
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.distributed import processes
from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.inference.api import require_model
from prompt_tuning_jax.inference.loading import (
    LoadedPrompts,
    load_prompts,
    members_of,
    prompt_list,
    where,
)
from prompt_tuning_jax.inference.predictor import Predictions, build_predictor
from prompt_tuning_jax.inference.prompt_sources import as_texts
from prompt_tuning_jax.inference.setup import build_model, partitioner_of, vocabulary_of
from prompt_tuning_jax.methods import TunedModel
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.typing import HostArray

# The experiment for predictions without a config or run.  Texts are used unchanged.
UNDESCRIBED = Experiment(data=Data(task="", inputs_length=512, targets_length=32))

PredictStrategy: TypeAlias = Literal["rank", "greedy", "beam"]
Prompts: TypeAlias = str | Path | HostArray | Sequence[str | Path | HostArray]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The prediction for one input.

    Attributes:
      prediction: a label or the generated text; the majority vote if there are several prompts.
      log_probs: the log-probability of each label, or of the generated text, averaged over prompts.
      votes: the number of prompts that predict each text; None for a single prompt.
      by_prompt: the prediction of each prompt, in the order of their names.
      input: the model's input, including the wording that the prompts were trained with.
      row: the data file's row that the input was made from, with all its columns.
      truncated: whether the model read only the beginning of the input.
    """

    prediction: str
    log_probs: dict[str, float] | None
    votes: dict[str, int] | None
    by_prompt: tuple[str, ...] = ()
    input: str = ""
    row: Mapping[str, Any] | None = None
    truncated: bool = False


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The experiment, the opened prompts, and the resolved wording, labels and task."""

    experiment: Experiment
    loaded: LoadedPrompts
    partitioner: Partitioner
    wording: Wording
    labels: tuple[str, ...]
    task: str  # which task of the mixture that the prompts were trained on


def predict(
    model: Model | TunedModel | Experiment,
    inputs: Given | Path | Iterable[Given],
    prompts: Prompts = (),
    *,
    labels: Sequence[str] = (),
    task: str = "",
    raw: bool = False,
    strategy: PredictStrategy | None = None,
    batch_size: int = 0,
    inputs_length: int = 0,
    max_length: int = 0,
) -> list[Prediction]:
    """Predicts a label for each input if labels are known, and otherwise text.

    ``model`` is a bare model, the result of ``attach``, or an Experiment, whose model is loaded.
    ``prompts`` are paths of prompts, runs or adapters, or arrays ``[P, D]``; several prompts vote.
    Without prompts the bare model predicts.

    ``inputs`` are bare texts, objects ``{column: value}``, or the Path of a data file, whose
    targets are ignored; of a model that reads images, paths of image files, the Path of a folder
    of them, or uint8 arrays.  The template that the prompts were trained with is applied to texts,
    unless ``raw`` is set; a template with several columns needs objects.

    ``labels`` replace the labels that the prompts were trained on, and ``task`` selects one of the
    tasks of a mixture.  ``strategy`` defaults to ``rank`` if there are labels, and otherwise to
    ``greedy``.  Inputs are cut to ``inputs_length`` tokens, and at most ``max_length`` tokens are
    generated; 0 uses the values of the prompts' run.  Raises UserError for invalid arguments.
    """
    labels = as_texts(labels, "labels")
    given_raw: object = raw  # callers may not type-check
    if not isinstance(given_raw, bool):
        raise UserError(f"raw must be True or False, not {given_raw!r}")
    experiment, loaded, frozen, partitioner = _opened(model, prompt_list(prompts))
    experiment = _with(
        experiment,
        strategy=strategy,
        batch_size=batch_size,
        inputs_length=inputs_length,
        max_length=max_length,
    )
    images = None
    if frozen.config.reads_images:
        require_for_images(experiment, lengths=False)
        images = given_images(inputs)
        bare = not any(about.labels for about in loaded.known)
        labels = labels or (frozen.config.labels if bare else ())  # type: ignore[attr-defined]
    asked = _asked(experiment, loaded, partitioner, labels=labels, task=task, raw=raw)
    if images is None:
        given, rows = _given(inputs, asked.experiment.data, asked.wording, raw=raw)
    else:
        given, rows = [*images.names], [None] * len(images)
    processes.require_same("the input", "\n".join(given))
    return _predictions(asked, frozen, given, rows, images)


def _opened(
    model: Model | TunedModel | Experiment, prompts: list[str | HostArray]
) -> tuple[Experiment, LoadedPrompts, Model, Partitioner]:
    if isinstance(model, Experiment):
        # An experiment without a task is valid here: texts are then the unchanged inputs.
        if model.data.task or model.data.train or model.data.eval:
            experiment = validate(model)
        else:
            data = dataclasses.replace(model.data, task="none")
            checked = validate(dataclasses.replace(model, data=data))
            data = dataclasses.replace(checked.data, task="")
            experiment = dataclasses.replace(checked, data=data)
        partitioner = partitioner_of(experiment)
        frozen = build_model(experiment, partitioner=partitioner)
        return experiment, open_for(experiment, frozen, prompts), frozen, partitioner
    require_model(model)
    if isinstance(model, TunedModel):
        if prompts:
            raise UserError("this model has something attached to it already: leave out prompts")
        partitioner = where(model.model)
        about = model.known.about or PromptMetadata()
        run: Experiment = model.known.run or UNDESCRIBED
        if about.labels:  # perhaps those of one task of the run
            run = dataclasses.replace(run, data=dataclasses.replace(run.data, labels=()))
        loaded = LoadedPrompts(groups=[members_of(model)], names=("attached",), known=(about,))
        return run, loaded, model.model, partitioner
    runs = (run_config(one) for one in prompts if isinstance(one, str))
    experiment = next((run for run in runs if run is not None), UNDESCRIBED)
    partitioner = where(model)
    return (
        experiment,
        load_prompts(experiment, model, prompts, partitioner=partitioner),
        model,
        partitioner,
    )


def open_for(
    experiment: Experiment, model: Model, prompts: Sequence[str | HostArray]
) -> LoadedPrompts:
    """Opens the prompts, or the bare model.

    With demonstrations the bare model has one name for each seed.
    """
    if not experiment.method.composes_inputs:
        return load_prompts(experiment, model, prompts)
    if prompts:
        raise UserError(
            "method=prompt_design puts words before the inputs of the bare model; leave out "
            "--prompt, or the method"
        )
    bare = load_prompts(experiment, model, [])
    if not experiment.method.num_demonstrations():
        return dataclasses.replace(bare, names=("no demonstrations",))
    seeds = experiment.training.seeds
    names = tuple(f"demonstrations of seed {seed}" for seed in seeds)
    return dataclasses.replace(bare, names=names, known=bare.known * len(names))


def _with(
    experiment: Experiment,
    *,
    strategy: PredictStrategy | None,
    batch_size: int,
    inputs_length: int,
    max_length: int,
) -> Experiment:
    """Overrides values of the experiment; 0 and None keep them."""
    if strategy not in (None, "rank", "greedy", "beam"):
        raise UserError(f"strategy is {strategy!r}; choose rank, greedy or beam")
    for name, number in (
        ("batch_size", batch_size),
        ("inputs_length", inputs_length),
        ("max_length", max_length),
    ):
        if number < 0:
            raise UserError(f"{name} is {number}; it must be at least 1")
    evaluation, data = experiment.evaluation, experiment.data
    evaluation = dataclasses.replace(
        evaluation,
        strategy=strategy or evaluation.strategy,
        batch_size=batch_size or evaluation.batch_size,
    )
    data = dataclasses.replace(
        data,
        inputs_length=inputs_length or data.inputs_length,
        targets_length=max_length or data.targets_length,
    )
    return dataclasses.replace(experiment, evaluation=evaluation, data=data)


def _asked(
    experiment: Experiment,
    loaded: LoadedPrompts,
    partitioner: Partitioner,
    *,
    labels: tuple[str, ...],
    task: str,
    raw: bool,
) -> _Asked:
    """Resolves wording, labels and task from the prompts' metadata and the arguments."""
    data = experiment.data
    known = loaded.by_name()
    mixtures = {name: tasks for name, one in known.items() if (tasks := tasks_of(one))}
    named = task or data.task
    chosen = ""
    if mixtures:
        of_tasks = any(members.tasks for members in loaded.groups)
        indifferent = bool(labels) and raw and not of_tasks
        for name, tasks in mixtures.items():
            one = _one_of(tasks, named, name, must_exist=bool(task), indifferent=indifferent)
            if one is not None:
                known[name], chosen = for_task(known[name], one), one.name
    elif task:
        one = _trained_task(get_task(task))
        known = {name: for_task(about, one) for name, about in known.items()}
    own = labels
    if not own:
        by_name = {name: about.labels for name, about in known.items()}
        own = shared_labels(by_name, instead="give the labels that all are to choose between")
        if data.labels and not chosen and not task:
            own = data.labels
    if any(about.normalize_length for about in known.values()):
        evaluation = dataclasses.replace(experiment.evaluation, normalize_length=True)
        experiment = dataclasses.replace(experiment, evaluation=evaluation)
    strategy = experiment.evaluation.strategy
    if not own and strategy in ("rank", "auto") and not chosen:
        own = _labels_of(data)
    if not own and strategy == "rank":
        raise UserError("no labels are known to rank; give them with labels (data.labels=a,b)")
    return _Asked(
        experiment=experiment,
        loaded=loaded,
        partitioner=partitioner,
        wording=AS_IT_IS if raw else _wording(data, known, named),
        labels=own,
        task=chosen,
    )


def _one_of(
    tasks: Sequence[TrainedTask], named: str, prompt: str, *, must_exist: bool, indifferent: bool
) -> TrainedTask | None:
    """Returns the task that ``named`` selects.

    If there is none, returns None if ``indifferent`` is set and ``must_exist`` is not; otherwise
    raises UserError.
    """
    names = [one.name for one in tasks]
    also = [one.name for one in tasks_known_as(named)] if named else []
    for one in tasks:
        if one.name == named or also == [one.name]:
            return one
    if must_exist:
        raise UserError(f"{prompt} was not trained on the task {named!r}; {suggest(named, names)}")
    if indifferent:
        return None
    raise UserError(
        f"{prompt} was trained on {len(names)} tasks: say with --task (task=) which one the inputs "
        f"are of: {listed(names)}"
    )


def _trained_task(task: Task) -> TrainedTask:
    template = "" if task.from_text is None else template_of(task.from_text)
    return TrainedTask(name=task.name, labels=task.labels, inputs_template=template)


def _labels_of(data: Data) -> tuple[str, ...]:
    """Returns the labels of the config's data; raises UserError if they cannot be determined."""
    if not (data.task or data.train or data.eval) or (data.eval and not data.train):
        return data.labels
    try:
        mixture = build_mixture(data)
    except UserError as error:
        raise UserError(
            f"nothing says which labels to choose between: give them with labels "
            f"(--set data.labels=a,b); {error}"
        ) from None
    if len(mixture.tasks) > 1:
        names = listed([task.name for task in mixture.tasks])
        raise UserError(
            f"{mixture.name} has {len(mixture.tasks)} tasks: name one with --task: {names}"
        )
    return mixture.tasks[0].labels


def _wording(data: Data, known: Mapping[str, PromptMetadata], named: str) -> Wording:
    """Returns the wording of the inputs: the config's template, or else the prompts' wording.

    Falls back to the wording of the config's data or of the named task.  Raises UserError if the
    prompts were trained with different wordings.
    """
    wordings = {
        name: wording_of(one.task, one.inputs_template, chat=one.chat)
        for name, one in known.items()
    }
    if template := data.inputs_template:
        wordings = {
            name: dataclasses.replace(one, template=template, from_text=None)
            for name, one in wordings.items()
        }
    try:
        shared = shared_wording(wordings)
    except UserError as error:
        hint = "predict with one after the other, or give whole inputs and raw"
        raise UserError(f"{error}; {hint}") from None
    chat = shared.chat or data.chat
    if shared != AS_IT_IS:
        return dataclasses.replace(shared, chat=chat)
    if data.train or data.eval:
        return Wording(template=template_of_column(data.inputs_column), chat=chat)
    return wording_of(named, "", chat=chat)


def _given(
    inputs: Given | Path | Iterable[Given], data: Data, wording: Wording, *, raw: bool
) -> tuple[list[str], list[Mapping[str, Any] | None]]:
    """Returns the model's inputs, and the row that each was made from (None for a text)."""
    texts: list[str] = []
    rows: list[Mapping[str, Any] | None] = []
    for place, one in _placed(inputs, data):
        try:
            if isinstance(one, str):
                texts.append(wording.apply(one))
                rows.append(None)
                continue
            texts.append(_of_row(one, data, wording, raw=raw))
            rows.append(one)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    if not texts:
        empty = f"{inputs}: holds no rows" if isinstance(inputs, Path) else "there are no inputs"
        raise UserError(empty)
    return texts, rows


def _placed(inputs: Given | Path | Iterable[Given], data: Data) -> Iterator[tuple[str, Given]]:
    """Yields each input with its place, for messages."""
    if isinstance(inputs, Path):
        yield from RowFile(
            path=inputs,
            header=data.header,
            columns=data.columns,
            separator=data.separator,
            split=data.eval_split,
        ).rows()
        return
    if isinstance(inputs, str | Mapping):
        inputs = [cast(Given, inputs)]
    if not isinstance(inputs, Iterable):
        raise UserError(f"inputs must be texts or objects, not {type(inputs).__name__}")
    for number, one in enumerate(inputs):
        given: object = one  # callers may not type-check
        if not isinstance(given, str | Mapping):
            shown = repr(given)[:40]
            raise UserError(f"inputs[{number}] must be a text or an object, not {shown}")
        yield f"inputs[{number}]", given


def _of_row(row: Mapping[str, Any], data: Data, wording: Wording, *, raw: bool) -> str:
    """Returns a row's input, from the wording's columns or from ``data.inputs_column``."""
    columns = wording.columns
    column = data.inputs_column
    if columns and wording.from_text is None and all(one in row for one in columns):
        return wording.apply(row)
    if len(columns) > 1:
        return wording.apply(row)  # raises UserError that names the missing column
    if column in row:
        return wording.apply(value_text(row[column], column))
    wanted = columns[0] if columns and wording.from_text is None else column
    names = [str(name)[:40] for name in row]
    raise UserError(
        f"no column {wanted!r}: {suggest(wanted, names)}; say which one with "
        f"--set data.inputs_column=NAME{'' if not raw else ' (raw reads one column as it is)'}"
    )


def _predictions(
    asked: _Asked,
    model: Model,
    texts: Sequence[str],
    rows: Sequence[Mapping[str, Any] | None],
    images: ImageSet | None = None,
) -> list[Prediction]:
    labels = asked.labels
    data = dataclasses.replace(asked.experiment.data, chat=asked.wording.chat)
    experiment = dataclasses.replace(asked.experiment, data=data)
    positions, inside = asked.loaded.added_positions()
    experiment = fit_window(experiment, model.config.max_positions, prompt_positions=positions)
    words = vocabulary_of(model)
    if not isinstance(words, ClassVocabulary):
        _check_labels(labels, words)
    source = None
    if experiment.method.composes_inputs:
        source = build_mixture(experiment.data).tasks[0]
    parts = []
    for own_draw in task_data.draws_of(experiment):
        examples: TokenizedExamples
        if images is not None and isinstance(words, ClassVocabulary):
            examples = unlabeled_examples(images, words)
        else:
            examples = tokenize(
                task_data.designed(own_draw, _as_task(texts, asked.wording), words, source=source),
                "predict",
                words,
                inputs_length=experiment.data.inputs_length,
                targets_length=experiment.data.targets_length,
                chat=experiment.data.chat,
                use_cache=False,
            )
        task_data.require_inputs(examples, has_prompt=inside > 0)
        for members in asked.loaded.groups:
            predictor = build_predictor(
                experiment,
                members.graphdef,
                vocabulary_of(members.model()),
                labels=labels,
                partitioner=asked.partitioner,
                buckets=FIXED if images else few_lengths(experiment.data.inputs_length),
            )
            parts.append(
                predictor.predict(
                    members.trainable,
                    members.frozen,
                    examples,
                    members=members.number,
                    task=members.task_number(asked.task),
                )
            )
    cut_N = examples.inputs.lengths > examples.inputs_length
    if cut_N.any():
        _log.warning(
            "%s of %s input%s %s cut to %d tokens, the longest has %d; "
            "data.inputs_length=N reads more",
            f"{cut_N.sum():,}",
            f"{len(texts):,}",
            "s" * (len(texts) != 1),
            "were" if cut_N.sum() != 1 else "was",
            experiment.data.inputs_length,
            examples.inputs.lengths.max(),
        )
    predictions = Predictions.joined(parts)
    each = zip(texts, rows, predictions.votes(), strict=True)
    return [
        Prediction(
            prediction=vote.prediction,
            log_probs=mean_log_probs([known[i] for known in predictions.log_probs_EN]),
            votes=dict(vote.votes) if len(predictions.texts_EN) > 1 else None,
            by_prompt=tuple(own[i] for own in predictions.texts_EN),
            input=text,
            row=row,
            truncated=bool(cut_N[i]),
        )
        for i, (text, row, vote) in enumerate(each)
    ]


def _check_labels(labels: Sequence[str], words: AnyVocabulary) -> None:
    """Raises UserError for a label without tokens, and for two labels with the same tokens."""
    seen: dict[tuple[int, ...], str] = {}
    for label in labels:
        ids = tuple(words.encode(label))
        if not ids:
            raise UserError(f"the label {label!r} has no tokens; give every label a text")
        if ids in seen:
            raise UserError(
                f"the labels {seen[ids]!r} and {label!r} have the same tokens in this vocabulary"
            )
        seen[ids] = label


def _as_task(inputs: Sequence[str], wording: Wording) -> Task:
    rows = [{"inputs": text, "targets": ""} for text in inputs]
    source = Source(
        splits=("predict",), rows=lambda split, data_dir: rows, fingerprint=lambda split, _: ""
    )
    ending, index = wording.ending, wording.index
    return Task(name="inputs", source=source, inputs_ending=ending, index=index)


def mean_log_probs(known_E: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Averages each text's log-probability over the members that have one."""
    texts = dict.fromkeys(text for known in known_E for text in known)
    return {
        text: float(np.mean([known[text] for known in known_E if text in known])) for text in texts
    }
