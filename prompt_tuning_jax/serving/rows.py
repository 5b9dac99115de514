"""Rows of a batch, and the arrays that they make, padded to the shapes of a program."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax.inference.decoding.logits_processors import LogitsProcessors
from prompt_tuning_jax.models.t5.config import TokenIds
from prompt_tuning_jax.serving.adapter_spec import ServedMethod
from prompt_tuning_jax.serving.shapes import Program
from prompt_tuning_jax.serving.tasks import ServedPrompt
from prompt_tuning_jax.typing import HostArray


@dataclass(frozen=True, kw_only=True)
class Row:
    """One input with one prompt (None: the bare model), and what is wanted of it.

    With a ``method`` in place of the prompt it can be beside rows of its structure alone.
    ``ids`` and ``targets`` have their end of sequence; ``limit`` is in tokens, and the
    other options of what is written are ``LogitsProcessors``'s.
    """

    ids: tuple[int, ...]
    prompt: ServedPrompt | None = None
    method: ServedMethod | None = None
    targets: tuple[tuple[int, ...], ...] = ()
    limit: int = 0
    min_length: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0


def token_array(rows: Sequence[Row], program: Program, ids: TokenIds) -> HostArray:
    """``[B, T]``, padding behind each input."""
    tokens_BT = np.full((program.rows, program.length), ids.fill, np.int32)
    for tokens_T, row in zip(tokens_BT, rows, strict=False):
        tokens_T[: len(row.ids)] = row.ids
    return tokens_BT


def target_array(rows: Sequence[Row], program: Program, ids: TokenIds) -> HostArray:
    """``[B, C, S]``, padding behind each target."""
    assert program.targets is not None
    shape = (program.rows, program.targets.number, program.targets.length)
    targets_BCS = np.full(shape, ids.fill, np.int32)
    targets_BCS[:, :, 0] = ids.eos  # what is to spare is a text that ends at once
    for targets_CS, row in zip(targets_BCS, rows, strict=False):
        for target_S, tokens in zip(targets_CS, row.targets, strict=False):
            target_S[: len(tokens)] = tokens
    return targets_BCS


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """For each row how many tokens may be written, and what changes their scores."""

    limit_B: Any
    processors: LogitsProcessors


def write_options(rows: Sequence[Row], program: Program, *, most: int) -> WriteOptions:
    """Each ``[B]``; spare rows write one token."""

    def each(values: list[Any], *, spare: Any, dtype: Any) -> HostArray:
        array_B = np.full(program.rows, spare, dtype)
        array_B[: len(values)] = values
        return array_B

    return WriteOptions(
        limit_B=each([min(row.limit, most) for row in rows], spare=1, dtype=np.int32),
        processors=LogitsProcessors(
            min_length=each([row.min_length for row in rows], spare=0, dtype=np.int32),
            repetition_penalty=each(
                [row.repetition_penalty for row in rows], spare=1, dtype=np.float32
            ),
            no_repeat_ngram_size=each(
                [row.no_repeat_ngram_size for row in rows], spare=0, dtype=np.int32
            ),
        ),
    )
