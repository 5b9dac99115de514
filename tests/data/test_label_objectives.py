from pathlib import Path
from random import Random

import numpy as np
import pytest

from prompt_tuning_jax.data.vocabularies.vocab import ByteVocabulary, Vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.pretraining.dictionary import Dictionary, load_dictionary
from prompt_tuning_jax.pretraining.initializations import cooccurrence_embeddings
from prompt_tuning_jax.pretraining.label_objective import (
    BehindEmptyBlock,
    LabelObjective,
    PromptBlock,
)
from prompt_tuning_jax.pretraining.label_objectives import (
    DictionaryLabels,
    LabelByKeyword,
    LabelBySimilarity,
    LabelByTopic,
    MissingWord,
    NextPart,
    RestoreOrder,
)
from prompt_tuning_jax.pretraining.text_corpus import Corpus
from prompt_tuning_jax.pretraining.text_objectives import PrefixLM
from prompt_tuning_jax.pretraining.word_table import WordTable, make_word_table
from tests.data.dictionary_files import ANIMALS, BAD, GOOD, PLACES, write_dictionary

TINY = Path(__file__).parents[2] / "prompt_tuning_jax/assets/tiny/spiece.model"
LENGTHS = {"inputs_length": 64, "targets_length": 8}
COUNT = 200
KINDS = ("similarity", "keyword", "topic", "missing", "dictionary", "next", "order")
ALL = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(TINY)


@pytest.fixture(scope="module")
def corpus(vocabulary: Vocabulary) -> Corpus:
    """60,000 tokens of words in one piece each: stretches of a dozen words that keep company."""
    pieces = [vocabulary.pieces(i) for i in range(2000)]
    words = [i for i, piece in enumerate(pieces) if len(piece) > 5 and piece[1:].isalpha()]
    words = [i for i in words if pieces[i].startswith("▁") and pieces[i].islower()][:600]
    random = Random(0)
    tokens: list[int] = []
    while len(tokens) < 60_000:
        start = random.randrange(0, len(words), 12)
        tokens += random.choices(words[start : start + 12], k=40)
    return Corpus(tokens=np.array(tokens, np.uint16), document_starts=np.zeros(1, np.int64))


@pytest.fixture(scope="module")
def words(corpus: Corpus, vocabulary: Vocabulary) -> WordTable:
    embeddings_VD = cooccurrence_embeddings(corpus.tokens, vocab_size=vocabulary.size, embed_dim=48)
    return make_word_table(corpus.tokens, vocabulary, embeddings_VD)


@pytest.fixture(scope="module")
def dictionary(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Dictionary:
    return load_dictionary(write_dictionary(tmp_path_factory.mktemp("wordnet")), vocabulary)


@pytest.fixture(scope="module")
def objectives(words: WordTable, dictionary: Dictionary) -> dict[str, LabelObjective]:
    return {
        "similarity": LabelBySimilarity(words=words, **LENGTHS),
        "keyword": LabelByKeyword(words=words, **LENGTHS),
        "topic": LabelByTopic(words=words, **LENGTHS),
        "missing": MissingWord(words=words, **LENGTHS),
        "dictionary": DictionaryLabels(
            words=words, dictionary=_with_more_kinds(dictionary), **LENGTHS
        ),
        "next": NextPart(words=words, **LENGTHS),
        "order": RestoreOrder(words=words, **LENGTHS),
    }


def _with_more_kinds(dictionary: Dictionary) -> Dictionary:
    """As many groups as a question may ask for."""
    return Dictionary(
        senses=dictionary.senses,
        short_senses=dictionary.short_senses,
        categories=dictionary.categories * 3,
        kinds=dictionary.kinds * 3,
        opposites=dictionary.opposites,
    )


def test_long_inputs_ask_for_no_more_words_than_a_class_has(
    words: WordTable, corpus: Corpus, vocabulary: Vocabulary
) -> None:
    objective = LabelBySimilarity(words=words, **{**LENGTHS, "inputs_length": 128})
    assert objective.class_tokens // 2 > words.neighbors_CM.shape[1]
    for index in range(COUNT):
        objective.example(corpus, vocabulary, index=index, seed=0)


class Example:
    """Inputs taken apart: classes, each from its start on, text, answer."""

    def __init__(self, objective, corpus, vocabulary, index: int) -> None:
        example = objective.example(corpus, vocabulary, index=index, seed=3)
        inputs, targets = example["inputs"].tolist(), example["targets"].tolist()
        assert inputs.pop() == targets.pop() == 1
        cut = inputs.index(vocabulary.sentinel(0))
        self.text, self.answer = inputs[cut + 1 :], targets
        self.classes: list[list[int]] = []
        for token in inputs[:cut]:
            if token == vocabulary.sentinel(2):
                self.classes.append([])
            else:
                self.classes[-1].append(token)


@pytest.fixture
def examples(objectives, corpus, vocabulary):
    return lambda kind: [
        Example(objectives[kind], corpus, vocabulary, index) for index in range(COUNT)
    ]


def is_in_corpus(tokens: list[int], corpus: Corpus) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(corpus.tokens, len(tokens))
    return bool((windows == np.array(tokens)).all(1).any())


@ALL
def test_an_example_depends_on_its_index_and_seed_alone(objectives, corpus, vocabulary, kind):
    objective = objectives[kind]
    indices_B = np.array([5, 99, 2], np.uint64)
    inputs_BT, targets_BS = objective.rows(corpus, vocabulary, indices_B=indices_B, seed=1)
    again_1T, _ = objective.rows(corpus, vocabulary, indices_B=indices_B[1:2], seed=1)
    other_1T, _ = objective.rows(corpus, vocabulary, indices_B=indices_B[1:2], seed=2)
    np.testing.assert_array_equal(inputs_BT[1:2], again_1T)
    assert (other_1T != again_1T).any()
    assert inputs_BT.shape == (3, 64) and targets_BS.shape == (3, 8)


@pytest.mark.parametrize("kind", ["similarity", "keyword", "topic", "missing"])
def test_the_answer_is_one_of_different_labels_and_any_of_them(examples, kind):
    places = []
    for example in examples(kind):
        labels = [own[0] for own in example.classes]
        assert len(set(labels)) == len(labels) >= 2
        places.append((len(labels), labels.index(example.answer[0])))
    # The first of two as often as the second: 5 standard deviations.
    of_two = [place for number, place in places if number == 2]
    assert abs(np.mean(of_two) - 0.5) < 5 * 0.5 / len(of_two) ** 0.5


def test_similarity_gives_the_class_of_the_nearest_vector(examples, words):
    right = nearest = 0
    for example in examples("similarity"):
        if len(example.classes[0]) < 3 or len(example.text) < 4:
            continue
        # The label is the group's first word, or any word and none of the group.
        whole, unlabeled = np.array(example.classes), np.array(example.classes)[:, 1:]
        text_D = words.vectors(np.array(example.text))
        best = [int(np.argmax(words.vectors(groups) @ text_D)) for groups in (whole, unlabeled)]
        nearest += 1
        right += example.answer[0] in {example.classes[i][0] for i in best}
    assert nearest > 30 and right / nearest > 0.95


def test_a_word_of_the_right_group_alone_stands_in_the_text(examples):
    """The corpus has no other pieces than words."""
    whole_groups = 0
    for example in examples("keyword"):
        inside = set(example.text)
        for label, *own in example.classes:
            assert (len(inside & set(own)) > 0) == (label == example.answer[0])
            whole_groups += len(own) > 1
    assert whole_groups > COUNT


def test_topic_words_come_from_behind_the_text(examples, corpus):
    tokens = corpus.tokens.tolist()
    for example in examples("topic")[:50]:
        (own,) = (c for c in example.classes if c[0] == example.answer[0])
        regions = [
            tokens[start + len(example.text) : start + len(example.text) + 40]
            for start in range(len(tokens))
            if tokens[start : start + len(example.text)] == example.text
        ]
        assert any(set(own[1:]) <= set(region) for region in regions)


def test_the_missing_word_restores_the_text(examples, corpus, vocabulary):
    for example in examples("missing"):
        place = example.text.index(vocabulary.sentinel(1))
        text = [*example.text[:place], *example.answer, *example.text[place + 1 :]]
        assert is_in_corpus(text, corpus)


def test_next_part_is_true_where_the_corpus_goes_on_so(examples, corpus, vocabulary):
    said = []
    for example in examples("next"):
        answer = vocabulary.decode(example.answer)
        assert answer in ("true", "false")
        if len(example.text) >= 6:
            assert is_in_corpus(example.classes[0] + example.text, corpus) == (answer == "true")
            said.append(answer)
    assert 0.3 < said.count("true") / len(said) < 0.7


def test_restoring_order_gives_text_of_the_same_tokens(examples, corpus):
    moved = 0
    for example in examples("order"):
        assert sorted(example.text) == sorted(example.answer)
        assert is_in_corpus(example.answer, corpus)
        moved += example.text != example.answer
    assert moved > 0.9 * COUNT


def test_dictionary_labels_are_those_of_the_words_group(examples, vocabulary):
    """Every word of the dictionary is of one group, so that the text tells which is right."""
    groups = [set(ANIMALS) | {"animal"}, set(PLACES) | {"place"}, set(GOOD[1:]), set(BAD[1:])]

    def group_of(text: str) -> set[str]:
        return next((g for g in groups for word in text.split() if word in g), set())

    checked = 0
    for example in examples("dictionary"):
        text = vocabulary.decode(example.text)
        answer = vocabulary.decode(example.answer)
        for own in example.classes:
            described = vocabulary.decode(own)
            if not described.startswith(answer + " "):
                continue
            members = described.removeprefix(answer + " ")
            if group_of(members) and group_of(text):
                checked += 1
                assert group_of(members) == group_of(text), (described, text)
                break
    assert checked > COUNT / 4


def test_inputs_that_are_too_short_for_the_questions_are_refused(words):
    with pytest.raises(UserError, match=r"data\.inputs_length of 24"):
        NextPart(words=words, inputs_length=20, targets_length=8)


def test_a_vocabulary_without_whole_words_is_refused():
    with pytest.raises(UserError, match="SentencePiece"):
        make_word_table(np.arange(3, 200), ByteVocabulary(), np.ones((384, 8), np.float32))


def test_common_pieces_and_parts_of_words_are_no_content(words, vocabulary, corpus):
    for token in words.content_C:
        piece = vocabulary.pieces(int(token))
        assert piece.startswith("▁") and piece[1:].isalpha() and len(piece) > 3
    counts = np.bincount(corpus.tokens)
    assert counts[words.content_C].max() <= np.sort(counts)[-120]


def test_neighbors_are_the_words_of_the_same_stretches(words):
    """The corpus has its words by twelves."""
    order = {int(token): number for number, token in enumerate(sorted(words.content_C))}
    assert (words.neighbors_CM[:, 0] == words.content_C).all()
    near = np.array([[order[int(t)] for t in row[:6]] for row in words.neighbors_CM])
    assert (np.abs(near[:, 1:] - near[:, :1]) < 24).mean() > 0.8


BLOCK = PromptBlock(positions=8, words=5)


def test_a_prompt_block_holds_the_classes_and_the_text_follows(words, corpus, vocabulary):
    lengths = {**LENGTHS, "inputs_length": LENGTHS["inputs_length"] + BLOCK.size}
    blocked = LabelBySimilarity(words=words, block=BLOCK, **lengths)
    indices_B = np.arange(COUNT, dtype=np.uint64)
    inputs_BT, targets_BS = blocked.rows(corpus, vocabulary, indices_B=indices_B, seed=3)
    filled = right = arbitrary = 0
    for row, targets in zip(inputs_BT, targets_BS, strict=True):
        positions = row[: BLOCK.size].reshape(BLOCK.positions, BLOCK.words)
        positions = [p[p > 0].tolist() for p in positions if p.any()]
        text = row[BLOCK.size :]
        text = text[text > 1].tolist()
        assert positions
        assert text[0] == vocabulary.sentinel(0) and vocabulary.sentinel(2) not in text
        classes: dict[int, list[int]] = {}
        for label, *own in positions:
            assert own
            classes.setdefault(label, []).extend(own)
        assert len(classes) >= 2 and targets[0] in classes
        filled += 1
        arbitrary += all(label not in own for label, own in classes.items())
        if len(text) > 4:
            scores = [
                words.vectors(np.array(list(dict.fromkeys(own))))
                @ words.vectors(np.array(text[1:]))
                for own in classes.values()
            ]
            right += list(classes)[int(np.argmax(scores))] == targets[0]
        else:
            right += 1
    assert filled == COUNT
    # A class may have more words than its positions hold.
    assert right / filled > 0.8
    # The label tells nothing, so that the words must be looked at.
    assert arbitrary / filled > 0.7


def test_other_objectives_leave_the_block_empty(corpus, vocabulary):
    inner = PrefixLM(inputs_length=24, targets_length=8)
    outer = BehindEmptyBlock(objective=inner, block=BLOCK)
    indices_B = np.arange(4, dtype=np.uint64)
    inputs_BT, targets_BS = outer.rows(corpus, vocabulary, indices_B=indices_B, seed=0)
    expected_BT, expected_BS = inner.rows(corpus, vocabulary, indices_B=indices_B, seed=0)
    assert outer.inputs_length == inputs_BT.shape[1] == 24 + BLOCK.size
    assert not inputs_BT[:, : BLOCK.size].any()
    np.testing.assert_array_equal(inputs_BT[:, BLOCK.size :], expected_BT)
    np.testing.assert_array_equal(targets_BS, expected_BS)


def test_a_corpus_that_is_too_small_is_refused(objectives):
    few = Corpus(tokens=np.ones(60, np.uint16), document_starts=np.zeros(1, np.int64))
    for objective in objectives.values():
        with pytest.raises(UserError, match="the corpus has 60 tokens"):
            objective.batch(few, None, step=0, seed=0, batch_size=32)
