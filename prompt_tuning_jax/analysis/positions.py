"""How much the positions of a prompt repeat each other, and what each contributes to the answer."""

from dataclasses import dataclass

import numpy as np

from prompt_tuning_jax.analysis.similarity import directions
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.inference.evaluation import EvalResult, evaluate
from prompt_tuning_jax.typing import HostArray

# Prompts that are evaluated at once; the last group is filled up, so that one program is compiled.
_AT_ONCE = 16
_SIMILAR = 0.9  # cosine of positions that count as copies of each other


@dataclass(frozen=True, kw_only=True)
class Redundancy:
    """How similar the positions of a prompt are.

    Attributes:
      cosines_PP: between all pairs of positions.
      mean: mean absolute cosine of different positions; None for a single position.
      effective_rank: the exponential of the entropy of the normalized singular values (Roy and
        Vetterli 2007): the number of directions that the prompt uses, from 1 to P.
      copies: the number of positions with a cosine above 0.9 to an earlier one.
    """

    cosines_PP: HostArray
    mean: float | None
    effective_rank: float
    copies: int


def redundancy(prompt_PD: HostArray) -> Redundancy:
    """Measures how similar the positions of a prompt are."""
    prompt = np.asarray(prompt_PD, np.float64)
    units = directions(prompt)
    cosines_PP = units @ units.T
    number = len(prompt)
    pairs = cosines_PP[np.triu_indices(number, 1)]
    values = np.linalg.svd(prompt, compute_uv=False)
    shares = values[values > 0] / values.sum() if values.sum() else np.ones(1)
    return Redundancy(
        cosines_PP=cosines_PP,
        mean=float(np.abs(pairs).mean()) if number > 1 else None,
        effective_rank=float(np.exp(-(shares * np.log(shares)).sum())),
        copies=int((np.tril(cosines_PP, -1) > _SIMILAR).any(axis=1).sum()),
    )


@dataclass(frozen=True, kw_only=True)
class Effects:
    """What happens to the answers when one position of a prompt is left out.

    The other positions move together, so the prompt is one position shorter.

    Attributes:
      examples: the number of examples that were answered.
      metric: the name of the task's metric.
      score: of the whole prompt.
      scores_P: without each position.
      changed_P: percentage of answers that differ from those of the whole prompt.
      loss_P: rise of the cross entropy of the right label among the labels; None if the answers
        are generated.
    """

    examples: int
    metric: str
    score: float
    scores_P: HostArray
    changed_P: HostArray
    loss_P: HostArray | None


def leave_one_out(
    experiment: Experiment, prompt_PD: HostArray, *, labels: tuple[str, ...] = ()
) -> Effects | None:
    """Evaluates a prompt without each of its positions on the experiment's evaluation data.

    ``labels`` are as in ``evaluate``.  Returns None for a prompt of one position.
    """
    number = len(prompt_PD)
    if number < 2:
        return None
    whole = evaluate(experiment, prompts=[prompt_PD], labels=labels)
    metric = next(iter(whole.mean))
    before = _losses(whole)[0]
    scores, changed, losses = [], [], []
    without = [np.delete(prompt_PD, position, axis=0) for position in range(number)]
    at_once = min(_AT_ONCE, number)
    for start in range(0, number, at_once):
        group = without[start : start + at_once]
        filled = group + [group[-1]] * (at_once - len(group))
        result = evaluate(experiment, prompts=filled, labels=labels)
        after = _losses(result)
        for member in range(len(group)):
            scores.append(result.per_prompt[member][metric])
            changed.append(_changed(whole, result, member))
            loss = after[member]
            if before is not None and loss is not None:
                losses.append(loss - before)
    return Effects(
        examples=sum(map(len, whole.examples.values())),
        metric=metric,
        score=whole.mean[metric],
        scores_P=np.array(scores),
        changed_P=np.array(changed),
        loss_P=np.array(losses) if len(losses) == number else None,
    )


def _changed(whole: EvalResult, result: EvalResult, member: int) -> float:
    pairs = [
        (one, other)
        for task, predictions in whole.predictions.items()
        for one, other in zip(
            predictions.texts_EN[0], result.predictions[task].texts_EN[member], strict=True
        )
    ]
    return 100 * sum(one != other for one, other in pairs) / len(pairs)


def _losses(result: EvalResult) -> list[float | None]:
    """Returns each prompt's mean cross entropy of the right labels, or None where one is unknown.

    The probabilities of an example's labels are normalized to sum to one.
    """
    losses: list[list[float]] = [[] for _ in result.names]
    for task, examples in result.examples.items():
        for values, known_N in zip(losses, result.predictions[task].log_probs_EN, strict=True):
            for example, known in zip(examples.texts, known_N, strict=True):
                right = known.get(example["targets"])
                if right is None or len(known) < 2:
                    return [None] * len(losses)
                values.append(float(np.logaddexp.reduce(list(known.values()))) - right)
    return [float(np.mean(values)) for values in losses]
