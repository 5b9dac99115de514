import json
import shutil
from pathlib import Path
from typing import Any

import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from prompt_tuning_jax.checkpoints.hf.pretrained import open_hf, read_hf, write_hf
from prompt_tuning_jax.checkpoints.hf.weights import open_weights
from prompt_tuning_jax.checkpoints.parameters import parameter_shapes
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.config import T5Config

CONFIG = T5Config(
    vocab_size=40,
    embed_dim=6,
    num_heads=2,
    head_dim=5,
    mlp_dim=12,
    num_encoder_layers=2,
    num_decoder_layers=1,
)
PARTS = (slice(None), slice(1, 3), slice(-2, None), slice(2, 2), slice(1, 99))


def random_params(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = parameter_shapes(CONFIG)
    return {k: random.standard_normal(s, np.float32).astype(dtype) for k, s in shapes.items()}


def assert_reads(folder: Path, params: dict[str, np.ndarray]) -> None:
    """The parameters whole and in parts, bit for bit."""
    config, lazy, _ = open_hf(folder)
    assert config == CONFIG
    assert lazy.keys() == params.keys()
    for name, array in lazy.items():
        assert (array.shape, array.dtype) == (params[name].shape, params[name].dtype), name
        np.testing.assert_array_equal(array.whole(), params[name], err_msg=name)
        for part in PARTS:
            index = (part, slice(None))[: len(array.shape)]
            np.testing.assert_array_equal(array.read(index), params[name][index], err_msg=name)
            index = (slice(None), part)[-len(array.shape) :]
            np.testing.assert_array_equal(array.read(index), params[name][index], err_msg=name)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_hf(tmp_path / "m", CONFIG, random_params(), dtype="float32")
    return tmp_path / "m"


def as_flax(folder: Path) -> dict[str, np.ndarray]:
    """Arrays as transformers' Flax T5 names and lays them, the safetensors file removed."""
    arrays = {}
    for name, array in load_file(folder / "model.safetensors").items():
        path = name.replace(".", "/")
        if "layer_norm" in path:
            arrays[path] = array
        elif "shared" in path or "relative_attention_bias" in path:
            arrays[path.removesuffix("weight") + "embedding"] = array
        else:
            arrays[path.removesuffix("weight") + "kernel"] = np.ascontiguousarray(array.T)
    (folder / "model.safetensors").unlink()
    return arrays


def save_flax(path: Path, arrays: dict[str, Any]) -> None:
    path.write_bytes(flax.serialization.to_bytes(unflatten_dict(arrays, sep="/")))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_flax(tmp_path: Path, dtype: Any) -> None:
    params = random_params(dtype)
    write_hf(tmp_path, CONFIG, params, dtype="stored")
    arrays = as_flax(tmp_path)
    save_flax(tmp_path / "flax_model.msgpack", {k: jnp.asarray(v) for k, v in arrays.items()})
    assert_reads(tmp_path, params)


def test_flax_in_shards(model: Path) -> None:
    arrays = as_flax(model)
    weight_map = {}
    for i in range(3):
        shard = dict(list(arrays.items())[i::3])
        save_flax(model / f"flax_model-{i}.msgpack", shard)
        weight_map |= dict.fromkeys(shard, f"flax_model-{i}.msgpack")
    index = model / "flax_model.msgpack.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_reads(model, random_params())


def test_flax_in_chunks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Flax cuts arrays above 1 GiB; here every one of more than 100 bytes.
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)
    save_flax(model / "flax_model.msgpack", as_flax(model))
    assert b"__msgpack_chunked_array__" in (model / "flax_model.msgpack").read_bytes()
    assert_reads(model, random_params())


def test_damaged_flax(model: Path) -> None:
    file = model / "flax_model.msgpack"
    arrays = as_flax(model)
    save_flax(file, arrays)
    raw = file.read_bytes()
    for size in [*range(0, 200, 7), len(raw) // 2, len(raw) - 1]:
        file.write_bytes(raw[:size])
        with pytest.raises(UserError, match=r"flax_model\.msgpack is damaged"):
            open_hf(model)
    for wrong in (raw + b"\0", b"\x81" * 5000, b"\x93\1\2\3", b"\x81\xa1a\xc7\x01\x05x"):
        file.write_bytes(wrong)
        with pytest.raises(UserError, match=r"flax_model\.msgpack is damaged"):
            open_hf(model)
    file.write_bytes(raw.replace(b"\xa7float32", b"\xa7float16"))
    with pytest.raises(UserError, match=r"is damaged: .* bytes for"):
        open_hf(model)
    save_flax(file, {**arrays, "shared/embedding": np.zeros((40, 6), np.int32)})
    with pytest.raises(UserError, match="stored as int32"):
        open_hf(model)


def test_what_is_not_a_float_is_refused(model: Path) -> None:
    arrays = load_file(model / "model.safetensors")
    arrays["shared.weight"] = arrays["shared.weight"].astype(np.int8)
    save_file(arrays, model / "model.safetensors")
    with pytest.raises(UserError, match=r"shared\.weight is stored as I8; supported: float32"):
        open_hf(model)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_hf(tmp_path / "s", CONFIG, random_params(), dtype="float32", max_shard_bytes=3000)
    return tmp_path / "s"


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    kept = {k: v for k, v in (index["weight_map"] | changes).items() if v is not None}
    path.write_text(json.dumps(index | {"weight_map": kept}))


def test_shards(sharded: Path) -> None:
    assert_reads(sharded, random_params())


def test_a_cache_of_links(sharded: Path, tmp_path: Path) -> None:
    # The hub's cache: names of files are links to contents outside of the folder.
    (tmp_path / "snapshot").mkdir()
    for file in sharded.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(f"../s/{file.name}")
    assert_reads(tmp_path / "snapshot", random_params())


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / sorted(f.name for f in sharded.glob("model-*"))[1]).unlink()
    with pytest.raises(
        UserError, match=r"1 of \d+ shards that are missing, for instance model-00002"
    ):
        open_hf(sharded)


def test_index_and_shards_that_differ(sharded: Path) -> None:
    edit_index(sharded, **{"shared.weight": "model-00002-of-00003.safetensors"})
    first = sorted(f.name for f in sharded.glob("model-*"))[0]
    edit_index(sharded, **{"shared.weight": first, "extra.weight": first})
    with pytest.raises(UserError, match=rf"lists extra\.weight in {first}, which does not"):
        open_hf(sharded)
    edit_index(sharded, **{"shared.weight": None, "extra.weight": None})
    with pytest.raises(UserError, match=rf"does not list shared\.weight, which {first} contains"):
        open_hf(sharded)


@pytest.mark.parametrize("shard", ["../m/x.safetensors", "/etc/passwd", "..", "a\\b", "", 3])
def test_paths_that_leave_the_folder(sharded: Path, shard: Any) -> None:
    edit_index(sharded, **{"shared.weight": shard})
    with pytest.raises(UserError, match=r"shared\.weight is in .*must name a file"):
        open_hf(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_no_index(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="is not an index of shards"):
        open_hf(sharded)


def test_torch_files_without_torch(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"install torch .* or convert the model to"):
        open_hf(model)


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch(tmp_path: Path, dtype: Any, old_format: bool) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    params = random_params(getattr(ml_dtypes, dtype, dtype))
    write_hf(tmp_path, CONFIG, params, dtype="stored")
    arrays = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    tensors = {
        k: torch.from_numpy(v.astype(np.float32)).to(getattr(torch, dtype))
        for k, v in arrays.items()
    }
    file, rest = tmp_path / "pytorch_model.bin", list(tensors)[5:]
    torch.save(tensors, file, _use_new_zipfile_serialization=not old_format)
    assert_reads(tmp_path, params)
    # In shards
    first = {k: v for k, v in tensors.items() if k not in rest}
    torch.save(first, tmp_path / "a.bin")
    torch.save({k: tensors[k] for k in rest}, tmp_path / "b.bin")
    file.unlink()
    weight_map = dict.fromkeys(rest, "b.bin") | dict.fromkeys(first, "a.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_reads(tmp_path, params)


def test_torch_files_run_no_code(model: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (model / "model.safetensors").unlink()
    file = model / "pytorch_model.bin"
    for content in ({"shared.weight": Evil()}, Evil()):
        torch.save(content, file)
        with pytest.raises(
            UserError, match=r"pytorch_model\.bin is damaged, or contains more than"
        ):
            open_hf(model)
    assert not (tmp_path / "ran").exists()
    torch.save([torch.zeros(3)], file)
    with pytest.raises(UserError, match="contains a list and not tensors"):
        open_hf(model)
    torch.save({"shared.weight": 3}, file)
    with pytest.raises(UserError, match=r"shared\.weight is a int and not a plain tensor"):
        open_hf(model)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        open_hf(model)


def test_the_first_format_is_taken(model: Path) -> None:
    (model / "flax_model.msgpack").write_bytes(b"")
    (model / "pytorch_model.bin").write_bytes(b"")
    assert open_weights(model)[0] == model / "model.safetensors"


@pytest.mark.parametrize("name", ["a_t5_10", "b_t5_11", "c_flan", "d_mt5", "e_byt5"])
@pytest.mark.parametrize("config_file", ["config.json", "config.v5.json"])
def test_recorded_models_through_flax_and_shards(
    shared: Path, tmp_path: Path, name: str, config_file: str
) -> None:
    source = shared / "fixtures" / "hf" / name
    config, params, _ = read_hf(source)
    write_hf(tmp_path / "m", config, params, dtype="stored")
    shutil.copyfile(source / config_file, tmp_path / "m" / "config.json")
    save_flax(tmp_path / "m" / "flax_model.msgpack", as_flax(tmp_path / "m"))
    write_hf(tmp_path / "n", *open_hf(tmp_path / "m")[:2], dtype="stored", max_shard_bytes=100_000)
    read_config, read_params, _ = read_hf(tmp_path / "n")
    assert read_config == config
    assert read_params.keys() == params.keys()
    for key, array in params.items():
        assert array.dtype == read_params[key].dtype
        np.testing.assert_array_equal(array, read_params[key])
