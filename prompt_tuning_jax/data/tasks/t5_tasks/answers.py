"""SQuAD's scores of an answer against several right ones (Rajpurkar et al. 2016)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """{"em", "f1"}: percent, each the best over a question's answers, averaged over questions.

    An empty answer that meets an empty one matches exactly and has an F1 of 0, as in ``t5``.
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
    """Lower case without ASCII punctuation, articles and superfluous white space."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def word_f1(target: str, prediction: str) -> float:
    """F1 of the words that two texts share, counted as often as they occur; 0 to 1."""
    target_words, predicted_words = target.split(), prediction.split()
    shared = sum((Counter(target_words) & Counter(predicted_words)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted_words), shared / len(target_words)
    return (2 * precision * recall) / (precision + recall)
