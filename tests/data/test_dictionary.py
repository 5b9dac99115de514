from pathlib import Path

import pytest

from prompt_tuning_jax.data.vocabularies.vocab import Vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.pretraining.dictionary import Dictionary, Sense, load_dictionary
from tests.data.dictionary_files import ANIMALS, BAD, GOOD, PLACES, write_dictionary

TINY = Path(__file__).parents[2] / "prompt_tuning_jax/assets/tiny/spiece.model"


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(TINY)


@pytest.fixture(scope="module")
def dictionary(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Dictionary:
    return load_dictionary(write_dictionary(tmp_path_factory.mktemp("wordnet")), vocabulary)


def first_words(senses: list[Sense], vocabulary: Vocabulary) -> set[str]:
    return {vocabulary.decode(sense.words[0]) for sense in senses}


def test_glosses_end_before_their_examples_and_underscores_are_blanks(dictionary, vocabulary):
    (dog,) = (s for s in dictionary.senses if vocabulary.decode(s.words[0]) == "dog")
    assert vocabulary.decode(dog.gloss) == "what people call dog"
    assert [vocabulary.decode(word) for word in dog.words] == ["dog", "old dog"]


def test_categories_kinds_and_opposites(dictionary, vocabulary):
    named = {vocabulary.decode(name): group for name, group in dictionary.categories}
    assert first_words(named["animal"], vocabulary) == {"animal", *ANIMALS}
    assert first_words(named["place"], vocabulary) == {"place", *PLACES}
    kinds = [first_words(group, vocabulary) for group in dictionary.kinds]
    assert kinds == [set(ANIMALS), set(PLACES)]
    ((one, other),) = dictionary.opposites
    # A pair of heads once, not from both sides; "(p)" is no part of a word.
    assert [first_words(one, vocabulary), first_words(other, vocabulary)] == [
        set(GOOD[1:]),
        set(BAD[1:]),
    ]


def test_a_missing_or_foreign_file_is_named(vocabulary, tmp_path):
    with pytest.raises(UserError, match=r"data\.noun: cannot read WordNet's database.*data\.dict"):
        load_dictionary(tmp_path / "nowhere", vocabulary)
    folder = write_dictionary(tmp_path)
    (folder / "data.adj").write_text("good|1\n(adj)|fine\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.adj: not a WordNet database file"):
        load_dictionary(folder, vocabulary)
