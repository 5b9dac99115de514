"""Predicts for texts and for the rows of a data file, with prompts or other tuned methods."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
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
from prompt_tuning_jax.data.tasks.selection import build_mixture
from prompt_tuning_jax.data.tasks.task import Source, Task
from prompt_tuning_jax.data.tasks.wording import Given, Wording
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.distributed import processes
from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.api import require_model
from prompt_tuning_jax.inference.decoding.checks import whole_number
from prompt_tuning_jax.inference.loading import (
    LoadedPrompts,
    load_prompts,
    members_of,
    prompt_list,
    where,
)
from prompt_tuning_jax.inference.model_inputs import model_inputs
from prompt_tuning_jax.inference.prediction_setup import PredictionSetup, resolve
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
    experiment, loaded, frozen, partitioner = _load(model, prompt_list(prompts))
    experiment = _override(
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
    setup = resolve(experiment, loaded, partitioner, labels=labels, task=task, raw=raw)
    if images is None:
        given, rows = model_inputs(inputs, setup.experiment.data, setup.wording, raw=raw)
    else:
        given, rows = [*images.names], [None] * len(images)
    processes.require_same("the input", "\n".join(given))
    return _predictions(setup, frozen, given, rows, images)


def _load(
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


def _override(
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
        whole_number(name, number, at_least=0)
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


def _predictions(
    setup: PredictionSetup,
    model: Model,
    texts: Sequence[str],
    rows: Sequence[Mapping[str, Any] | None],
    images: ImageSet | None = None,
) -> list[Prediction]:
    labels = setup.labels
    data = dataclasses.replace(setup.experiment.data, chat=setup.wording.chat)
    experiment = dataclasses.replace(setup.experiment, data=data)
    positions, inside = setup.loaded.added_positions()
    experiment = fit_window(experiment, model.config.max_positions, prompt_positions=positions)
    words = vocabulary_of(model)
    if not isinstance(words, ClassVocabulary):
        _check_labels(labels, words)
    source = None
    if experiment.method.composes_inputs:
        source = build_mixture(experiment.data).tasks[0]
    parts = []
    cut_N = np.zeros(len(texts), bool)
    for draw in task_data.draws_of(experiment):
        examples: TokenizedExamples
        if images is not None and isinstance(words, ClassVocabulary):
            examples = unlabeled_examples(images, words)
        else:
            examples = tokenize(
                task_data.designed(draw, _as_task(texts, setup.wording), words, source=source),
                "predict",
                words,
                inputs_length=experiment.data.inputs_length,
                targets_length=experiment.data.targets_length,
                chat=experiment.data.chat,
                use_cache=False,
            )
        task_data.require_inputs(examples, has_prompt=inside > 0)
        too_long_N = examples.inputs.lengths > examples.inputs_length
        if (too_long_N & ~cut_N).any():
            _warn_of_cut(too_long_N, examples)
        cut_N |= too_long_N
        for members in setup.loaded.groups:
            predictor = build_predictor(
                experiment,
                members.graphdef,
                vocabulary_of(members.model()),
                labels=labels,
                partitioner=setup.partitioner,
                buckets=FIXED if images else few_lengths(experiment.data.inputs_length),
            )
            parts.append(
                predictor.predict(
                    members.trainable,
                    members.frozen,
                    examples,
                    members=members.number,
                    task=members.task_number(setup.task),
                )
            )
    predictions = Predictions.joined(parts)
    each = zip(texts, rows, predictions.votes(), strict=True)
    return [
        Prediction(
            prediction=vote.prediction,
            log_probs=mean_log_probs([known[i] for known in predictions.log_probs_EN]),
            votes=dict(vote.votes) if len(predictions.texts_EN) > 1 else None,
            by_prompt=tuple(by_example[i] for by_example in predictions.texts_EN),
            input=text,
            row=row,
            truncated=bool(cut_N[i]),
        )
        for i, (text, row, vote) in enumerate(each)
    ]


def _warn_of_cut(cut_N: HostArray, examples: TokenizedExamples) -> None:
    _log.warning(
        "%s of %s input%s %s cut to %d tokens, the longest has %d; data.inputs_length=N reads more",
        f"{cut_N.sum():,}",
        f"{len(cut_N):,}",
        "s" * (len(cut_N) != 1),
        "were" if cut_N.sum() != 1 else "was",
        examples.inputs_length,
        examples.inputs.lengths.max(),
    )


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
