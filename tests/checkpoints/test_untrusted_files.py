"""Files that claim more than they hold, and JSON that Python's reader trips over, everywhere."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.array_files import (
    map_safetensors,
    require_stored,
    safetensors_of,
)
from prompt_tuning_jax.checkpoints.hf.flax_msgpack import scan_tree
from prompt_tuning_jax.checkpoints.hf.pretrained import hf_name, open_hf
from prompt_tuning_jax.checkpoints.inspect import open_source
from prompt_tuning_jax.checkpoints.parameters import EMBEDDING, LOGITS, PROMPT
from prompt_tuning_jax.checkpoints.prompt_file import load_prompt, read_prompt
from prompt_tuning_jax.checkpoints.t5x.reader import open_t5x
from prompt_tuning_jax.checkpoints.t5x.writer import write_t5x
from prompt_tuning_jax.checkpoints.tuned_checkpoint import open_tuned
from prompt_tuning_jax.config.config_file import run_config
from prompt_tuning_jax.config.gin import experiment_from_gin
from prompt_tuning_jax.data.tasks.row_files import RowFile
from prompt_tuning_jax.data.vocabularies.hf_tokenizer import HfTokenizer
from prompt_tuning_jax.data.vocabularies.tokenizer_files import read_added_tokens, vocabulary_file
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.training.logging import read_metrics
from tests.convert_cases import CONFIG, hf_model, params, prompt, t5x_model
from tests.limits import bounded

HUGE = 20 * 2**30
BAD_JSON = {
    "brackets": "[" * 100_000,
    "objects": '{"a":' * 100_000,
    "digits": '{"a": ' + "9" * 5000 + "}",
    "surrogate": r'{"a": "\ud800"}',
    "nan": '{"a": NaN}',
    "overflow": '{"a": 1e999}',
    "latin1": b'{"a": "\xe9"}',
    "cut": '{"a": 1',
    "list": "[1, 2]",
    "empty": "",
}


def refusal(read: Callable[[], object]) -> str:
    with bounded(), pytest.raises(UserError) as raised:
        read()
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 1500
    return message


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_model(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def t5x(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return t5x_model(tmp_path_factory.mktemp("t5x"), with_prompt=True)


@pytest.fixture
def model(hf: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(hf, tmp_path / "model"))


def of_metadata(key: str) -> Callable[[Path, bytes], object]:
    """The text as a value of a tuned file's metadata."""

    def read(folder: Path, data: bytes) -> object:
        metadata = {"method": '{"class": "LoRA"}', key: data.decode(errors="replace")}
        file = folder / "tuned.safetensors"
        file.write_bytes(safetensors_of({"x": prompt()}, metadata=metadata))
        stored = open_tuned(file)
        if key == "method":
            from prompt_tuning_jax.checkpoints.tuned_checkpoint import method_of

            return method_of(stored, file)
        return stored

    return read


def of_file(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    def write_and_read(folder: Path, data: bytes) -> object:
        (folder / name).write_bytes(data)
        return read(folder)

    return write_and_read


def peft_folder(folder: Path) -> object:
    array = safetensors_of({"prompt_embeddings": prompt()}, metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").write_bytes(array)
    return load_prompt(folder)


def sharded(folder: Path) -> object:
    os.rename(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    return open_hf(folder)


READERS: dict[str, Callable[[Path, bytes], object]] = {
    "config.json": of_file("config.json", open_hf),
    "index": of_file("model.safetensors.index.json", sharded),
    "tokenizer_config.json": of_file("tokenizer_config.json", vocabulary_file),
    "adapter_config.json": of_file("adapter_config.json", peft_folder),
    "experiment.json": of_file("experiment.json", lambda folder: run_config(str(folder))),
    "method": of_metadata("method"),
    "labels": of_metadata("labels"),
    "tasks": of_metadata("tasks"),
}


@pytest.mark.parametrize("bad", BAD_JSON)
@pytest.mark.parametrize("reader", READERS)
def test_json_that_cannot_be_read(model: Path, reader: str, bad: str) -> None:
    if (reader, bad) == ("tasks", "list"):
        pytest.skip("a list is what it is")
    text = BAD_JSON[bad]
    data = text.encode() if isinstance(text, str) else text
    if reader in ("method", "labels", "tasks") and bad == "latin1":
        data = b'{"a": 1e5, "b":'
    message = refusal(lambda: READERS[reader](model, data))
    assert str(model) in message


@pytest.mark.parametrize("bad", ["brackets", "digits", "surrogate", "nan"])
def test_orbax_metadata_that_cannot_be_read(tmp_path: Path, bad: str) -> None:
    (tmp_path / "state").mkdir()
    text = BAD_JSON[bad]
    assert isinstance(text, str)
    (tmp_path / "state" / "_METADATA").write_text(text)
    assert "state/_METADATA" in refusal(lambda: open_t5x(tmp_path))


def test_a_measurement_that_cannot_be_read(tmp_path: Path) -> None:
    good = '{"kind": "eval", "step": 1, "metrics": []}\n'
    for bad in ("brackets", "digits", "surrogate"):
        (tmp_path / "metrics.jsonl").write_text(f"{good}{BAD_JSON[bad]!s}\n{good}")
        assert "line 2" in refusal(lambda: read_metrics(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize("shard", ["x" * 5000, "../x", "a/b", "", ".", "\u00e9" * 200, 7, None])
def test_a_shard_is_the_name_of_a_file_here(model: Path, shard: object) -> None:
    index = {"weight_map": {hf_name(EMBEDDING): shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()
    assert "name a file in this folder" in refusal(lambda: open_hf(model))


def sparse(path: Path, head: bytes, size: int = HUGE) -> Path:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


def npy_head(shape: tuple[int, ...]) -> bytes:
    import io

    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def safetensors_head(name: str, shape: tuple[int, ...], **metadata: str) -> bytes:
    size = int(np.prod(shape)) * 4
    header = {"__metadata__": metadata, name: {"dtype": "F32", "shape": shape}}
    header[name]["data_offsets"] = [0, size]  # type: ignore[assignment]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def test_a_file_that_is_nearly_all_holes_is_not_read(
    model: Path, t5x: Path, tmp_path: Path
) -> None:
    """A sparse file of 20 GB takes a kilobyte of the disk."""
    rows = HUGE // 4 // 1024
    head = npy_head((rows, 1024))
    file = sparse(tmp_path / "p.npy", head, len(head) + rows * 4096)
    assert "the copy is incomplete" in refusal(lambda: load_prompt(file))
    head = safetensors_head("prompt", (rows, 1024))
    file = sparse(tmp_path / "p.safetensors", head, len(head) + rows * 4096)
    assert "the copy is incomplete" in refusal(lambda: load_prompt(file))
    head = safetensors_head("x", (rows, 1024), method='{"class": "LoRA"}')
    file = sparse(tmp_path / "t.safetensors", head, len(head) + rows * 4096)
    assert "the copy is incomplete" in refusal(lambda: open_tuned(file))
    for name in ("model.safetensors", "flax_model.msgpack"):
        (model / "model.safetensors").unlink(missing_ok=True)
        sparse(model / name, b"\x08\0\0\0\0\0\0\0{}      ")
        assert str(model / name) in refusal(lambda: open_hf(model))
        (model / name).unlink()
    (tmp_path / "ckpt").mkdir()
    sparse(tmp_path / "ckpt" / "checkpoint", b"\x81")
    assert "bytes" in refusal(lambda: open_t5x(tmp_path / "ckpt"))
    shutil.copytree(t5x, tmp_path / "chunks")
    header = next(iter(sorted((tmp_path / "chunks").rglob(".zarray"))))
    for file in (header.with_name("0.0"), header):
        sparse(file, file.read_bytes())
        assert str(file) in refusal(lambda: open_t5x(tmp_path / "chunks"))
        file.unlink()
    (tmp_path / "x.gin").write_bytes(b"")
    sparse(tmp_path / "x.gin", b"a = 1\n")
    assert "bytes" in refusal(lambda: experiment_from_gin([str(tmp_path / "x.gin")]))
    sparse(tmp_path / "metrics.jsonl", b"")
    assert "the copy is incomplete" in refusal(lambda: read_metrics(tmp_path / "metrics.jsonl"))
    sparse(tmp_path / "rows.jsonl.gz", b"")
    rows = RowFile(path=tmp_path / "rows.jsonl.gz").rows()
    assert "the copy is incomplete" in refusal(lambda: list(rows))
    sparse(model / "config.json", b'{"model_type": "t5"')
    assert "too large" in refusal(lambda: open_hf(model))


def test_a_prompt_of_more_numbers_than_any_is_refused_by_its_shape(tmp_path: Path) -> None:
    """Also where the disk holds all of them: what is mapped is not copied."""
    array = np.lib.stride_tricks.as_strided(
        np.zeros(1, np.float32), shape=(2**20, 1024), strides=(0, 0)
    )
    from prompt_tuning_jax.checkpoints.array_files import checked_prompt

    assert "at most" in refusal(lambda: checked_prompt(array, of="the prompt"))


def test_bfloat16_in_an_npy(tmp_path: Path) -> None:
    array = prompt().astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "p.npy", array)
    assert np.load(tmp_path / "p.npy").dtype.kind == "V"  # NumPy has no name for it
    np.testing.assert_array_equal(load_prompt(tmp_path / "p.npy"), array.astype(np.float32))
    assert read_prompt(tmp_path / "p.npy").prompt_PD.dtype == ml_dtypes.bfloat16
    np.save(tmp_path / "v4.npy", np.zeros((2, 3), "V4"))
    assert "floating-point" in refusal(lambda: load_prompt(tmp_path / "v4.npy"))


def test_a_repeated_name_in_a_header_is_not_believed_twice(tmp_path: Path) -> None:
    entry = '"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    lie = '"x": {"dtype": "F32", "shape": [1000000000], "data_offsets": [0, 4000000000]}'
    for text in (f"{{{lie}, {entry}}}", f"{{{entry}, {lie}}}"):
        data = text.encode() + b" " * (-len(text) % 8)
        file = tmp_path / "x.safetensors"
        file.write_bytes(len(data).to_bytes(8, "little") + data + b"\0" * 8)
        with bounded():
            try:
                assert map_safetensors(file).arrays["x"].shape == (2,)
            except UserError:
                continue


def zarr(folder: Path, **fields: Any) -> None:
    path = next(p for p in sorted(folder.glob("target.*")) if (p / ".zarray").exists())
    header = json.loads((path / ".zarray").read_text()) | fields
    (path / ".zarray").write_text(json.dumps(header))


@pytest.mark.parametrize(
    "fields",
    [
        {"chunks": [2147483648, 16]},
        {"chunks": [2**40, 16]},
        {"chunks": [2**20, 2**10]},
        {"shape": [2**31, 2**31]},
        {"dtype": "|V1000000000"},
        {"chunks": [0, 1]},
        {"chunks": [-1, 1]},
        {"shape": []},
        {"chunks": None},
        {"dtype": [["a", "<f4"]] * 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("told", [True, False])
def test_a_header_of_a_zarr_array_is_compared_first(
    t5x: Path, tmp_path: Path, fields: dict[str, Any], told: bool
) -> None:
    """TensorStore ends the process where the memory for a chunk cannot be had."""
    from flax import serialization

    folder = Path(shutil.copytree(t5x, tmp_path / "copy"))
    zarr(folder, **fields)
    if not told:  # the index need not say the shape
        index = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
        specs = [index["optimizer"]["target"]]
        while specs:
            one = specs.pop()
            if isinstance(one, dict):
                one.pop("metadata", None)
                one.pop("dtype", None)
                specs += list(one.values())
        (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(index))

    def read() -> None:
        for array in open_t5x(folder).params.values():
            array.whole()

    assert str(folder) in refusal(read)


def test_lengths_in_an_index_cost_nothing_until_they_are_there(tmp_path: Path) -> None:
    """Of msgpack's own reader each header of a list makes a list of that many."""
    for head in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdd\x00\x0f\xff\xff"):
        (tmp_path / "checkpoint").write_bytes(b"\x81\xa1a" + head * 200_000)
        assert str(tmp_path) in refusal(lambda: open_t5x(tmp_path))
    (tmp_path / "checkpoint").write_bytes(b"\x81\xa1a\xdd\x00\x21\x00\x00" + b"\x80" * 0x210000)
    assert "values" in refusal(lambda: open_t5x(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "encoder/layers_1/prompt/prompt",
        "encoder/layers_0/attention/prompt/prompt/prompt",
        "decoder/prompt/prompt/prompt",
        "encoder/prompts/deep_prompt",
    ],
)
@pytest.mark.parametrize("with_first", [True, False])
def test_prompts_of_layers_are_not_read_as_one(tmp_path: Path, name: str, with_first: bool) -> None:
    from flax import serialization

    found = params() | ({PROMPT: prompt()} if with_first else {})
    folder = write_t5x(tmp_path, found, step=1)
    index = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    at = index["optimizer"]["target"]
    *parents, last = name.split("/")
    for parent in parents:
        at = at.setdefault(parent, {})
    at[last] = prompt()
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(index))
    for read in (load_prompt, read_prompt):
        message = refusal(lambda read=read: read(folder))
        assert name in message
    assert name in refusal(lambda: open_source(str(folder)))


TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "Unigram",
        "unk_id": 2,
        "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["a", -1.0]],
    },
}


def split_at(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}}
    return {"pre_tokenizer": {**split, "behavior": "Isolated", "invert": False}}


@pytest.mark.parametrize(
    "fields",
    [
        split_at("(a+)+$"),
        split_at("("),
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}},
        {"model": {"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0]]}},
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
        {"model": {"type": "Nothing"}},
    ],
    ids=str,
)
def test_a_tokenizer_that_the_library_panics_at(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], fields: dict[str, Any]
) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(TOKENIZER))
    assert HfTokenizer(path).encode("aa") == [3, 3]
    path.write_text(json.dumps(TOKENIZER | fields))
    assert str(path) in refusal(lambda: HfTokenizer(path))
    assert capfd.readouterr().err == ""


def test_many_added_tokens_take_no_long_time(tmp_path: Path) -> None:
    tokens = {str(i): {"content": f"<{i % 99_999}>"} for i in range(100_000)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    assert "the token '<0>' has two ids" in refusal(lambda: read_added_tokens(tmp_path))


def test_arrays_within_arrays_are_refused() -> None:
    data = b"\xc0"
    for _ in range(2000):  # each an array's record that holds the one before
        data = b"\xc9" + len(data).to_bytes(4, "big") + b"\x01" + data
    with bounded(), pytest.raises(ValueError, match="nested too deeply"):
        scan_tree(memoryview(b"\x81\xa1a" + data))


class Repeated:
    """A torch tensor of 100 by 100,000,000 numbers that stores one: its strides are 0."""

    def numel(self) -> int:
        return 10**10

    def element_size(self) -> int:
        return 4

    def untyped_storage(self) -> Any:
        return SimpleNamespace(nbytes=lambda: 4)


def test_a_tensor_that_repeats_its_numbers_is_refused() -> None:
    message = refusal(lambda: require_stored(Repeated(), of="file: name"))
    assert message.startswith("file: name ")


def test_the_fixtures_have_what_the_tests_change() -> None:
    assert {EMBEDDING, LOGITS} <= params().keys()
    assert CONFIG.embed_dim == prompt().shape[1]
