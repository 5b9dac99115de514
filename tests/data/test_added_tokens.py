"""Tokens that the files beside spiece.model add: units in a text, back to text, written again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prompt_tuning_jax.checkpoints.hf.config import tokenizer_files
from prompt_tuning_jax.data.vocabularies.vocab import Vocabulary, load_vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.config import PRESETS

PIECES = 5900  # of the bundled vocabulary
EVENT, LOC, NEWLINE = 6000, 6001, 6002
THE, DOG = 4, 1519


def folder_with(tmp_path: Path, tiny_model_dir: Path, **files: Any) -> Path:
    shutil.copy(tiny_model_dir / "spiece.model", tmp_path)
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


def decoder(**flags: Any) -> dict[str, Any]:
    """tokenizer_config.json with three added tokens and one sentinel."""
    tokens = {
        "0": {"content": "<pad>"},
        "1": {"content": "</s>"},
        "5999": {"content": "<extra_id_0>", "lstrip": True, "rstrip": True},
        str(EVENT): {"content": "[EVENT]", **flags},
        str(LOC): {"content": "<loc>", "single_word": True},
        str(NEWLINE): {"content": "\n"},
    }
    return {"tokenizer_class": "T5Tokenizer", "added_tokens_decoder": tokens}


ADDED = {"[EVENT]": EVENT, "<loc>": LOC, "\n": NEWLINE, "<extra_id_0>": 5999}


@pytest.mark.parametrize(
    "files",
    [{"tokenizer_config": decoder()}, {"added_tokens": ADDED}],
    ids=["tokenizer_config", "added_tokens"],
)
def test_added_tokens_are_units(
    tmp_path: Path, tiny_model_dir: Path, files: dict[str, Any]
) -> None:
    words = load_vocabulary(folder_with(tmp_path, tiny_model_dir, **files))
    plain = Vocabulary(tiny_model_dir / "spiece.model")
    assert words.size == NEWLINE + 1
    assert words.encode("[EVENT] the dog") == [EVENT, THE, DOG]
    assert words.encode("the[EVENT]dog") == [THE, EVENT, DOG]
    assert words.encode("the<extra_id_0>dog") == [THE, 5999, DOG]
    assert words.encode("the\ndog") == [THE, NEWLINE, DOG]
    assert words.encode("[event] the") == plain.encode("[event] the")
    assert words.decode([EVENT, THE, DOG]) == "[EVENT] the dog"
    assert words.decode([THE, DOG, NEWLINE, EVENT]) == "the dog \n [EVENT]"
    assert words.decode([THE, 1, EVENT]) == "the"
    assert words.pieces(EVENT) == "[EVENT]" and words.sentinel(0) == 5999
    texts = ["the dog", "[EVENT] the", "", "a\n"]
    assert words.encode_batch(texts) == [words.encode(text) for text in texts]
    assert words != plain and words == load_vocabulary(tmp_path)


def test_flags_decide_about_what_is_beside(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = decoder(lstrip=True, rstrip=True)
    words = load_vocabulary(folder_with(tmp_path, tiny_model_dir, tokenizer_config=config))
    assert words.encode("\n [EVENT] \n the") == [NEWLINE, EVENT, NEWLINE, THE]
    assert words.encode("[EVENT]\n the") == [EVENT, THE]  # a blank, too, though a token
    assert words.encode("the <loc> dog") == [THE, LOC, DOG]
    assert LOC not in words.encode("the<loc>dog")  # within a word


def test_the_longest_token_at_a_place_wins(tmp_path: Path, tiny_model_dir: Path) -> None:
    added = {"[E": 6000, "[E]": 6001}
    words = load_vocabulary(folder_with(tmp_path, tiny_model_dir, added_tokens=added))
    assert words.encode("[E] the[E") == [6001, THE, 6000]


def test_tokens_without_an_id_get_the_next_ones(tmp_path: Path, tiny_model_dir: Path) -> None:
    special = {"additional_special_tokens": ["<sep>", {"content": "<cls>", "rstrip": True}]}
    files = {"special_tokens_map": special, "added_tokens": {"[X]": 6000}}
    words = load_vocabulary(folder_with(tmp_path, tiny_model_dir, **files))
    assert words.encode("<sep>[X]<cls>") == [6001, 6000, 6002]


@pytest.mark.parametrize("number", [0, 7, 300])
def test_the_number_of_sentinels_is_the_files(
    tmp_path: Path, tiny_model_dir: Path, number: int
) -> None:
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": number}
    words = load_vocabulary(folder_with(tmp_path, tiny_model_dir, tokenizer_config=config))
    assert words.size == PIECES + number
    if number:
        assert words.sentinel(0) == PIECES + number - 1
        assert words.encode("<extra_id_0> the") == [PIECES + number - 1, THE]
        assert words.sentinel(number - 1) == PIECES
    with pytest.raises(UserError, match=f"no sentinel <extra_id_{number}>"):
        words.sentinel(number)
    # What is asked for counts more than the files.
    assert load_vocabulary(tmp_path, extra_ids=2).sentinel(1) == PIECES


def test_they_are_written_as_they_were(tmp_path: Path, tiny_model_dir: Path) -> None:
    files = {"tokenizer_config": decoder(), "added_tokens": ADDED}
    source = folder_with(tmp_path, tiny_model_dir, **files)
    written = tokenizer_files(source / "spiece.model", PRESETS["tiny"])
    assert written == {
        name: source / name
        for name in ("spiece.model", "tokenizer_config.json", "added_tokens.json")
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"[X]": "6000"}}, r"added_tokens.json: '6000' is not a valid token id"),
        ({"added_tokens": {"[X]": -1}}, "'-1' is not a valid token id"),
        ({"added_tokens": {"[X]": 10**9}}, "'1000000000' is not a valid token id"),
        ({"added_tokens": {"": 6000}}, "has no text"),
        ({"added_tokens": []}, "is an array, not a JSON"),
        ({"tokenizer_config": {"extra_ids": -1}}, "extra_ids is '-1'"),
        ({"tokenizer_config": {"extra_ids": 10**9}}, "extra_ids is '1000000000'"),
        (
            {"tokenizer_config": {"added_tokens_decoder": []}},
            "added_tokens_decoder is not an object",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": "y"}}}, "'x' is not a valid token id"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"6000": "y", "6001": "y"}}},
            "token 'y' has two ids",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"6000": {"content": "y", "lstrip": 1}}}},
            "a flag of the token 'y'",
        ),
        ({"special_tokens_map": {"additional_special_tokens": "x"}}, "is not a list"),
    ],
)
def test_nonsense_is_refused_by_file(
    tmp_path: Path, tiny_model_dir: Path, files: dict[str, Any], message: str
) -> None:
    folder = folder_with(tmp_path, tiny_model_dir, **files)
    with pytest.raises(UserError, match=message) as error:
        load_vocabulary(folder)
    assert "\n" not in str(error.value)
