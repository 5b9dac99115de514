"""Pre-training objectives that ask which of the classes described in the input fits a text.

The model can only answer by comparing the text with the class descriptions before it.  Prompt
tuning relies on the same ability: a soft prompt later takes the place of the descriptions.  All
answers come from the text itself or from a dictionary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

import numpy as np

from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.pretraining.dictionary import Dictionary, Sense
from prompt_tuning_jax.pretraining.label_objective import LabelObjective, Question
from prompt_tuning_jax.pretraining.text_corpus import Corpus
from prompt_tuning_jax.pretraining.word_table import WordTable

T = TypeVar("T")

_LONGEST_WORD = 6  # tokens
_CANDIDATES = 4  # texts to choose the clearest from
_UNLIKE_GROUPS = 0.3  # probability of groups of unrelated words, as in the classes of some tasks
_REGION = 40  # number of tokens after a text that give its topic


@dataclass(frozen=True, kw_only=True)
class LabelBySimilarity(LabelObjective):
    """Asks which of K groups of words is most similar to the text, by corpus co-occurrence.

    A class is a word and some of its nearest neighbors, or a few unrelated words.  Its label is
    one of its words or any other word.  The text is a word of the class, some of the neighbors
    left out of it, or a window of the corpus.  For a window, the right class is the one whose mean
    vector is nearest to the text's (``WordTable``), which is a linear function of the text's words.
    A prompt can then ask for anything that a classifier on word vectors can learn.
    """

    def question(self, corpus: Corpus, vocabulary: AnyVocabulary, random: Random) -> Question:
        classes, size, length = self.sizes(random)
        table = self.words
        unlike = random.random() < _UNLIKE_GROUPS
        if unlike:
            near = [_labels(table, table.neighbors_CM.shape[1], random) for _ in range(classes)]
        else:
            near = [table.neighbors_CM[i].tolist() for i in _distinct(table, classes, random)]
        # At least one neighbor is left out of a class, for the text.
        size = min(size, table.neighbors_CM.shape[1] - 1)
        groups = [[words[0], *random.sample(words[1:], size - 1)] for words in near]
        right = random.randrange(classes)
        draw = random.random()
        if draw < 0.15:
            text = [random.choice(groups[right])]
        elif draw < 0.35 and not unlike:
            unnamed = [word for word in near[right] if word not in groups[right]]
            text = random.sample(unnamed, random.randint(1, len(unnamed)))
        else:
            text, right = self._window_like(groups, right, corpus, length, random)
        label_tokens = self.names_itself(random)
        labels = [g[0] for g in groups] if label_tokens else _labels(table, classes, random)
        return _make_question(labels, groups, text, right)

    def _window_like(
        self, groups: list[list[int]], right: int, corpus: Corpus, length: int, random: Random
    ) -> tuple[list[int], int]:
        """Returns the clearest of a few corpus windows for group ``right``, and its nearest group.

        The nearest group differs from ``right`` if none of the windows is closest to ``right``.
        """
        texts = [_window(corpus, self.words, length, random) for _ in range(_CANDIDATES)]
        width = max(map(len, texts))
        tokens = np.array([text + [-1] * (width - len(text)) for text in texts])
        like = self.words.vectors(tokens) @ self.words.vectors(np.array(groups)).T
        chosen = int(np.argmax(like[:, right] - np.delete(like, right, axis=1).max(1)))
        return texts[chosen], int(np.argmax(like[chosen]))


@dataclass(frozen=True, kw_only=True)
class LabelByKeyword(LabelObjective):
    """Asks which of K groups contains a word that occurs in the text.

    The words may be of any kind, including very common ones.  ``LabelBySimilarity`` looks at the
    whole text; here one word decides, such as the *who* or *where* of a question.
    """

    def question(self, corpus: Corpus, vocabulary: AnyVocabulary, random: Random) -> Question:
        classes, size, length = self.sizes(random)
        table = self.words
        groups: list[list[int]] = []
        while not all(groups) or len(groups) < classes:
            text = _window(corpus, table, length, random)
            inside = set(text)
            keywords = [word for word in inside if table.starts_word_V[word]]
            if not keywords:
                continue
            groups = [
                [word for word in _scattered(corpus, table, 2 * size, random) if word not in inside]
                for _ in range(classes)
            ]
            groups = [group[:size] for group in groups]
        right = random.randrange(classes)
        groups[right][random.randrange(len(groups[right]))] = random.choice(keywords)
        labels = _labels(table, classes, random)
        return _make_question(labels, groups, text, right)


@dataclass(frozen=True, kw_only=True)
class LabelByTopic(LabelObjective):
    """Asks which of K groups of words comes from the passage right after the text.

    Half of the wrong groups come from the text's neighborhood, mostly the same book.
    """

    def question(self, corpus: Corpus, vocabulary: AnyVocabulary, random: Random) -> Question:
        classes, size, length = self.sizes(random)
        right = random.randrange(classes)
        last = len(corpus.tokens) - _REGION - length - 1
        place = random.randrange(last)
        text = corpus.tokens[place : place + length].tolist()
        groups = []
        for index in range(classes):
            start = place + length
            if index != right and random.random() < 0.5:
                start += random.choice((-1, 1)) * random.randrange(1_000, 20_000)
            elif index != right:
                start = random.randrange(last)
            start = min(max(start, 0), last)
            region = corpus.tokens[start : start + _REGION]
            content = list(dict.fromkeys(region[self.words.is_content_V[region]].tolist()))
            groups.append(random.sample(content, min(size, len(content))))
        return _make_question(_labels(self.words, classes, random), groups, text, right)


@dataclass(frozen=True, kw_only=True)
class MissingWord(LabelObjective):
    """Asks which of K words is missing from the text, where ``<1>`` replaces it."""

    def question(self, corpus: Corpus, vocabulary: AnyVocabulary, random: Random) -> Question:
        table = self.words
        classes = random.randint(2, self.most_classes + 2)
        while True:
            start = random.randrange(len(corpus.tokens) - self.text_tokens)
            text = corpus.tokens[start : start + random.randint(6, self.text_tokens)].tolist()
            # Take only words of a single piece: the next piece must begin another word.
            places = [
                i
                for i in range(len(text) - 1)
                if table.is_content_V[text[i]] and table.starts_word_V[text[i + 1]]
            ]
            if places:
                break
        place = random.choice(places)
        answer = text[place]
        others = [int(table.content_C[i]) for i in _distinct(table, classes, random)]
        choices = [answer, *[word for word in others if word != answer][: classes - 1]]
        random.shuffle(choices)
        text[place] = vocabulary.sentinel(1)
        names_itself = not self.block.size or self.names_itself(random)
        labels = choices if names_itself else _labels(table, len(choices), random)
        return _make_question(labels, [[word] for word in choices], text, choices.index(answer))


@dataclass(frozen=True, kw_only=True)
class DictionaryLabels(LabelObjective):
    """Asks for the headword of a WordNet gloss, or for the group of a word or gloss."""

    dictionary: Dictionary

    def question(self, corpus: Corpus, vocabulary: AnyVocabulary, random: Random) -> Question:
        draw = random.random()
        if draw < 0.2:
            return self._headword(random)
        named: list[list[int]] = []
        if draw < 0.5:
            chosen = self._some(self.dictionary.categories, random)
            groups = [group for _, group in chosen]
            named = [name for name, _ in chosen] if self.names_itself(random) else []
        elif draw < 0.75:
            groups = list(random.choice(self.dictionary.opposites))
            random.shuffle(groups)
        else:
            groups = self._some(self.dictionary.kinds, random)
        right = random.randrange(len(groups))
        wanted = random.choice(groups[right])
        size = random.randint(1, max(1, self.class_tokens // 2 // len(groups)))
        words = [
            [random.choice(sense.words) for sense in random.choices(group, k=size)]
            for group in groups
        ]
        if not named and self.names_itself(random):
            named = [sense_words[0] for sense_words in words]
        labels = named or [[label] for label in _labels(self.words, len(groups), random)]
        return Question(
            labels=labels,
            words=[
                [token for word in sense_words for token in word][: self.class_tokens]
                for sense_words in words
            ],
            text=_described(wanted, random),
            answer=labels[right],
        )

    def _some(self, groups: Sequence[T], random: Random) -> list[T]:
        return random.sample(groups, random.randint(2, min(self.most_classes, len(groups))))

    def _headword(self, random: Random) -> Question:
        """Asks which of several words a gloss explains."""
        # A prompt position has room for a one-token label only.
        senses = self.dictionary.short_senses if self.block.size else self.dictionary.senses
        chosen = self._some(senses, random)
        words = [min(sense.words, key=len) for sense in chosen]
        labels = words
        if self.block.size and not self.names_itself(random):
            labels = [[label] for label in _labels(self.words, len(words), random)]
        right = random.randrange(len(chosen))
        return Question(labels=labels, words=words, text=chosen[right].gloss, answer=labels[right])


@dataclass(frozen=True, kw_only=True)
class NextPart(LabelObjective):
    """Asks whether the second of two passages follows the first in the corpus.

    Inputs are ``<2> first <0> second``; targets are ``true`` or ``false``.
    """

    def question(self, corpus: Corpus, vocabulary: AnyVocabulary, random: Random) -> Question:
        length = random.randint(6, self.text_length // 2 - 2)
        start = random.randrange(len(corpus.tokens) - 2 * length)
        is_next = random.random() < 0.5
        after = start + length
        if not is_next:
            after += random.choice((-1, 1)) * random.randrange(200, 20_000)
            after = min(max(after, 0), len(corpus.tokens) - length)
        return Question(
            labels=[corpus.tokens[start : start + length].tolist()],
            words=[[]],
            text=corpus.tokens[after : after + length].tolist(),
            answer=vocabulary.encode("true" if is_next else "false"),
        )


@dataclass(frozen=True, kw_only=True)
class RestoreOrder(LabelObjective):
    """Asks for the original order of a few shuffled tokens of text."""

    def question(self, corpus: Corpus, vocabulary: AnyVocabulary, random: Random) -> Question:
        text = _window(corpus, self.words, self.targets_length - 1, random)
        mixed = random.sample(text, len(text))
        return Question(labels=[], words=[], text=mixed, answer=text)


def _distinct(table: WordTable, count: int, random: Random) -> list[int]:
    """Draws ``count`` different content words, as positions in C."""
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        drawn[int(table.draw_content(np.array(random.random())))] = None
    return list(drawn)


def _labels(table: WordTable, count: int, random: Random) -> list[int]:
    return [int(table.content_C[i]) for i in _distinct(table, count, random)]


def _scattered(corpus: Corpus, table: WordTable, count: int, random: Random) -> list[int]:
    """Draws up to ``count`` word-initial pieces, in proportion to their corpus frequency."""
    drawn = (int(corpus.tokens[random.randrange(len(corpus.tokens))]) for _ in range(count))
    return [word for word in drawn if table.starts_word_V[word]]


def _window(corpus: Corpus, table: WordTable, length: int, random: Random) -> list[int]:
    """Draws ``length`` tokens of the corpus, starting at a word where possible.

    A length of 1 means one whole word.
    """
    start = random.randrange(len(corpus.tokens) - length - 2 * _LONGEST_WORD)
    tokens = corpus.tokens[start : start + length + 2 * _LONGEST_WORD]
    starts = np.flatnonzero(table.starts_word_V[tokens])
    if length == 1:
        content = [i for i in starts[:-1] if table.weights_V[tokens[i]] > 0.5]
        first = int(content[0]) if content else int(starts[0]) if len(starts) else 0
        after = [int(i) for i in starts if i > first]
        return tokens[first : (after[0] if after else first + 1)][:_LONGEST_WORD].tolist()
    first = int(starts[0]) if len(starts) and starts[0] < _LONGEST_WORD else 0
    return tokens[first : first + length].tolist()


def _make_question(
    labels: Sequence[int], words: Sequence[list[int]], text: list[int], right: int
) -> Question:
    return Question(
        labels=[[label] for label in labels],
        words=list(words),
        text=text,
        answer=[labels[right]],
    )


def _described(sense: Sense, random: Random) -> list[int]:
    """Returns one word of a sense, its gloss, or both."""
    draw = random.random()
    word = random.choice(sense.words)
    return word if draw < 0.4 else sense.gloss if draw < 0.7 else word + sense.gloss
