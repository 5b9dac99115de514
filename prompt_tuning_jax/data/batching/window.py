"""A model's window: the positions that a prompt, an input and a target share."""

import dataclasses

from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.errors import UserError


def inputs_limit(
    window: int | None,
    *,
    inputs_length: int,
    targets_length: int,
    prompt_positions: int,
    advice: str,
) -> int:
    """Returns the length, in tokens, to which inputs are cut.

    A decoder-only model writes its target behind the prompt and the input, and all three have to
    fit in its window.  Prompts and targets are never cut.

    Args:
      window: ``ModelConfig.max_positions``; None: the model has no window.
      inputs_length: the limit without a window.
      targets_length: of the longest target, or the number of tokens to generate.
      prompt_positions: of the prompt or the prefix in front of the input.
      advice: what to change, for the error.

    Raises UserError if the prompt and the target leave no room for an input.
    """
    if window is None:
        return inputs_length
    room = window - prompt_positions - targets_length
    if room < 1:
        raise UserError(
            f"the model's window has {window} positions: {prompt_positions} of the prompt and "
            f"{targets_length} of the target leave none for an input; {advice}"
        )
    return min(inputs_length, room)


def fit_window(
    experiment: Experiment, window: int | None, *, prompt_positions: int | None = None
) -> Experiment:
    """Returns the experiment with ``data.inputs_length`` reduced to what fits the model's window.

    ``prompt_positions`` are those of loaded prompts; None: those of the experiment's method.
    Raises UserError as ``inputs_limit`` does.
    """
    data = experiment.data
    length = inputs_limit(
        window,
        inputs_length=data.inputs_length,
        targets_length=data.targets_length,
        prompt_positions=experiment.method.context_positions()
        if prompt_positions is None
        else prompt_positions,
        advice="use a shorter prompt (method.length) or shorter targets (data.targets_length)",
    )
    if length == data.inputs_length:
        return experiment
    return dataclasses.replace(experiment, data=dataclasses.replace(data, inputs_length=length))
