"""What a model is, from its headers alone."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from prompt_tuning_jax.checkpoints.architecture import (
    architecture,
    fingerprint_of,
    layout,
    open_source,
    size_name,
)
from prompt_tuning_jax.checkpoints.t5x.reader import PROMPT
from prompt_tuning_jax.data.vocabularies.vocab import ByteVocabulary, load_vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.config import T5Config

# Larger models are not read wholly unless asked.
_FINGERPRINTED_BYTES = 2_000_000_000


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A stored model.

    ``size`` is a preset's name or empty; ``dtypes`` counts the parameters stored in each; ``bytes``
    are theirs; ``step``, ``prompt`` (its shape) and ``optimizer_arrays`` are of T5X checkpoints;
    ``fingerprint`` is empty where it has not been computed.
    """

    location: str
    is_t5x: bool
    architecture: str
    size: str
    layout: str
    config: T5Config
    parameters: int
    dtypes: dict[str, int]
    bytes: int
    step: int | None
    prompt: tuple[int, ...] | None
    optimizer_arrays: int | None
    vocabulary: str
    fingerprint: str


def describe_model(
    name_or_path: str,
    *,
    with_fingerprint: bool | None = None,
    relpos_max_distance: int | None = None,
) -> ModelDescription:
    """Opens what ``load_model`` loads, with the same errors, and describes it.

    Only headers are read but for the fingerprint, which takes the whole model; None computes it up
    to 2 GB on this machine.
    """
    opened = open_source(name_or_path, relpos_max_distance=relpos_max_distance)
    dtypes: Counter[str] = Counter()
    for array in opened.params.values():
        dtypes[array.dtype.name] += prod(array.shape)
    size = sum(array.nbytes for array in opened.params.values())
    if with_fingerprint is None:
        with_fingerprint = size <= _FINGERPRINTED_BYTES and "://" not in opened.location
    checkpoint = None if isinstance(opened.source, Path) else opened.source
    prompt = None if checkpoint is None else checkpoint.params.get(PROMPT)
    return ModelDescription(
        location=opened.location,
        is_t5x=checkpoint is not None,
        architecture=architecture(opened),
        size=size_name(opened.config),
        layout=layout(opened),
        config=opened.config,
        parameters=dtypes.total(),
        dtypes=dict(dtypes.most_common()),
        bytes=size,
        step=None if checkpoint is None else checkpoint.step,
        prompt=None if prompt is None else prompt.shape,
        optimizer_arrays=None if checkpoint is None else len(checkpoint.state_names),
        vocabulary=_vocabulary(opened.vocabulary_file),
        fingerprint=fingerprint_of(opened) if with_fingerprint else "",
    )


def _vocabulary(file: Path | None) -> str:
    """In words, empty for none; one that cannot be used does not hide what the rest is."""
    if file is None:
        return ""
    try:
        words = load_vocabulary(file)
    except UserError as error:
        return f"cannot be used: {error}"
    if isinstance(words, ByteVocabulary):
        return f"bytes, {words.size} ids"
    sentinels = (
        f", {words.extra_ids} of them sentinels added to the file" if words.extra_ids else ""
    )
    return f"{file.name}, {words.size:,} ids{sentinels}"
