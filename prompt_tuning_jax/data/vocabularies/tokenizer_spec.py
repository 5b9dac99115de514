"""A tokenizer of the tokenizers library, with what the model's files say about its use."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import TokenIds


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """A tokenizer and what the files beside it say.

    Attributes:
      tokenizer: a ``tokenizers.Tokenizer``, which neither truncates nor pads.
      digest: equal for tokenizers that encode equally.
      special: the texts of ``bos_token``, ``eos_token``, ``pad_token`` and ``unk_token``, as far as
        they are known.
      token_ids: the model's special ids, if the file has them.
      add_bos: whether an input starts with ``bos_token``; None: as the tokenizer's post-processor
        says.
      chat_template: in Jinja; empty if there is none.
    """

    tokenizer: Any
    digest: str
    special: Mapping[str, str] = field(default_factory=dict)
    token_ids: TokenIds | None = None
    add_bos: bool | None = None
    chat_template: str = ""


def import_tokenizers(path: Path) -> Any:
    """Returns the tokenizers library; UserError if it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f"{path} is read by the tokenizers library, which is not installed: "
            "pip install tokenizers"
        ) from None
    return tokenizers


@contextlib.contextmanager
def no_panic(path: Path) -> Iterator[None]:
    """Turns the library's failures into UserError: Exception, or a panic, which is not one."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        line = next(iter(str(error).splitlines()), "")[:200]
        raise UserError(f"{path}: not a tokenizer, or a damaged one: {line}") from None


@contextlib.contextmanager
def quiet_errors() -> Iterator[None]:
    """Suppresses the stack trace of a panic, which the library writes to the process's stderr."""
    sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
