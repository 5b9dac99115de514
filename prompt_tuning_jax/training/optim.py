"""Optimizers for the trainable arrays, and learning rate schedules.

The learning rate is an argument of ``update`` instead of a part of the transformation, so that
members that train together can have different learning rates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.config.field_syntax import parse_rates
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import Array, Mask


def make_optimizer(config: Optimizer, mask: Mask) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer, used as ``update(gradients, state, params, learning_rate=...)``.

    It accepts any dictionary path -> array whose paths are in the mask.  Frozen arrays have no
    slots, and their updates are exactly zero even if they have gradients.  Raises UserError for an
    entry of ``rates`` that matches no trainable array.
    """
    factors = rate_factors(config.rates, [name for name, trains in mask.items() if trains])
    at_rate = _scale_by_given_learning_rate(factors)
    steps = {"adafactor": _adafactor, "adamw": _adamw, "sgd": _sgd}[config.name](config, at_rate)
    if config.gradient_clip_norm > 0:
        steps = [optax.clip_by_global_norm(config.gradient_clip_norm), *steps]

    def trains(params: dict[str, Any]) -> dict[str, bool]:
        return {name: mask[name] for name in params}

    def frozen(params: dict[str, Any]) -> dict[str, bool]:
        return {name: not mask[name] for name in params}

    # masked() passes the updates of the other arrays through, so they must be set to zero as well.
    return optax.chain(
        optax.masked(optax.chain(*steps, optax.scale(-1.0)), trains),
        optax.masked(optax.set_to_zero(), frozen),
    )


def _adafactor(
    config: Optimizer, at_rate: optax.GradientTransformation
) -> list[optax.GradientTransformation]:
    """Returns Adafactor (Shazeer & Stern 2018), as in t5x/adafactor.py.

    The learning rate does not scale the weight decay.  ``initial_step`` shifts the step in the
    second moment's decay, ``1 - (step + 1)**-0.8``: T5X continues to count from the step of the
    restored checkpoint, and at step 1,100,000 the decay is 0.999985.
    """
    steps = [
        optax.scale_by_factored_rms(
            factored=config.min_dim_size_to_factor > 0,
            decay_rate=config.decay_rate,
            step_offset=-config.initial_step,
            min_dim_size_to_factor=config.min_dim_size_to_factor,
        )
    ]
    if config.clipping_threshold > 0:
        steps.append(optax.clip_by_block_rms(config.clipping_threshold))
    steps.append(at_rate)
    if config.multiply_by_parameter_scale:
        steps.append(optax.scale_by_param_block_rms())
    return [*steps, optax.add_decayed_weights(config.weight_decay)]


def _adamw(
    config: Optimizer, at_rate: optax.GradientTransformation
) -> list[optax.GradientTransformation]:
    """Returns AdamW (Loshchilov & Hutter 2019); the learning rate scales the weight decay."""
    return [
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2),
        optax.add_decayed_weights(config.weight_decay),
        at_rate,
    ]


def _sgd(
    config: Optimizer, at_rate: optax.GradientTransformation
) -> list[optax.GradientTransformation]:
    momentum = [optax.trace(config.momentum)] if config.momentum > 0 else []
    return [
        *momentum,
        optax.add_decayed_weights(config.weight_decay),
        at_rate,
    ]


def _scale_by_given_learning_rate(
    factors: Mapping[str, float],
) -> optax.GradientTransformationExtraArgs:
    """Multiplies each update by the given learning rate and by the array's factor."""

    def update(
        updates: Any, state: Any, params: Any = None, *, learning_rate: Array, **_: Any
    ) -> tuple[Any, Any]:
        def scaled(path: Any, update: Array) -> Array:
            factor = factors.get(path[-1].key, 1.0)
            return update * (learning_rate if factor == 1.0 else learning_rate * factor)

        return jax.tree.map_with_path(scaled, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def rate_factors(texts: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Returns each array's learning rate factor, from the first pattern that matches its path.

    Raises UserError for a pattern that matches no path, or only paths of earlier patterns.
    """
    rates = parse_rates(texts)
    matched: dict[str, int] = {}
    for name in names:
        first = (i for i, (pattern, _) in enumerate(rates) if pattern.fullmatch(name))
        if (number := next(first, None)) is not None:
            matched[name] = number
    for number, text in enumerate(texts):
        if number not in matched.values():
            shown = ", ".join(sorted(names)[:3]) + ", ..." * (len(names) > 3)
            raise UserError(
                f"optimizer.rates: {text!r} matches no trainable parameter (by its whole path) "
                f"that earlier entries leave; trainable: {shown or 'none'}"
            )
    return {name: rates[number][1] for name, number in matched.items()}


def make_schedule(config: Optimizer, *, total_steps: int) -> optax.Schedule:
    """Returns a schedule that maps a step, from 0, to a factor on the learning rate.

    The factor rises linearly over ``warmup_steps``, starting at ``1 / warmup_steps``.  After that,
    ``constant`` stays at 1.  ``linear`` and ``cosine`` fall to ``end_learning_rate`` at
    ``decay_steps``, or one step after the run's last; members with other learning rates fall in the
    same proportion.  ``rsqrt`` falls with the inverse square root of the step.
    """
    warmup = config.warmup_steps
    decay_steps = max((config.decay_steps or total_steps) - warmup, 1)
    end = config.end_learning_rate / config.learning_rate if config.learning_rate else 0.0

    def rsqrt(step: Any) -> Array:
        return jnp.sqrt(max(warmup, 1) / (step + warmup + 1))

    schedule: optax.Schedule = {
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, end, decay_steps),
        "cosine": optax.cosine_decay_schedule(1.0, decay_steps, alpha=end),
        "rsqrt": rsqrt,
    }[config.schedule]
    if not warmup:
        return schedule
    rise = optax.linear_schedule(1 / warmup, 1.0, max(warmup - 1, 1))
    return optax.join_schedules([rise, schedule], [warmup])
