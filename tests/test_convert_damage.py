"""What is damaged, unfinished or no checkpoint: one line from the command, nothing written."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import serialization

from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
from prompt_tuning_jax.checkpoints.parameters import PROMPT
from prompt_tuning_jax.checkpoints.peft.adapter_file import write_peft
from prompt_tuning_jax.checkpoints.prompt_file import save_prompt
from tests import convert_cases as cases
from tests.convert_cases import Program, hf_model, orbax_model, prompt, t5x_model

EMBEDDING = "target.token_embedder.embedding"


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Program:
    return Program(capsys, tmp_path)


def index_of(folder: Path) -> Any:
    return serialization.msgpack_restore((folder / "checkpoint").read_bytes())


def edit_spec(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = index_of(folder)
    change(index["optimizer"]["target"]["token_embedder"]["embedding"])
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(index))


def chunk_of(folder: Path) -> Path:
    return next((folder / EMBEDDING).glob("[0-9]*"))


def cut_chunk(folder: Path) -> None:
    chunk_of(folder).write_bytes(chunk_of(folder).read_bytes()[:500])


def flip_chunk(folder: Path) -> None:
    data = bytearray(chunk_of(folder).read_bytes())
    data[len(data) // 2] ^= 0xFF
    chunk_of(folder).write_bytes(bytes(data))


def other_shape(folder: Path) -> None:
    edit_spec(folder, lambda spec: spec["metadata"].update(shape=[3, 3]))


def inline_of_other_shape(folder: Path) -> None:
    index = index_of(folder)
    index["optimizer"]["target"]["encoder"]["encoder_norm"]["scale"] = np.ones(3, np.float32)
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(index))


def unfinished(folder: Path) -> Path:
    return folder.rename(folder.with_name("checkpoint_9.tmp-123"))


def without_index(folder: Path) -> None:
    (folder / "checkpoint").unlink()


def path_out(folder: Path) -> None:
    edit_spec(folder, lambda spec: spec["kvstore"].update(path="../elsewhere"))


def link_out(folder: Path) -> None:
    shutil.move(folder / EMBEDDING, folder.parent / "elsewhere")
    (folder / EMBEDDING).symlink_to("../elsewhere")


T5X: list[tuple[str, Callable[[Path], Any], str]] = [
    ("a chunk cut short", cut_chunk, "damaged or incomplete for token_embedder/embedding"),
    ("a chunk with a wrong byte", flip_chunk, "damaged or incomplete for token_embedder"),
    ("a chunk missing", lambda f: chunk_of(f).unlink(), "damaged or incomplete for token_embedder"),
    ("an array missing", lambda f: shutil.rmtree(f / EMBEDDING), "the copy is incomplete"),
    ("an unfinished save", unfinished, "unfinished"),
    ("an index missing", without_index, "the copy is incomplete"),
    ("an index cut", lambda f: cut(f / "checkpoint"), "is damaged, or not a T5X index"),
    ("another shape", other_shape, "the index says [3, 3]"),
    ("a wrong shape", inline_of_other_shape, "encoder_norm/scale"),
    ("a driver", lambda f: edit_spec(f, lambda s: s["kvstore"].update(driver="http")), "'http'"),
    ("a format", lambda f: edit_spec(f, lambda s: s.update(driver="n5")), "'n5', not zarr"),
    ("a path out", path_out, "outside the folder"),
    ("a link out", link_out, "outside the folder"),
]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(("damage", "message"), [c[1:] for c in T5X], ids=[c[0] for c in T5X])
def test_damaged_t5x(
    program: Program, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    source = t5x_model(tmp_path / "t5x", with_prompt=True)
    source = damage(source) or source
    for to in ("hf", "t5x"):
        assert message in program.refused("convert", source, tmp_path / "out", "--to", to)
    assert message in program.refused("inspect", source)
    assert message in program.refused("inspect", source, "--json")


def test_damaged_orbax(program: Program, tmp_path: Path) -> None:
    source = orbax_model(tmp_path, {**cases.params(), PROMPT: prompt()}, use_ocdbt=True)
    words = ("convert", source, tmp_path / "out", "--to", "hf")
    commit = source / "state" / "commit_success.txt"
    mark = commit.read_bytes()
    commit.unlink()
    assert "unfinished" in program.refused(*words)
    commit.write_bytes(mark)
    for file in (source / "state" / "ocdbt.process_0" / "d").iterdir():
        cut(file)
    for file in (source / "state" / "d").iterdir():
        cut(file)
    assert "damaged or incomplete" in program.refused(*words)
    assert "damaged" in program.refused("convert", source, tmp_path / "p.npy")
    (source / "state" / "_METADATA").write_text("{")
    assert "is damaged" in program.refused("convert", source, tmp_path / "p.npy")


def missing_shard(folder: Path) -> None:
    next(folder.glob("model-00002-*")).unlink()


def shard_elsewhere(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["shared.weight"] = "../model.safetensors"
    file.write_text(json.dumps(index))


def shard_of_another(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shards = index["weight_map"]
    here = shards["shared.weight"]
    shards["shared.weight"] = next(shard for shard in shards.values() if shard != here)
    file.write_text(json.dumps(index))


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "d_ff": 33}))


def one_more_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": 2}))


HF: list[tuple[str, Callable[[Path], Any], str]] = [
    ("a shard missing", missing_shard, "shards that are missing"),
    ("a shard out of the folder", shard_elsewhere, "name a file in this folder"),
    ("a shard of another array", shard_of_another, "does not contain it"),
    ("a shard cut", lambda f: cut(next(f.glob("model-00002-*"))), "is damaged"),
    ("an index cut", lambda f: cut(f / "model.safetensors.index.json"), "not an index of shards"),
    ("a wrong shape", other_config, "by config.json it is"),
    ("a layer missing", one_more_layer, "has no arrays of encoder.block.1, which config.json"),
    ("no config", lambda f: (f / "config.json").unlink(), "config.json"),
]


@pytest.mark.parametrize(("damage", "message"), [c[1:] for c in HF], ids=[c[0] for c in HF])
def test_damaged_hf(
    program: Program, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    write_hf(tmp_path / "hf", cases.CONFIG, cases.params(), dtype="stored", max_shard_bytes=15_000)
    damage(tmp_path / "hf")
    words = ("convert", tmp_path / "hf", tmp_path / "out", "--to", "t5x")
    assert message in program.refused(*words)
    assert message in program.refused("inspect", tmp_path / "hf")


def test_damaged_hf_in_one_file(program: Program, tmp_path: Path) -> None:
    source = hf_model(tmp_path / "hf")
    cut(source / "model.safetensors")
    assert "damaged" in program.refused("convert", source, tmp_path / "out", "--to", "t5x")
    (source / "model.safetensors").unlink()
    assert "no weights" in program.refused("convert", source, tmp_path / "out", "--to", "t5x")


def npy(array: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.save(path, array, allow_pickle=True)


def cut_npy(path: Path) -> None:
    np.save(path, prompt())
    cut(path)


def cut_safetensors(path: Path) -> None:
    save_prompt(path, prompt(), format="safetensors")
    cut(path)


def of_a_model(path: Path) -> None:
    model = hf_model(path.parent / "model")
    shutil.move(model / "model.safetensors", path)
    shutil.rmtree(model)


def cut_peft(path: Path) -> None:
    write_peft(path, prompt(), base_model_name_or_path="org/t5")
    cut(path / "adapter_model.safetensors")


def other_adapter(path: Path) -> None:
    write_peft(path, prompt(), base_model_name_or_path="org/t5")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "ADALORA"}))


PROMPTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("an npy cut", cut_npy, "is a damaged .npy file"),
    ("a pickle in an npy", npy(np.array([[{}]], object)), "contains Python objects"),
    ("a pickle", lambda p: p.write_bytes(pickle.dumps([1])), "pickles are never loaded"),
    ("a safetensors cut", cut_safetensors, "is a damaged .safetensors file"),
    ("a model's file", of_a_model, "a prompt's file has one array 'prompt'"),
    ("an empty file", lambda p: p.touch(), "it is empty"),
    ("a text", lambda p: p.write_text("hello, hello"), "is neither an .npy nor a .safetensors"),
    ("a vector", npy(np.ones(3, np.float32)), "a prompt has two dimensions"),
    ("several in one", npy(np.ones((2, 3, 4), np.float32)), "a prompt has two dimensions"),
    ("whole numbers", npy(np.ones((3, 4), np.int32)), "floating-point numbers"),
    ("infinity", npy(np.full((3, 4), np.inf, np.float32)), "not finite"),
    ("an adapter cut", cut_peft, "damaged"),
    ("another adapter", other_adapter, 'peft_type is "ADALORA"'),
    ("a checkpoint without", lambda p: t5x_model(p.parent).rename(p), "without a prompt"),
    ("an empty folder", lambda p: p.mkdir(), "is a folder without a prompt"),
]


@pytest.mark.parametrize(("make", "message"), [c[1:] for c in PROMPTS], ids=[c[0] for c in PROMPTS])
def test_what_is_no_prompt(
    program: Program, tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    source = tmp_path / "p"
    make(tmp_path / "made.npy")
    (tmp_path / "made.npy").rename(source)
    for out in (("o.safetensors",), ("o.npy",), ("o", "--to", "peft", "--model", "org/t5")):
        assert message in program.refused("convert", source, tmp_path / out[0], *out[1:])
    if source.is_file() or (source / "adapter_config.json").exists():
        assert message in program.refused("inspect", source)
