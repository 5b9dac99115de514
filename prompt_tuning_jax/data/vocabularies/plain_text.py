"""Encodes texts in which special tokens, written out, are text like any other."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prompt_tuning_jax.data.vocabularies.tokenizer_spec import import_tokenizers, no_panic


class PlainEncoder:
    """Encodes texts without recognizing special tokens, so that a text cannot contain them.

    Other added tokens, which models read as text, are recognized as always.
    """

    def __init__(self, tokenizer: Any, special: Mapping[int, str], *, path: Path) -> None:
        """``special`` are the texts of the special tokens by their ids."""
        self._path = path
        self._special = dict(special)
        by_length = sorted(filter(None, special.values()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, by_length)) or "(?!)")
        text = tokenizer.to_str()
        self._at_start = _copy(text, path)
        self._behind = self._at_start
        if '"first"' in _state(self._at_start.pre_tokenizer):
            self._behind = _copy(text, path)
            _never_prefix(self._behind.pre_tokenizer)

    def encode(self, texts: Sequence[str], *, at_start: bool) -> list[list[int]]:
        """Returns the token ids of each text.

        ``at_start`` is False for what follows a special token.
        """
        tokenizer = self._at_start if at_start else self._behind
        with no_panic(self._path):
            encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [list(one.ids) for one in encoded]
        return [
            ids if self._special.keys().isdisjoint(ids) else self._encode_apart(text, tokenizer)
            for text, ids in zip(texts, rows, strict=True)
        ]

    def _encode_apart(self, text: str, tokenizer: Any) -> list[int]:
        """For vocabularies whose pieces include special tokens: encodes these in two parts."""
        cuts = [0, *(match.start() + 1 for match in self._pattern.finditer(text)), len(text)]
        ids: list[int] = []
        with no_panic(self._path):
            for start, stop in itertools.pairwise(cuts):
                ids += tokenizer.encode(text[start:stop], add_special_tokens=False).ids
        return [i for i in ids if i not in self._special]


def _copy(text: str, path: Path) -> Any:
    copy = import_tokenizers(path).Tokenizer.from_str(text)
    copy.encode_special_tokens = True  # as text; a file cannot store it
    return copy


def _state(component: Any) -> str:
    return "" if component is None else component.__getstate__().decode(errors="replace")


def _never_prefix(pre_tokenizer: Any) -> None:
    """Makes ``Metaspace`` treat texts like those behind the beginning of a longer text."""
    if hasattr(pre_tokenizer, "prepend_scheme"):
        if pre_tokenizer.prepend_scheme == "first":
            pre_tokenizer.prepend_scheme = "never"
    elif hasattr(pre_tokenizer, "__getitem__"):
        try:
            number = 0
            while True:
                _never_prefix(pre_tokenizer[number])
                number += 1
        except IndexError:
            pass
