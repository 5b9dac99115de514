"""Every layout of T5X's checkpoints, made here in other sizes, and those that T5X itself wrote."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.location import CheckpointFolder, is_t5x
from prompt_tuning_jax.checkpoints.parameters import PROMPT, config_of, parameter_shapes
from prompt_tuning_jax.checkpoints.t5x.reader import T5XCheckpoint, open_t5x, read_t5x
from prompt_tuning_jax.checkpoints.t5x.writer import write_t5x
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.config import T5Config
from tests.convert_cases import orbax_model

BF16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = T5Config(
    vocab_size=37,
    embed_dim=6,
    num_heads=3,
    head_dim=5,
    mlp_dim=10,
    num_encoder_layers=3,
    num_decoder_layers=2,
    relpos_num_buckets=4,
    relpos_max_distance=8,
)
VARIANTS = {
    "tiny_t5x/checkpoint_3": ("t5x", 3, False),
    "prompted_tiny_t5x/checkpoint_3": ("t5x", 3, False),
    "scan_t5x/checkpoint_7": ("t5x", 7, True),
    "orbax/tiny/checkpoint_3": ("t5x_orbax", 3, False),
    "orbax/scan/checkpoint_7": ("t5x_orbax", 7, True),
}


def random_params(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(CONFIG) | {PROMPT: (4, CONFIG.embed_dim)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def stacked(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As a scan-layers model has them; biases are the same in all layers."""
    scanned = {n: a for n, a in params.items() if "layers_" not in n and "relpos_bias" not in n}
    for stack, count in (("encoder", 3), ("decoder", 2)):
        bias = params[f"{stack}/relpos_bias/rel_embedding"]
        scanned[f"{stack}/{stack}/relpos_bias/rel_embedding"] = np.stack([bias] * count, 1)
        prefix = f"{stack}/layers_0/"
        for rest in [name.removeprefix(prefix) for name in params if name.startswith(prefix)]:
            layers = [params[f"{stack}/layers_{i}/{rest}"] for i in range(count)]
            if rest.endswith("out/kernel"):
                layers = [layer.reshape(3, 5, 6) for layer in layers]
            elif "attention/" in rest:
                layers = [layer.reshape(6, 3, 5) for layer in layers]
            scanned[f"{stack}/{stack}/{rest}"] = np.stack(layers, 1)
    return scanned


def as_version_2(folder: Path, params: dict[str, np.ndarray]) -> Path:
    """What T5X wrote until 2021: bfloat16 as its bits, in arrays and in the index."""
    from flax import serialization

    bits = {name: a.view(np.uint16) if a.dtype == BF16 else a for name, a in params.items()}
    inline = [f"target/{name}" for name in params if name.endswith("/scale")]
    written = write_t5x(folder, bits, step=5, inline=inline)
    index = serialization.msgpack_restore((written / "checkpoint").read_bytes())
    index["version"] = 2
    (written / "checkpoint").write_bytes(serialization.msgpack_serialize(index))
    return written


def make(layout: str, folder: Path, params: dict[str, np.ndarray]) -> Path:
    if layout == "version 2":
        return as_version_2(folder, params)
    if layout == "version 3":
        return write_t5x(folder, params, step=5)
    if layout == "scan":
        return write_t5x(folder, stacked(params), step=5)
    return orbax_model(
        folder,
        stacked(params) if "scan" in layout else params,
        use_ocdbt="ocdbt" in layout,
    )


LAYOUTS = ("version 2", "version 3", "scan", "orbax ocdbt", "orbax ocdbt scan", "orbax folders")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=str)
def test_every_layout_gives_the_same_parameters(layout: str, dtype: Any, tmp_path: Path) -> None:
    params = random_params(dtype)
    folder = make(layout, tmp_path, params)
    checkpoint = open_t5x(folder)
    assert (checkpoint.step, is_t5x(folder)) == (5, True)
    assert checkpoint.layout == ("t5x_orbax" if "orbax" in layout else "t5x")
    assert checkpoint.version == (2 if layout == "version 2" else 3)
    assert checkpoint.scanned == ("scan" in layout)
    require_equal(checkpoint, params)
    assert config_of(checkpoint.params, relpos_max_distance=8) == CONFIG
    if "orbax" in layout:
        state = checkpoint.open_state()
        assert (
            set(checkpoint.state_names)
            == set(state)
            == {
                "param_states/prompt/v",
                "param_states/none",
            }
        )
        assert state["param_states/none"] is None
        np.testing.assert_array_equal(state["param_states/prompt/v"].whole(), np.ones(3))


def require_equal(checkpoint: T5XCheckpoint, params: dict[str, np.ndarray]) -> None:
    assert checkpoint.params.keys() == params.keys()
    for name, want in params.items():
        got = checkpoint.params[name]
        assert got.shape == want.shape and got.dtype == want.dtype, name
        assert got.whole().tobytes() == want.tobytes() and got.whole().dtype == want.dtype, name
        require_parts(got, want)


def require_parts(array: Any, want: np.ndarray) -> None:
    """Any part that is read is that part of the whole."""
    rng = np.random.default_rng(1)
    for _ in range(3):
        ends = [sorted(rng.integers(0, size + 1, 2)) for size in want.shape]
        index = tuple(slice(int(start), int(stop)) for start, stop in ends)
        part = array.read(index)
        assert part.shape == want[index].shape and part.tobytes() == want[index].tobytes()
    open_ended = tuple(slice(-1, None) for _ in want.shape)
    np.testing.assert_array_equal(array.read(open_ended), want[open_ended])


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_t5x_wrote(shared: Path, variant: str) -> None:
    folder = shared / "fixtures" / "t5x"
    checkpoint = open_t5x(folder / variant)
    layout, step, scanned = VARIANTS[variant]
    assert (checkpoint.layout, checkpoint.step, checkpoint.scanned) == (layout, step, scanned)
    for array in checkpoint.params.values():
        whole = array.whole()
        assert whole.dtype == np.float32 == array.dtype
        require_parts(array, whole)
    if scanned:
        require_recorded_scan(checkpoint, np.load(folder / "scan_logits.npz"))
    else:
        tiny = read_t5x(folder / "tiny_t5x/checkpoint_3")
        for name, want in tiny.items():
            np.testing.assert_array_equal(checkpoint.params[name].whole(), want)
        prompt = set() if variant.startswith("tiny_t5x") else {PROMPT}
        assert checkpoint.params.keys() - tiny.keys() == prompt


def require_recorded_scan(checkpoint: T5XCheckpoint, recorded: Any) -> None:
    prefix = "scanparam:"
    stored = {key.removeprefix(prefix): recorded[key] for key in recorded if key.startswith(prefix)}
    assert checkpoint.stored.keys() == stored.keys()
    for name, want in stored.items():
        np.testing.assert_array_equal(checkpoint.stored[name].whole(), want)
        stack, _, rest = name.partition("/")
        if not rest.startswith(f"{stack}/"):
            np.testing.assert_array_equal(checkpoint.params[name].whole(), want)
            continue
        for i in range(want.shape[1]):
            layer = checkpoint.params[f"{stack}/layers_{i}/{rest.partition('/')[2]}"]
            assert len(layer.shape) <= 2
            np.testing.assert_array_equal(layer.whole(), want[:, i].reshape(layer.shape))


def test_both_layouts_of_one_train_state_are_equal(shared: Path) -> None:
    folder = shared / "fixtures" / "t5x"
    pairs = [
        ("prompted_tiny_t5x/checkpoint_3", "orbax/tiny/checkpoint_3"),
        ("scan_t5x/checkpoint_7", "orbax/scan/checkpoint_7"),
    ]
    for native, orbax in pairs:
        old, new = open_t5x(folder / native), open_t5x(folder / orbax)
        assert old.params.keys() == new.params.keys()
        assert set(old.state_names) == set(new.state_names)
        for name, array in old.params.items():
            np.testing.assert_array_equal(array.whole(), new.params[name].whole())
        states = old.open_state(), new.open_state()
        for name, slot in states[0].items():
            other = states[1][name]
            assert (slot is None) == (other is None)
            if slot is not None and other is not None:
                np.testing.assert_array_equal(slot.whole(), other.whole())


def test_reading_a_part_needs_its_chunks_and_no_others(tmp_path: Path) -> None:
    import tensorstore

    written = write_t5x(tmp_path, {"a": np.zeros((2, 2), np.float32)}, step=1)
    shutil.rmtree(written / "target.a")
    want = np.arange(48, dtype=np.float32).reshape(8, 6)
    metadata = {"shape": [8, 6], "chunks": [2, 3], "dtype": "<f4", "compressor": {"id": "gzip"}}
    store = {"driver": "file", "path": f"{written / 'target.a'}/"}
    spec = {"driver": "zarr", "kvstore": store, "metadata": metadata}
    tensorstore.open(spec, create=True).result().write(want).result()
    from flax import serialization

    index = serialization.msgpack_restore((written / "checkpoint").read_bytes())
    index["optimizer"]["target"]["a"]["metadata"] |= {"shape": [8, 6], "chunks": [2, 3]}
    (written / "checkpoint").write_bytes(serialization.msgpack_serialize(index))
    for lost in (written / "target.a").glob("*.*"):
        if lost.name not in (".zarray", "1.0", "2.0"):
            lost.unlink()
    array = open_t5x(written).params["a"]
    np.testing.assert_array_equal(array.read((slice(2, 6), slice(0, 3))), want[2:6, :3])
    with pytest.raises(UserError, match=r"target.a is damaged or incomplete for a: .*missing"):
        array.read((slice(2, 6), slice(0, 4)))


def test_the_optimizer_is_not_read_until_it_is_asked_for(tmp_path: Path) -> None:
    params = {"a/b": np.ones((2, 3), np.float32)}
    state = {"param_states/a/b/v": np.full((2, 3), 2, np.float32), "param_states/a/b/m": None}
    written = write_t5x(tmp_path, params, step=1, state=state)
    shutil.rmtree(written / "state.param_states.a.b.v")
    checkpoint = open_t5x(written)
    assert set(checkpoint.state_names) == set(state)
    checkpoint.params["a/b"].whole()
    with pytest.raises(UserError, match=r"no folder .* for state/param_states/a/b/v"):
        checkpoint.open_state()


def test_layers_stacked_along_the_first_axis(tmp_path: Path) -> None:
    """T5X's ``param_scan_axis`` may be 0: the scales of norms tell the axis."""
    scanned = stacked(random_params())
    first = {
        name: np.moveaxis(array, 1, 0) if re.match(r"(\w+)/\1/", name) else array
        for name, array in scanned.items()
    }
    one, other = (
        open_t5x(write_t5x(tmp_path / str(axis), params, step=5))
        for axis, params in enumerate((first, scanned))
    )
    assert one.params.keys() == other.params.keys()
    for name, array in one.params.items():
        np.testing.assert_array_equal(array.whole(), other.params[name].whole())


def test_biases_that_differ_stay_with_their_layers(tmp_path: Path) -> None:
    scanned = stacked(random_params())
    scanned["decoder/decoder/relpos_bias/rel_embedding"][:, 1] += 1
    checkpoint = open_t5x(write_t5x(tmp_path, scanned, step=5))
    names = {name for name in checkpoint.params if "relpos_bias" in name}
    layers = [f"encoder/layers_{i}" for i in range(3)] + [f"decoder/layers_{i}" for i in range(2)]
    # Those of the encoder are equal, and stay too: a T5 has all its biases of one kind.
    assert names == {f"{layer}/relpos_bias/rel_embedding" for layer in layers}
    assert config_of(checkpoint.params, relpos_max_distance=8) == replace(
        CONFIG, relpos_per_layer=True
    )
    one, other = (checkpoint.params[f"{layer}/relpos_bias/rel_embedding"] for layer in layers[3:])
    np.testing.assert_array_equal(one.whole() + 1, other.whole())


def test_stacks_that_are_none(tmp_path: Path) -> None:
    scanned = stacked(random_params())
    name = "encoder/encoder/mlp/wo/kernel"
    with pytest.raises(
        UserError, match=f"{name}.*2 layers, but other arrays of the encoder have 3"
    ):
        open_t5x(write_t5x(tmp_path, scanned | {name: scanned[name][:, :2]}, step=1))
    with pytest.raises(UserError, match=rf"{name}.*\[10\] is not a stack of layers"):
        open_t5x(write_t5x(tmp_path, scanned | {name: scanned[name][:, 0, 0]}, step=2))


@pytest.mark.parametrize("name", ["checkpoint_5.tmp-17", "checkpoint_5.orbax-checkpoint-tmp-17"])
def test_unfinished_saves(tmp_path: Path, name: str) -> None:
    written = write_t5x(tmp_path, {"a": np.ones(3, np.float32)}, step=5)
    unfinished = written.rename(tmp_path / name)
    link = tmp_path / "checkpoint_9"
    link.symlink_to(unfinished)
    for folder in (unfinished, str(unfinished) + "/", link):
        with pytest.raises(UserError, match="unfinished"):
            open_t5x(folder)
    link.unlink()
    (unfinished.rename(link) / "checkpoint").unlink()
    with pytest.raises(UserError, match="written last: the save or the copy is incomplete"):
        open_t5x(link)


def test_marks_of_orbax_saves(tmp_path: Path) -> None:
    folder = orbax_model(tmp_path, random_params(), use_ocdbt=True)
    for mark in folder.rglob("commit_success.txt"):
        mark.unlink()
    open_t5x(folder)  # Orbax leaves no marks where it can rename a folder
    marks = [folder / at / "commit_success.txt" for at in (".", "state", "dataset")]
    (folder / "dataset").mkdir()
    for mark in marks:
        mark.write_text("")
        with pytest.raises(UserError, match="unfinished"):
            open_t5x(folder)
        mark.unlink()
    top = folder / "_CHECKPOINT_METADATA"
    top.write_text(json.dumps({"commit_timestamp_nsecs": None}))
    with pytest.raises(UserError, match="unfinished"):
        open_t5x(folder)
    top.write_text("{")
    with pytest.raises(UserError, match="_CHECKPOINT_METADATA is damaged"):
        open_t5x(folder)


def test_damaged_orbax_checkpoints(tmp_path: Path) -> None:
    whole = orbax_model(tmp_path / "whole", random_params(), use_ocdbt=True)
    metadata = json.loads((whole / "state/_METADATA").read_text())

    def damaged(change: Any) -> Path:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        if isinstance(change, dict):
            (folder / "state/_METADATA").write_text(json.dumps(change))
        else:
            change(folder)
        return folder

    def entry(*path: str, **value: Any) -> dict[str, Any]:
        value = {"value_type": "jax.Array", "skip_deserialize": False} | value
        leaf = {"key_metadata": [{"key": key} for key in path], "value_metadata": value}
        return metadata | {"tree_metadata": metadata["tree_metadata"] | {"new": leaf}}

    def truncate(folder: Path) -> None:
        for file in folder.glob("state/**/d/*"):
            file.write_bytes(file.read_bytes()[:-40])

    def lose(pattern: str) -> Any:
        return lambda folder: [file.unlink() for file in folder.glob(pattern)]

    def link_away(folder: Path) -> None:
        file = next(iter(folder.glob("state/**/d/*")))
        file.rename(tmp_path / "away")
        file.symlink_to(tmp_path / "away")

    cases = [
        (entry("target", "lost"), "incomplete for lost"),
        (entry("target", "..", "lost"), "is not a valid (array )?name"),
        (entry("target", "../../lost"), "is not a valid (array )?name"),
        (entry("target", "token_embedder", "embedding", write_shape=[38, 6]), "says .38, 6"),
        (entry("target"), "is not a valid (array )?name"),
        ({"tree_metadata": {"x": 3}}, "damaged, or not an Orbax index"),
        ({"tree_metadata": {}}, "no parameters or no step"),
        ({}, "lists no arrays"),
        (truncate, "damaged or incomplete"),
        (lose("state/**/d/*"), "damaged or incomplete"),
        (lose("state/manifest.ocdbt"), "damaged or incomplete"),
        (lose("state/_METADATA"), "no state/_METADATA"),
        (link_away, "outside the folder"),
    ]
    for change, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            read_t5x(damaged(change))
        assert "\n" not in str(caught.value)


def test_unknown_drivers_and_links_within_arrays(tmp_path: Path) -> None:
    from flax import serialization

    written = write_t5x(tmp_path, {"a/b": np.ones((3, 2), np.float32)}, step=5)
    index = serialization.msgpack_restore((written / "checkpoint").read_bytes())
    spec = index["optimizer"]["target"]["a"]["b"]

    def rewritten(**changes: Any) -> Path:
        index["optimizer"]["target"]["a"]["b"] = spec | changes
        (written / "checkpoint").write_bytes(serialization.msgpack_serialize(index))
        return written

    path = spec["kvstore"]["path"]
    for driver in ("file", "gfile", "gcs"):
        store = {"driver": driver, "path": path, "bucket": "t5x-dummy-bucket"}
        np.testing.assert_array_equal(read_t5x(rewritten(kvstore=store))["a/b"], np.ones((3, 2)))
    old = rewritten(kvstore={"driver": "gcs", "bucket": "t5x-dummy-bucket"}, path=path)
    np.testing.assert_array_equal(read_t5x(old)["a/b"], np.ones((3, 2)))
    for store in ({"driver": "http", "path": path}, {"path": path}):
        with pytest.raises(UserError, match="a/b is in a store of unknown driver"):
            open_t5x(rewritten(kvstore=store))
    with pytest.raises(UserError, match="holds float32 for a/b, but the index says bfloat16"):
        open_t5x(rewritten(dtype="bfloat16"))
    chunk = written / "target.a.b" / "0.0"
    chunk.rename(tmp_path / "away")
    chunk.symlink_to(tmp_path / "away")
    with pytest.raises(UserError, match="outside the folder"):
        open_t5x(rewritten())


def test_version_3_has_no_bits_in_place_of_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.* holds uint16, which is not a type"):
        open_t5x(write_t5x(tmp_path, {"a": np.ones(3, np.uint16)}, step=1))


def test_places_in_buckets() -> None:
    for address, driver in (("gs://there/a/b/", "gcs"), ("s3://there/a/b", "s3")):
        place = CheckpointFolder.of(address)
        store = {"driver": driver, "bucket": "there", "path": "a/b/"}
        assert place.root is None and place.store == store
        assert place.below("target.x/", of="x") == store | {"path": "a/b/target.x/"}
        for path in ("../c", "/c", "x/../../c", ".", "", None, "a\0b"):
            with pytest.raises(UserError, match=r"outside the folder|not a text"):
                place.below(path, of="x")
    assert CheckpointFolder.of("gs://there").store["path"] == ""
    with pytest.raises(UserError, match="unfinished"):
        CheckpointFolder.of("gs://there/checkpoint_7.tmp-123/")
