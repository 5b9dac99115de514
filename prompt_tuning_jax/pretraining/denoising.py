"""BART's objectives as google-research/prompt-tuning trains on them: restore a damaged text.

The targets are the whole text.  Suffixes: B examples, T input length, W tokens of a window.
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from prompt_tuning_jax.data.random_draws import random_bits
from prompt_tuning_jax.data.vocabularies.vocab import EOS_ID, PAD_ID, AnyVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.pretraining.text_corpus import Corpus
from prompt_tuning_jax.pretraining.text_objectives import (
    DELETION,
    Objective,
    cut,
    noise_spans,
    numbers_of_noise,
    replace_spans,
    windows,
)


@dataclass(frozen=True, kw_only=True)
class _Denoising(Objective):
    """A window of text as the targets, and what is left of it as the inputs.

    A window has as many tokens as both lengths hold, with the end of sequence.
    """

    inputs_length: int
    targets_length: int
    noise_density: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.noise_density < 1:
            raise UserError(f"noise_density must be between 0 and 1, not {self.noise_density}")
        if self.window_length < 2:
            raise UserError(
                f"inputs_length {self.inputs_length} and targets_length {self.targets_length} "
                "must be 3 or more"
            )

    @property
    def window_length(self) -> int:
        """The number of text tokens of an example."""
        return min(self.inputs_length, self.targets_length) - 1

    def rows(
        self, corpus: Corpus, vocabulary: AnyVocabulary, *, indices_B: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        text_BW = windows(corpus, length=self.window_length, indices_B=indices_B, seed=seed)
        inputs_BT = self._damaged(text_BW, vocabulary, indices_B=indices_B, seed=seed)
        targets_BS = np.full((len(text_BW), self.targets_length), PAD_ID, np.int32)
        targets_BS[:, : self.window_length] = text_BW
        targets_BS[:, self.window_length] = EOS_ID
        return inputs_BT, targets_BS

    @abstractmethod
    def _damaged(
        self, text_BW: np.ndarray, vocabulary: AnyVocabulary, *, indices_B: np.ndarray, seed: int
    ) -> np.ndarray:
        """Returns the inputs [B, T] for the text."""


@dataclass(frozen=True, kw_only=True)
class TextInfilling(_Denoising):
    """Sentinels replace spans of the text, which the targets repeat as a whole.

    Each span has a sentinel of its own, unlike BART's.
    Source: prompt_tuning.data.preprocessors ``text_infilling``; Lewis et al. 2020, section 2.2.
    """

    mean_span_length: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mean_span_length < 1:
            raise UserError(f"mean_span_length must be 1 or more, not {self.mean_span_length}")

    def _damaged(
        self, text_BW: np.ndarray, vocabulary: AnyVocabulary, *, indices_B: np.ndarray, seed: int
    ) -> np.ndarray:
        length = self.window_length
        numbers = numbers_of_noise(length, self.noise_density, self.mean_span_length)
        spans = noise_spans(length, *numbers, vocabulary, indices_B=indices_B, seed=seed)
        return replace_spans(text_BW, spans, length=self.inputs_length, hidden=spans.is_noise_BW)


@dataclass(frozen=True, kw_only=True)
class TokenDeletion(_Denoising):
    """Each token is missing from the inputs with the probability ``noise_density``.

    Source: prompt_tuning.data.preprocessors ``token_deletion``; Lewis et al. 2020, section 2.2.
    """

    def _damaged(
        self, text_BW: np.ndarray, vocabulary: AnyVocabulary, *, indices_B: np.ndarray, seed: int
    ) -> np.ndarray:
        draws_BW = random_bits(self.window_length, seed=seed, purpose=DELETION, indices_B=indices_B)
        is_kept_BW = draws_BW / 2.0**64 >= self.noise_density
        # Stable: what is kept stays in order.
        order_BW = np.argsort(~is_kept_BW, axis=1, kind="stable")
        inputs_BW = cut(np.take_along_axis(text_BW, order_BW, axis=1), is_kept_BW.sum(axis=1))
        missing = self.inputs_length - inputs_BW.shape[1]
        return np.pad(inputs_BW, ((0, 0), (0, missing)), constant_values=PAD_ID)
