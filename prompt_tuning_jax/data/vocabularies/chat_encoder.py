"""Encodes messages in a chat template, whose special tokens no message can contain."""

import itertools
from collections.abc import Mapping, Sequence

from prompt_tuning_jax.data.vocabularies.chat_template import ChatFormat
from prompt_tuning_jax.data.vocabularies.plain_text import PlainEncoder
from prompt_tuning_jax.data.vocabularies.tokenizer_files import AddedToken, Splitter

_MESSAGE = "\ue000"  # where the message goes, while the text around it is split


class ChatEncoder:
    """Encodes messages as a tokenizer encodes the whole conversation.

    The text between two special tokens is encoded at once, because pieces may reach over the ends
    of a message.

    Attributes:
      head, tail: the ids before and behind the text that contains the message.
    """

    def __init__(
        self, chat: ChatFormat, plain: PlainEncoder, special: Mapping[int, AddedToken]
    ) -> None:
        """``special`` are the special tokens by id."""
        self._chat, self._plain = chat, plain
        id_of = {token.content: token_id for token_id, token in special.items() if token.content}
        splitter = Splitter(token for token in special.values() if token.content)
        parts = list(splitter.split(chat.before + _MESSAGE + chat.after))
        (index,) = (i for i, (text, _) in enumerate(parts) if _MESSAGE in text)
        self._before, _, self._after = parts[index][0].partition(_MESSAGE)
        ids: list[list[int]] = []
        for number, (text, is_special) in enumerate(parts):
            if number == index:
                ids.append([])
            elif is_special:
                ids.append([id_of[text]])
            else:
                ids += plain.encode([text], at_start=number == 0)
        self.head = tuple(itertools.chain(*ids[:index]))
        self.tail = tuple(itertools.chain(*ids[index + 1 :]))
        self._at_start = index == 0
        tokens = {token.content: token for token in special.values()}
        previous = tokens[parts[index - 1][0]] if index and parts[index - 1][1] else None
        following = tokens[parts[index + 1][0]] if len(parts) > index + 1 else None
        self._strips_start = previous is not None and previous.rstrip and not self._before
        self._strips_end = following is not None and following.lstrip and not self._after

    @property
    def num_last(self) -> int:
        """The number of ids behind a message."""
        return len(self.tail) + len(self._plain.encode([self._after], at_start=False)[0])

    def encode(self, messages: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of the conversation up to the answer, for each message."""
        rows = self._plain.encode([self._text(m) for m in messages], at_start=self._at_start)
        return [[*self.head, *ids, *self.tail] for ids in rows]

    def _text(self, message: str) -> str:
        message = self._chat.clean(message)
        message = message.lstrip() if self._strips_start else message
        message = message.rstrip() if self._strips_end else message
        return self._before + message + self._after
