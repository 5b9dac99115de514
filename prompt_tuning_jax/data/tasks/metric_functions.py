"""The formulas of SQuAD, ROUGE and correlations, which general and T5 metrics share."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Returns {"em", "f1"} in percent: the best over a question's answers, averaged over questions.

    An empty prediction for an empty answer is an exact match with an F1 of 0, as in ``t5``.  Raises
    ValueError for a question without answers.
    """
    exact, overlap = [], []
    for answers, prediction in zip(targets, predictions, strict=True):
        given = normalized(prediction)
        right = [normalized(answer) for answer in answers]
        exact.append(given in right)
        overlap.append(max(word_f1(answer, given) for answer in right))
    return {"em": float(100 * np.mean(exact)), "f1": float(100 * np.mean(overlap))}


def normalized(text: str) -> str:
    """Returns the text in lower case without ASCII punctuation, articles and extra blanks."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def word_f1(target: str, prediction: str) -> float:
    """Returns F1 of the words that two texts share, with multiplicity; from 0 to 1."""
    target_words, predicted_words = target.split(), prediction.split()
    shared = sum((Counter(target_words) & Counter(predicted_words)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted_words), shared / len(target_words)
    return (2 * precision * recall) / (precision + recall)


def pearson(targets: Sequence[float], predictions: Sequence[float]) -> float:
    """Returns Pearson's correlation; nan if all predictions are equal, as in the original."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, targets, predictions)


def spearman(targets: Sequence[float], predictions: Sequence[float]) -> float:
    """Returns Spearman's rank correlation; nan as in ``pearson``."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, targets, predictions)


def _correlation(function: Any, targets: Sequence[float], predictions: Sequence[float]) -> float:
    # SciPy warns for constant values before it returns nan, and rejects fewer than two.
    if len(set(targets)) < 2 or len(set(predictions)) < 2:
        return float("nan")
    return 100 * float(function(targets, predictions)[0])


def rouge_f1(
    targets: Sequence[str], predictions: Sequence[str], *, kinds: Sequence[str]
) -> dict[str, float]:
    """Returns the mean F1 of these kinds of ROUGE.

    ``kinds`` are their names in the reference implementation.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(kinds))
    scores = [
        scorer.score(target=_in_lines(target), prediction=_in_lines(prediction))
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {kind: 100 * float(np.mean([s[kind].fmeasure for s in scores])) for kind in kinds}


def _in_lines(summary: str) -> str:
    return summary.replace(" . ", " .\n")
