"""Training data from text objectives, for pre-training and LM adaptation."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.data.tasks.metrics import Direction
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.distributed.sharding import Partitioner
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.ensemble import loss_sums
from prompt_tuning_jax.methods import TunedModel
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.pretraining.denoising import TextInfilling, TokenDeletion
from prompt_tuning_jax.pretraining.dictionary import load_dictionary
from prompt_tuning_jax.pretraining.initializations import cooccurrence_embeddings
from prompt_tuning_jax.pretraining.label_objective import (
    BehindEmptyBlock,
    LabelObjective,
    PromptBlock,
)
from prompt_tuning_jax.pretraining.label_objectives import (
    DictionaryLabels,
    LabelByKeyword,
    LabelBySimilarity,
    LabelByTopic,
    MissingWord,
    NextPart,
    RestoreOrder,
)
from prompt_tuning_jax.pretraining.text_corpus import Corpus, load_corpus
from prompt_tuning_jax.pretraining.text_objectives import (
    Mixture,
    Objective,
    PrefixLM,
    SpanCorruption,
)
from prompt_tuning_jax.pretraining.word_table import make_word_table
from prompt_tuning_jax.typing import Batch, FlatParams

HELD_OUT = 0.005  # fraction of the training text to evaluate on if there is no evaluation text
EVAL_BATCHES = 16
EVAL_SEED = 2**31 - 1
_TABLE_DIMS = 96  # width of the word vectors that label objectives compare


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Windows of a corpus that an objective turns into batches.

    The ``best_by`` metric is the mean loss per target token.
    """

    objective: Objective
    vocabulary: AnyVocabulary
    train: Corpus
    evaluation: Corpus
    batch_size: int
    seeds: tuple[int, ...]
    best_by: str = "loss"
    direction: Direction = "min"
    labels: tuple[str, ...] = ()
    task_labels: tuple[tuple[str, ...], ...] = ()

    # Text has no epochs and no padding, and a run's curves show every evaluated score.
    examples_per_epoch: None = None
    charted: tuple[str, ...] = ()

    def require_direction(self) -> Direction:
        """Returns "min": a smaller loss is better."""
        return self.direction

    def baselines(self) -> dict[str, float]:
        return {}

    def digests(self) -> dict[str, str]:
        """Returns SHA-256 digests of the training tokens and of the evaluation tokens."""
        corpora = {"training data": self.train, "evaluation data": self.evaluation}
        return {
            name: hashlib.sha256(np.ascontiguousarray(corpus.tokens).data).hexdigest()
            for name, corpus in corpora.items()
        }

    def empty_batches(self, steps: int) -> list[Batch]:
        """Returns an empty list: all batches have one shape, which the first step compiles."""
        return []

    def padding(self, start: int, stop: int) -> None:
        return None

    @property
    def reports(self) -> tuple[str, ...]:
        return (
            f"{len(self.train.tokens):,} tokens of text to train on, "
            f"{len(self.evaluation.tokens):,} to evaluate on",
        )

    def batches(self, start: int, stop: int, partitioner: Partitioner) -> Iterator[Batch]:
        """Yields the batches ``[E, B, ...]`` of steps ``start`` to ``stop - 1``.

        A background thread prepares them.  Every process makes whole batches, and the partitioner
        shards them over the mesh.
        """
        import grain

        steps = grain.MapDataset.range(start, max(start, stop))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
        for batch in steps.map(self._batch).to_iter_dataset(options):
            yield partitioner.shard_batch(batch, ("ensemble", "batch", "length"))

    def eval_batches(self) -> Iterator[Batch]:
        """Yields the same ``EVAL_BATCHES`` batches ``[B, ...]`` on every call."""
        for step in range(EVAL_BATCHES):
            yield self._one(self.evaluation, step=step, seed=EVAL_SEED)

    def _batch(self, step: int) -> Batch:
        blocks = [self._one(self.train, step=step, seed=seed) for seed in self.seeds]
        return {name: np.stack([batch[name] for batch in blocks]) for name in blocks[0]}

    def _one(self, corpus: Corpus, *, step: int, seed: int) -> Batch:
        return self.objective.batch(
            corpus, self.vocabulary, step=step, seed=seed, batch_size=self.batch_size
        )


def build_text_data(experiment: Experiment, vocabulary: AnyVocabulary) -> TextData:
    """Returns training data for ``data.objectives`` on the corpus ``data.train``.

    The corpus is tokenized, or read from the cache.  If ``data.eval`` is empty, the end of the
    training text is held out for evaluation.  Inputs begin with a prompt block if the method is
    ``DescribedPrompts``.

    Raises UserError if ``data.train`` is empty, the vocabulary's special ids are not T5's, or the
    text or the number of sentinels is too small.
    """
    data, method = experiment.data, experiment.method
    positions, words = method.description_shape()
    block = PromptBlock(positions=positions, words=words)
    if not data.train:
        raise UserError("data.objectives need text; name a folder of text files in data.train")
    if vocabulary.token_ids != TokenIds():
        raise UserError(
            "data.objectives make examples with T5's ids (padding 0, end 1, start 0), and this "
            f"model has others: {vocabulary.token_ids}"
        )
    train = load_corpus(data.train, vocabulary)
    if data.eval:
        evaluation = load_corpus(data.eval, vocabulary)
    else:
        held_out = max(math.ceil(len(train.tokens) * HELD_OUT), 4 * data.inputs_length)
        evaluation = replace(train, tokens=train.tokens[-held_out:])
        if held_out >= len(train.tokens):
            raise UserError(
                f"data.train has {len(train.tokens):,} tokens, and {held_out:,} of them would be "
                "held out for evaluation: train on more text, or set data.eval"
            )
        train = replace(train, tokens=train.tokens[:-held_out])
    objective = _objective(data, vocabulary, train, block)
    for corpus in (train, evaluation):  # fail early on too little text or too few sentinels
        for each in objective.objectives:
            each.example(corpus, vocabulary, index=0, seed=0)
    return TextData(
        objective=objective,
        vocabulary=vocabulary,
        train=train,
        evaluation=evaluation,
        batch_size=experiment.training.batch_size,
        seeds=experiment.training.seeds,
    )


def _objective(
    data: Data, vocabulary: AnyVocabulary, corpus: Corpus, block: PromptBlock
) -> Mixture:
    """Returns the mixture of ``data.objectives`` with ``data.objective_weights``."""
    lengths = {"inputs_length": data.inputs_length, "targets_length": data.targets_length}
    kinds: dict[str, Callable[[], Objective]] = {
        "span_corruption": lambda: SpanCorruption(
            noise_density=data.noise_density, mean_span_length=data.mean_span_length, **lengths
        ),
        "prefix_lm": lambda: PrefixLM(**lengths),
        "text_infilling": lambda: TextInfilling(
            noise_density=data.noise_density, mean_span_length=data.mean_span_length, **lengths
        ),
        "token_deletion": lambda: TokenDeletion(noise_density=data.noise_density, **lengths),
    }
    if not set(data.objectives) <= set(kinds):
        embeddings_VD = cooccurrence_embeddings(
            corpus.tokens,
            vocab_size=vocabulary.size,
            embed_dim=min(_TABLE_DIMS, vocabulary.size),
        )
        labeled: dict[str, Any] = {
            "words": make_word_table(corpus.tokens, vocabulary, embeddings_VD),
            "inputs_length": data.inputs_length + block.size,
            "targets_length": data.targets_length,
            "block": block,
        }
        kinds |= {
            "label_by_similarity": lambda: LabelBySimilarity(**labeled),
            "label_by_keyword": lambda: LabelByKeyword(**labeled),
            "label_by_topic": lambda: LabelByTopic(**labeled),
            "missing_word": lambda: MissingWord(**labeled),
            "dictionary": lambda: DictionaryLabels(
                dictionary=load_dictionary(data.dictionary, vocabulary), **labeled
            ),
            "next_part": lambda: NextPart(**labeled),
            "restore_order": lambda: RestoreOrder(**labeled),
        }
    objectives = [kinds[name]() for name in data.objectives]
    if block.size:
        objectives = [
            o if isinstance(o, LabelObjective) else BehindEmptyBlock(objective=o, block=block)
            for o in objectives
        ]
    return Mixture(
        objectives=tuple(objectives),
        weights=data.objective_weights or (1.0,) * len(data.objectives),
    )


def start_from_cooccurrence(model: T5, corpus: Corpus) -> None:
    """Initializes the token embeddings and the output layer from co-occurrence in the corpus.

    An untied output layer gets the transposed embeddings at its usual initial scale.  A decoder
    position that represents a word then gives high scores to the words that occur near it.
    """
    config = model.config
    table_VD = jnp.asarray(
        cooccurrence_embeddings(
            corpus.tokens, vocab_size=config.vocab_size, embed_dim=config.embed_dim
        )
    )
    embedding = model.token_embedder.embedding
    embedding.set_value(table_VD.astype(embedding.get_value().dtype))
    if not config.tie_embeddings:
        kernel = model.decoder.logits_dense.kernel
        kernel.set_value((table_VD.T * config.embed_dim**-0.5).astype(kernel.get_value().dtype))


def text_losses(
    graphdef: nnx.GraphDef[TunedModel],
    trainable: FlatParams,
    frozen: FlatParams,
    data: TextData,
    partitioner: Partitioner | None = None,
) -> list[dict[str, float]]:
    """Returns each member's mean loss per target token on the evaluation text."""
    batches = data.eval_batches()
    if partitioner is not None:
        batches = (partitioner.shard_batch(batch, ("batch", "length")) for batch in batches)
    members = len(next(iter(trainable.values())))
    sums = [
        loss_sums(graphdef, trainable, frozen, batch, members, partitioner) for batch in batches
    ]
    losses_E = np.sum([np.asarray(loss) for loss, _ in sums], axis=0)
    tokens_E = np.sum([np.asarray(tokens) for _, tokens in sums], axis=0)
    return [{"loss": float(value)} for value in losses_E / tokens_E]
