"""The format of classification questions, whose answer is the label of one of several classes.

    <2> river water boat <2> bread meat dish <0> he rowed to the bank   ->   river

The input describes each class by a label and related words, followed by a text.  The target is the
label of the class that the text belongs to.  The class descriptions are either part of the text or
in a block of prompt positions before it (``methods.DescribedPrompts``).
"""

from abc import abstractmethod
from dataclasses import dataclass
from random import Random

import numpy as np

from prompt_tuning_jax.data.random_draws import random_bits
from prompt_tuning_jax.data.vocabularies.vocab import EOS_ID, PAD_ID, AnyVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.pretraining.text_corpus import Corpus
from prompt_tuning_jax.pretraining.text_objectives import Objective
from prompt_tuning_jax.pretraining.word_table import WordTable

_PURPOSE = 100  # separates the random draws of this module from those of text_objectives
# Limits as shares of ``text_length``: number of classes, class tokens besides the labels, and
# tokens of the text.
_CLASSES = 1 / 8
_CLASS_TOKENS = 0.3
_TEXT_TOKENS = 0.5
_AROUND_TEXT = 64  # tokens of the corpus that a question may need beside its text


@dataclass(frozen=True, kw_only=True)
class PromptBlock:
    """Reserves ``positions`` prompt positions of ``words`` tokens each before every input.

    The first token of a position is a label, the others are words, and 0 is padding.
    ``methods.described_prompts`` pools each position into one vector.
    """

    positions: int
    words: int

    @property
    def size(self) -> int:
        return self.positions * self.words


NO_BLOCK = PromptBlock(positions=0, words=0)


@dataclass(frozen=True, kw_only=True)
class Question:
    """Classes, a text and the answer, as token ids.

    Each class has a label and the words that describe it, which may include the label.  The text is
    truncated if the input is too long.
    """

    labels: list[list[int]]
    words: list[list[int]]
    text: list[int]
    answer: list[int]


@dataclass(frozen=True, kw_only=True)
class LabelObjective(Objective):
    """Inputs are ``<2> class <2> class ... <0> text </s>``; targets are ``answer </s>``."""

    inputs_length: int
    targets_length: int
    words: WordTable
    block: PromptBlock = NO_BLOCK

    def __post_init__(self) -> None:
        if self.text_length < 24 or self.targets_length < 4:
            raise UserError(
                f"label objectives need data.inputs_length of 24 and data.targets_length of 4 or "
                f"more, not {self.text_length} and {self.targets_length}"
            )

    @property
    def text_length(self) -> int:
        """The number of input tokens after the prompt block."""
        return self.inputs_length - self.block.size

    @property
    def most_classes(self) -> int:
        return max(int(self.text_length * _CLASSES), self.block.positions // 2)

    @property
    def class_tokens(self) -> int:
        in_text = int(self.text_length * _CLASS_TOKENS)
        in_prompts = self.block.positions * (self.block.words - 1) // 2
        return max(in_text, in_prompts)

    def names_itself(self, random: Random) -> bool:
        """Draws whether a class's label is one of its words (True) or any word (False).

        With a prompt block it is mostly any word, so that the model must match the text with the
        words and not with the label.  Otherwise a tuned prompt could not set the two independently.
        """
        return random.random() < (0.05 if self.block.size else 0.6)

    @property
    def text_tokens(self) -> int:
        """The maximum number of tokens of a text.

        With a prompt block, the text can use everything but the separator and the end of sequence.
        """
        return self.text_length - 2 if self.block.size else int(self.text_length * _TEXT_TOKENS)

    def sizes(self, random: Random) -> tuple[int, int, int]:
        """Draws the number of classes, of tokens in each class, and of tokens in the text."""
        few = random.random() < 0.4 or self.most_classes < 3
        classes = 2 if few else random.randint(3, self.most_classes)
        size = random.randint(1, max(1, self.class_tokens // classes))
        length = 1 if random.random() < 0.2 else random.randint(4, self.text_tokens)
        return classes, size, length

    @abstractmethod
    def question(self, corpus: Corpus, vocabulary: AnyVocabulary, random: Random) -> Question:
        """Returns one example; all randomness comes from ``random``."""

    def rows(
        self, corpus: Corpus, vocabulary: AnyVocabulary, *, indices_B: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        block, least = self.block, self.text_length + _AROUND_TEXT
        if len(corpus.tokens) < least:
            raise UserError(
                f"the corpus has {len(corpus.tokens)} tokens, and label objectives need {least}; "
                "give more text or a smaller inputs_length"
            )
        inputs_BT = np.full((len(indices_B), self.inputs_length), PAD_ID, np.int32)
        targets_BS = np.full((len(indices_B), self.targets_length), PAD_ID, np.int32)
        separator, class_start = vocabulary.sentinel(0), vocabulary.sentinel(2)
        seeds_B = random_bits(1, seed=seed, purpose=_PURPOSE, indices_B=indices_B)[:, 0]
        for row, row_seed in enumerate(seeds_B.tolist()):
            random = Random(row_seed)
            question = self.question(corpus, vocabulary, random)
            inputs = [separator, *question.text]
            if block.size and _fits(question, block):
                inputs_BT[row, : block.size] = _as_prompts(question, block, random).ravel()
            else:
                described: list[int] = []
                for label, words in zip(question.labels, question.words, strict=True):
                    described += [class_start, *label]
                    described += [word for word in words if [word] != label]
                inputs = described + inputs
            inputs = inputs[: self.text_length - 1]
            inputs_BT[row, block.size : block.size + len(inputs) + 1] = [*inputs, EOS_ID]
            targets = question.answer[: self.targets_length - 1]
            targets_BS[row, : len(targets) + 1] = [*targets, EOS_ID]
        return inputs_BT, targets_BS


@dataclass(frozen=True, kw_only=True)
class BehindEmptyBlock(Objective):
    """Wraps another objective and puts an empty prompt block before its inputs."""

    objective: Objective
    block: PromptBlock

    @property
    def inputs_length(self) -> int:  # type: ignore[override]
        return self.block.size + self.objective.inputs_length

    @property
    def targets_length(self) -> int:  # type: ignore[override]
        return self.objective.targets_length

    def rows(
        self, corpus: Corpus, vocabulary: AnyVocabulary, *, indices_B: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        inputs_BT, targets_BS = self.objective.rows(
            corpus, vocabulary, indices_B=indices_B, seed=seed
        )
        return np.pad(inputs_BT, ((0, 0), (self.block.size, 0))), targets_BS


def _fits(question: Question, block: PromptBlock) -> bool:
    return 2 <= len(question.labels) <= block.positions and all(
        len(label) == 1 for label in question.labels
    )


def _as_prompts(question: Question, block: PromptBlock, random: Random) -> np.ndarray:
    """Returns the classes as prompt positions [P, W] in random order, one or more per class."""
    positions_PW = np.zeros((block.positions, block.words), np.int32)
    places = list(range(block.positions))
    random.shuffle(places)
    share = random.randint(1, block.positions // len(question.labels))
    for label, words in zip(question.labels, question.words, strict=True):
        for part in range(share):
            chosen = words[part::share] or random.sample(words, min(1, len(words)))
            chosen = [*label, *chosen][: block.words]
            positions_PW[places.pop(), : len(chosen)] = chosen
    return positions_PW
