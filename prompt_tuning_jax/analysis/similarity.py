"""Measures how similar prompts, and hence their tasks, are (SPoT: Vu et al. 2022, section 4).

Ranks prompts by their similarity to a given one, and mixes the nearest of them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from prompt_tuning_jax.checkpoints.destination import atomic_write_to, require_free
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata, StoredPrompt, save_prompt
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.inference.prompt_sources import as_paths, prompt_paths, read_all
from prompt_tuning_jax.storage import expanded
from prompt_tuning_jax.typing import Array, HostArray

By = Literal["mean", "tokens"]
BY: tuple[By, ...] = get_args(By)


def similarity(a_PD: Array | HostArray, b_QD: Array | HostArray, *, by: By = "mean") -> float:
    """Returns the similarity of two prompts of the same width, from -1 to 1.

    Their lengths may differ.  ``by`` selects one of the paper's two metrics.  ``mean`` is the
    cosine between the mean vectors of the prompts; it is 1 for a prompt and itself.  ``tokens`` is
    the mean cosine over all pairs of positions; it is 1 only if all positions have the same
    direction.  Vectors of zeros have cosine 0 with any vector.
    """
    if by not in BY:
        raise UserError(f"by is {by!r}: {suggest(by, BY)}")
    a, b = np.asarray(a_PD, np.float64), np.asarray(b_QD, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"prompts {list(a.shape)} and {list(b.shape)} have no width in common")
    if by == "mean":
        return float(np.clip(directions(a.mean(axis=0)) @ directions(b.mean(axis=0)), -1, 1))
    return float((directions(a) @ directions(b).T).mean())


def mixture(prompts: Sequence[Array | HostArray], weights: Sequence[float]) -> HostArray:
    """Returns the weighted mean ``[P, D]`` of prompts of the same shape.

    The paper's section 4 mixes the nearest source prompts, weighted by their similarities.  Raises
    UserError if the shapes differ, or if a weight is not positive.
    """
    arrays = [np.asarray(prompt, np.float64) for prompt in prompts]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) != 1:
        shown = " and ".join(str(list(shape)) for shape in shapes)
        raise UserError(f"a mixture takes prompts of one shape, and these have {shown}")
    if min(weights) <= 0:
        raise UserError(
            f"a mixture weights prompts by their similarity, and {min(weights):.3f} is not above 0"
        )
    shares = np.asarray(weights, np.float64) / sum(weights)
    return np.tensordot(shares, np.stack(arrays), 1).astype(np.float32)


def directions(vectors_XD: HostArray) -> HostArray:
    """Scales vectors to unit length; zero vectors stay zero."""
    norms = np.linalg.norm(vectors_XD, axis=-1, keepdims=True)
    directions: HostArray = vectors_XD / np.where(norms == 0, 1, norms)
    return directions


@dataclass(frozen=True, kw_only=True)
class Similar:
    """A source prompt, its similarity, and the task that it was trained on."""

    path: str
    similarity: float
    task: str
    shape: tuple[int, int]


def similar(
    prompt: str | Path,
    among: str | Path | Sequence[str | Path],
    *,
    by: By = "mean",
    top: int = 0,
    output: str | Path = "",
    overwrite: bool = False,
) -> list[Similar]:
    """Ranks source prompts by their similarity to ``prompt``, the most similar first.

    Returns the first ``top`` of them, or all if ``top`` is 0.  ``among`` names files, folders of
    prompts and runs; ``prompt`` itself is skipped.  If ``output`` is given, writes the mean of the
    returned prompts, weighted by similarity, to that file (if ``top`` is 0, only the nearest
    prompt).  Training can start from it with ``method.init=file``.  Raises UserError for prompts of
    different models, and if ``among`` holds no other prompt.
    """
    among = as_paths(among, "among")
    (path,) = _one(prompt)
    own = read_all([path])[path]
    sources = read_all([p for place in among for p in prompt_paths(place)])
    # A copy in another file, for instance with another suffix, is still the same prompt.
    sources = {
        p: stored
        for p, stored in sources.items()
        if os.path.realpath(p) != os.path.realpath(path)
        and not np.array_equal(stored.prompt_PD, own.prompt_PD)
    }
    if not sources:
        raise UserError(f"--among names no prompt besides {path}")
    require_one_model({path: own, **sources})
    results = [
        Similar(
            path=p,
            similarity=similarity(own.prompt_PD, stored.prompt_PD, by=by),
            task=stored.metadata.task,
            shape=(stored.prompt_PD.shape[0], stored.prompt_PD.shape[1]),
        )
        for p, stored in sources.items()
    ]
    results.sort(key=lambda each: (-each.similarity, each.path))
    results = results[: top or len(results)]
    if output:
        _write_mixture(results[: top or 1], sources, own, Path(output), by=by, overwrite=overwrite)
    return results


def _one(prompt: str | Path) -> list[str]:
    paths = prompt_paths(prompt)
    if len(paths) != 1:
        listed = ", ".join(Path(p).name for p in paths[:5]) + ", ..." * (len(paths) > 5)
        raise UserError(f"{prompt} holds {len(paths)} prompts; name one of them: {listed}")
    return paths


def require_one_model(prompts: dict[str, StoredPrompt]) -> None:
    """Raises UserError unless all prompts have one width and all known fingerprints agree."""
    (first, first_prompt), *rest = prompts.items()
    width = first_prompt.prompt_PD.shape[1]
    known, by = first_prompt.metadata, first
    for path, stored in rest:
        if stored.prompt_PD.shape[1] != width:
            raise UserError(
                f"{path} has width {stored.prompt_PD.shape[1]} and {first} has {width}: they are "
                "for different models, whose prompts cannot be compared"
            )
        theirs = stored.metadata
        if not known.model_fingerprint:
            known, by = theirs, path
        elif theirs.model_fingerprint not in ("", known.model_fingerprint):
            raise UserError(
                f"{path} is for another model ({_model(theirs)}) than {by} ({_model(known)}), and "
                "their prompts cannot be compared; prompt-tuning recycle carries one over"
            )


def _model(metadata: PromptMetadata) -> str:
    name = " ".join(metadata.model_name.split())[:100]
    return f"{name} {metadata.model_fingerprint}".strip()


def _write_mixture(
    nearest: Sequence[Similar],
    sources: dict[str, StoredPrompt],
    prompt: StoredPrompt,
    output: Path,
    *,
    by: By,
    overwrite: bool,
) -> None:
    output = Path(os.path.abspath(expanded(output)))
    require_free(output, overwrite=overwrite, folder=False)
    for each in nearest:
        if each.similarity <= 0:
            raise UserError(
                f"a mixture weights prompts by their similarity, and that of {each.path}, "
                f"{each.similarity:.3f}, is not above 0; lower --top"
            )
        if each.shape != nearest[0].shape:
            raise UserError(
                f"{each.path} is {list(each.shape)} and {nearest[0].path} is "
                f"{list(nearest[0].shape)}: a mixture takes prompts of one length; lower --top"
            )
    weights = [each.similarity for each in nearest]
    mixed_PD = mixture([sources[each.path].prompt_PD for each in nearest], weights)
    shares = [f"{w / sum(weights):.3f} {e.path}" for w, e in zip(weights, nearest, strict=True)]
    models = [prompt.metadata, *(sources[each.path].metadata for each in nearest)]
    known = next((m for m in models if m.model_fingerprint), prompt.metadata)
    placements = {sources[each.path].metadata.combine for each in nearest}
    metadata = PromptMetadata(
        model_fingerprint=known.model_fingerprint,
        model_name=known.model_name,
        model_type=known.model_type,
        embedding_scale=known.embedding_scale,
        combine=placements.pop() if len(placements) == 1 else "",
        origin=f"mixture by similarity ({by}): {', '.join(shares)}",
    )
    with atomic_write_to(output, overwrite=overwrite, folder=False) as aside:
        save_prompt(aside, mixed_PD, metadata=metadata)
