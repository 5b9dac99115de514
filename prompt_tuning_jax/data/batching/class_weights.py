"""How much an example counts in the training loss, by its label."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from prompt_tuning_jax.errors import UserError, suggest

BALANCED = "balanced"


def parse_class_weights(entries: Sequence[str]) -> dict[str, float]:
    """``LABEL=WEIGHT`` each -> weights by label; empty for ``balanced``; UserError for others.

    >>> parse_class_weights(["a=b=2", "c=0.5"])
    {'a=b': 2.0, 'c': 0.5}
    """
    if tuple(entries) == (BALANCED,):
        return {}
    weights: dict[str, float] = {}
    for entry in entries:
        label, equals, text = entry.rpartition("=")
        try:
            weight = float(text) if equals else math.nan
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise UserError(
                f"data.class_weights: {entry!r} is neither LABEL=WEIGHT, with a number of at least "
                f"0, nor {BALANCED} alone"
            )
        if label in weights:
            raise UserError(f"data.class_weights: the label {label!r} is there twice")
        weights[label] = weight
    return weights


def example_weights(
    entries: Sequence[str], *, labels: Sequence[str], targets: Sequence[str]
) -> np.ndarray:
    """``[N]`` float32: the weight of each example.

    ``balanced`` gives an example of a label that n of N examples have N / (C * n), C being the
    labels that occur: each of these counts the same in the sum of all, and the mean weight is 1.
    Otherwise labels that are not named have weight 1.

    Raises UserError for a label that the task has not, and where every weight is 0.
    """
    given, counts = parse_class_weights(entries), Counter(targets)
    if not labels:
        raise UserError(
            "data.class_weights are for labels, and the targets are text; leave them out, or give "
            "data.labels"
        )
    for label in given:
        if label not in labels:
            raise UserError(f"data.class_weights: no label {label!r}: {suggest(label, labels)}")
    if given:
        by_label = {label: given.get(label, 1.0) for label in counts}
    else:
        by_label = {label: len(targets) / (len(counts) * n) for label, n in counts.items()}
    weights_N = np.asarray([by_label[target] for target in targets], np.float32)
    if not weights_N.any():
        raise UserError("data.class_weights: all examples have weight 0; give some label another")
    return weights_N
