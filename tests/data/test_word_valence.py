import subprocess
import sys
from collections import Counter

import pytest

from prompt_tuning_jax.data.tasks import word_valence
from prompt_tuning_jax.data.tasks.registry import get_task
from prompt_tuning_jax.data.tasks.word_valence import crude_stem, from_text, read_lexicon, split_of
from prompt_tuning_jax.errors import UserError


@pytest.fixture(scope="module")
def examples():
    task = get_task("word_valence")
    return {split: list(task.load(split)) for split in task.splits}


def words_of(examples):
    return [example["inputs"].removeprefix("valence: ") for example in examples]


@pytest.mark.parametrize(
    "family",
    [
        "love loved lovely lovable loving lover lovers lovingly",
        "happy happier happiness happily happiest",
        "admire admirable admiration admirer admired",
        "win winner winning wins",
        "terror terrify terrified terrible terrific",
        "joy joyful joyous joyfully joys",
        "nasty nastier nasties nastiest",
    ],
)
def test_a_word_and_its_relatives_share_a_stem(family):
    assert len({crude_stem(word) for word in family.split()}) == 1


def test_the_splits_are_disjoint_in_words_and_stems(examples):
    stems = [{crude_stem(word) for word in words_of(e)} for e in examples.values()]
    assert not (stems[0] & stems[1] or stems[0] & stems[2] or stems[1] & stems[2])


def test_hardly_a_test_word_begins_as_a_training_word_does(examples):
    beginnings = {word[:5] for word in words_of(examples["train"]) if len(word) >= 5}
    test_words = words_of(examples["test"])
    assert sum(word[:5] in beginnings for word in test_words) < 0.03 * len(test_words)


def test_sizes_and_balance(examples):
    sizes = {split: len(e) for split, e in examples.items()}
    total = sum(sizes.values())
    assert 6000 < total < 7000
    assert 0.75 < sizes["train"] / total < 0.85
    for split in examples:
        counts = Counter(example["targets"] for example in examples[split])
        assert set(counts) == {"terrible", "beautiful"}
        assert 0.4 < counts["beautiful"] / sizes[split] < 0.6


def test_the_labels_are_what_everybody_would_say(examples):
    assert all(from_text(e["inputs"]) == e["inputs"] for e in examples["train"][:9])
    label = {e["inputs"]: e["targets"] for split in examples.values() for e in split}
    for word in ("love", "happy", "excellent", "beautiful", "win"):
        assert label[f"valence: {word}"] == "beautiful"
    for word in ("hate", "sad", "terrible", "murder", "lose"):
        assert label[f"valence: {word}"] == "terrible"


def test_only_words_with_a_clear_rating_are_kept(tmp_path):
    lexicon = tmp_path / "lexicon.txt"
    lexicon.write_text(
        ":)\t2.0\t1\t[]\ngr8\t3.0\t1\t[]\nxqzt\t1.6\t1\t[]\nok\t1\t1\t[]\nfed up\t-2\t1\t[]\n"
        "fine\t0.8\t1\t[]\nmeh\t-0.3\t1\t[]\nfav\t2.0\t1\t[]\nfav\t3.0\t1\t[]\nbad\t-2.5\t1\t[]\n"
    )
    assert read_lexicon(lexicon) == {"fine": 0.8, "fav": 2.5, "bad": -2.5}
    lexicon.write_text("bad word\n")
    assert read_lexicon(lexicon) == {}
    lexicon.write_text("fine\t1\t1\t[]\nbad\n")
    with pytest.raises(UserError, match=r"lexicon\.txt:2"):
        read_lexicon(lexicon)


def test_the_split_of_a_word_never_changes():
    assert [split_of(w) for w in ("love", "sad", "giggle")] == ["train", "test", "test"]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(word_valence.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install vaderSentiment"):
        list(get_task("word_valence").load("test"))


def test_the_package_is_not_imported():
    code = (
        "import sys; from prompt_tuning_jax.data.tasks.registry import get_task;"
        "list(get_task('word_valence').load('test')); print('vaderSentiment' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
