"""Rank classification of tasks whose examples have their own texts to choose between."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.data.batching.loader import eval_batches
from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples
from prompt_tuning_jax.distributed.sharding import Partitioner, activation_sharding, replicate
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.decoding.rank import sequence_log_probs
from prompt_tuning_jax.inference.ensemble import map_members
from prompt_tuning_jax.methods import TunedModel
from prompt_tuning_jax.typing import Array, FlatParams, HostArray

# Runs a batch: (tokens [B, T], choices [B, K, S]) -> log-probabilities [E, B, K].
Scores = Callable[[HostArray, HostArray], Any]
_LENGTHS = 4  # choices are padded to a multiple, so that batches have few shapes


@partial(jax.jit, static_argnums=(0, 5, 6))
def choice_scores(
    graphdef: nnx.GraphDef[TunedModel],
    trainable: FlatParams,
    frozen: FlatParams,
    tokens_BT: Array,
    choices_BKS: Array,
    members: int,
    partitioner: Partitioner | None = None,
    task_B: Array | HostArray | None = None,
) -> Array:
    """Returns ``[E, B, K]``: the summed log-probability of each row's own choices.

    The model reads each example once per member, and writes one choice after another.  On a mesh
    the result is replicated.
    """

    def member(params: FlatParams) -> Array:
        tuned = param_tree.merge(graphdef, {**frozen, **params})
        context, injections = tuned.read(tokens_BT, task_B=task_B)

        def score(choice_BS: Array) -> Array:
            model = tuned.model
            lazy = model.lazy_logits(model.write_hidden(context, choice_BS, injections=injections))
            return sequence_log_probs(lazy, choice_BS, padding=model.token_ids.fill)

        scores_KB: Array = jax.lax.map(score, choices_BKS.swapaxes(0, 1))
        return scores_KB.T

    with activation_sharding(partitioner):
        return replicate(map_members(member, trainable, members=members, chunk_size=1))


def rank_choices(
    examples: TokenizedExamples,
    scores: Scores,
    *,
    members: int,
    encode: Callable[[list[str]], list[list[int]]],
    fill: int,
    batch_size: int,
    buckets: Any,
) -> list[list[dict[str, tuple[float, int]]]]:
    """Scores every example's choices.

    Returns for each member and example the summed log-probability and the number of tokens of each
    choice, by its text.  Raises UserError for an example without choices.
    """
    field = examples.task.choices_field
    every: list[list[str]] = [choices_of(example, field, examples) for example in examples.texts]
    ids: list[list[list[int]]] = [encode(choices) for choices in every]
    scored: list[list[dict[str, tuple[float, int]]]] = [
        [{} for _ in range(len(examples))] for _ in range(members)
    ]
    for batch in eval_batches(examples, batch_size=batch_size, buckets=buckets):
        index_R = batch["example_index"][batch["row_mask"]]
        batch_ids = [ids[index] for index in index_R]
        number = _padded(max(map(len, batch_ids)))
        longest = _padded(max(len(tokens) for each in batch_ids for tokens in each))
        choices_BKS = np.full((len(batch["inputs"]), number, longest), fill, np.int32)
        for row, each in enumerate(batch_ids):
            for column, tokens in enumerate(each):
                choices_BKS[row, column, : len(tokens)] = tokens
        scores_EBK = np.asarray(scores(batch["inputs"], choices_BKS))
        for member in range(members):
            for row, index in enumerate(index_R):
                for text, tokens, value in zip(
                    every[index], ids[index], scores_EBK[member, row].tolist(), strict=False
                ):
                    scored[member][index][text] = (value, len(tokens))
    return scored


def choices_of(example: Any, field: str, examples: TokenizedExamples) -> list[str]:
    """Returns the texts that an example chooses between, without repetitions."""
    choices = example.get(field)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
        raise UserError(
            f"{examples.title}: {field!r} of each example must be a list of texts to choose between"
        )
    return list(dict.fromkeys(choices))


def best_choice(scored: dict[str, tuple[float, int]], *, normalize_length: bool) -> str:
    """Returns the choice with the largest log-probability, or mean of it over tokens."""
    return max(
        scored, key=lambda c: scored[c][0] / (max(scored[c][1], 1) if normalize_length else 1)
    )


def _padded(size: int) -> int:
    return -(-size // _LENGTHS) * _LENGTHS
