"""Rank classification: scores given label strings instead of generating text."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.output_head import LazyLogits, statistics_of
from prompt_tuning_jax.typing import Array, HostArray

MAX_LOGITS = 2**26  # of the labels that are decoded together
# label_S (int32, one target for the whole batch) -> logits_BSV that predict it.  What the model has
# read belongs in the closure, so that it is computed once for all labels.
LabelLogits: TypeAlias = Callable[[Array], Array | LazyLogits]


def rank(
    label_logits: LabelLogits,
    labels_CS: Array | HostArray,
    *,
    normalize_length: bool = False,
    padding: int = 0,
    max_logits: int = MAX_LOGITS,
) -> Array:
    """Returns the summed log-probability of each label for each example: scores_BC float32.

    ``labels_CS`` holds each label's tokens, including its end-of-sequence token, then ``padding``.
    ``normalize_length`` divides by the number of tokens, so that long labels are not at a
    disadvantage.  To save memory, labels are decoded in groups, each as large as possible with
    [labels, B, S, V] within ``max_logits`` numbers, and of at least one label.  Lazy logits have a
    bound of their own, which a group keeps.  Raises UserError for a label without tokens if
    ``labels_CS`` is a NumPy array.
    """
    real_C = np.any(labels_CS != padding, axis=1) if isinstance(labels_CS, np.ndarray) else None
    if real_C is not None and not real_C.all():
        empty = int(np.argmin(real_C))
        raise UserError(f"label number {empty} has no tokens: give every label a text")
    labels_CS = jnp.asarray(labels_CS, jnp.int32)

    num_labels = labels_CS.shape[0]
    # Only for its shape: nothing is allocated.
    one_BSV = jax.eval_shape(lambda label_S: jnp.zeros(label_logits(label_S).shape), labels_CS[0])
    at_once = min(max(1, max_logits // one_BSV.size), num_labels)

    def score_label(label_S: Array) -> Array:
        logits_BSV = label_logits(label_S)
        if isinstance(logits_BSV, LazyLogits):
            logits_BSV = replace(logits_BSV, copies=at_once * logits_BSV.copies)
        return sequence_log_probs(
            logits_BSV,
            jnp.broadcast_to(label_S, logits_BSV.shape[:2]),
            normalize_length=normalize_length,
            padding=padding,
        )

    if at_once == num_labels:
        scores_CB: Array = jax.vmap(score_label)(labels_CS)
    else:
        scores_CB = lax.map(score_label, labels_CS, batch_size=at_once)
    return scores_CB.T


def sequence_log_probs(
    logits_BSV: Array | LazyLogits,
    targets_BS: Array,
    *,
    normalize_length: bool = False,
    padding: int = 0,
) -> Array:
    """Returns the log-probability [B] of each target, summed in float32 over non-padding tokens.

    ``targets_BS`` is int32.  ``normalize_length`` returns the mean instead of the sum.
    """
    of = statistics_of(logits_BSV, targets_BS)
    log_probs_BS = of.target - of.log_z
    real_BS = targets_BS != padding
    total_B = jnp.sum(log_probs_BS, axis=-1, where=real_BS)
    return total_B / jnp.maximum(real_BS.sum(axis=-1), 1) if normalize_length else total_B
