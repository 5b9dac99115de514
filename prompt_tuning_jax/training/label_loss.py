"""Losses over the labels of a task alone, which leave everything else unlikely or likely.

Source: prompt_tuning/extended/perceptron/train/models.py.  A label's score is the log-probability
of its tokens, or their mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.ensemble import score_labels
from prompt_tuning_jax.methods import TunedModel
from prompt_tuning_jax.methods.base import LabelTokens, same_tokens
from prompt_tuning_jax.models.layers import Remat
from prompt_tuning_jax.models.losses import TokenSums, class_sums
from prompt_tuning_jax.typing import Array, Batch

Kind: TypeAlias = Literal["labels", "perceptron", "hinge"]
_NEVER = float(np.finfo(np.float32).min) / 4  # the score of another task's label


@dataclass(frozen=True, kw_only=True)
class LabelLoss:
    """A loss over labels; ``labels`` are the tokens of all tasks' labels.

    ``task_labels`` says for each task which of them it has; empty if all examples have all.
    """

    kind: Kind
    labels: LabelTokens
    task_labels: tuple[tuple[bool, ...], ...] = ()
    margin: float = 0.0
    normalize_length: bool = False

    def sums(
        self,
        tuned: TunedModel,
        batch: Batch,
        *,
        key: Array | None,
        remat: Remat,
        z_loss: float,
        copies: int = 1,
    ) -> TokenSums:
        """Computes the summed loss of a batch; its ``tokens`` count examples.

        Examples whose target is none of the labels are ignored.  ``copies`` is how often a ``vmap``
        around it computes this at once.
        """
        task_B, fill = batch.get("task_index"), tuned.model.token_ids.fill
        longest = max(map(len, self.labels))
        labels_CS = np.asarray([[*one, *[fill] * (longest - len(one))] for one in self.labels])
        scores_BC = score_labels(
            tuned,
            batch["inputs"],
            labels_CS,
            task_B=task_B,
            key=key,
            remat=remat,
            copies=copies,
            normalize_length=self.normalize_length,
        )
        same_BC = same_tokens(batch["targets"], self.labels, padding=fill)
        class_B = jnp.where(same_BC.any(axis=1), jnp.argmax(same_BC, axis=1), -1)
        if self.task_labels and task_B is not None:
            scores_BC = jnp.where(jnp.asarray(self.task_labels)[task_B], scores_BC, _NEVER)
        weights_B = batch.get("example_weights")
        if self.kind == "labels":
            return class_sums(scores_BC, class_B, z_loss=z_loss, weights_B=weights_B)
        margins_B = margin_losses(scores_BC, class_B, kind=self.kind, margin=self.margin)
        some_B = class_B >= 0
        counted_B = some_B.astype(jnp.float32)
        weighted_B = counted_B if weights_B is None else counted_B * jnp.asarray(weights_B)
        right_B = some_B & (jnp.argmax(scores_BC, axis=1) == class_B)
        return TokenSums(
            loss=jnp.sum(margins_B * weighted_B),
            tokens=jnp.sum(weighted_B),
            examples=jnp.sum(counted_B),
            correct=jnp.sum(right_B, dtype=jnp.float32),
        )


def margin_losses(
    scores_BC: Array, class_B: Array, *, kind: Literal["perceptron", "hinge"], margin: float
) -> Array:
    """Computes ``max(0, margin + best - own)`` of each example.

    ``own`` is the score of its class, and ``best`` the largest: ``perceptron`` includes its own,
    as the original code does, so that the margin is a constant; ``hinge`` takes the best other.
    """
    is_own_BC = jnp.arange(scores_BC.shape[1]) == class_B[:, None]
    own_B = jnp.sum(jnp.where(is_own_BC, scores_BC, 0.0), axis=1)
    others_BC = scores_BC if kind == "perceptron" else jnp.where(is_own_BC, _NEVER, scores_BC)
    return jnp.maximum(0.0, margin + jnp.max(others_BC, axis=1) - own_B)


def task_label_sets(
    tasks: Sequence[Sequence[str]], labels: Sequence[str]
) -> tuple[tuple[bool, ...], ...]:
    """Returns for each task which of ``labels`` it has; empty if all have all.

    Raises UserError for a task that has none.
    """
    if any(not one for one in tasks) or not labels:
        raise UserError(
            "training.loss chooses among labels, and a task that is trained on has none; set "
            "data.labels, or training.loss=tokens"
        )
    sets = tuple(tuple(label in task for label in labels) for task in tasks)
    return () if all(map(all, sets)) else sets
