"""Vocabularies of decoder-only models: tokenizer.json files and GGUF files."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning_jax.checkpoints.hf.config import tokenizer_files
from prompt_tuning_jax.checkpoints.load import ModelCheckpoint
from prompt_tuning_jax.data.vocabularies.gguf_metadata import read_metadata
from prompt_tuning_jax.data.vocabularies.gguf_tokenizer import PRE_TOKENIZERS, token_ids_of
from prompt_tuning_jax.data.vocabularies.hf_tokenizer import HfTokenizer
from prompt_tuning_jax.data.vocabularies.vocab import load_vocabulary, require_t5
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import TokenIds
from tests.data.tokenizer_cases import (
    CORPUS,
    byte_level,
    gpt2_metadata,
    llama_metadata,
    sentencepiece_model,
    write_gguf,
)

KINDS = ("json", "gpt2", "llama", "llama without prefix")
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="▁\0"), max_size=40
).filter(lambda text: "<" not in text)  # special tokens are recognized in texts


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HfTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    file = byte_level(folder / "json")
    files = {"json": file, "gpt2": write_gguf(folder / "a.gguf", gpt2_metadata(file, "gpt-2"))}
    for kind, prefix in (("llama", True), ("llama without prefix", False)):
        metadata = llama_metadata(sentencepiece_model(prefix=prefix), prefix=prefix)
        files[kind] = write_gguf(folder / f"{prefix}.gguf", metadata)
    return {kind: HfTokenizer(file) for kind, file in files.items()}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(text=TEXTS)
def test_texts_return_and_prefixes_of_ids_are_prefixes_of_texts(
    tokenizers: dict[str, HfTokenizer], kind: str, text: str
) -> None:
    words = tokenizers[kind]
    ids = words.encode(text)
    assert words.decode(ids) == text
    assert words.encode_batch([text, text]) == [ids, ids]
    for number in range(len(ids)):
        # What a stream of tokens shows: an incomplete character is held back.
        assert text.startswith(words.decode(ids[:number]).rstrip("\ufffd"))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(text=TEXTS)
def test_only_the_incomplete_character_is_lost(
    tokenizers: dict[str, HfTokenizer], kind: str, text: str
) -> None:
    words = tokenizers[kind]
    ids = words.encode(f"{text}猫")
    cut = words.decode(ids[:-1])
    assert cut.rstrip("\ufffd") == text.rstrip("\ufffd") or cut == f"{text}猫"[:-1]


@pytest.mark.parametrize("prefix", [True, False])
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_pieces_with_scores_are_merged_as_sentencepiece_does(
    tokenizers: dict[str, HfTokenizer], prefix: bool, data: st.DataObject
) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_proto=_reference(prefix=prefix))
    words = tokenizers["llama" if prefix else "llama without prefix"]
    near = st.lists(st.sampled_from(" ".join(CORPUS).split(" ")), max_size=8).map(" ".join)
    text = data.draw(st.one_of(near, TEXTS))
    assert words.encode(text) == reference.encode(text)


_models: dict[bool, bytes] = {}


def _reference(*, prefix: bool) -> bytes:
    if prefix not in _models:
        _models[prefix] = sentencepiece_model(prefix=prefix)
    return _models[prefix]


def test_inputs_and_targets(tokenizers: dict[str, HfTokenizer]) -> None:
    words = tokenizers["json"]
    end = words.eos_id
    assert words.pieces(end) == "<|im_end|>"
    assert words.encode_input("yes") == words.encode("yes")  # neither beginning nor end
    assert words.encode_target("yes") == [*words.encode("yes"), end]
    assert words.encode_inputs(["yes", ""]) == [words.encode("yes"), []]
    llama = tokenizers["llama"]
    assert llama.encode_input("yes") == [1, *llama.encode("yes")]
    assert llama.encode_target("yes") == [*llama.encode("yes"), 2]
    assert llama.decode([*llama.encode("yes"), 2, *llama.encode("no")]) == "yes"
    # An encoder-decoder's inputs end.
    ended = load_vocabulary(words.path, token_ids=TokenIds(pad=0, eos=end, start=0))
    assert ended.encode_input("yes") == [*words.encode("yes"), end]


def test_decoding_stops_at_every_end_and_leaves_special_tokens_out(
    tokenizers: dict[str, HfTokenizer],
) -> None:
    path = tokenizers["json"].path
    words = load_vocabulary(path, token_ids=TokenIds(pad=0, eos=2, start=-1, more_eos=(0,)))
    yes, no = words.encode("yes"), words.encode(" no")
    assert words.decode([*yes, 1, *no]) == "yes no"
    assert words.decode([*yes, 0, *no]) == words.decode([*yes, 2, *no]) == "yes"
    assert words.decode([*yes, -1, 10**6, *no]) == "yes no"
    assert words.decode([]) == ""


def test_pieces_are_readable(tokenizers: dict[str, HfTokenizer]) -> None:
    for words in tokenizers.values():
        for text in ("lighthouse keeper", "größe", "a  b"):
            ids = words.encode(text)
            joined = "".join(words.pieces(i) for i in ids).replace("▁", " ")
            assert joined.strip(" ") == text or "<0x" in joined or "\\x" in joined
        assert words.pieces(words.size) == words.pieces(-1) == "<unk>"
        with pytest.raises(UserError, match="no sentinel <extra_id_0>"):
            words.sentinel(0)


def test_copies_are_equal(tokenizers: dict[str, HfTokenizer]) -> None:
    for words in tokenizers.values():
        for same in (copy.deepcopy(words), pickle.loads(pickle.dumps(words))):
            assert (same, hash(same)) == (words, hash(words))
            assert same.encode_input("all is well") == words.encode_input("all is well")
            assert same.decode(same.encode("größe")) == "größe"
    assert len({words.fingerprint for words in tokenizers.values()}) == len(tokenizers)


def test_vocab_json_and_merges_txt(tokenizers: dict[str, HfTokenizer], tmp_path: Path) -> None:
    """The files of OPT and of the first GPT-2, which have no tokenizer.json."""
    words = tokenizers["json"]
    model = json.loads(words.path.read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"]), ""]
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    special = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    made = load_vocabulary(tmp_path)
    assert made.eos_id == words.eos_id
    for text in (*CORPUS, "", "größe <|im_end|> x"):
        assert made.encode_input(text) == [1, *words.encode(text)]
    assert made.decode(made.encode_target(CORPUS[3])) == CORPUS[3]
    (tmp_path / "vocab.json").write_text("[1]")
    with pytest.raises(UserError, match=r"vocab\.json: a vocabulary is an object of ids"):
        load_vocabulary(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_of_gguf_files_are_written_as_json(
    tokenizers: dict[str, HfTokenizer], tmp_path: Path, kind: str
) -> None:
    words = tokenizers[kind]
    model: Any = SimpleNamespace(vocab_size=words.size, token_ids=words.token_ids)
    for name, content in tokenizer_files(words.path, model).items():
        text = content.read_text() if isinstance(content, Path) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
    written = load_vocabulary(tmp_path)
    assert written.token_ids.eos == words.token_ids.eos
    for text in CORPUS:
        assert written.encode_input(text) == words.encode_input(text)
        assert written.decode(written.encode(text)) == text


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.model"])
@pytest.mark.parametrize("adds", [True, False])
def test_what_is_written_begins_inputs_as_what_was_read(
    tmp_path: Path, name: str, adds: bool
) -> None:
    """Whether with ``add_bos_token`` or without, and whatever is usual for the tokenizer."""
    special = {"bos_token": "</s>", "eos_token": "</s>", "add_bos_token": adds}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    if name == "vocab.json":  # as OPT's
        vocab = {"<pad>": 0, "</s>": 1, "y": 2, "e": 3, "s": 4, "ye": 5, "a": 6}
        (tmp_path / name).write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("y e\n")
    else:
        (tmp_path / name).write_bytes(sentencepiece_model(prefix=True))
    words = load_vocabulary(tmp_path)
    ids = words.encode("yes")
    bos = words.token_ids.eos
    assert words.encode_input("yes") == [*([bos] * adds), *ids]
    model: Any = SimpleNamespace(vocab_size=words.size, token_ids=words.token_ids)
    written = tmp_path / "written"
    written.mkdir()
    for file, content in tokenizer_files(tmp_path / name, model).items():
        (written / file).write_text(json.dumps(content), encoding="utf-8")
    assert load_vocabulary(written).encode_input("yes") == words.encode_input("yes")
    described = json.loads((written / "tokenizer_config.json").read_text())
    assert described["add_bos_token"] is adds
    # Other readers look at the tokenizer alone.
    (written / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert load_vocabulary(written).encode_input("yes") == words.encode_input("yes")


def test_ends_of_the_model_serve_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    """As in GPT-2's repository."""
    file = byte_level(tmp_path, config={})
    ids = TokenIds(pad=2, eos=2, start=-1)
    model: Any = SimpleNamespace(vocab_size=500, token_ids=ids)
    assert tokenizer_files(file, model)["tokenizer.json"] == file
    checkpoint = ModelCheckpoint(
        location="", source=tmp_path, config=model, params={}, vocabulary_file=file
    )
    words = checkpoint.vocabulary()
    assert words is not None and words.token_ids == ids


@pytest.mark.parametrize(
    ("config", "starts"),
    [
        ({"add_bos_token": True, "bos_token": "<|endoftext|>"}, [0]),
        ({"add_bos_token": True, "bos_token": {"content": "<|im_start|>", "lstrip": False}}, [1]),
        ({"add_bos_token": False, "bos_token": "<|endoftext|>"}, []),
        ({"bos_token": "<|endoftext|>"}, []),
    ],
)
def test_the_beginning_of_sequence_is_the_configs(
    tmp_path: Path, config: dict[str, Any], starts: list[int]
) -> None:
    words = HfTokenizer(byte_level(tmp_path, config={"eos_token": "<|im_end|>", **config}))
    assert words.encode_input("yes") == [*starts, *words.encode("yes")]


def test_the_beginning_of_sequence_is_the_post_processors(tmp_path: Path) -> None:
    import tokenizers

    file = byte_level(tmp_path)
    made = tokenizers.Tokenizer.from_file(str(file))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>",
        special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)],
    )
    file.write_text(made.to_str(), encoding="utf-8")
    words = HfTokenizer(file)
    assert words.encode_input("yes") == [1, *words.encode("yes")]


def test_without_an_end_of_sequence(tmp_path: Path) -> None:
    file = byte_level(tmp_path, config={})
    with pytest.raises(UserError, match="has no end-of-sequence token; name it as eos_token"):
        load_vocabulary(file)
    assert load_vocabulary(file, token_ids=TokenIds(eos=2, start=-1)).eos_id == 2
    with pytest.raises(UserError, match=r"id \(eos_token_id\) is -1, and the vocabulary has ids 0"):
        load_vocabulary(file, token_ids=TokenIds(eos=-1, start=-1))
    with pytest.raises(UserError, match="add_bos_token is true, but the tokenizer has no bos"):
        load_vocabulary(
            byte_level(tmp_path, config={"add_bos_token": True, "eos_token": "<|im_end|>"})
        )


def test_t5_needs_its_ids(tokenizers: dict[str, HfTokenizer]) -> None:
    with pytest.raises(UserError, match=r"T5 needs <pad> and </s> at ids 0 and 1, and <unk> at 2"):
        require_t5(tokenizers["json"])


def test_padding_that_is_written_out_is_text(tmp_path: Path) -> None:
    """An encoder-decoder's padding id marks empty positions, so no text may contain it."""
    file = byte_level(tmp_path)
    words = load_vocabulary(file, token_ids=TokenIds(pad=0, eos=2, start=0))
    text = "a <|endoftext|> b"
    assert 0 not in words.encode(text)
    assert words.decode(words.encode(text)) == text
    assert 0 in load_vocabulary(file).encode(text)  # in a decoder-only model it is a token


def test_added_tokens_beyond_the_embeddings_are_left_out(tmp_path: Path) -> None:
    import tokenizers

    file = byte_level(tmp_path)
    made = tokenizers.Tokenizer.from_file(str(file))
    size = made.get_vocab_size()
    made.add_special_tokens(["<image>"])
    file.write_text(made.to_str(), encoding="utf-8")
    assert load_vocabulary(file).size == size + 1
    words = load_vocabulary(file, max_size=size)
    assert words.size == size
    assert words.decode(words.encode("an <image>")) == "an <image>"


@pytest.mark.parametrize("family", ["smollm2", pytest.param("gemma3_270m", marks=pytest.mark.slow)])
def test_recorded_ids(shared: Path, request: pytest.FixtureRequest, family: str) -> None:
    """Ids, pieces and texts that transformers gives for the same files."""
    folder = shared / "fixtures/families" / family
    path: Path = request.getfixturevalue(family)
    words = load_vocabulary(path)
    texts = json.loads((folder / "texts.json").read_text())
    cases = np.load(folder / "cases.npz")
    recorded = (cases["input_ids"], cases["attention_mask"])
    rows = zip(texts["sentences"], texts["tokens"], *recorded, strict=True)
    for sentence, pieces, ids, mask in rows:
        encoded = words.encode_input(sentence)
        assert encoded == ids[mask.astype(bool)].tolist()
        assert words.decode(encoded) == sentence
        spelled = [piece.replace("Ġ", "▁").replace("Ċ", "\n") for piece in pieces]
        assert [words.pieces(i) for i in encoded] == spelled
    for prompt, ids in zip(texts["prompts"], cases["prompt_ids"], strict=True):
        encoded = words.encode_input(prompt)
        assert encoded == ids[: len(encoded)].tolist()
    greedy = zip(texts["greedy_texts"], cases["greedy_ids"], cases["greedy_len"], strict=True)
    for text, ids, length in greedy:
        assert words.decode(ids[:length].tolist()) == text.removesuffix("<|im_end|>")
    assert token_ids_of(read_metadata(path), path) == words.token_ids


def test_other_ends_of_a_gguf_file_end_texts_too(
    tokenizers: dict[str, HfTokenizer], tmp_path: Path
) -> None:
    """<|endoftext|> of Qwen's ends a text as well as <|im_end|>; SmolLM2's is its unknown token."""
    for more, ends in (({}, (0,)), ({"tokenizer.ggml.unknown_token_id": 0}, ())):
        metadata = gpt2_metadata(tokenizers["json"].path, "qwen2", **more)
        assert metadata["tokenizer.ggml.tokens"][0] == "<|endoftext|>"
        words = load_vocabulary(write_gguf(tmp_path / "model.gguf", metadata))
        assert words.token_ids.more_eos == ends


def metadata_cases() -> dict[str, tuple[Callable[[dict[str, Any]], None], str]]:
    def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
        return lambda metadata: metadata.update({f"tokenizer.ggml.{key}": value})

    def drop(key: str) -> Callable[[dict[str, Any]], None]:
        return lambda metadata: metadata.pop(f"tokenizer.ggml.{key}")

    return {
        "kind": (put("model", "bert"), "model is 'bert'; gpt2 and llama tokenizers are read"),
        "no kind": (drop("model"), "the file has no tokenizer"),
        "pre": (put("pre", "qwen3x"), r"pre: did you mean 'qwen2'\?"),
        "no tokens": (drop("tokens"), "the tokenizer has no tokens"),
        "no merges": (drop("merges"), "the tokenizer has no merges"),
        "twice": (put("tokens", ["a", "a"]), "the token 'a' has two ids"),
        "types": (put("token_type", [1, 1]), "tokens and 2 tokenizer.ggml.token_type"),
        "merge": (put("merges", ["a q"]), "the merge 'a q' is not of two pieces"),
        "end": (put("eos_token_id", 10**6), "eos_token_id is 1000000; the tokenizer has"),
        "ends": (put("eos_token_id", [1, 2]), "eos_token_id is .* the tokenizer has"),
        "kinds": (put("model", ["gpt2"]), "gpt2 and llama tokenizers are read"),
        "no end": (drop("eos_token_id"), "the tokenizer has no end-of-sequence token"),
        "flag": (put("add_bos_token", 7), "add_bos_token is 7; it must be true or false"),
    }


@pytest.mark.parametrize("case", metadata_cases())
def test_metadata_that_does_not_fit_is_refused(
    tokenizers: dict[str, HfTokenizer], tmp_path: Path, case: str
) -> None:
    change, message = metadata_cases()[case]
    metadata = gpt2_metadata(tokenizers["json"].path, "smollm")
    change(metadata)
    path = write_gguf(tmp_path / "model.gguf", metadata)
    with pytest.raises(UserError, match=message) as error:
        load_vocabulary(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_every_truncation_is_refused(tokenizers: dict[str, HfTokenizer], tmp_path: Path) -> None:
    data = tokenizers["gpt2"].path.read_bytes()
    path = tmp_path / "model.gguf"
    for length in (0, 3, 10, 24, 60, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="GGUF"):
            load_vocabulary(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + data[8:])
    with pytest.raises(UserError, match="GGUF version 1, but only versions 2 and 3"):
        load_vocabulary(path)


@settings(deadline=None, max_examples=50)
@given(at=st.integers(4, 2000), byte=st.integers(0, 255))
def test_damaged_metadata_is_read_or_refused(
    tokenizers: dict[str, HfTokenizer], at: int, byte: int
) -> None:
    source = tokenizers["gpt2"].path
    data = bytearray(source.read_bytes())
    data[at] = byte
    path = source.with_name("damaged.gguf")
    path.write_bytes(data)
    try:
        load_vocabulary(path).encode("a text")
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "in 1987's  end", ["in", " 1987", "'s", " ", " end"]),
        ("smollm", "in 1987's  end", ["in", " ", "1", "9", "8", "7", "'s", " ", " end"]),
        (
            "llama-bpe",
            "in 1987'S  end\n\nx",
            ["in", " ", "198", "7", "'S", " ", " end", "\n\n", "x"],
        ),
        ("qwen2", "in 1987\n x", ["in", " ", "1", "9", "8", "7", "\n", " x"]),
        ("bloom", "in 1987, x (y", ["in", " 1987", ",", " x", " (", "y"]),
        (
            "default",
            "in 19871's. `  end\n",
            ["in", " ", "198", "71", "'", "s", ".", " `", " ", " end", "\n"],
        ),
    ],
)
def test_pre_tokenizers(
    tokenizers: dict[str, HfTokenizer], tmp_path: Path, pre: str, text: str, words: list[str]
) -> None:
    metadata = gpt2_metadata(tokenizers["json"].path, pre)
    made = load_vocabulary(write_gguf(tmp_path / "model.gguf", metadata))
    parts = made._tokenizer.pre_tokenizer.pre_tokenize_str(text)  # type: ignore[union-attr]
    assert [text[start:stop] for _, (start, stop) in parts] == words
    assert made.decode(made.encode(text)) == text


@pytest.mark.parametrize(
    ("architecture", "pre"),
    [("gpt2", "gpt-2"), ("bloom", "bloom"), ("qwen2", "qwen2"), ("qwen3", "qwen2")],
)
def test_an_old_file_has_the_pre_tokenizer_of_its_architecture(
    tokenizers: dict[str, HfTokenizer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    architecture: str,
    pre: str,
) -> None:
    def splits(name: str, change: Callable[[dict[str, Any]], object]) -> list[Any]:
        metadata = gpt2_metadata(tokenizers["json"].path, pre)
        metadata["general.architecture"] = architecture
        change(metadata)
        made = load_vocabulary(write_gguf(tmp_path / name, metadata))
        text = "in 19871's. `  END\n\nx (y"
        parts: list[Any] = made._tokenizer.pre_tokenizer.pre_tokenize_str(text)  # type: ignore[union-attr]
        return parts

    known = splits("known.gguf", lambda metadata: None)
    assert splits("old.gguf", lambda metadata: metadata.pop("tokenizer.ggml.pre")) == known
    assert not caplog.records

    def of_another(metadata: dict[str, Any]) -> None:
        del metadata["tokenizer.ggml.pre"]
        metadata["general.architecture"] = "llama"

    default = splits("llama.gguf", of_another)
    assert "does not name its pre-tokenizer" in caplog.text
    assert default == splits("default.gguf", lambda m: m.update({"tokenizer.ggml.pre": "default"}))


def test_known_pre_tokenizers_are_built(tokenizers: dict[str, HfTokenizer], tmp_path: Path) -> None:
    for pre in PRE_TOKENIZERS:
        bos = {"tokenizer.ggml.bos_token_id": 0}
        metadata = gpt2_metadata(tokenizers["json"].path, pre, **bos)
        words = load_vocabulary(write_gguf(tmp_path / "model.gguf", metadata))
        assert words.decode(words.encode(CORPUS[4])) == CORPUS[4]
        # As in llama.cpp, where the file does not say so.
        llama3 = pre in ("llama-bpe", "llama3", "llama-v3", "falcon3")
        assert words.input_start == ((0,) if llama3 else ())
