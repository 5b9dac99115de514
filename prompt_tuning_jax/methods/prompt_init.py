"""Initial values of a prompt (Lester et al. 2021, section 3.2 and figure 3b)."""

import logging
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from prompt_tuning_jax.config.methods import MultitaskInit
from prompt_tuning_jax.data.vocabularies.vocab import Vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import PROMPT, Context
from prompt_tuning_jax.models.layers import Table
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array, HostArray

_MOST_LISTED = 12

_log = logging.getLogger(__name__)


def uniform(key: Array, length: int, width: int, *, low: float, high: float) -> Array:
    """``[P, D]`` drawn from [low, high): the paper's [-0.5, 0.5), the released code's [0, 0.5)."""
    return jax.random.uniform(key, (length, width), jnp.float32, low, high)


def sampled_vocabulary(key: Array, embedding_VD: Table, length: int, *, population: int) -> Array:
    """``[P, D]``: embeddings of pieces drawn from the first ``population``, the most common ones.

    Pieces repeat only where the prompt is longer than the population; 0 takes the vocabulary whole.
    Draws the pieces that prompt_tuning/prompts.py, ``from_sample_of_embeddings`` draws.
    """
    population = min(population or embedding_VD.shape[0], embedding_VD.shape[0])
    chosen_P = jax.random.choice(key, population, (length,), replace=length > population)
    return embedding_VD[chosen_P].astype(jnp.float32)


def class_labels(embedding_VD: Table, vocabulary: Vocabulary, labels: Sequence[str]) -> Array:
    """``[number of labels, D]``: each label as the mean of the embeddings of its pieces."""
    rows = []
    for label in labels:
        pieces = vocabulary.encode(label)
        if not pieces:
            raise UserError(
                f"method.init=class_labels: label {label!r} has no pieces; "
                "give labels with text in data.labels or method.init_labels"
            )
        rows.append(jnp.mean(embedding_VD[jnp.asarray(pieces)].astype(jnp.float32), axis=0))
    return jnp.stack(rows)


def described(content_PD: Array, labels_CD: Array) -> Array:
    """``[P, D]``: the labels in turn, and contents in the way of ``methods.DescribedPrompts``.

    For models that were pre-trained with such prompts, the bundled one for instance: every position
    is a vote for its label wherever the input resembles its content.
    """
    turned_PD = jnp.roll(content_PD, content_PD.shape[1] // 2, axis=-1)
    return turned_PD + labels_CD[jnp.arange(content_PD.shape[0]) % labels_CD.shape[0]]


def say_what_is_left_out(init: str, labels: Sequence[str], length: int) -> None:
    """A note where a prompt has fewer positions than there are labels."""
    if len(labels) <= length:
        return
    listed = ", ".join(repr(label) for label in labels[length:][:_MOST_LISTED])
    more = len(labels) - length - _MOST_LISTED
    _log.warning(
        "method.init=%s: there are %d labels and the prompt has %d positions: nothing starts from "
        "%s%s; raise method.length, or put those that matter first in data.labels",
        *(init, len(labels), length, listed, f" and {more} more" if more > 0 else ""),
    )


def string(embedding_VD: Table, vocabulary: Vocabulary, text: str) -> Array:
    """``[number of pieces, D]``: the embeddings of the pieces of a text."""
    pieces = vocabulary.encode(text)
    if not pieces:
        raise UserError("method.init=string: method.init_text has no pieces; give it some text")
    return embedding_VD[jnp.asarray(pieces)].astype(jnp.float32)


class PromptInit(Protocol):
    """The fields of a method that initializes a prompt."""

    @property
    def init(self) -> MultitaskInit: ...
    @property
    def init_text(self) -> str: ...
    @property
    def init_population(self) -> int: ...


def init_prompt(
    config: PromptInit,
    model: T5,
    *,
    key: Array,
    length: int,
    context: Context,
    labels: Sequence[str] = (),
) -> Array:
    """A prompt ``[length, D]`` as the fields of ``config`` say; ``labels`` replace the context's.

    Raises UserError as ``initial_prompt`` does.
    """
    return initial_prompt(
        config.init,
        key=key,
        embedding_VD=model.token_embedder.table(),
        length=length,
        vocabulary=context.vocabulary,
        labels=labels or context.labels,
        text=config.init_text,
        file_PD=context.init_arrays.get(PROMPT),
        population=config.init_population,
    )


def initial_prompt(
    init: MultitaskInit,
    *,
    key: Array,
    embedding_VD: Table,
    length: int,
    vocabulary: Vocabulary | None = None,
    labels: Sequence[str] = (),
    text: str = "",
    file_PD: HostArray | None = None,
    population: int = 5000,
) -> Array:
    """A prompt ``[P, D]`` in float32; what labels or a text leave over is sampled vocabulary.

    Raises UserError where the initialisation lacks what it needs, or the file has another shape.
    """
    width = embedding_VD.shape[1]
    if init == "uniform":
        return uniform(key, length, width, low=-0.5, high=0.5)
    if init == "uniform_positive":
        return uniform(key, length, width, low=0.0, high=0.5)
    if init == "file":
        if file_PD is None:
            raise UserError("method.init=file needs method.init_path, a prompt file")
        if file_PD.shape != (length, width):
            raise UserError(
                f"method.init_path: the file holds a prompt of shape {list(file_PD.shape)}; this "
                f"run trains [{length}, {width}] (method.length, model width)"
            )
        return jnp.asarray(file_PD, jnp.float32)
    prompt_PD = sampled_vocabulary(key, embedding_VD, length, population=population)
    if init == "sampled_vocabulary":
        return prompt_PD
    if vocabulary is None:
        raise UserError(f"method.init={init} needs the model's vocabulary; set model.vocabulary")
    if init in ("class_labels", "described"):
        if not labels:
            raise UserError(
                f"method.init={init}: the task has no labels; give data.labels or "
                "method.init_labels, or choose method.init=sampled_vocabulary"
            )
        first = class_labels(embedding_VD, vocabulary, labels)
        say_what_is_left_out(init, labels, length)
        if init == "described":
            return described(prompt_PD, first)
    else:
        first = string(embedding_VD, vocabulary, text)
        if len(first) > length:
            _log.warning(
                "method.init=string: method.init_text has %d pieces and the prompt has %d "
                "positions: the last %d pieces are left out; raise method.length",
                *(len(first), length, len(first) - length),
            )
    first = first[:length]
    return prompt_PD.at[: first.shape[0]].set(first)
