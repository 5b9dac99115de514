"""What all vocabularies share: which tokens an input and a target consist of."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.untrusted_input import has_surrogate


def _require_utf8(texts: Sequence[str]) -> None:
    for text in texts:
        if has_surrogate(text):
            raise UserError(
                f"the text {text[:60]!r} has half of a surrogate pair; it was not UTF-8"
            )


class BaseVocabulary(ABC):
    """Text to token ids and back.

    ``encode_inputs`` and ``encode_targets`` are the only places that decide which special tokens
    surround a text; training, evaluation, the API and the server all use them.

    Attributes:
      token_ids: the model's special ids; its ``eos`` ends a target.
      eos_id: the vocabulary's end of sequence, which ends an input if ``token_ids.inputs_end``.
      input_start: the ids before an input's text, such as a beginning of sequence.
      extra_ids: the number of sentinels that are added to those of the file.
      fingerprint: equal for vocabularies that encode all texts equally.
    """

    token_ids: TokenIds
    eos_id: int
    input_start: tuple[int, ...] = ()
    extra_ids: int = 0
    fingerprint: str

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of ids, sentinels included (a model's embedding may be padded beyond it)."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text alone, without beginning and end of sequence."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Returns ``encode`` of each text, but faster."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text before the first end of sequence; ids beyond the vocabulary are unknown.

        An incomplete character at the end becomes U+FFFD.  Without it, the text of a prefix is a
        prefix of the whole text.
        """

    @abstractmethod
    def pieces(self, token_id: int) -> str:
        """Returns the piece of an id, with ``▁`` for a blank.

        Ids outside the vocabulary give ``<unk>``.
        """

    @abstractmethod
    def sentinel(self, index: int) -> int:
        """Returns the id of ``<extra_id_{index}>``; UserError if there is none."""

    @property
    def input_end(self) -> tuple[int, ...]:
        """The ids behind an input's text."""
        return (self.eos_id,) if self.token_ids.inputs_end else ()

    def encode_input(self, text: str, *, chat: bool = False) -> list[int]:
        """Returns the token ids of an input; see ``encode_inputs``."""
        return self.encode_inputs([text], chat=chat)[0]

    def encode_inputs(
        self, texts: Sequence[str], *, chat: bool = False, num_threads: int = 1
    ) -> list[list[int]]:
        """Returns the token ids of inputs, with the special tokens around them.

        ``chat`` makes each text the message of a user, in the vocabulary's chat template.  Raises
        UserError if there is no chat template, for a token that stands for an image, and for a text
        that UTF-8 cannot represent.
        """
        _require_utf8(texts)
        if chat:
            encoded = self.encode_chat(texts, num_threads=num_threads)
            return [[*ids, *self.input_end] for ids in encoded]
        encoded = self.encode_batch(texts, num_threads=num_threads)
        image = self.token_ids.image
        if image >= 0 and (with_image := next((ids for ids in encoded if image in ids), None)):
            raise UserError(
                f"an input has {self.pieces(image)}, which stands for an image: images are not "
                f"supported, and this model reads text alone ({self.decode(with_image)[:40]!r})"
            )
        return [[*self.input_start, *ids, *self.input_end] for ids in encoded]

    def encode_target(self, text: str) -> list[int]:
        """Returns the token ids of a target, which end with the model's end of sequence."""
        return self.encode_targets([text])[0]

    def encode_targets(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Returns the token ids of targets, which end with the model's end of sequence."""
        _require_utf8(texts)
        eos = self.token_ids.eos
        return [[*ids, eos] for ids in self.encode_batch(texts, num_threads=num_threads)]

    def encode_chat(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Returns the token ids of each text as a user's message.

        They end where the answer begins.
        """
        del texts, num_threads
        raise UserError(f"data.chat is True, but {self!r} has no chat template; set it to False")

    def num_kept_at_end(self, *, chat: bool = False, ending: str = "") -> int:
        """Returns the number of last tokens of an input that truncation keeps.

        These are the end of sequence, and what a chat template has behind the text.  Where inputs
        have no end of sequence, the answer follows the text directly, and the words of the text's
        ``ending`` (such as a question) are kept, too.
        """
        kept = len(self.input_end) + (self._num_chat_end() if chat else 0)
        return kept if self.input_end else kept + len(self.encode(ending))

    def cut_input(self, ids: Sequence[int], length: int, *, kept_at_end: int) -> list[int]:
        """Returns an input of ``encode_inputs``, cut in front of its end to ``length`` tokens."""
        if len(ids) <= length:
            return list(ids)
        return [*ids[: length - kept_at_end], *ids[len(ids) - kept_at_end :]]

    def input_format(self, *, chat: bool = False) -> str:
        """Identifies what ``encode_inputs`` puts around texts, for cache keys."""
        parts = (self.input_start, self.input_end, self._chat_format() if chat else None)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _num_chat_end(self) -> int:
        return 0

    def _chat_format(self) -> str:
        return ""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)
