"""What the prompts of a task have computed for one input, as one answer."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from prompt_tuning_jax.inference.ensemble import majority_vote
from prompt_tuning_jax.serving.schema import Mode, PromptResult, Result


def assembled(
    mode: Mode,
    *,
    task: str,
    prompts: Sequence[str],
    labels: Sequence[str],
    values: Sequence[Any],
    decode: Callable[[list[int]], str],
    divisors: Sequence[int] = (),
) -> Result:
    """One result; ``values`` are of the first prompt, then of the second and so on.

    They are lists of log-probabilities (a prompt's labels may be in several), or ``WrittenRow``.
    ``divisors``, one for each label or target, divide the first; empty: none.
    """
    each = len(values) // len(prompts)
    by_prompt = [values[i * each : (i + 1) * each] for i in range(len(prompts))]
    if mode == "score":
        scored = [
            PromptResult(prompt=name, log_prob=_divided([own[0][0]], divisors)[0])
            for name, own in zip(prompts, by_prompt, strict=True)
        ]
        mean = sum(one.log_prob or 0.0 for one in scored) / len(scored)
        return Result(task=task, log_prob=mean, prompts=scored)
    known: list[dict[str, float]] = []
    found: list[PromptResult] = []
    probabilities: dict[str, float] | None = None
    if mode == "label":
        for name, own in zip(prompts, by_prompt, strict=True):
            log_probs = _divided([one for part in own for one in part], divisors)
            known.append(dict(zip(labels, log_probs, strict=True)))
            share = softmax(log_probs)
            best = max(range(len(share)), key=log_probs.__getitem__)
            found.append(
                PromptResult(
                    prompt=name,
                    prediction=labels[best],
                    probabilities=dict(zip(labels, share, strict=True)),
                )
            )
        shares = [one.probabilities or {} for one in found]
        probabilities = {
            label: sum(share[label] for share in shares) / len(shares) for label in labels
        }
    else:
        for name, (written,) in zip(prompts, by_prompt, strict=True):
            text = decode(written.ids)
            log_prob = _finite(written.log_prob)
            known.append({text: log_prob})
            tokens = len(written.ids)
            found.append(
                PromptResult(prompt=name, prediction=text, log_prob=log_prob, tokens=tokens)
            )
    vote = majority_vote([one.prediction or "" for one in found], known)
    several = len(found) > 1
    return Result(
        task=task,
        prediction=vote.prediction,
        probabilities=probabilities,
        votes=dict(vote.votes) if several else None,
        agreement=vote.votes[vote.prediction] / len(found) if several else None,
        prompts=found,
    )


def softmax(log_probs: Sequence[float]) -> list[float]:
    """Shares that sum to one."""
    most = max(log_probs)
    weights = [math.exp(one - most) for one in log_probs]
    total = sum(weights)
    return [weight / total for weight in weights]


def _divided(log_probs: Sequence[float], divisors: Sequence[int]) -> list[float]:
    found = map(_finite, log_probs)
    if not divisors:
        return list(found)
    return [one / divisor for one, divisor in zip(found, divisors, strict=True)]


def _finite(number: float) -> float:
    """JSON has no infinity; what is impossible is as unlikely as a float32 can say."""
    return number if math.isfinite(number) else -3.4e38
