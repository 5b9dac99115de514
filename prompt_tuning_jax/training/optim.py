"""Optimizers for what the mask says trains, with the learning rate given at every step.

The learning rate is an argument of ``update`` and not part of the transformation, so that prompts
trained at once may have one each.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from prompt_tuning_jax.config.field_syntax import parse_rates
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import Array, Mask


class OptimizerConfig(Protocol):
    """The fields that are read here; see ``experiment.Optimizer`` for their meaning."""

    @property
    def name(self) -> str: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def decay_steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def end_learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def decay_rate(self) -> float: ...
    @property
    def clipping_threshold(self) -> float: ...
    @property
    def multiply_by_parameter_scale(self) -> bool: ...
    @property
    def min_dim_size_to_factor(self) -> int: ...
    @property
    def initial_step(self) -> int: ...
    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def gradient_clip_norm(self) -> float: ...
    @property
    def rates(self) -> tuple[str, ...]: ...


def make_optimizer(config: OptimizerConfig, mask: Mask) -> optax.GradientTransformationExtraArgs:
    """The optimizer; ``update(gradients, state, params, learning_rate=...)``.

    It acts on any dictionary path -> array whose names the mask knows.  What the mask freezes has
    no slot and gets an update of exactly zero, even when its gradient is handed in.  Raises
    UserError for an entry of ``rates`` that no trained array follows.
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

    # masked() lets the updates of what it leaves out pass through: they must be zeroed as well.
    return optax.chain(
        optax.masked(optax.chain(*steps, optax.scale(-1.0)), trains),
        optax.masked(optax.set_to_zero(), frozen),
    )


def _adafactor(
    config: OptimizerConfig, at_rate: optax.GradientTransformation
) -> list[optax.GradientTransformation]:
    """Shazeer & Stern 2018 as t5x/adafactor.py has it; weight decay is not scaled by the rate.

    ``initial_step`` shifts the step in the second moment's decay, ``1 - (step + 1)**-0.8``: T5X
    goes on counting from the restored checkpoint's step, and at 1,100,000 the decay is 0.999985.
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
    config: OptimizerConfig, at_rate: optax.GradientTransformation
) -> list[optax.GradientTransformation]:
    """Loshchilov & Hutter 2019: the decay is scaled by the learning rate."""
    return [
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2),
        optax.add_decayed_weights(config.weight_decay),
        at_rate,
    ]


def _sgd(
    config: OptimizerConfig, at_rate: optax.GradientTransformation
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
    """Multiplies with the rate of this update, and that with an array's own factor."""

    def update(
        updates: Any, state: Any, params: Any = None, *, learning_rate: Array, **_: Any
    ) -> tuple[Any, Any]:
        def scaled(path: Any, update: Array) -> Array:
            factor = factors.get(path[-1].key, 1.0)
            return update * (learning_rate if factor == 1.0 else learning_rate * factor)

        return jax.tree.map_with_path(scaled, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def rate_factors(texts: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """The factor on the learning rate of each of these arrays; the first match of a path decides.

    UserError for a pattern that matches none of the paths, or none that is left to it.
    """
    rates = parse_rates(texts)
    followed: dict[str, int] = {}
    for name in names:
        first = (i for i, (pattern, _) in enumerate(rates) if pattern.fullmatch(name))
        if (number := next(first, None)) is not None:
            followed[name] = number
    for number, text in enumerate(texts):
        if number not in followed.values():
            raise UserError(
                f"optimizer.rates: {text!r} is the whole path of nothing that trains, or of what "
                f"an entry before it has; for instance {min(names, default='nothing')} trains"
            )
    return {name: rates[number][1] for name, number in followed.items()}


def make_schedule(config: OptimizerConfig, *, total_steps: int) -> Callable[[Array], Array]:
    """Step (from 0) -> factor on the learning rate: 1 at its height.

    All warm up linearly over ``warmup_steps``, then: ``constant``; ``linear`` and ``cosine`` fall
    to ``end_learning_rate`` at ``decay_steps`` (or the run's end); ``rsqrt`` falls with the inverse
    square root of the step, from its height at the end of the warm-up.
    """
    warmup = config.warmup_steps
    decay = (config.decay_steps or total_steps) - warmup
    end = config.end_learning_rate / config.learning_rate if config.learning_rate else 0.0

    def factor(step: Array) -> Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(1.0, (step + 1) / warmup) if warmup else jnp.float32(1.0)
        share = jnp.clip((step - warmup) / max(decay, 1), 0.0, 1.0)
        if config.schedule == "linear":
            fall = 1 + (end - 1) * share
        elif config.schedule == "cosine":
            fall = end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        elif config.schedule == "rsqrt":
            height = max(warmup, 1)
            fall = jnp.sqrt(height / jnp.maximum(step + 1, height))
        else:
            fall = jnp.float32(1.0)
        return rise * fall

    return factor
