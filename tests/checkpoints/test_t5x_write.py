"""Writing T5X's format: what T5X wrote comes out again as it was, and nothing half done is left."""

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray
from prompt_tuning_jax.checkpoints.parameters import PROMPT
from prompt_tuning_jax.checkpoints.t5x.reader import open_t5x, read_t5x
from prompt_tuning_jax.checkpoints.t5x.writer import _CHUNK_BYTES, _chunk_shape, write_t5x
from prompt_tuning_jax.errors import UserError

BF16 = np.dtype(ml_dtypes.bfloat16)
TABLE = np.arange(28, dtype=np.float32).reshape(7, 4)
PARAMS = {
    "token_embedder/embedding": TABLE,
    "encoder/encoder_norm/scale": np.ones(4, np.float32),
    "encoder/layers_0/mlp/wo/kernel": TABLE.astype(BF16) / 3,
}


def index_of(folder: Path) -> dict[str, Any]:
    from flax import serialization

    index: dict[str, Any] = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    return index


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("variant", ["prompted_tiny_t5x/checkpoint_3", "scan_t5x/checkpoint_7"])
def test_what_t5x_wrote_is_written_again_byte_for_byte(
    shared: Path, tmp_path: Path, variant: str
) -> None:
    folder = shared / "fixtures" / "t5x" / variant
    was = open_t5x(folder)
    written = write_t5x(
        tmp_path, was.stored, step=was.step, state=was.open_state(), inline=was.inline
    )
    assert written == tmp_path / folder.name
    # Even the compressed chunks: the same library with the same settings wrote them.
    assert files_of(written) == files_of(folder)


def test_an_older_checkpoint_keeps_its_structure_and_bits(shared: Path, tmp_path: Path) -> None:
    folder = shared / "fixtures" / "t5x" / "tiny_t5x" / "checkpoint_3"
    was = open_t5x(folder)
    state = was.open_state()
    written = write_t5x(tmp_path, was.params, step=was.step, state=state, inline=was.inline)
    again = open_t5x(written)
    assert again.inline == was.inline and again.step == was.step
    assert again.params.keys() == was.params.keys() and again.state_names == was.state_names
    for name, array in was.params.items():
        assert array.whole().tobytes() == again.params[name].whole().tobytes()
    for name, slot in again.open_state().items():
        assert slot is not None and slot.whole().tobytes() == state[name].whole().tobytes()


def test_from_orbax_to_the_native_layout(shared: Path, tmp_path: Path) -> None:
    folder = shared / "fixtures" / "t5x"
    new = open_t5x(folder / "orbax/tiny/checkpoint_3")
    written = write_t5x(tmp_path, new.stored, step=new.step, state=new.open_state())
    assert files_of(written) == files_of(folder / "prompted_tiny_t5x/checkpoint_3")


def test_numbers_keep_their_type_and_bits(tmp_path: Path) -> None:
    written = write_t5x(tmp_path / "new" / "folders", PARAMS, step=12)
    assert written == tmp_path / "new" / "folders" / "checkpoint_12"
    assert os.listdir(written.parent) == ["checkpoint_12"]
    read = read_t5x(written)
    assert read.keys() == PARAMS.keys()
    for name, want in PARAMS.items():
        assert read[name].dtype == want.dtype and read[name].tobytes() == want.tobytes()
    index = index_of(written)
    assert index["version"] == 3
    step = index["optimizer"]["state"].pop("step")
    assert (step, step.dtype, step.shape) == (12, np.int32, ())
    assert index["optimizer"]["state"] == {}  # as T5X saves for inference
    spec = index["optimizer"]["target"]["encoder"]["layers_0"]["mlp"]["wo"]["kernel"]
    assert spec == {
        "driver": "zarr",
        "dtype": "bfloat16",
        "kvstore": {"driver": "file", "path": "target.encoder.layers_0.mlp.wo.kernel/"},
        "metadata": {
            "chunks": [7, 4],
            "compressor": {"id": "gzip", "level": 1},
            "shape": [7, 4],
        },
    }


def test_a_prompt_has_the_state_that_t5x_gives_it(shared: Path, tmp_path: Path) -> None:
    """The recorded checkpoint is of the same tree: the prompt alone has slots."""
    recorded = open_t5x(shared / "fixtures/t5x/prompted_tiny_t5x/checkpoint_3")
    params = dict(recorded.params)
    prompt = params.pop(PROMPT)
    again = open_t5x(write_t5x(tmp_path, params, step=3, trained={PROMPT: prompt}))
    np.testing.assert_array_equal(again.params[PROMPT].whole(), prompt.whole())
    assert again.state_names == recorded.state_names
    assert again.inline == recorded.inline
    injections, want = again.open_state(), recorded.open_state()
    for name, slot in want.items():
        ours = injections[name]
        assert (slot is None) == (ours is None)
        if slot is not None and ours is not None:
            assert ours.shape == slot.shape and ours.dtype == slot.dtype
            assert not ours.whole().any()


@pytest.mark.parametrize("shape", [(128, 160), (150, 128), (127, 160)])
def test_large_prompts_are_factored_as_t5x_does(
    shared: Path, tmp_path: Path, shape: tuple[int, int]
) -> None:
    prefix = f"ada_{shape[0]}x{shape[1]}_s0_"
    recorded = np.load(shared / "fixtures/t5x/train_traj.npz")
    if not any(key.startswith(prefix) for key in recorded):
        pytest.fail(f"no record {prefix}")
    state = open_t5x(write_t5x(tmp_path, {}, step=0, trained={PROMPT: np.ones(shape, np.float32)}))
    injections = state.open_state()
    for slot in ("v_row", "v_col"):
        array = injections[f"param_states/{PROMPT}/{slot}"]
        assert array is not None and array.shape == recorded[f"{prefix}{slot}"].shape
    v = injections[f"param_states/{PROMPT}/v"]
    assert v is not None and v.shape == tuple(recorded[f"{prefix}v_shape"])


def test_a_prompt_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    old, new = np.zeros((2, 4), np.float32), np.ones((3, 4), np.float32)
    written = write_t5x(tmp_path, PARAMS | {PROMPT: old}, step=1, trained={PROMPT: new})
    np.testing.assert_array_equal(read_t5x(written)[PROMPT], new)


def test_large_arrays_are_written_chunk_by_chunk(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("prompt_tuning_jax.checkpoints.t5x.writer._CHUNK_BYTES", 64)
    want = np.random.default_rng(0).normal(size=(12, 10)).astype(np.float32)
    asked = []

    def read(index: tuple[slice, ...]) -> np.ndarray:
        asked.append(want[index].size)
        return want[index]

    lazy = LazyArray(shape=want.shape, dtype=want.dtype, where="here", read=read)
    written = write_t5x(tmp_path, {"a": lazy}, step=1)
    assert sum(asked) == want.size and max(asked) * 4 <= 64
    np.testing.assert_array_equal(read_t5x(written)["a"], want)


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((32128, 4096), (4016, 4096)),
        ((4096, 10240), (4096, 2560)),
        ((50331648,), (16777216,)),  # a third: a divisor of the whole, not of its half
        ((), ()),
        ((3,), (3,)),
        ((16777259, 2), (1, 2)),  # a prime
    ],
)
def test_chunks_divide_the_array_as_those_of_t5x_do(
    shape: tuple[int, ...], chunks: tuple[int, ...]
) -> None:
    lazy = LazyArray(shape=shape, dtype=np.dtype(np.float32), where="", read=lambda _: TABLE)
    got = _chunk_shape(lazy)
    assert all(size % chunk == 0 for size, chunk in zip(shape, got, strict=True))
    assert np.prod(got) * 4 <= _CHUNK_BYTES
    assert got == chunks


def test_nothing_is_left_of_a_save_that_fails(tmp_path: Path) -> None:
    def read(_: Any) -> np.ndarray:
        raise UserError("the source is damaged")

    bad = LazyArray(shape=(2,), dtype=np.dtype(np.float32), where="there", read=read)
    with pytest.raises(UserError, match="the source is damaged"):
        write_t5x(tmp_path, PARAMS | {"zzz": bad}, step=1)
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/checkpoint_1"):
        write_t5x(tmp_path / "file", PARAMS, step=1)
    written = write_t5x(tmp_path, PARAMS, step=1)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match="checkpoint_1 exists already"):
        write_t5x(tmp_path, {"a": TABLE}, step=1)
    assert files_of(tmp_path) == before and written.is_dir()


@pytest.mark.parametrize(
    ("params", "more", "message"),
    [
        ({"../a": TABLE}, {}, "is not a valid (array )?name"),
        ({"a//b": TABLE}, {}, "is not a valid (array )?name"),
        ({"a.b": TABLE}, {}, "is not a valid (array )?name"),
        ({"a": TABLE, "a/b": TABLE}, {}, "a cannot be an array and contain a/b"),
        ({"a": np.array(["x"])}, {}, "T5X does not store arrays of <U1"),
        ({"a": np.zeros((0, 3))}, {}, r"an array of shape \[0, 3\] is empty"),
        ({"a": TABLE}, {"step": -1}, "step of a T5X checkpoint"),
        ({"a": TABLE}, {"step": 1.5}, "step of a T5X checkpoint"),
        ({"a": TABLE}, {"step": True}, "step of a T5X checkpoint"),
        (PARAMS, {"state": {"step": TABLE}}, "as the argument step"),
        (PARAMS, {"state": {"param_states/../a": TABLE}}, "is not a valid (array )?name"),
    ],
)
def test_what_cannot_be_written(
    tmp_path: Path, params: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        write_t5x(tmp_path, params, **({"step": 1} | more))
    assert "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)


def test_a_checkpoint_appears_whole_by_one_renaming(tmp_path: Path, monkeypatch: Any) -> None:
    def killed(aside: Path, final: Path) -> None:
        assert (aside / "checkpoint").is_file() and not final.exists()
        with pytest.raises(UserError, match="unfinished"):
            open_t5x(aside)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write_t5x(tmp_path, PARAMS, step=1)
    assert not os.listdir(tmp_path)
