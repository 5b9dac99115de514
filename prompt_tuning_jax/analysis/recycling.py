"""Carries prompts from one model to another with the same vocabulary (Lester et al. 2022).

*Reducing Retraining by Recycling Parameter-Efficient Prompts*: a map that is fitted from the token
embeddings of the source model to those of the target model also maps the source model's prompts.
It needs no task data and no training with the target model.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prompt_tuning_jax.checkpoints.convert_prompt import with_model
from prompt_tuning_jax.checkpoints.destination import PROMPT_SUFFIXES, atomic_write_to, require_free
from prompt_tuning_jax.checkpoints.inspect import fingerprint_of, open_source
from prompt_tuning_jax.checkpoints.load import ModelCheckpoint
from prompt_tuning_jax.checkpoints.parameters import EMBEDDING
from prompt_tuning_jax.checkpoints.prompt_file import check_fits, in_model_space, save_prompt
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.inference.prompt_sources import prompt_paths, read_all
from prompt_tuning_jax.storage import expanded
from prompt_tuning_jax.typing import Array, HostArray

By = Literal["linear", "mlp", "combination"]
BY: tuple[By, ...] = get_args(By)
# Maps input vectors [X, D] of the source model to input vectors [X, E] of the target, in float64.
Recycler: TypeAlias = Callable[[HostArray], HostArray]
LEAST_PIECES = 20
_HELD_OUT = 10  # holds out every tenth piece
_MOST_MEASURED = 20  # pieces, where the error is slow to compute


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How to fit a recycler.

    ``terms`` applies to combinations only; the fields after it apply to the MLP only.
    """

    by: By = "linear"
    terms: int = 64
    hidden: int = 0  # 0: four times the target's width
    steps: int = 200
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A fitted recycler and its relative errors (see ``relative_error``), which are 0 at best.

    ``error`` is measured on the pieces used for fitting; it is 0 for combinations, which can use
    each piece itself.  ``held_out_error`` is measured on every tenth piece, with a recycler fitted
    on the others.
    """

    recycle: Recycler
    pieces: int
    error: float
    held_out_error: float


def fit_recycler(
    source_VD: Array | HostArray, target_VE: Array | HostArray, fit: Fit | None = None
) -> Fitted:
    """Fits a recycler on two embedding tables whose rows belong to the same pieces.

    Raises UserError if the tables differ in their number of rows, or have too few.
    """
    fit = fit or Fit()
    source, target = np.asarray(source_VD, np.float64), np.asarray(target_VE, np.float64)
    if len(source) != len(target):
        raise UserError(
            f"the vocabularies have {len(source):,} and {len(target):,} pieces, so they differ"
        )
    if len(source) < LEAST_PIECES:
        raise UserError(f"{len(source)} pieces are too few to fit on; {LEAST_PIECES} are the least")
    held_out = np.arange(len(source)) % _HELD_OUT == _HELD_OUT - 1
    tried = _fit(source[~held_out], target[~held_out], fit)
    recycle = _fit(source, target, fit)
    some = slice(None) if fit.by != "combination" else slice(_MOST_MEASURED)
    return Fitted(
        recycle=recycle,
        pieces=len(source),
        error=relative_error(recycle(source[some]), target[some]),
        held_out_error=relative_error(tried(source[held_out][some]), target[held_out][some]),
    )


def relative_error(actual: HostArray, expected: HostArray) -> float:
    """Returns the norm of the difference, divided by the norm of ``expected``."""
    length = float(np.linalg.norm(expected))
    return float(np.linalg.norm(actual - expected)) / (length or 1.0)


def _fit(source_ND: HostArray, target_NE: HostArray, fit: Fit) -> Recycler:
    if fit.by == "linear":
        return _linear(source_ND, target_NE)
    if fit.by == "mlp":
        return _mlp(source_ND, target_NE, fit)
    if fit.by != "combination":
        raise UserError(f"by is {fit.by!r}: {suggest(fit.by, BY)}")
    return lambda vectors_XD: as_combinations(vectors_XD, source_ND, terms=fit.terms) @ target_NE


def _linear(source_ND: HostArray, target_NE: HostArray) -> Recycler:
    """Fits the matrix ``[D, E]`` with the least squared error on the pieces (v2v-lin)."""
    # There are many rows; QR leaves only a small matrix to invert.
    basis_NK, rest_KD = np.linalg.qr(source_ND)
    map_DE = np.linalg.pinv(rest_KD, rcond=1e-12) @ (basis_NK.T @ target_NE)
    return lambda vectors_XD: np.asarray(vectors_XD @ map_DE)


def as_combinations(vectors_XD: HostArray, pieces_ND: HostArray, *, terms: int) -> HostArray:
    """Approximates each vector by a weighted sum of at most ``terms`` pieces.

    Returns the weights ``[X, N]``.  Uses orthogonal matching pursuit: it repeatedly adds the piece
    best aligned with the residual, and the weights are the least-squares solution for the chosen
    pieces.  (With all pieces, and more of them than the width, many sums are exact; ``linear``
    corresponds to the one with the smallest weights.)
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
            for _ in range(2):  # a single pass loses digits
                new_D = new_D - (basis_TD @ new_D) @ basis_TD
            size = np.linalg.norm(new_D)
            if size > 1e-8:  # otherwise it depends linearly on the chosen pieces
                basis_TD[len(chosen[x])] = new_D / size
                left_XD[x] -= (new_D @ left_XD[x]) / size**2 * new_D
                chosen[x].append(best)
    weights_XN = np.zeros(usable_XN.shape)
    for x, pieces in enumerate(chosen):
        weights_XN[x, pieces] = np.linalg.lstsq(pieces_ND[pieces].T, vectors_XD[x], rcond=None)[0]
    return weights_XN


def _mlp(source_ND: HostArray, target_NE: HostArray, fit: Fit) -> Recycler:
    """Fits the linear map, and an MLP with one hidden ReLU layer to its residual (v2v-nn).

    Adam trains the MLP.  The paper's network has no linear path beside it; without that path, the
    error was several times as large.
    """
    linear = _linear(source_ND, target_NE)
    missed_NE = target_NE - linear(source_ND)
    # Scale inputs and outputs to about one, whatever the scale of the models' embeddings.
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
    # Loop in Python: inside a compiled loop, a CPU computes matrix products on one core.
    for _ in range(fit.steps):
        rows_B = random.integers(len(source_ND), size=fit.batch_size)
        params, state = step(params, state, source_ND[rows_B], target_NE[rows_B])
    return params


@functools.cache
def _mlp_training(learning_rate: float, steps: int) -> tuple[Any, Any]:
    """Returns the optimizer's jitted ``init`` and a jitted step, compiled once per size of fit."""
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


_FIRST = 3  # skips padding, end of sequence and unknown, which are not words


@dataclass(frozen=True, kw_only=True)
class Recycled:
    """The paths of the recycled prompts, the number of pieces used, and how well the recycler fits.

    Errors are relative (see ``Fitted``).  ``prompt_error`` is the error of the combinations of
    pieces on the source prompts themselves; it is None for other recyclers.
    """

    paths: tuple[str, ...]
    by: str
    pieces: int
    error: float
    held_out_error: float
    prompt_error: float | None
    notes: tuple[str, ...]


def recycle(
    prompt: str | Path,
    *,
    source: str,
    target: str,
    output: str | Path,
    fit: Fit | None = None,
    pieces: int = 0,
    allow_other_model: bool = False,
    overwrite: bool = False,
) -> Recycled:
    """Converts a prompt of the model ``source`` into one for ``target``, and writes it.

    The recycler is fitted on the embeddings of the two models.  If ``prompt`` is a run or a folder
    of prompts, converts each of them and writes them to a folder.  ``pieces`` is the number of the
    vocabulary's most common pieces to fit on; 0 uses all.  The metadata name the target model and
    its fingerprint.  They omit the score, which belongs to the source model.  Raises UserError if
    the models have different vocabularies, or if a prompt does not belong to ``source``.
    """
    fit = fit or Fit()
    place = Path(os.path.abspath(expanded(output)))
    paths = prompt_paths(prompt)
    alone = len(paths) == 1 and place.suffix in PROMPT_SUFFIXES
    one = alone or paths == [str(prompt)]
    if place.suffix not in PROMPT_SUFFIXES and one:
        raise UserError(f"--output {output}: a prompt is saved as .safetensors or .npy")
    if place.suffix in PROMPT_SUFFIXES and not one:
        raise UserError(f"{prompt} holds several prompts: --output names a folder for them")
    require_free(place, overwrite=overwrite, folder=not one)
    here, there = open_source(source), open_source(target)
    scale = here.config.peft_prompt_scale
    prompts = {p: in_model_space(s, peft_scale=scale) for p, s in read_all(paths).items()}
    fingerprint, new_fingerprint = fingerprint_of(here), fingerprint_of(there)
    for path, stored in prompts.items():
        check_fits(
            stored.prompt_PD,
            stored.metadata,
            embed_dim=here.config.embed_dim,
            fingerprint=fingerprint,
            path=path,
            allow_other_model=allow_other_model,
        )
    number, notes = shared_pieces((source, here), (target, there))
    if pieces > number - _FIRST:
        raise UserError(f"--pieces {pieces}: the vocabulary has {number - _FIRST:,} pieces")
    rows = slice(_FIRST, _FIRST + pieces if pieces else number)
    source_VD, target_VE = embeddings(here)[rows], embeddings(there)[rows]
    fitted = fit_recycler(source_VD, target_VE, fit)
    carried = {
        path: fitted.recycle(stored.prompt_PD.astype(np.float64)).astype(np.float32)
        for path, stored in prompts.items()
    }
    origin = f"recycled ({fit.by}, {fitted.pieces} pieces) from {source} {fingerprint}"
    written: list[str] = []
    with atomic_write_to(place, overwrite=overwrite, folder=not one) as aside:
        for path, stored in prompts.items():
            metadata = dataclasses.replace(
                stored.metadata,
                model_name="",
                model_fingerprint="",
                metric="",
                score=None,
                created_by="",
                origin=f"{origin}: {path}",
            )
            metadata = with_model(metadata, there.config, name=target, fingerprint=new_fingerprint)
            file = aside if one else aside / f"{Path(path).stem}.safetensors"
            save_prompt(file, carried[path], metadata=metadata)
            written.append(str(place if one else place / file.name))
    prompt_error = None
    if fit.by == "combination":
        vectors_XD = np.concatenate([s.prompt_PD.astype(np.float64) for s in prompts.values()])
        weights_XN = as_combinations(vectors_XD, source_VD, terms=fit.terms)
        prompt_error = relative_error(weights_XN @ source_VD, vectors_XD)
    return Recycled(
        paths=tuple(written),
        by=fit.by,
        pieces=fitted.pieces,
        error=fitted.error,
        held_out_error=fitted.held_out_error,
        prompt_error=prompt_error,
        notes=tuple(notes),
    )


def embeddings(checkpoint: ModelCheckpoint) -> HostArray:
    """Reads only the token embeddings ``[V, D]`` of a model, as its layers get them, as float64."""
    scale: float = getattr(checkpoint.config, "embedding_scale", 1.0)
    return checkpoint.params[EMBEDDING].whole().astype(np.float64) * scale


def shared_pieces(
    source: tuple[str, ModelCheckpoint], target: tuple[str, ModelCheckpoint]
) -> tuple[int, list[str]]:
    """Returns n, where ids 0 to n - 1 are the same words in both models, and notes for the user.

    ``source`` and ``target`` are names and opened checkpoints.  Raises UserError for different
    vocabularies.
    """
    (name, here), (other, there) = source, target
    words = [checkpoint.vocabulary() for checkpoint in (here, there)]
    rows = min(here.config.vocab_size, there.config.vocab_size)
    ours, theirs = words
    if not ours or not theirs:
        lacks = " and ".join(n for n, w in zip((name, other), words, strict=True) if not w)
        if here.config.vocab_size != there.config.vocab_size:
            raise UserError(
                f"{name} has {here.config.vocab_size:,} embeddings and {other} "
                f"{there.config.vocab_size:,}, and {lacks} has no vocabulary to compare: prompts "
                "are carried between models of one vocabulary"
            )
        return rows, [f"{lacks} has no vocabulary: that it is the same one is taken for granted"]
    number = min(rows, _words(ours), _words(theirs))
    if ours != theirs:
        for token in range(_FIRST, number):
            if ours.pieces(token) != theirs.pieces(token):
                raise UserError(
                    f"{name} and {other} have different vocabularies (piece {token} is "
                    f"{ours.pieces(token)!r} and {theirs.pieces(token)!r}): prompts are carried "
                    "between models of one vocabulary"
                )
    return number, []


def _words(vocabulary: AnyVocabulary) -> int:
    """Returns the number of ids below the sentinels."""
    return vocabulary.size - vocabulary.extra_ids
