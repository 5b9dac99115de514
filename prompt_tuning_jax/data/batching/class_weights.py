"""How much an example counts in the training loss, by its label."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from prompt_tuning_jax.config.field_syntax import parse_class_weights
from prompt_tuning_jax.errors import UserError, suggest


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
