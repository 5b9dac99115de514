"""Llama's ``tokenizer.model`` encodes and decodes as the sentencepiece library does."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece

from prompt_tuning_jax.checkpoints.hf.config import tokenizer_files
from prompt_tuning_jax.data.vocabularies.hf_tokenizer import HfTokenizer
from prompt_tuning_jax.data.vocabularies.vocab import load_vocabulary
from prompt_tuning_jax.errors import UserError
from tests.tiny_lm import make_lm

SENTENCES = [
    "The harbour was quiet, and the boats lay at anchor.",
    "A quick letter, written in haste, said nothing of the harbour.",
    "Nothing is written about boats 1905 and 1914 in the letter.",
    "  two blanks  inside, and at the end  ",
]
TEXTS = [*SENTENCES, "", " ", "naïve café, 東京 🙂", "tabs\tand\nlines", "the<mark>boats", "</s>"]


def train(path: Path, **options: object) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    settings: dict[str, object] = {
        "vocab_size": 360,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<mark>"],
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=model, **(settings | options)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_and_texts_are_those_of_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    theirs = train(tmp_path / "tokenizer.model", add_dummy_prefix=prefix)
    ours = load_vocabulary(tmp_path)
    assert isinstance(ours, HfTokenizer)
    assert ours.size == theirs.get_piece_size()
    # With a prefix, text behind an added token starts a word, as in transformers' legacy tokenizer.
    for text in TEXTS[: -2 if prefix else -1]:
        want = theirs.encode(text)
        assert ours.encode(text) == want, text
        assert ours.decode(want) == theirs.decode(want), text
    assert (ours.token_ids.eos, ours.input_start) == (theirs.eos_id(), (theirs.bos_id(),))
    # As in transformers, a special token written out in a text is that token.
    assert ours.encode("</s>") == [theirs.eos_id()]


def test_the_files_beside_it_add_tokens_and_say_what_starts_an_input(tmp_path: Path) -> None:
    size = train(tmp_path / "tokenizer.model").get_piece_size()
    config = {
        "add_bos_token": False,
        "pad_token": "<pad>",
        "added_tokens_decoder": {str(size): {"content": "<pad>"}, str(size + 1): "<|turn|>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    words = load_vocabulary(tmp_path)
    assert words.input_start == ()
    assert words.encode("boats<|turn|>")[-1] == size + 1
    # Caches of examples and moved prompts go by what a vocabulary is.
    config["added_tokens_decoder"][str(size + 1)] = "<|other|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    other = load_vocabulary(tmp_path)
    assert other != words and other.fingerprint != words.fingerprint
    assert other.encode("boats<|turn|>") != words.encode("boats<|turn|>")
    config["added_tokens_decoder"] = {str(size + 3): "<|turn|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{size} pieces, and the added tokens have ids"):
        load_vocabulary(tmp_path)


def test_a_folder_that_is_written_has_a_tokenizer_json_with_the_same_ids(tmp_path: Path) -> None:
    train(tmp_path / "read" / "tokenizer.model")
    ours = load_vocabulary(tmp_path / "read")
    files = tokenizer_files(
        tmp_path / "read" / "tokenizer.model", make_lm(vocab_size=ours.size).config
    )
    for name, content in files.items():
        assert isinstance(content, dict)
        (tmp_path / name).write_text(json.dumps(content))
    written = load_vocabulary(tmp_path / "tokenizer.json")
    assert [written.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert written.input_start == ours.input_start


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_type": "unigram", "vocab_size": 300}, "of type unigram"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"normalizes texts \(nmt_nfkc\)"),
        ({"remove_extra_whitespaces": True}, "normalizes texts"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    train(tmp_path / "tokenizer.model", **options)
    with pytest.raises(UserError, match=message):
        load_vocabulary(tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff\xff\x0fnothing")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_vocabulary(tmp_path)
