"""Metrics of text as in ``t5.evaluation.metrics``: BLEU, question answering, edit distance."""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.data.tasks.metric_functions import normalized, squad, word_f1
from prompt_tuning_jax.errors import UserError

AUC_NAMES = ("auc-roc", "auc-pr")
_MAX_ORDER = 4  # of BLEU's n-grams
_TRIVIA_PUNCTUATION = str.maketrans(dict.fromkeys(f"{string.punctuation}‘’´`_", " "))
_NO_WORD = re.compile(r"\W")


def bleu(targets: Sequence[Any], predictions: Sequence[str]) -> float:
    """Corpus BLEU-4 with sacrebleu's ``intl`` tokenizer and exponential smoothing, in percent.

    Targets are texts, or lists of equally many references each.  Papineni et al. 2002; Post 2018.
    """
    references = [[t] if isinstance(t, str) else list(t) for t in targets]
    if len({len(texts) for texts in references}) > 1:
        raise UserError("metric 'bleu': every target must have the same number of references")
    matches, totals = [0] * _MAX_ORDER, [0] * _MAX_ORDER
    length = reference_length = 0
    for texts, prediction in zip(references, predictions, strict=True):
        words = international_words(prediction)
        sides = [international_words(text) for text in texts]
        length += len(words)
        reference_length += min((abs(len(s) - len(words)), len(s)) for s in sides)[1]
        for n in range(_MAX_ORDER):
            ngrams = _ngrams(words, n + 1)
            allowed: Counter[tuple[str, ...]] = Counter()
            for side in sides:
                allowed |= _ngrams(side, n + 1)
            matches[n] += (ngrams & allowed).total()
            totals[n] += ngrams.total()
    if not any(matches) or not all(totals):
        return 0.0
    smoothing, logs = 1.0, []
    for match, total in zip(matches, totals, strict=True):
        if not match:
            smoothing *= 2
        logs.append(math.log(100 * match / total if match else 100 / (smoothing * total)))
    penalty = 1.0 if length >= reference_length else math.exp(1 - reference_length / length)
    return penalty * math.exp(sum(logs) / _MAX_ORDER)


def international_words(text: str) -> list[str]:
    """Returns the words of mteval-v14's international tokenization, which keeps case.

    Punctuation is apart unless it is between digits, as in 1.5, or ends the text; symbols always
    are.
    """
    text = text.rstrip()
    kinds = [unicodedata.category(character)[0] for character in text]
    # Each pair of characters is read once, as by the original's replacements of two at a time.
    text = _apart(text, kinds, first=lambda k: k != "N", second=lambda k: k == "P", after=True)
    kinds = [unicodedata.category(character)[0] for character in text]
    text = _apart(text, kinds, first=lambda k: k == "P", second=lambda k: k != "N", after=False)
    return "".join(f" {c} " if unicodedata.category(c)[0] == "S" else c for c in text).split()


def _apart(text: str, kinds: Sequence[str], *, first: Any, second: Any, after: bool) -> str:
    parts, i = [], 0
    while i < len(text):
        if i + 1 < len(text) and first(kinds[i]) and second(kinds[i + 1]):
            pair = f"{text[i]} {text[i + 1]} " if after else f" {text[i]} {text[i + 1]}"
            parts.append(pair)
            i += 2
        else:
            parts.append(text[i])
            i += 1
    return "".join(parts)


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def trivia_qa(
    targets: Sequence[Sequence[str] | str], predictions: Sequence[str]
) -> dict[str, float]:
    """Returns {"em", "f1"} in percent: the best over an entry's answers, normalized as by TriviaQA.

    Unlike SQuAD's normalization, punctuation becomes a blank.
    """
    exact, overlap = [], []
    for answers, prediction in zip(targets, predictions, strict=True):
        given = normalized(prediction.translate(_TRIVIA_PUNCTUATION))
        right = [normalized(answer.translate(_TRIVIA_PUNCTUATION)) for answer in _answers(answers)]
        exact.append(given in right)
        overlap.append(max(word_f1(answer, given) for answer in right))
    return {"em": float(100 * np.mean(exact)), "f1": float(100 * np.mean(overlap))}


def _answers(answers: Sequence[str] | str) -> list[str]:
    return [answers] if isinstance(answers, str) else list(answers)


def span_squad(
    targets: Sequence[Mapping[str, Any]], predictions: Sequence[str]
) -> dict[str, float]:
    """Returns SQuAD's scores of predicted spans, ``start: 3 end: 6``, of words of the ``context``.

    Targets have ``answers`` and ``context``.  A prediction that is not a span counts as empty.
    """
    texts = [
        _span(_words(target["context"]), _words(prediction))
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return squad([target["answers"] for target in targets], texts)


def _words(text: str) -> list[str]:
    return _NO_WORD.sub(" ", text).split()


def _span(context: Sequence[str], answer: Sequence[str]) -> str:
    try:
        start, end = int(answer[1]), int(answer[3])
    except (IndexError, ValueError):
        return ""
    return " ".join(context[start : end + 1])


def coqa_f1(targets: Sequence[Sequence[str] | str], predictions: Sequence[str]) -> float:
    """Returns the best F1 of words over an entry's answers, normalized as for SQuAD, in percent.

    Two texts without words are equal.
    """
    scores = []
    for answers, prediction in zip(targets, predictions, strict=True):
        given = normalized(prediction)
        right = [normalized(answer) for answer in _answers(answers)]
        scores.append(max(float(not given) if not a else word_f1(a, given) for a in right))
    return float(np.mean(scores) * 100)


def sequence_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> float:
    """Returns the percentage of predictions that equal their targets."""
    return float(100 * np.mean([p == t for p, t in zip(predictions, targets, strict=True)]))


def edit_distance(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns edit distances between the words of targets and predictions, without case.

    ``min_edit``, ``max_edit``, ``mean_edit``, ``median_edit`` and ``sum_edit``, in words.
    """
    pairs = zip(targets, predictions, strict=True)
    distances = [_distance(_split(target), _split(prediction)) for target, prediction in pairs]
    return {
        "min_edit": float(min(distances)),
        "max_edit": float(max(distances)),
        "mean_edit": float(np.mean(distances)),
        "median_edit": float(np.median(distances)),
        "sum_edit": float(sum(distances)),
    }


def _split(text: str) -> list[str]:
    return re.split(r"[^\w]", text.lower())


def _distance(one: Iterable[str], other: Sequence[str]) -> int:
    """Returns Levenshtein's distance of two sequences."""
    row = list(range(len(other) + 1))
    for number, word in enumerate(one, start=1):
        diagonal, row[0] = row[0], number
        for column, theirs in enumerate(other, start=1):
            change = diagonal + (word != theirs)
            diagonal = row[column]
            row[column] = min(change, row[column] + 1, row[column - 1] + 1)
    return row[-1]


def auc(targets: Sequence[float], scores: Sequence[float]) -> dict[str, float]:
    """Returns the areas under the ROC and the precision-recall curve, from 0 to 1.

    ``targets`` are 0 or 1; with one class alone both are nan.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    if len(set(targets)) < 2:
        return dict.fromkeys(AUC_NAMES, math.nan)
    areas = roc_auc_score(targets, scores), average_precision_score(targets, scores)
    return dict(zip(AUC_NAMES, map(float, areas), strict=True))
