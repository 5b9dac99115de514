"""T5's pre-training objectives, which turn windows of a corpus into inputs and targets.

An example is a pure function of its index and the seed, so any host can recreate any step of a run
without the steps before it (``random_draws``).
Array suffixes: B examples, T input length, S target length, W tokens of a window, M spans.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from prompt_tuning_jax.data.random_draws import random_bits, random_integers
from prompt_tuning_jax.data.vocabularies.vocab import EOS_ID, PAD_ID, AnyVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.pretraining.text_corpus import Corpus

Batch: TypeAlias = dict[str, np.ndarray]

# Purposes of random draws; draws for different purposes are independent.
_WINDOW, _NOISE_LENGTHS, _TEXT_LENGTHS, _PREFIX_LENGTH, _TARGETS_LENGTH, _MIXTURE = range(6)
DELETION = 6  # of pretraining/denoising.py


class Objective(ABC):
    """Turns windows of text into inputs and targets.

    Inputs have at most ``inputs_length`` tokens and targets at most ``targets_length``, including
    the end of sequence.  Windows start at uniformly random positions of the corpus and may cross
    document boundaries.
    """

    inputs_length: int
    targets_length: int

    @abstractmethod
    def rows(
        self, corpus: Corpus, vocabulary: AnyVocabulary, *, indices_B: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns padded int32 inputs [B, inputs_length] and targets [B, targets_length]."""

    def example(
        self, corpus: Corpus, vocabulary: AnyVocabulary, *, index: int, seed: int
    ) -> dict[str, np.ndarray]:
        """Returns ``inputs`` and ``targets`` of example ``index``, int32, without padding."""
        indices_B = np.array([index], np.uint64)
        inputs_BT, targets_BS = self.rows(corpus, vocabulary, indices_B=indices_B, seed=seed)
        # Padding occurs only at the end, because text never has its id.
        return {
            "inputs": inputs_BT[0, : np.count_nonzero(inputs_BT[0])],
            "targets": targets_BS[0, : np.count_nonzero(targets_BS[0])],
        }

    def batch(
        self, corpus: Corpus, vocabulary: AnyVocabulary, *, step: int, seed: int, batch_size: int
    ) -> Batch:
        """Returns the T5 batch of step ``step``: ``batch_size`` consecutive examples.

        Their indices start at ``step * batch_size``.  The keys are ``inputs`` [B, T] and
        ``targets`` [B, S].
        """
        indices_B = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.uint64)
        inputs_BT, targets_BS = self.rows(corpus, vocabulary, indices_B=indices_B, seed=seed)
        return {"inputs": inputs_BT, "targets": targets_BS}


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(Objective):
    """T5's denoising objective: sentinels replace spans of the text, and targets list the spans.

    Inputs are ``text <0> text <1> ... </s>`` and fill ``inputs_length``.  Targets are ``<0> span
    <1> span ... </s>`` and have ``needed_targets_length`` tokens.  Text and spans alternate,
    starting with text; each has at least one token, and all divisions are equally likely.

    Raises UserError if ``targets_length`` is less than ``needed_targets_length``, or another field
    is out of range.
    Source: t5.data.preprocessors ``random_spans_helper`` and ``random_spans_noise_mask``; Raffel et
    al. 2020, section 3.1.4.
    """

    inputs_length: int
    targets_length: int
    noise_density: float = 0.15
    mean_span_length: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.noise_density < 1:
            raise UserError(f"noise_density must be between 0 and 1, not {self.noise_density}")
        if self.mean_span_length < 1:
            raise UserError(f"mean_span_length must be 1 or more, not {self.mean_span_length}")
        if self.inputs_length < 3:
            raise UserError(f"inputs_length must be 3 or more, not {self.inputs_length}")
        if self.targets_length < self.needed_targets_length:
            raise UserError(
                f"targets_length {self.targets_length} is too short: span corruption of inputs of "
                f"{self.inputs_length} tokens needs {self.needed_targets_length}"
            )

    @property
    def window_length(self) -> int:
        """The number of text tokens that yield inputs of ``inputs_length``."""
        length = self.inputs_length - 1
        while self._inputs_length(length + 1) <= self.inputs_length:
            length += 1
        # T5 special-cases a density of 0.5, so that inputs and targets have the same length.
        noise, spans = self._noise_and_spans(length)
        if self.noise_density == 0.5 and noise + spans + 1 > self._inputs_length(length):
            length -= 1
        return length

    @property
    def needed_targets_length(self) -> int:
        """The length of every example's targets."""
        noise, spans = self._noise_and_spans(self.window_length)
        return noise + spans + 1

    def rows(
        self, corpus: Corpus, vocabulary: AnyVocabulary, *, indices_B: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        length = self.window_length
        text_BW = windows(corpus, length=length, indices_B=indices_B, seed=seed)
        spans = noise_spans(
            length, *self._noise_and_spans(length), vocabulary, indices_B=indices_B, seed=seed
        )
        return (
            replace_spans(text_BW, spans, length=self.inputs_length, hidden=spans.is_noise_BW),
            replace_spans(text_BW, spans, length=self.targets_length, hidden=~spans.is_noise_BW),
        )

    def _noise_and_spans(self, length: int) -> tuple[int, int]:
        return numbers_of_noise(length, self.noise_density, self.mean_span_length)

    def _inputs_length(self, length: int) -> int:
        noise, spans = self._noise_and_spans(length)
        return length - noise + spans + 1


@dataclass(frozen=True, kw_only=True)
class PrefixLM(Objective):
    """Prefix language modelling: inputs are a prefix of a text, targets its continuation.

    The prefix has ``min_prefix`` to ``inputs_length - 1`` tokens, all equally likely.  The
    continuation fills ``targets_length``; if ``min_continuation`` is not 0, it has at least that
    many tokens instead.  Used for LM adaptation (Lester et al. 2021, section 3.2).

    T5's ``random_prefix_noise_mask`` differs: it splits a window of fixed length, so a longer
    prefix leaves a shorter target, and half of the positions are padding.
    """

    inputs_length: int
    targets_length: int
    min_prefix: int = 1
    min_continuation: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.min_prefix < self.inputs_length:
            raise UserError(
                f"min_prefix must be 1 or more and below inputs_length {self.inputs_length}, "
                f"not {self.min_prefix}"
            )
        if not 0 <= self.min_continuation < self.targets_length or self.targets_length < 2:
            raise UserError(
                f"min_continuation must be 0 or more and below targets_length "
                f"{self.targets_length} (2 or more), not {self.min_continuation}"
            )

    def rows(
        self, corpus: Corpus, vocabulary: AnyVocabulary, *, indices_B: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        most_prefix, most_continuation = self.inputs_length - 1, self.targets_length - 1
        text_BW = windows(
            corpus, length=most_prefix + most_continuation, indices_B=indices_B, seed=seed
        )
        prefix_B = random_integers(
            self.min_prefix, most_prefix, seed=seed, purpose=_PREFIX_LENGTH, indices_B=indices_B
        )
        continuation_B = random_integers(
            self.min_continuation or most_continuation,
            most_continuation,
            seed=seed,
            purpose=_TARGETS_LENGTH,
            indices_B=indices_B,
        )
        positions_BS = prefix_B[:, None] + np.arange(most_continuation)
        after_BS = np.take_along_axis(text_BW, positions_BS, axis=1)
        return cut(text_BW[:, :most_prefix], prefix_B), cut(after_BS, continuation_B)


@dataclass(frozen=True, kw_only=True)
class Mixture(Objective):
    """Mixes objectives of equal lengths; each run of ``consecutive`` examples uses one of them.

    ``weights`` need not add up to 1.  ``consecutive=1`` mixes objectives within a batch; the batch
    size as ``consecutive`` gives every step a single objective.
    """

    objectives: tuple[Objective, ...]
    weights: tuple[float, ...]
    consecutive: int = 1
    inputs_length: int = field(init=False)
    targets_length: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.objectives or len(self.objectives) != len(self.weights):
            raise UserError(
                f"a mixture needs one weight per objective, not {len(self.weights)} weights "
                f"for {len(self.objectives)}"
            )
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise UserError(f"weights must be 0 or more, and one above 0: {self.weights}")
        if self.consecutive < 1:
            raise UserError(f"consecutive must be 1 or more, not {self.consecutive}")
        lengths = {(o.inputs_length, o.targets_length) for o in self.objectives}
        if len(lengths) > 1:
            raise UserError(
                f"objectives of a mixture differ in (inputs, targets) length: {lengths}"
            )
        inputs_length, targets_length = lengths.pop()
        object.__setattr__(self, "inputs_length", inputs_length)
        object.__setattr__(self, "targets_length", targets_length)

    def rows(
        self, corpus: Corpus, vocabulary: AnyVocabulary, *, indices_B: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        inputs_BT = np.zeros((len(indices_B), self.inputs_length), np.int32)
        targets_BS = np.zeros((len(indices_B), self.targets_length), np.int32)
        runs_B = indices_B // np.uint64(self.consecutive)
        draws_B = random_bits(1, seed=seed, purpose=_MIXTURE, indices_B=runs_B)[:, 0] / 2.0**64
        shares = np.cumsum(self.weights) / np.sum(self.weights)
        # A draw may round to 1.0, which selects the last objective with a nonzero weight.
        last = int(np.flatnonzero(self.weights)[-1])
        kind_B = np.minimum(np.searchsorted(shares, draws_B, side="right"), last)
        for kind in np.unique(kind_B):
            rows = np.flatnonzero(kind_B == kind)
            inputs_BT[rows], targets_BS[rows] = self.objectives[kind].rows(
                corpus, vocabulary, indices_B=indices_B[rows], seed=seed
            )
        return inputs_BT, targets_BS


@dataclass(frozen=True, kw_only=True)
class NoiseSpans:
    """Which tokens of windows are noise, where spans start, and the sentinel of each token."""

    is_noise_BW: np.ndarray
    is_start_BW: np.ndarray
    sentinels_BW: np.ndarray


def numbers_of_noise(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """Returns the number of noise tokens and of spans; both, and the text, are at least 1."""
    noise = min(max(round(length * noise_density), 1), length - 1)
    spans = max(round(noise / mean_span_length), 1)
    return noise, min(spans, length - noise)


def noise_spans(
    length: int,
    noise: int,
    spans: int,
    vocabulary: AnyVocabulary,
    *,
    indices_B: np.ndarray,
    seed: int,
) -> NoiseSpans:
    """Draws ``spans`` spans of ``noise`` tokens in all; text comes first, and between them."""
    text_lengths_BM = _random_segments(
        length - noise, spans, seed=seed, purpose=_TEXT_LENGTHS, indices_B=indices_B
    )
    noise_lengths_BM = _random_segments(
        noise, spans, seed=seed, purpose=_NOISE_LENGTHS, indices_B=indices_B
    )
    # Even segments are text to keep; odd segments are noise.
    lengths_BMx2 = np.stack([text_lengths_BM, noise_lengths_BM], axis=2)
    starts_Bx2M = np.cumsum(lengths_BMx2.reshape(len(indices_B), 2 * spans), axis=1)[:, :-1]
    is_start_BW = np.zeros((len(indices_B), length), bool)
    np.put_along_axis(is_start_BW, starts_Bx2M, True, axis=1)
    segment_BW = np.cumsum(is_start_BW, axis=1)
    is_start_BW[:, 0] = True
    sentinels_M = np.array([vocabulary.sentinel(i) for i in range(spans)], np.int32)
    return NoiseSpans(
        is_noise_BW=segment_BW % 2 == 1,
        is_start_BW=is_start_BW,
        sentinels_BW=sentinels_M[segment_BW // 2],
    )


def windows(corpus: Corpus, *, length: int, indices_B: np.ndarray, seed: int) -> np.ndarray:
    """Returns random windows [B, W] of ``length`` tokens each, int32."""
    starts = len(corpus.tokens) - length + 1
    if starts < 1:
        raise UserError(
            f"the corpus has {len(corpus.tokens)} tokens, fewer than one example's {length}; "
            f"give more text or a smaller inputs_length"
        )
    start_B = random_integers(0, starts - 1, seed=seed, purpose=_WINDOW, indices_B=indices_B)
    return corpus.tokens[start_B[:, None] + np.arange(length)].astype(np.int32)


def replace_spans(
    text_BW: np.ndarray, spans: NoiseSpans, *, length: int, hidden: np.ndarray
) -> np.ndarray:
    """Replaces each hidden span by a sentinel, then adds the end and padding: [B, length]."""
    kept_BW = ~hidden | spans.is_start_BW
    written_BW = np.where(hidden, spans.sentinels_BW, text_BW)
    rows = written_BW[kept_BW].reshape(len(text_BW), -1)  # every row keeps the same number
    out = np.full((len(text_BW), length), PAD_ID, np.int32)
    out[:, : rows.shape[1]] = rows
    out[:, rows.shape[1]] = EOS_ID
    return out


def cut(text_BW: np.ndarray, length_B: np.ndarray) -> np.ndarray:
    """Returns the first ``length_B`` tokens of each row, the end and padding: [B, W + 1]."""
    position = np.arange(text_BW.shape[1] + 1)
    padded = np.pad(text_BW, ((0, 0), (0, 1)))
    padded = np.where(position < length_B[:, None], padded, PAD_ID)
    return np.where(position == length_B[:, None], EOS_ID, padded).astype(np.int32)


def _random_segments(
    items: int, segments: int, *, seed: int, purpose: int, indices_B: np.ndarray
) -> np.ndarray:
    """Returns lengths [B, M] of a random division of ``items`` into nonempty ``segments``."""
    draws = random_bits(items - 1, seed=seed, purpose=purpose, indices_B=indices_B)
    cuts = np.argsort(draws, axis=1)[:, : segments - 1] + 1
    ends = np.full((len(indices_B), 1), items)
    bounds = np.concatenate([np.zeros_like(ends), np.sort(cuts, axis=1), ends], axis=1)
    return np.diff(bounds, axis=1)
