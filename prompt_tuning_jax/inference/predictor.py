"""Predicts and scores with E members on one frozen model, with one forward pass per batch."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.data.batching import task_data
from prompt_tuning_jax.data.batching.buckets import FIXED, Buckets, padded_size
from prompt_tuning_jax.data.batching.image_examples import ImageExamples
from prompt_tuning_jax.data.batching.loader import eval_batches
from prompt_tuning_jax.data.batching.task_data import (
    chosen_strategy,
    eval_batch_size,
    require_labels,
)
from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples
from prompt_tuning_jax.data.tasks.metrics import EVALUATION_LOSS, LOSS
from prompt_tuning_jax.data.tasks.task import NORMED, Task
from prompt_tuning_jax.data.tasks.text_metrics import auc
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.distributed.sharding import Partitioner, spans_devices
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.choices import best_choice, choice_scores, rank_choices
from prompt_tuning_jax.inference.decoding.beam import T5XRule
from prompt_tuning_jax.inference.decoding.logits_processors import (
    LogitsProcessors,
    logits_processors,
)
from prompt_tuning_jax.inference.ensemble import (
    DecodeConfig,
    Vote,
    abstract_member,
    label_scores,
    loss_sums,
    majority_vote,
    write,
)
from prompt_tuning_jax.inference.setup import Members, partitioner_of, vocabulary_of
from prompt_tuning_jax.methods import TunedModel
from prompt_tuning_jax.typing import Batch, FlatParams, HostArray


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The predictions of E members for N examples.

    ``texts_EN`` holds the predicted texts.  ``log_probs_EN`` holds log-probabilities by text: of
    all labels when ranking, and of the member's prediction when generating.
    """

    texts_EN: list[list[str]]
    log_probs_EN: list[list[dict[str, float]]]

    def votes(self) -> list[Vote]:
        """Returns the majority vote of the members for each example."""
        return [
            majority_vote(list(texts), list(log_probs))
            for texts, log_probs in zip(
                zip(*self.texts_EN, strict=True), zip(*self.log_probs_EN, strict=True), strict=True
            )
        ]

    @staticmethod
    def joined(parts: Sequence["Predictions"]) -> "Predictions":
        """Concatenates the members of several groups, over the same examples."""
        return Predictions(
            texts_EN=[texts for part in parts for texts in part.texts_EN],
            log_probs_EN=[known for part in parts for known in part.log_probs_EN],
        )


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Predicts with any attached method; ``labels`` are the label strings that ``rank`` scores.

    ``few_sizes`` pads batches with fewer than ``batch_size`` examples to one of a few sizes.
    """

    graphdef: nnx.GraphDef[TunedModel]
    vocabulary: AnyVocabulary
    strategy: Literal["rank", "greedy", "beam"]
    batch_size: int
    max_length: int
    num_beams: int = 4
    normalize_length: bool = False
    processors: LogitsProcessors | None = None
    labels: tuple[str, ...] = ()
    buckets: Buckets = FIXED
    few_sizes: bool = False
    partitioner: Partitioner | None = None

    def __post_init__(self) -> None:
        if self.strategy == "rank":
            require_labels(self.labels)

    def predict(
        self,
        trainable: FlatParams,
        frozen: FlatParams,
        examples: TokenizedExamples,
        *,
        members: int,
        task: int | None = None,
    ) -> Predictions:
        """Predicts for all examples in order; ``trainable`` has a leading axis E = ``members``.

        ``task`` is the index of the examples' task if the method was trained on a mixture of tasks.
        On a mesh the rows of each batch are sharded, and every process gets all results.
        """
        self._require_known_labels(trainable, frozen)
        trainable, frozen = self._replicate(trainable), self._replicate(frozen)
        texts: list[list[str]] = [[""] * len(examples) for _ in range(members)]
        known: list[list[dict[str, float]]] = [[{} for _ in range(len(examples))] for _ in texts]
        pending: list[tuple[Any, HostArray]] = []
        number = padded_size(len(examples)) if self.few_sizes else len(examples)
        batch_size = self._padded_batch_size(number)
        # One batch is dispatched ahead: the host reads a batch while the device computes the next.
        for batch in eval_batches(examples, batch_size=batch_size, buckets=self.buckets):
            tokens_BT = batch["inputs"]
            index_R = batch["example_index"][batch["row_mask"]]
            pending.append((self._run(trainable, frozen, tokens_BT, members, task), index_R))
            if len(pending) > 1:
                self._collect(*pending.pop(0), texts, known)
        for result, index_R in pending:
            self._collect(result, index_R, texts, known)
        return Predictions(texts_EN=texts, log_probs_EN=known)

    def choices(
        self,
        trainable: FlatParams,
        frozen: FlatParams,
        examples: TokenizedExamples,
        *,
        members: int,
        task: int | None = None,
    ) -> list[list[dict[str, tuple[float, int]]]]:
        """Scores the texts that each example chooses between; see ``choices.rank_choices``.

        Raises UserError if the method scores fixed labels itself.
        """
        if abstract_member(self.graphdef, trainable, frozen).method.label_tokens:
            raise UserError(
                f"{examples.task.name} ranks texts of each example, and this method scores the "
                "labels that it was trained on alone; evaluate it on their task"
            )
        trainable, frozen = self._replicate(trainable), self._replicate(frozen)

        def scores(tokens_BT: HostArray, choices_BKS: HostArray) -> Any:
            return choice_scores(
                self.graphdef,
                trainable,
                frozen,
                self._shard(tokens_BT, "length"),
                self._shard(choices_BKS, None, None),
                members,
                self.partitioner,
                self._task_of_rows(task, len(tokens_BT)),
            )

        return rank_choices(
            examples,
            scores,
            members=members,
            encode=self.vocabulary.encode_targets,
            fill=self.vocabulary.token_ids.fill,
            batch_size=self._padded_batch_size(len(examples)),
            buckets=self.buckets,
        )

    def losses(
        self,
        trainable: FlatParams,
        frozen: FlatParams,
        examples: TokenizedExamples,
        *,
        members: int,
        task: int | None = None,
    ) -> list[float]:
        """Returns each member's mean cross entropy per target token.

        Targets are truncated as for training.  Raises UserError if the method scores labels itself
        and a target is not among them.
        """
        trainable, frozen = self._replicate(trainable), self._replicate(frozen)
        batch_size = self._padded_batch_size(len(examples))
        sums = []
        for whole in eval_batches(examples, batch_size=batch_size, buckets=self.buckets):
            batch: Batch = {
                name: self._shard(whole[name], "length") for name in ("inputs", "targets")
            }
            task_B = self._task_of_rows(task, len(whole["row_mask"]))
            sums.append(
                loss_sums(
                    self.graphdef, trainable, frozen, batch, members, self.partitioner, task_B
                )
            )
        # float64, so that the sum does not depend on the number of batches.
        totals_ME = np.asarray([[np.asarray(x) for x in pair] for pair in sums], np.float64)
        loss_E, tokens_E = totals_ME.sum(axis=0)
        label_tokens = abstract_member(self.graphdef, trainable, frozen).method.label_tokens
        if label_tokens and tokens_E.min() < len(examples):
            raise UserError(
                f"the loss on {examples.task.name}/{examples.split} needs every target among the "
                "labels that this method scores, and some are not; name all in data.labels"
            )
        return [float(value) for value in loss_E / tokens_E]

    def _replicate(self, params: FlatParams) -> FlatParams:
        """Places parameters that are not yet on the mesh on all of its devices."""
        return params if self.partitioner is None else self.partitioner.replicate_arrays(params)

    def _shard(self, x: HostArray, *axes: str | None) -> Any:
        """Shards the rows of an array, which are its first axis, over the mesh."""
        if self.partitioner is None:
            return x
        return self.partitioner.shard_batch({"": x}, ("batch", *axes))[""]

    def _task_of_rows(self, task: int | None, rows: int) -> Any:
        return None if task is None else self._shard(np.full(rows, task, np.int32))

    def _padded_batch_size(self, examples: int) -> int:
        parts = 1 if self.partitioner is None else self.partitioner.num_batch_shards
        return eval_batch_size(self.batch_size, examples, parts=parts)

    def _run(
        self,
        trainable: FlatParams,
        frozen: FlatParams,
        tokens_BT: HostArray,
        members: int,
        task: int | None,
    ) -> Any:
        task_B = self._task_of_rows(task, len(tokens_BT))
        tokens_BT = self._shard(tokens_BT, "length")
        if self.strategy == "rank":
            return label_scores(
                self.graphdef,
                trainable,
                frozen,
                tokens_BT,
                self._labels_CS(),
                members,
                self.partitioner,
                task_B,
                self.normalize_length,
            )
        writing = DecodeConfig(
            strategy=self.strategy, max_length=self.max_length, num_beams=self.num_beams
        )
        if not spans_devices(self.partitioner) or not trainable:
            return self._write(writing, trainable, frozen, tokens_BT, task_B)
        # One member at a time: decoding them together would move rows between devices.
        each = [{name: x[e : e + 1] for name, x in trainable.items()} for e in range(members)]
        results = [self._write(writing, params, frozen, tokens_BT, task_B) for params in each]
        return tuple(np.concatenate(parts) for parts in zip(*results, strict=True))

    def _write(
        self,
        writing: DecodeConfig,
        trainable: FlatParams,
        frozen: FlatParams,
        tokens_BT: Any,
        task_B: Any,
    ) -> tuple[Any, Any]:
        return write(
            self.graphdef,
            writing,
            trainable,
            frozen,
            tokens_BT,
            jax.random.key(0),
            self.partitioner,
            task_B,
            self.processors,
        )

    def _collect(
        self,
        result: Any,
        index_R: HostArray,
        texts: list[list[str]],
        known: list[list[dict[str, float]]],
    ) -> None:
        """Stores the results of a batch at its examples' indices; padding rows come last."""
        rows = len(index_R)
        if self.strategy == "rank":
            for member, scores_BC in enumerate(np.asarray(result)[:, :rows]):
                for index, row_C in zip(index_R, scores_BC, strict=True):
                    texts[member][index] = self.labels[int(row_C.argmax())]
                    known[member][index] = dict(zip(self.labels, row_C.tolist(), strict=True))
            return
        ids, scores = (np.asarray(part)[:, :rows] for part in result)
        if self.strategy == "beam":
            ids, scores = ids[:, :, 0], scores[:, :, 0]
            of = self.vocabulary.token_ids
            scores = np.stack(
                [T5XRule().log_probs(*each, of) for each in zip(scores, ids, strict=True)]
            )
        for member, (ids_BS, scores_B) in enumerate(zip(ids, scores, strict=True)):
            for index, ids_S, value in zip(index_R, ids_BS, scores_B, strict=True):
                text = self.vocabulary.decode(ids_S.tolist())
                texts[member][index] = text
                known[member][index] = {text: float(value)}

    def _require_known_labels(self, trainable: FlatParams, frozen: FlatParams) -> None:
        """Raises UserError if a method that scores labels itself was trained on other labels."""
        if self.strategy != "rank":
            return
        known = abstract_member(self.graphdef, trainable, frozen).method.label_tokens
        for label in self.labels if known else ():
            if tuple(self.vocabulary.encode_target(label)) not in known:
                raise UserError(
                    f"the label {label!r} is not one that this method was trained to score; "
                    "evaluate it on a task with the same labels (data.labels)"
                )

    def _labels_CS(self) -> HostArray:
        ids = self.vocabulary.token_ids
        rows = self.vocabulary.encode_targets(self.labels)
        labels_CS = np.full((len(rows), max(map(len, rows))), ids.fill, np.int32)
        for row_S, tokens in zip(labels_CS, rows, strict=True):
            row_S[: len(tokens)] = tokens
        return labels_CS


def score_members(examples: TokenizedExamples, predictions: Predictions) -> list[dict[str, float]]:
    """Returns the task's metrics for each member, in percent."""
    return [examples.score(texts) for texts in predictions.texts_EN]


def build_predictor(
    experiment: Experiment,
    graphdef: nnx.GraphDef[TunedModel],
    vocabulary: AnyVocabulary,
    *,
    labels: tuple[str, ...],
    partitioner: Partitioner | None = None,
    buckets: Buckets | None = None,
) -> Predictor:
    """Builds the predictor for the experiment's evaluation settings.

    ``partitioner`` and ``buckets`` default to the experiment's.  If ``buckets`` is given, batches
    have only a few shapes whatever the number of inputs.
    """
    config = experiment.evaluation
    return Predictor(
        graphdef=graphdef,
        vocabulary=vocabulary,
        strategy=chosen_strategy(config.strategy, labels),
        batch_size=config.batch_size,
        max_length=experiment.data.targets_length,
        num_beams=config.num_beams,
        normalize_length=config.normalize_length,
        processors=logits_processors(
            min_length=config.min_length,
            repetition_penalty=config.repetition_penalty,
            no_repeat_ngram_size=config.no_repeat_ngram_size,
            max_length=experiment.data.targets_length,
            prefix="evaluation.",
        ),
        labels=labels,
        buckets=task_data.buckets_of(experiment) if buckets is None else buckets,
        few_sizes=buckets is not None,
        partitioner=partitioner_of(experiment) if partitioner is None else partitioner,
    )


def _for_task(experiment: Experiment, task: Task) -> Experiment:
    """Returns the experiment with a task's own way of prediction."""
    if not task.ranks:
        return experiment
    evaluation = dataclasses.replace(
        experiment.evaluation, strategy="rank", normalize_length=task.normalize_length
    )
    return dataclasses.replace(experiment, evaluation=evaluation)


def _label_curves(examples: TokenizedExamples, predictions: Predictions) -> list[dict[str, float]]:
    """Returns each member's areas under the curves of the second of two labels, in percent."""
    first, second = examples.task.labels
    targets = [float(example["targets"] == second) for example in examples.texts]
    curves = []
    for known_N in predictions.log_probs_EN:
        odds = [known[second] - known[first] for known in known_N]
        curves.append({name: 100 * area for name, area in auc(targets, odds).items()})
    return curves


def _best_choices(
    ranked: list[list[dict[str, tuple[float, int]]]], *, normalize_length: bool
) -> list[list[str]]:
    return [
        [best_choice(one, normalize_length=normalize_length) for one in each] for each in ranked
    ]


def evaluate_members(
    experiment: Experiment,
    members: Members,
    trainable: FlatParams,
    data: task_data.TaskData,
    *,
    scores_alone: bool = False,
) -> tuple[list[dict[str, float]], dict[str, Predictions]]:
    """Returns each member's metrics, and the predictions by task.

    With several tasks, metrics are named ``task/metric``.  ``scores_alone`` skips the predictions
    for a task whose only metric is the loss.
    """
    scores: list[dict[str, float]] = [{} for _ in range(members.number)]
    predictions = {}
    words = vocabulary_of(members.model())
    for name, examples in data.evaluation.items():
        labels = examples.task.labels
        if isinstance(examples, ImageExamples) and isinstance(words, ClassVocabulary):
            examples = examples.with_classes(words)
        predictor = build_predictor(
            _for_task(experiment, examples.task), members.graphdef, words, labels=labels
        )
        prefix = f"{name}/" if len(data.evaluation) > 1 else ""
        arguments: dict[str, Any] = {
            "members": members.number,
            "task": members.task_number(name),
        }
        if examples.task.choices_field:
            ranked = predictor.choices(trainable, members.frozen, examples, **arguments)
            predictions[name] = Predictions(
                texts_EN=_best_choices(ranked, normalize_length=False),
                log_probs_EN=[
                    [{text: log_prob for text, (log_prob, _) in one.items()} for one in each]
                    for each in ranked
                ],
            )
            normed = _best_choices(ranked, normalize_length=True)
            for before, texts_EN in (("", predictions[name].texts_EN), (NORMED, normed)):
                for member_scores, texts_N in zip(scores, texts_EN, strict=True):
                    for metric, value in examples.score(texts_N).items():
                        member_scores[f"{prefix}{before}{metric}"] = value
        elif not scores_alone or any(one is not EVALUATION_LOSS for one in examples.task.metrics):
            predictions[name] = predictor.predict(trainable, members.frozen, examples, **arguments)
            scored = score_members(examples, predictions[name])
            if examples.task.ranking_scores(()):
                curves = _label_curves(examples, predictions[name])
                for member_scores, areas in zip(scored, curves, strict=True):
                    member_scores.update(areas)
            for member_scores, values in zip(scores, scored, strict=True):
                member_scores.update(
                    {f"{prefix}{metric}": value for metric, value in values.items()}
                )
        if data.wants_loss(examples.task) and f"{prefix}{LOSS}" not in scores[0]:
            losses = predictor.losses(trainable, members.frozen, examples, **arguments)
            for member_scores, loss in zip(scores, losses, strict=True):
                member_scores[f"{prefix}{LOSS}"] = loss
    return scores, predictions
