"""One training step of E prompts at once: a pure function of state, frozen weights and batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.distributed.partitioner import Partitioner, activation_sharding
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import TunedModel
from prompt_tuning_jax.models.t5.blocks import Remat
from prompt_tuning_jax.training.losses import TokenSums
from prompt_tuning_jax.training.microbatching import NO_MICROBATCHING, Microbatching, map_members
from prompt_tuning_jax.typing import Array, FlatParams, HostArray

Batch = Mapping[str, Array | HostArray]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that changes: the step, and for every member the tuned arrays and optimizer state.

    Arrays carry a leading axis E.  No array of the frozen model is here.
    """

    step: Array
    trainable: FlatParams
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Per member: mean loss per target token, share of examples wholly right, norms."""

    loss_E: Array
    accuracy_E: Array
    gradient_norm_E: Array
    update_norm_E: Array


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one step is of all members: token positions, and floating point operations (0: unknown).

    Positions are those of inputs and targets, padding included.
    """

    tokens: int
    flops: float


TrainStep = Callable[[TrainState, FlatParams, Batch], tuple[TrainState, StepMetrics]]


def step_cost(
    step: TrainStep,
    state: TrainState,
    frozen: FlatParams,
    batch: Batch,
    *,
    rounds: int = 1,
) -> StepCost:
    """The cost of a step of this shape, by the compiler's count before it optimises.

    ``rounds`` is how often its loops are gone through.
    """
    tokens = batch["encoder_input_tokens"].size + batch["decoder_target_tokens"].size
    # A step that is no jitted function has no count.
    lower = getattr(step, "lower", None)
    analysis = lower(state, frozen, batch).cost_analysis() if lower else None
    # The compiler counts the body of a loop once, whose rounds are all of a step but its update.
    flops = rounds * float((analysis or {}).get("flops", 0.0))
    return StepCost(tokens=int(tokens), flops=flops)


def init_state(
    trainable: FlatParams,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    partitioner: Partitioner | None = None,
) -> TrainState:
    """The state before the first step; ``trainable`` has the leading axis E.

    On a mesh what the optimizer keeps for an array lies as the array does.
    """

    def start(trainable: FlatParams) -> TrainState:
        opt_state = jax.vmap(optimizer.init)(trainable)
        return TrainState(step=jnp.zeros((), jnp.int32), trainable=trainable, opt_state=opt_state)

    if partitioner is None or partitioner.is_single_device:
        return start(trainable)
    shardings = state_shardings(jax.eval_shape(start, trainable), trainable, partitioner)
    started: TrainState = jax.jit(start, out_shardings=shardings)(trainable)
    return started


def state_shardings(
    state: TrainState, trainable: FlatParams, partitioner: Partitioner
) -> TrainState:
    """How a state, which may be of shapes alone, lies for tuned arrays that lie as these do."""

    def sharding_of(path: Any, leaf: Any) -> Any:
        array = trainable.get(getattr(path[-1], "key", ""))
        alike = array is not None and array.shape == leaf.shape
        return array.sharding if array is not None and alike else partitioner.replicated

    shardings: TrainState = jax.tree.map_with_path(sharding_of, state)
    return shardings


def make_train_step(
    graphdef: nnx.GraphDef[TunedModel],
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Array], Array],
    *,
    learning_rates: tuple[float, ...],
    seeds: tuple[int, ...],
    microbatching: Microbatching = NO_MICROBATCHING,
    loss_normalization: Literal["tokens", "sum"] = "tokens",
    z_loss: float = 0.0,
    dropout: bool = True,
    partitioner: Partitioner | None = None,
    state_shardings: TrainState | None = None,
    remat: Remat = "none",
    compiler_options: Mapping[str, str] | None = None,
) -> TrainStep:
    """The jitted step; its state is donated, the frozen weights are an argument and only read.

    ``learning_rates`` and ``seeds`` have one entry per member.  A batch holds
    ``encoder_input_tokens [E, B, T]``, ``decoder_input_tokens`` and ``decoder_target_tokens
    [E, B, S]``, ``task_index [E, B]`` where the data has several tasks, and ``example_weights [E,
    B]`` where some count more than others: the loss and the tokens of an example are multiplied by
    its weight, before one is divided by the other.  A member's step depends on its own seed, step
    and batch alone, whoever trains beside it.  ``microbatching`` says what is computed one after
    another, for the same gradient; UserError where it cannot split B.
    ``remat`` computes parts of the forward again in the backward in place of keeping them, and
    changes nothing else.  On a mesh (``partitioner``) ``state_shardings`` shard the new state, the
    old one's, and metrics are replicated.
    """

    def summed_loss(
        trainable: FlatParams, frozen: FlatParams, batch: Batch, key: Array | None
    ) -> tuple[Array, TokenSums]:
        attached = param_tree.merge(graphdef, {**frozen, **trainable})
        sums = attached.token_sums(
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            task_B=batch.get("task_index"),
            key=key,
            remat=remat,
            z_loss=z_loss,
            weights_B=batch.get("example_weights"),
        )
        return sums.loss, sums

    def in_parts(x: Array | HostArray, parts: int) -> Array:
        """``[B, ...]`` as ``[parts, B / parts, ...]``."""
        if x.shape[0] % parts:
            raise UserError(
                f"a batch of {x.shape[0]} examples cannot be divided into "
                f"training.gradient_accumulation {parts} equal parts"
            )
        # By turns: of rows that are spread over devices, each part then has some on each.
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    def gradient(
        trainable: FlatParams, frozen: FlatParams, batch: Batch, key: Array
    ) -> tuple[FlatParams, TokenSums]:
        differentiate = jax.grad(summed_loss, has_aux=True)
        number = microbatching.num_microbatches(*batch["encoder_input_tokens"].shape)
        if number == 1:
            return differentiate(trainable, frozen, batch, key if dropout else None)
        parts = {name: in_parts(x, number) for name, x in batch.items()}

        def add_part(total: Any, part_and_index: Any) -> tuple[Any, None]:
            part, index = part_and_index
            part_key = jax.random.fold_in(key, index) if dropout else None
            return jax.tree.map(
                jnp.add, total, differentiate(trainable, frozen, part, part_key)
            ), None

        shapes = jax.eval_shape(
            differentiate, trainable, frozen, jax.tree.map(lambda x: x[0], parts), None
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(add_part, zeros, (parts, jnp.arange(number)))
        return total

    def member_step(
        trainable: FlatParams,
        opt_state: Any,
        batch: Batch,
        learning_rate: Array,
        key: Array,
        frozen: FlatParams,
    ) -> tuple[FlatParams, Any, StepMetrics]:
        gradients, sums = gradient(trainable, frozen, batch, key)
        # Weighted tokens may be fewer than one.
        tokens = jnp.where(sums.tokens > 0, sums.tokens, 1.0)
        if loss_normalization == "tokens":
            gradients = jax.tree.map(lambda g: g / tokens.astype(g.dtype), gradients)
        updates, opt_state = optimizer.update(
            gradients, opt_state, trainable, learning_rate=learning_rate
        )
        metrics = StepMetrics(
            loss_E=sums.loss / tokens,
            accuracy_E=sums.correct / jnp.maximum(sums.examples, 1.0),
            gradient_norm_E=optax.tree.norm(gradients),
            update_norm_E=optax.tree.norm(updates),
        )
        return optax.apply_updates(trainable, updates), opt_state, metrics

    def compute(
        state: TrainState, frozen: FlatParams, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        rates_E = jnp.asarray(learning_rates, jnp.float32) * schedule(state.step)
        seeds_E = jnp.asarray(seeds, jnp.uint32)
        keys_E = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), state.step))(
            seeds_E
        )
        shape = batch["encoder_input_tokens"].shape
        trainable, opt_state, metrics = map_members(
            partial(member_step, frozen=frozen),
            microbatching.members_at_once(*shape),
            *(state.trainable, state.opt_state, dict(batch), rates_E, keys_E),
            members=len(seeds),
        )
        return TrainState(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics

    results = None
    if partitioner is not None and not partitioner.is_single_device and state_shardings is not None:
        # Named exactly: a state that lies elsewhere would make the next step compile again.
        results = (state_shardings, partitioner.replicated)

    options = dict(compiler_options or {})

    @partial(jax.jit, donate_argnums=0, out_shardings=results, compiler_options=options)
    def train_step(
        state: TrainState, frozen: FlatParams, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        with activation_sharding(partitioner):
            return compute(state, frozen, batch)

    return train_step
