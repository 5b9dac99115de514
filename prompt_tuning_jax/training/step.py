"""The training step of E ensemble members: a pure function of state, frozen weights and batch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.distributed.sharding import Partitioner, activation_sharding, spans_devices
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.ensemble import map_members, members_per_chunk, rows_in_cache
from prompt_tuning_jax.methods import TunedModel
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.layers import Remat
from prompt_tuning_jax.models.losses import TokenSums
from prompt_tuning_jax.training.flops import product_flops
from prompt_tuning_jax.training.label_loss import LabelLoss
from prompt_tuning_jax.training.wayward import Regularizer
from prompt_tuning_jax.typing import Array, Batch, FlatParams, HostArray


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The step, and the trainable arrays and optimizer state of every member.

    Arrays have a leading axis E.  The frozen arrays are not part of the state.
    """

    step: Array
    trainable: FlatParams
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Per member: mean loss per target token, share of exact matches, and norms."""

    loss_E: Array
    accuracy_E: Array
    gradient_norm_E: Array
    update_norm_E: Array


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The token positions and FLOPs of one step of all members.

    Positions include those of inputs, targets and padding, and are 0 for images.  FLOPs are 0 if
    unknown.
    """

    tokens: int
    flops: float


# Measured on two cores with SmolLM2-135M, 16 rows of 128 positions and a prompt of 100: 5.8 s a
# step in microbatches of 2 rows, 5.0 s of 4, 4.8 s of 8 and 5.1 s of 16.
_POSITIONS_PER_SHARED = 10
# Frozen weights and activations that a step on a CPU may hold without smaller microbatches, which
# repeat the prompt's pass: with 2 positions behind each of the prompt's, it takes a third of it.
_STEP_BYTES, _LEAST_PER_SHARED, _FLOAT32_BYTES = 1.45e9, 2, 4


@dataclass(frozen=True, kw_only=True)
class Microbatching:
    """Splits a step into microbatches and chunks of members that run one after another.

    The result equals that of the whole step.  ``num_microbatches`` sets the number of microbatches.
    If ``config`` is given, the split instead makes the largest activation fit into a CPU's cache;
    the method adds ``prompt_positions`` positions to each row, or ``shared_positions`` to each
    microbatch.  Beside ``frozen_bytes`` of weights, deep models get smaller microbatches.  By
    default, nothing is split.
    """

    num_microbatches: int = 1
    config: ModelConfig | None = None
    prompt_positions: int = 0
    shared_positions: int = 0
    frozen_bytes: int = 0

    def microbatches(self, rows: int, length: int) -> int:
        """Returns the number of equal microbatches of a member's batch ``[rows, length]``.

        It depends only on the member's batch, because each microbatch draws different dropout.
        """
        if self.config is None:
            return self.num_microbatches
        length = self.config.input_positions(length) + self.prompt_positions
        # The prompt's pass, which every microbatch repeats, must stay a small part of it.
        least = math.ceil(_POSITIONS_PER_SHARED * self.shared_positions / length)
        most = max(rows_in_cache(self.config, length), least)
        if self.frozen_bytes:
            left = max(_STEP_BYTES - self.frozen_bytes, 0) / activation_bytes(self.config)
            least = math.ceil(_LEAST_PER_SHARED * self.shared_positions / length)
            most = min(most, max(int(left - self.shared_positions) // length, least, 1))
        fitting = (n for n in range(1, rows) if rows % n == 0 and rows // n <= most)
        return next(fitting, rows)

    def chunk_size(self, members: int, rows: int, length: int) -> int:
        """Returns the number of members to vectorize together; it divides ``members``."""
        if self.config is None:
            return members
        length = self.config.input_positions(length) + self.prompt_positions
        return members_per_chunk(self.config, members, rows, length)


def activation_bytes(config: ModelConfig) -> int:
    """Returns about how much a step stores for each position if linear maps are not computed again.

    Measured with SmolLM2-135M and Gemma 3 270M in float32.
    """
    of_layer = 2 * (config.mlp_dim + config.embed_dim) + 4 * config.num_heads * config.head_dim
    return _FLOAT32_BYTES * config.num_reading_layers * of_layer


NO_MICROBATCHING = Microbatching()

TrainStep = Callable[[TrainState, FlatParams, Batch], tuple[TrainState, StepMetrics]]


def step_cost(step: TrainStep, state: TrainState, frozen: FlatParams, batch: Batch) -> StepCost:
    """Returns the cost of a step of this shape; FLOPs are those of its matrix products."""
    are_tokens = jnp.issubdtype(batch["inputs"].dtype, jnp.signedinteger)  # and not pixels
    tokens = batch["inputs"].size + batch["targets"].size if are_tokens else 0
    # Only a jitted function can be traced.
    trace = getattr(step, "trace", None)
    flops = product_flops(trace(state, frozen, batch).jaxpr) if trace else 0.0
    return StepCost(tokens=int(tokens), flops=flops)


def init_state(
    trainable: FlatParams,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    partitioner: Partitioner | None = None,
) -> TrainState:
    """Returns the state before the first step; ``trainable`` has the leading axis E.

    On a mesh, the optimizer's slots are sharded like the arrays that they belong to.
    """

    def start(trainable: FlatParams) -> TrainState:
        opt_state = jax.vmap(optimizer.init)(trainable)
        return TrainState(step=jnp.zeros((), jnp.int32), trainable=trainable, opt_state=opt_state)

    if not spans_devices(partitioner):
        return start(trainable)
    shardings = state_shardings(jax.eval_shape(start, trainable), trainable, partitioner)
    started: TrainState = jax.jit(start, out_shardings=shardings)(trainable)
    return started


def state_shardings(
    state: TrainState, trainable: FlatParams, partitioner: Partitioner
) -> TrainState:
    """Returns the shardings of a state, which may be abstract, given those of its ``trainable``."""

    def sharding_of(path: Any, leaf: Any) -> Any:
        array = trainable.get(getattr(path[-1], "key", ""))
        same_shape = array is not None and array.shape == leaf.shape
        return array.sharding if array is not None and same_shape else partitioner.replicated

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
    label_loss: LabelLoss | None = None,
    regularizer: Regularizer | None = None,
    dropout: bool = True,
    partitioner: Partitioner | None = None,
    state_shardings: TrainState | None = None,
    remat: Remat = "none",
    compiler_options: Mapping[str, str] | None = None,
) -> TrainStep:
    """Returns the jitted step ``(state, frozen, batch) -> (state, metrics)``; it donates the state.

    Args:
      graphdef: the structure of one member.
      optimizer: its ``update`` takes the learning rate.
      schedule: maps a step to a factor on the learning rates.
      learning_rates: one per member.
      seeds: one per member; a member's step depends only on its seed, step and batch.
      microbatching: how to split the step into sequential parts, for the same gradient.
      loss_normalization: whether to divide the summed loss by the number of target tokens.
      z_loss: the factor of ``log(Z)**2``.
      label_loss: the loss over labels; None is the cross entropy of the target tokens.
      regularizer: added to the loss after the normalization; metrics leave it out.
      dropout: whether the step draws random numbers.
      partitioner: the mesh; None is one device.
      state_shardings: on a mesh, the shardings of the new state, which must be the old one's.
      remat: which activations to recompute in the backward pass.
      compiler_options: passed to ``jax.jit``.

    A batch holds ``inputs [E, B, T]``, ``targets [E, B, S]``, ``task_index [E, B]`` where the data
    has several tasks, and ``example_weights [E, B]`` where examples are weighted: the weight
    multiplies an example's loss and its number of tokens.  Metrics are replicated.  Raises
    UserError if ``microbatching`` cannot split B.
    """

    def summed_loss(
        trainable: FlatParams, frozen: FlatParams, batch: Batch, key: Array | None, *, copies: int
    ) -> tuple[Array, TokenSums]:
        attached = param_tree.merge(graphdef, {**frozen, **trainable})
        if label_loss is not None:
            sums = label_loss.sums(
                attached, batch, key=key, remat=remat, z_loss=z_loss, copies=copies
            )
            return sums.loss, sums
        sums = attached.token_sums(
            batch["inputs"],
            batch["targets"],
            task_B=batch.get("task_index"),
            key=key,
            remat=remat,
            z_loss=z_loss,
            weights_B=batch.get("example_weights"),
            training=True,
            copies=copies,
        )
        return sums.loss, sums

    def split(x: Array | HostArray, number: int) -> Array:
        """Splits ``[B, ...]`` into ``[number, B / number, ...]``."""
        if x.shape[0] % number:
            raise UserError(
                f"training.gradient_accumulation: a batch of {x.shape[0]} examples cannot be "
                f"divided into {number} equal microbatches"
            )
        # Deal rows out in turn: each microbatch of a sharded batch then has rows on every device.
        return jnp.swapaxes(x.reshape(-1, number, *x.shape[1:]), 0, 1)

    def gradient(
        trainable: FlatParams, frozen: FlatParams, batch: Batch, key: Array, copies: int
    ) -> tuple[FlatParams, TokenSums]:
        differentiate = jax.grad(partial(summed_loss, copies=copies), has_aux=True)
        number = microbatching.microbatches(*batch["inputs"].shape)
        if number == 1:
            return differentiate(trainable, frozen, batch, key if dropout else None)
        microbatches = {name: split(x, number) for name, x in batch.items()}

        def accumulate(total: Any, microbatch_and_index: Any) -> tuple[Any, None]:
            microbatch, index = microbatch_and_index
            own_key = jax.random.fold_in(key, index) if dropout else None
            added = differentiate(trainable, frozen, microbatch, own_key)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, added), None

        first = jax.tree.map(lambda x: x[0], microbatches)
        shapes = jax.eval_shape(differentiate, trainable, frozen, first, None)
        # Many small gradients of bfloat16 weights would be lost in a sum in bfloat16.
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes
        )
        total, _ = jax.lax.scan(accumulate, zeros, (microbatches, jnp.arange(number)))
        return jax.tree.map(lambda a, s: a.astype(s.dtype), total, shapes)

    def member_step(
        trainable: FlatParams,
        opt_state: Any,
        batch: Batch,
        learning_rate: Array,
        key: Array,
        *,
        frozen: FlatParams,
        copies: int,
    ) -> tuple[FlatParams, Any, StepMetrics]:
        gradients, sums = gradient(trainable, frozen, batch, key, copies)
        # The sum of weighted tokens may be less than one.
        tokens = jnp.where(sums.tokens > 0, sums.tokens, 1.0)
        if loss_normalization == "tokens":
            gradients = jax.tree.map(lambda g: g / tokens.astype(g.dtype), gradients)
        if regularizer is not None:
            added = jax.grad(regularizer)(trainable, frozen)
            gradients = jax.tree.map(jnp.add, gradients, added)
        updates, opt_state = optimizer.update(
            gradients, opt_state, trainable, learning_rate=learning_rate
        )
        metrics = StepMetrics(
            loss_E=sums.loss / tokens,
            accuracy_E=sums.correct / jnp.maximum(sums.examples, 1.0),
            gradient_norm_E=optax.tree.norm(gradients),
            update_norm_E=optax.tree.norm(updates),
        )
        updated = optax.apply_updates(trainable, updates)
        method = param_tree.merge(graphdef, {**frozen, **trainable}).method
        return method.constrained(trainable, updated), opt_state, metrics

    def compute(
        state: TrainState, frozen: FlatParams, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        rates_E = jnp.asarray(learning_rates, jnp.float32) * schedule(state.step)
        seeds_E = jnp.asarray(seeds, jnp.uint32)
        keys_E = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), state.step))(
            seeds_E
        )
        chunk_size = microbatching.chunk_size(*batch["inputs"].shape)
        trainable, opt_state, metrics = map_members(
            partial(member_step, frozen=frozen, copies=chunk_size),
            *(state.trainable, state.opt_state, dict(batch), rates_E, keys_E),
            members=len(seeds),
            chunk_size=chunk_size,
        )
        return TrainState(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics

    results = None
    if spans_devices(partitioner) and state_shardings is not None:
        # Fix the shardings: a differently sharded state would make the next step recompile.
        results = (state_shardings, partitioner.replicated)

    options = dict(compiler_options or {})

    @partial(jax.jit, donate_argnums=0, out_shardings=results, compiler_options=options)
    def train_step(
        state: TrainState, frozen: FlatParams, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        with activation_sharding(partitioner):
            return compute(state, frozen, batch)

    return train_step
