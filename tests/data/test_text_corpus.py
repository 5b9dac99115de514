import gzip
import lzma
import os
from pathlib import Path

import numpy as np
import pytest

from prompt_tuning_jax.data.vocabularies.vocab import ByteVocabulary, Vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.pretraining import text_corpus
from prompt_tuning_jax.pretraining.text_corpus import load_corpus, text_files

TINY = Path(__file__).parents[2] / "prompt_tuning_jax/assets/tiny/spiece.model"

FIRST = "One two.\n\n\n  Three four, é.  \nFive.\n"  # documents: [One two.] [Three ... Five.]
SECOND = "\nSix.\n \n\u200b\n\nSeven.\n\n"  # [Six.] [Seven.]; between them one of no token
DOCUMENTS = [["One two."], ["Three four, é.", "Five."], ["Six."], ["Seven."]]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(TINY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(FIRST, encoding="utf-8")
    (folder / "b.txt.xz").write_bytes(lzma.compress(SECOND.encode()))
    (folder / "README.txt").write_text("about")
    (folder / "notes.md").write_text("about")
    return folder


def documents(corpus) -> list[list[int]]:
    return [part.tolist() for part in np.split(corpus.tokens, corpus.document_starts[1:])]


@pytest.mark.parametrize("characters", [1, 20, 4_000_000])  # batches of one paragraph, some, all
def test_documents_are_their_paragraphs(folder, vocabulary, tmp_path, monkeypatch, characters):
    monkeypatch.setattr(text_corpus, "_CHARACTERS_PER_BATCH", characters)
    corpus = load_corpus(folder, vocabulary, cache_dir=tmp_path / "cache")
    expected = [
        [i for text in paragraphs for i in vocabulary.encode(text)] for paragraphs in DOCUMENTS
    ]
    assert documents(corpus) == expected
    assert corpus.document_starts[0] == 0
    assert corpus.tokens.dtype == np.dtype("<u2")
    assert corpus.document_starts.dtype == np.dtype("<i8")


def test_a_list_of_files_and_gzip(folder, tmp_path):
    vocabulary = ByteVocabulary()
    (folder / "c.gz").write_bytes(gzip.compress(b"Eight.\n"))
    files = [folder / "c.gz", folder / "a.txt"]
    corpus = load_corpus(files, vocabulary, cache_dir=tmp_path / "cache")
    texts = [vocabulary.decode(ids) for ids in documents(corpus)]
    assert texts == ["Eight.", "One two.", "Three four, é.Five."]
    one = load_corpus(str(folder / "c.gz"), vocabulary, cache_dir=tmp_path / "cache")
    assert vocabulary.decode(one.tokens) == "Eight."


def test_max_files_takes_the_first(folder, vocabulary, tmp_path):
    corpus = load_corpus(folder, vocabulary, cache_dir=tmp_path / "cache", max_files=1)
    assert len(corpus.document_starts) == 2
    with pytest.raises(UserError, match="max_files must be 1 or more"):
        load_corpus(folder, vocabulary, cache_dir=tmp_path / "cache", max_files=0)


def test_second_load_reads_the_cache(folder, vocabulary, tmp_path, monkeypatch):
    first = load_corpus(folder, vocabulary, cache_dir=tmp_path / "cache")

    def fail(*_, **__):
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(text_corpus, "_build", fail)
        second = load_corpus(folder, vocabulary, cache_dir=tmp_path / "cache")
        np.testing.assert_array_equal(first.tokens, second.tokens)
        np.testing.assert_array_equal(first.document_starts, second.document_starts)
        assert not second.tokens.flags.owndata, "not mapped"
        with pytest.raises(ValueError, match="read-only"):
            second.tokens[0] = 7
        # Another vocabulary, other files and a file's other time are other corpora.
        with pytest.raises(AssertionError, match="tokenized again"):
            load_corpus(folder, Vocabulary(TINY, extra_ids=7), cache_dir=tmp_path / "cache")
        with pytest.raises(AssertionError, match="tokenized again"):
            load_corpus(folder, vocabulary, cache_dir=tmp_path / "cache", max_files=1)
        os.utime(folder / "a.txt", ns=(1, 1))
        with pytest.raises(AssertionError, match="tokenized again"):
            load_corpus(folder, vocabulary, cache_dir=tmp_path / "cache")


def test_damaged_cache_is_made_again(folder, vocabulary, tmp_path):
    first = load_corpus(folder, vocabulary, cache_dir=tmp_path / "cache")
    expected = first.tokens.tolist()
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "tokens.npy").write_bytes((entry / "tokens.npy").read_bytes()[:-2])
    again = load_corpus(folder, vocabulary, cache_dir=tmp_path / "cache")
    assert again.tokens.tolist() == expected
    assert list((tmp_path / "cache").iterdir()) == [entry]


def test_interrupted_build_leaves_nothing(folder, vocabulary, tmp_path):
    def interrupt(fraction, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_corpus(folder, vocabulary, cache_dir=tmp_path / "cache", progress=interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_faster_of_two_builds_wins(folder, vocabulary, tmp_path):
    def other_process(fraction, tokens):
        if fraction == 1.0:
            load_corpus(folder, vocabulary, cache_dir=tmp_path / "cache")

    corpus = load_corpus(folder, vocabulary, cache_dir=tmp_path / "cache", progress=other_process)
    assert len(documents(corpus)) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_progress_rises_to_one(folder, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr(text_corpus, "_CHARACTERS_PER_BATCH", 1)
    seen = []
    corpus = load_corpus(
        folder, vocabulary, cache_dir=tmp_path / "c", progress=lambda f, n: seen.append((f, n))
    )
    assert seen == sorted(seen)
    assert seen[-1] == (1.0, len(corpus.tokens))


def test_default_cache_follows_xdg(folder, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_corpus(folder, vocabulary)
    assert len(list((tmp_path / "xdg/prompt_tuning_jax").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_corpus(folder, vocabulary)
    assert len(list((tmp_path / "home/.cache/prompt_tuning_jax").iterdir())) == 1


def test_bad_input_is_a_user_error(folder, vocabulary, tmp_path):
    def load(path):
        load_corpus(path, vocabulary, cache_dir=tmp_path / "cache")

    with pytest.raises(UserError, match=r"absent\.txt: no such text file"):
        load(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="empty list"):
        load([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no text file"):
        load(tmp_path / "empty")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(UserError, match="hold no text"):
        load(tmp_path / "blank.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8"):
        load(tmp_path / "latin.txt")
    whole = {"xz": lzma.compress(b"text\n" * 99), "gz": gzip.compress(b"text\n" * 99)}
    for suffix, content in whole.items():
        for damaged in (content[:-9], b"plain text", content[:20] + b"\xff\0" * 40):
            file = tmp_path / f"damaged.{suffix}"
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"damaged\.{suffix}: damaged compressed file"):
                load(file)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the corpus cache"):
        load_corpus(folder, vocabulary, cache_dir=tmp_path / "file")
    assert list((tmp_path / "cache").iterdir()) == []


def test_text_files_leaves_out_what_is_about_the_text(folder):
    assert [file.name for file in text_files(folder)] == ["a.txt", "b.txt.xz"]
