"""Initial values of a prompt (Lester et al. 2021, section 3.2 and figure 3b)."""

import logging
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from prompt_tuning_jax.config.methods import MultitaskInit
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary, Vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import PROMPT, Context
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.layers import Table
from prompt_tuning_jax.typing import Array, HostArray

_MOST_LISTED = 12
_WITHOUT_WORDS = ("uniform", "uniform_positive", "file")

_log = logging.getLogger(__name__)


def uniform(key: Array, length: int, width: int, *, low: float, high: float) -> Array:
    """Draws a prompt ``[P, D]`` uniformly from [low, high).

    The paper uses [-0.5, 0.5), and the released code uses [0, 0.5).
    """
    return jax.random.uniform(key, (length, width), jnp.float32, low, high)


def sampled_vocabulary(key: Array, embedding_VD: Table, length: int, *, population: int) -> Array:
    """Samples embeddings ``[P, D]`` from the first (most common) ``population`` pieces.

    A ``population`` of 0 means the whole vocabulary.  Pieces repeat only if the prompt is longer
    than the population.  The draw matches ``from_sample_of_embeddings`` in
    prompt_tuning/prompts.py.
    """
    population = min(population or embedding_VD.shape[0], embedding_VD.shape[0])
    chosen_P = jax.random.choice(key, population, (length,), replace=length > population)
    return embedding_VD[chosen_P].astype(jnp.float32)


def class_labels(embedding_VD: Table, vocabulary: Vocabulary, labels: Sequence[str]) -> Array:
    """Returns one vector per label, ``[C, D]``: the mean embedding of the label's pieces.

    Raises UserError if a label has no pieces.
    """
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
    """Builds a prompt ``[P, D]`` that cycles through the labels and adds content to each position.

    The content is rotated by half the width, as in ``methods.DescribedPrompts``.  Use this for
    models that were pre-trained with such prompts, such as the bundled one: each position votes for
    its label when the input resembles its content.
    """
    turned_PD = jnp.roll(content_PD, content_PD.shape[1] // 2, axis=-1)
    return turned_PD + labels_CD[jnp.arange(content_PD.shape[0]) % labels_CD.shape[0]]


def say_what_is_left_out(init: str, labels: Sequence[str], length: int) -> None:
    """Logs a warning if the prompt has fewer positions than there are labels."""
    if len(labels) <= length:
        return
    listed = ", ".join(repr(label) for label in labels[length:][:_MOST_LISTED])
    more = len(labels) - length - _MOST_LISTED
    _log.warning(
        "method.init=%s: there are %d labels and the prompt has %d positions: nothing starts from "
        "%s%s; raise method.length, or put those that matter first in data.labels",
        *(init, len(labels), length, listed, f" and {more} more" if more > 0 else ""),
    )


def string(embedding_VD: Table, vocabulary: AnyVocabulary, text: str) -> Array:
    """Returns the embeddings of a text's pieces, ``[number of pieces, D]``.

    Raises UserError if the text has no pieces.
    """
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
    model: Model,
    *,
    key: Array,
    length: int,
    context: Context,
    labels: Sequence[str] = (),
) -> Array:
    """Initializes a prompt ``[length, D]`` as the fields of ``config`` specify.

    ``labels``, if not empty, override the labels of the context.  Raises UserError under the same
    conditions as ``initial_prompt``, and for words in a model that reads images.
    """
    if config.init == "xavier_uniform":
        bound, width = model.prompt_bound(), model.config.embed_dim
        return uniform(key, length, width, low=-bound, high=bound)
    if model.config.reads_images and config.init not in _WITHOUT_WORDS:
        raise UserError(
            f"method.init={config.init} takes words, and this model reads images; set "
            "method.init=xavier_uniform"
        )
    no_words_0D = jnp.zeros((0, model.config.embed_dim))
    return initial_prompt(
        config.init,
        key=key,
        embedding_VD=no_words_0D if model.config.reads_images else model.embedding_table(),
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
    """Initializes a prompt ``[P, D]`` in float32.

    Positions that labels or a text do not fill start from sampled vocabulary.  Raises UserError if
    an input that ``init`` requires is missing, or if the file's prompt has a different shape.
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
