"""Joins the predictions of several prompts (Lester et al. 2021, section 6)."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Vote:
    """The ensemble's prediction for one example, and how many members gave each text."""

    prediction: str
    votes: Mapping[str, int]


def majority_vote(predictions_E: Sequence[str], log_probs_E: Sequence[Mapping[str, float]]) -> Vote:
    """What most members predict.

    A tie goes to the candidate with the larger log-probability summed over the members:
    ``log_probs_E`` holds, for each, what it knows about the texts (all labels when ranking, its own
    prediction when writing, so that then only a candidate's voters count).  Equal sums go to the
    text that is first in the alphabet, so that the order of the members decides nothing.
    """
    votes = Counter(predictions_E)
    most = max(votes.values())

    def summed(text: str) -> float:
        # Exactly rounded, so that the order of the members cannot break a tie.
        return math.fsum(known[text] for known in log_probs_E if text in known)

    tied = [text for text, count in votes.items() if count == most]
    winner = min(tied, key=lambda text: (-summed(text), text))
    return Vote(prediction=winner, votes=dict(votes))
