"""Rank classification: scores given label strings instead of generating text."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import Array, HostArray

# label_S (int32, one target for the whole batch) -> logits_BSV that predict it.  What the model has
# read belongs in the closure, so that it is computed once for all labels.
LabelLogits: TypeAlias = Callable[[Array], Array]


def rank(
    label_logits: LabelLogits,
    labels_CS: Array | HostArray,
    *,
    normalize_length: bool = False,
    padding: int = 0,
    max_logits: int = 2**26,
) -> Array:
    """Returns the summed log-probability of each label for each example: scores_BC float32.

    ``labels_CS`` holds each label's tokens, including its end-of-sequence token, then ``padding``.
    ``normalize_length`` divides by the number of tokens, so that long labels are not at a
    disadvantage.  To save memory, labels are decoded in groups, each as large as possible with
    [labels, B, S, V] within ``max_logits`` numbers, and of at least one label.  Raises UserError
    for a label without tokens if ``labels_CS`` is a NumPy array.
    """
    real_C = np.any(labels_CS != padding, axis=1) if isinstance(labels_CS, np.ndarray) else None
    if real_C is not None and not real_C.all():
        empty = int(np.argmin(real_C))
        raise UserError(f"label number {empty} has no tokens: give every label a text")
    labels_CS = jnp.asarray(labels_CS, jnp.int32)

    def score_label(label_S: Array) -> Array:
        logits_BSV = label_logits(label_S)
        return sequence_log_probs(
            logits_BSV,
            jnp.broadcast_to(label_S, logits_BSV.shape[:2]),
            normalize_length=normalize_length,
            padding=padding,
        )

    num_labels = labels_CS.shape[0]
    logits_per_label = jax.eval_shape(label_logits, labels_CS[0]).size
    at_once = max(1, max_logits // logits_per_label)
    if at_once >= num_labels:
        scores_CB: Array = jax.vmap(score_label)(labels_CS)
    else:
        scores_CB = lax.map(score_label, labels_CS, batch_size=at_once)
    return scores_CB.T


def sequence_log_probs(
    logits_BSV: Array, targets_BS: Array, *, normalize_length: bool = False, padding: int = 0
) -> Array:
    """Returns the log-probability [B] of each target, summed in float32 over non-padding tokens.

    ``targets_BS`` is int32.  ``normalize_length`` returns the mean instead of the sum.
    """
    logits_BSV = logits_BSV.astype(jnp.float32)
    # logsumexp and a gather, because log_softmax would allocate another [B, S, V].
    at_target_BS = jnp.take_along_axis(logits_BSV, targets_BS[..., None], axis=-1)[..., 0]
    log_probs_BS = at_target_BS - jax.nn.logsumexp(logits_BSV, axis=-1)
    real_BS = targets_BS != padding
    total_B = jnp.sum(log_probs_BS, axis=-1, where=real_BS)
    return total_B / jnp.maximum(real_BS.sum(axis=-1), 1) if normalize_length else total_B
