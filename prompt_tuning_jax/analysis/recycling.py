"""Carries prompts from one model to another with the same vocabulary (Lester et al. 2022).

*Reducing Retraining by Recycling Parameter-Efficient Prompts*: what takes the token embeddings of
the source model to those of the target model takes its prompts there, too.  No data of a task and
no step of training with the target model is needed.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import Array, HostArray

By = Literal["linear", "mlp", "combination"]
BY: tuple[By, ...] = get_args(By)
# From vectors [X, D] at the source model's input to [X, E] at the target model's, in float64.
Recycler: TypeAlias = Callable[[HostArray], HostArray]
LEAST_PIECES = 20
_HELD_OUT = 10  # one piece of so many
_MOST_MEASURED = 20  # pieces, for an error that takes long to find


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How recyclers are fitted: ``terms`` is of combinations, the rest of the MLP."""

    by: By = "linear"
    terms: int = 64
    hidden: int = 0  # 0: four times the target's width
    steps: int = 200
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A recycler, and what is lost: lengths of differences over lengths, 0 where all is right.

    ``error`` is on the pieces that it was fitted on (of combinations, which hold each of them: 0),
    ``held_out_error`` on every tenth piece by a recycler fitted on the others.
    """

    recycle: Recycler
    pieces: int
    error: float
    held_out_error: float


def fit_recycler(
    source_VD: Array | HostArray, target_VE: Array | HostArray, fit: Fit | None = None
) -> Fitted:
    """Fits a recycler on the embeddings of the same pieces in two models, row by row.

    Raises UserError for tables of unequal or too few rows.
    """
    fit = fit or Fit()
    source, target = np.asarray(source_VD, np.float64), np.asarray(target_VE, np.float64)
    if len(source) != len(target):
        raise UserError(f"{len(source):,} and {len(target):,} pieces: they are not the same ones")
    if len(source) < LEAST_PIECES:
        raise UserError(f"{len(source)} pieces are too few to fit on; {LEAST_PIECES} are the least")
    held = np.arange(len(source)) % _HELD_OUT == _HELD_OUT - 1
    tried = _fit(source[~held], target[~held], fit)
    recycle = _fit(source, target, fit)
    some = slice(None) if fit.by != "combination" else slice(_MOST_MEASURED)
    return Fitted(
        recycle=recycle,
        pieces=len(source),
        error=relative_error(recycle(source[some]), target[some]),
        held_out_error=relative_error(tried(source[held][some]), target[held][some]),
    )


def relative_error(found: HostArray, wanted: HostArray) -> float:
    """The length of the difference over that of what is wanted."""
    length = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(found - wanted)) / (length or 1.0)


def _fit(source_ND: HostArray, target_NE: HostArray, fit: Fit) -> Recycler:
    if fit.by == "linear":
        return _linear(source_ND, target_NE)
    if fit.by == "mlp":
        return _mlp(source_ND, target_NE, fit)
    return lambda vectors_XD: as_combinations(vectors_XD, source_ND, terms=fit.terms) @ target_NE


def _linear(source_ND: HostArray, target_NE: HostArray) -> Recycler:
    """The map ``[D, E]`` with the least squared error on the pieces (v2v-lin)."""
    # Rows are many: a small matrix is left to take apart.
    basis_NK, rest_KD = np.linalg.qr(source_ND)
    map_DE = np.linalg.pinv(rest_KD, rcond=1e-12) @ (basis_NK.T @ target_NE)
    return lambda vectors_XD: np.asarray(vectors_XD @ map_DE)


def as_combinations(vectors_XD: HostArray, pieces_ND: HostArray, *, terms: int) -> HostArray:
    """``[X, N]``: of each vector the weights of at most ``terms`` pieces whose sum comes near it.

    Orthogonal matching pursuit: the piece that points most along what is left is taken next, and
    all weights are the best for those taken.  (With all pieces there are many exact sums where
    these are more than the width; the one with the smallest weights is what ``linear`` gives.)
    """
    left_XD = np.array(vectors_XD, np.float64)
    enough_X = 1e-12 * np.linalg.norm(left_XD, axis=1)
    norms_N = np.linalg.norm(pieces_ND, axis=1)
    units_ND = pieces_ND / np.where(norms_N, norms_N, 1)[:, None]
    most = min(terms, *pieces_ND.shape)
    chosen: list[list[int]] = [[] for _ in left_XD]
    basis_XTD = np.zeros((len(left_XD), most, left_XD.shape[1]))
    usable_XN = np.broadcast_to(norms_N > 0, (len(left_XD), len(norms_N))).copy()
    while True:
        along_XN = np.where(usable_XN, np.abs(left_XD @ units_ND.T), 0)
        going = [
            x
            for x, pieces in enumerate(chosen)
            if len(pieces) < most and np.linalg.norm(left_XD[x]) > enough_X[x] and along_XN[x].any()
        ]
        if not going:
            break
        for x in going:
            best = int(np.argmax(along_XN[x]))
            usable_XN[x, best] = False
            new_D, basis_TD = units_ND[best], basis_XTD[x]
            for _ in range(2):  # once loses digits
                new_D = new_D - (basis_TD @ new_D) @ basis_TD
            size = np.linalg.norm(new_D)
            if size > 1e-8:  # else nothing that those taken do not give
                basis_TD[len(chosen[x])] = new_D / size
                left_XD[x] -= (new_D @ left_XD[x]) / size**2 * new_D
                chosen[x].append(best)
    weights_XN = np.zeros(usable_XN.shape)
    for x, pieces in enumerate(chosen):
        weights_XN[x, pieces] = np.linalg.lstsq(pieces_ND[pieces].T, vectors_XD[x], rcond=None)[0]
    return weights_XN


def _mlp(source_ND: HostArray, target_NE: HostArray, fit: Fit) -> Recycler:
    """One hidden layer of relus for what the linear map misses, trained by Adam (v2v-nn).

    The paper's network has no linear path around it; by itself it missed several times as much.
    """
    linear = _linear(source_ND, target_NE)
    missed_NE = target_NE - linear(source_ND)
    # Numbers of about one on both sides, whatever the models' embeddings are like.
    source_scale, missed_scale = _scale(source_ND), _scale(missed_NE)
    params = _train_mlp(
        np.asarray(source_ND / source_scale, np.float32),
        np.asarray(missed_NE / missed_scale, np.float32),
        fit,
    )

    def recycle(vectors_XD: HostArray) -> HostArray:
        scaled_XD = np.asarray(vectors_XD / source_scale, np.float32)
        added_XE = np.asarray(_apply_mlp(params, scaled_XD), np.float64)
        return linear(vectors_XD) + added_XE * missed_scale

    return recycle


def _train_mlp(source_ND: HostArray, target_NE: HostArray, fit: Fit) -> dict[str, Array]:
    random = np.random.default_rng(fit.seed)
    inputs, outputs = source_ND.shape[1], target_NE.shape[1]
    hidden = fit.hidden or 4 * outputs
    start = {
        "in_DF": random.normal(size=(inputs, hidden)) * (2 / inputs) ** 0.5,
        "in_F": np.zeros(hidden),
        "out_FE": np.zeros((hidden, outputs)),
        "out_E": np.zeros(outputs),
    }
    params = {name: jnp.asarray(array, jnp.float32) for name, array in start.items()}
    init, step = _mlp_training(fit.learning_rate, fit.steps)
    state = init(params)
    # No loop inside of the program: there a CPU computes products on one core.
    for _ in range(fit.steps):
        rows_B = random.integers(len(source_ND), size=fit.batch_size)
        params, state = step(params, state, source_ND[rows_B], target_NE[rows_B])
    return params


@functools.cache
def _mlp_training(learning_rate: float, steps: int) -> tuple[Any, Any]:
    """The optimizer's start, and a step on a batch; compiled once for all fits of one size."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def loss(params: dict[str, Array], source_BD: Array, target_BE: Array) -> Array:
        return jnp.mean(jnp.square(_apply_mlp(params, source_BD) - target_BE))

    @jax.jit
    def step(
        params: dict[str, Array], state: optax.OptState, source_BD: Array, target_BE: Array
    ) -> tuple[optax.Params, optax.OptState]:
        gradient = jax.grad(loss)(params, source_BD, target_BE)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    return jax.jit(optimizer.init), step


@jax.jit
def _apply_mlp(params: dict[str, Array], vectors_XD: Array) -> Array:
    hidden_XF = jax.nn.relu(vectors_XD @ params["in_DF"] + params["in_F"])
    return hidden_XF @ params["out_FE"] + params["out_E"]


def _scale(vectors_XD: HostArray) -> float:
    return float(np.sqrt(np.mean(np.square(vectors_XD)))) or 1.0
