"""What a tokenizer is to text: the classes of a model, and the images that it reads."""

import hashlib
import json
from collections.abc import Iterable, Sequence

from prompt_tuning_jax.data.vocabularies.base import BaseVocabulary
from prompt_tuning_jax.errors import UserError, suggest
from prompt_tuning_jax.models.vit.config import ViTConfig

_SHOWN = 100  # characters


class ClassVocabulary(BaseVocabulary):
    """Labels to the numbers of their classes and back; a target is a single number.

    ``images`` says what images the model reads: their size, and how files become pixels.
    """

    def __init__(self, config: ViTConfig) -> None:
        self.images = config
        self.labels = config.labels
        self.token_ids = config.token_ids
        self.eos_id = config.token_ids.eos
        read = (config.image_size, config.num_channels, repr(config.processing))
        self.fingerprint = hashlib.sha256(json.dumps([self.labels, read]).encode()).hexdigest()
        self._numbers = {label: number for number, label in enumerate(self.labels)}

    def __repr__(self) -> str:
        return f"ClassVocabulary of {len(self.labels)} labels"

    @property
    def size(self) -> int:
        return len(self.labels)

    def encode(self, text: str) -> list[int]:
        """Returns the number of the class with this label; UserError if there is none."""
        if text not in self._numbers:
            shown = text[:_SHOWN]
            raise UserError(
                f"{shown!r} is not one of the {self.size} classes of this model: "
                f"{suggest(shown, self.labels)}"
            )
        return [self._numbers[text]]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        del num_threads
        return [self.encode(text) for text in texts]

    def encode_targets(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Returns the number of each label's class, without an end."""
        return self.encode_batch(texts)

    def encode_inputs(
        self, texts: Sequence[str], *, chat: bool = False, num_threads: int = 1
    ) -> list[list[int]]:
        raise UserError("this model reads images, and got a text: give image files")

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.pieces(number) for number in ids)

    def pieces(self, token_id: int) -> str:
        return self.labels[token_id] if 0 <= token_id < self.size else "<unk>"

    def sentinel(self, index: int) -> int:
        raise UserError("a model that reads images has no sentinels")
