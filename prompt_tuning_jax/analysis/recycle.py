"""Carries prompts to another model of the same vocabulary."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prompt_tuning_jax.analysis.recycling import (
    Fit,
    as_combinations,
    fit_recycler,
    relative_error,
)
from prompt_tuning_jax.checkpoints.architecture import fingerprint_of, open_source
from prompt_tuning_jax.checkpoints.destination import PROMPT_SUFFIXES, atomic_write_to, require_free
from prompt_tuning_jax.checkpoints.load import OpenedModel
from prompt_tuning_jax.checkpoints.names import EMBEDDING
from prompt_tuning_jax.checkpoints.prompt_file import check_fits, save_prompt
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary, load_vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.prompt_sources import prompt_paths, read_all
from prompt_tuning_jax.typing import HostArray

_FIRST = 3  # padding, end of sequence and unknown are no words


@dataclass(frozen=True, kw_only=True)
class Recycled:
    """What was written where, on how many pieces the recycler was fitted, and how well it fits.

    Errors are relative (``analysis.recycling.Fitted``); ``prompt_error`` is what the combinations
    of pieces miss of the prompts at the source, None for other recyclers.
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
    """Writes a prompt of the model ``source`` as one for ``target``, fitted on their embeddings.

    Of a run or a folder of prompts each one, into a folder.  ``pieces`` is how many of the most
    common pieces of the vocabulary are used, 0 for all.  The target's name and fingerprint are
    written with it; its score is not, which was that of another model.  Raises UserError for models
    of other vocabularies, and for prompts that are not for ``source``.
    """
    fit = fit or Fit()
    place = Path(os.path.abspath(Path(output).expanduser()))
    paths = prompt_paths(prompt)
    alone = len(paths) == 1 and place.suffix in PROMPT_SUFFIXES
    one = alone or paths == [str(prompt)]
    if place.suffix not in PROMPT_SUFFIXES and one:
        raise UserError(f"--output {output}: a prompt is saved as .safetensors or .npy")
    if place.suffix in PROMPT_SUFFIXES and not one:
        raise UserError(f"{prompt} holds several prompts: --output names a folder for them")
    require_free(place, overwrite=overwrite, folder=not one)
    prompts = read_all(paths)
    here, there = open_source(source), open_source(target)
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
    number, notes = _shared_pieces((source, here), (target, there))
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
                model_name=target,
                model_fingerprint=new_fingerprint,
                metric="",
                score=None,
                created_by="",
                origin=f"{origin}: {path}",
            )
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


def embeddings(opened: OpenedModel) -> HostArray:
    """The token embeddings ``[V, D]`` of a model, alone read of it, as float64."""
    return opened.params[EMBEDDING].whole().astype(np.float64)


def _shared_pieces(
    source: tuple[str, OpenedModel], target: tuple[str, OpenedModel]
) -> tuple[int, list[str]]:
    """How many ids, from 0 on, are words of both, and what to know about that."""
    (name, here), (other, there) = source, target
    words = [o.vocabulary_file and load_vocabulary(o.vocabulary_file) for o in (here, there)]
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
    """How many ids stand below the sentinels."""
    return vocabulary.size - vocabulary.extra_ids
