"""Rows of a batch, and the arrays that they make, padded to the shapes of a program."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.serving.shapes import Program
from prompt_tuning_jax.serving.structures import ServedMethod
from prompt_tuning_jax.serving.tasks import ServedPrompt
from prompt_tuning_jax.typing import HostArray


@dataclass(frozen=True, kw_only=True)
class Row:
    """One input with one prompt (None: the bare model), and what is wanted of it.

    With a ``method`` in place of the prompt it can be beside rows of its structure alone.
    ``ids`` and ``targets`` have their end of sequence; ``limit`` is in tokens.
    """

    ids: tuple[int, ...]
    prompt: ServedPrompt | None = None
    method: ServedMethod | None = None
    targets: tuple[tuple[int, ...], ...] = ()
    limit: int = 0


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


def limit_array(rows: Sequence[Row], program: Program, *, most: int) -> HostArray:
    """``[B]``: how many tokens may be written."""
    limit_B = np.ones(program.rows, np.int32)
    limit_B[: len(rows)] = [min(row.limit, most) for row in rows]
    return limit_B
