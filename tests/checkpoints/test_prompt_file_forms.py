"""Forms of a prompt other than one plain file, round trips, and descriptions."""

import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from prompt_tuning_jax.checkpoints.array_files import safetensors_bytes
from prompt_tuning_jax.checkpoints.inspect import describe_prompt
from prompt_tuning_jax.checkpoints.location import INDEX
from prompt_tuning_jax.checkpoints.parameters import PROMPT as PROMPT_PATH
from prompt_tuning_jax.checkpoints.peft.adapter_file import write_peft
from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    check_fits,
    load_prompt,
    load_prompt_with_metadata,
    save_prompt,
)
from prompt_tuning_jax.errors import UserError

PROMPT = np.random.default_rng(0).standard_normal((5, 8), np.float32)
METADATA = PromptMetadata(task="t", seed=3, labels=("yes", "é", "中"), metric="f1", score=0.5)


def write_t5x(folder: Path, leaves: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    nested: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = leaf
    state = {"target": nested, "state": {"step": np.int32(7)}}
    index = serialization.msgpack_serialize({"version": 3, "optimizer": state})
    (folder / INDEX).write_bytes(index)


def test_the_prompt_in_a_t5x_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint_7"
    write_t5x(folder, {PROMPT_PATH: PROMPT, "encoder/encoder_norm/scale": PROMPT[0]})
    np.testing.assert_array_equal(load_prompt(folder), PROMPT)
    with pytest.raises(UserError, match=r"without a prompt.*did you mean .*checkpoint_7"):
        load_prompt(tmp_path)


def test_t5x_checkpoints_without_a_prompt(tmp_path: Path) -> None:
    write_t5x(tmp_path / "none", {"encoder/encoder_norm/scale": PROMPT[0]})
    with pytest.raises(UserError, match=r"none is a T5X checkpoint without a prompt"):
        load_prompt(tmp_path / "none")
    write_t5x(tmp_path / "nan", {PROMPT_PATH: np.where(PROMPT > 1, np.inf, PROMPT)})
    with pytest.raises(UserError, match=r"encoder/prompt/prompt/prompt in .*nan.* not finite"):
        load_prompt(tmp_path / "nan")
    write_t5x(tmp_path / "damaged", {PROMPT_PATH: PROMPT})
    index = tmp_path / "damaged" / INDEX
    index.write_bytes(index.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged"):
        load_prompt(tmp_path / "damaged")


def test_the_original_prompted_checkpoint(shared: Path) -> None:
    folder = shared / "fixtures/t5x/prompted_tiny_t5x"
    exported = folder / "numpy_checkpoints/checkpoint_3"
    prompt = load_prompt(exported / "encoder.prompt.prompt.prompt")
    np.testing.assert_array_equal(load_prompt(folder / "checkpoint_3"), prompt)
    described = describe_prompt(folder / "checkpoint_3")
    assert (described.format, described.length, described.width) == ("T5X checkpoint", 5, 4)
    with pytest.raises(UserError, match=r"did you mean .*encoder\.prompt\.prompt\.prompt"):
        load_prompt(exported)
    with pytest.raises(UserError, match="T5X checkpoint without a prompt"):
        load_prompt(shared / "fixtures/t5x/tiny_t5x/checkpoint_3")


@pytest.mark.parametrize("name", ["p", "encoder.prompt.prompt.prompt", "p.safetensors"])
def test_the_name_of_an_npy_is_of_no_account(tmp_path: Path, name: str) -> None:
    save_prompt(tmp_path / name, PROMPT, format="npy")
    np.testing.assert_array_equal(load_prompt(tmp_path / name), PROMPT)


def test_the_name_of_a_safetensors_is_of_no_account(tmp_path: Path) -> None:
    save_prompt(tmp_path / "p.npy", PROMPT, metadata=METADATA, format="safetensors")
    assert load_prompt_with_metadata(tmp_path / "p.npy")[1].task == "t"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npy_to_ours_to_npy_is_bit_exact(tmp_path: Path, dtype: Any) -> None:
    # Denormal numbers and minus zero, too.
    array = np.concatenate([PROMPT, PROMPT * 1e-6, np.full((1, 8), -0.0)]).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    save_prompt(tmp_path / "b.safetensors", load_prompt(tmp_path / "a.npy", dtype=None), dtype=None)
    loaded = load_prompt(tmp_path / "b.safetensors", dtype=None)
    save_prompt(tmp_path / "c.npy", loaded, dtype=None)
    assert loaded.dtype == dtype
    assert (tmp_path / "c.npy").read_bytes() == (tmp_path / "a.npy").read_bytes()


def test_bfloat16_stays_in_safetensors_and_is_float32_in_npy(tmp_path: Path) -> None:
    array = PROMPT.astype(ml_dtypes.bfloat16)
    for name, dtype in (("p.safetensors", ml_dtypes.bfloat16), ("p.npy", np.float32)):
        save_prompt(tmp_path / name, array, dtype=None)
        loaded = load_prompt(tmp_path / name, dtype=None)
        assert loaded.dtype == dtype
        np.testing.assert_array_equal(loaded.astype(np.float32), array.astype(np.float32))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [">f4", ">f8", ">f2", np.longdouble])
def test_other_byte_orders_and_types_keep_their_numbers(
    tmp_path: Path, dtype: Any, order: Any
) -> None:
    array = np.asarray(PROMPT, dtype, order=order)
    np.save(tmp_path / "p.npy", array)
    loaded = load_prompt(tmp_path / "p.npy", dtype=None)
    np.testing.assert_array_equal(loaded, array)
    for name in ("q.npy", "q.safetensors"):
        save_prompt(tmp_path / name, loaded, dtype=None)
        np.testing.assert_array_equal(load_prompt(tmp_path / name, dtype=None), array)


def test_what_is_loaded_is_no_window_into_the_file(tmp_path: Path) -> None:
    save_prompt(tmp_path / "p.npy", PROMPT)
    for dtype in (None, np.float32):
        loaded = load_prompt(tmp_path / "p.npy", dtype=dtype)
        assert type(loaded) is np.ndarray and loaded.flags.writeable and loaded.flags.owndata


def test_the_same_prompt_gives_the_same_bytes(tmp_path: Path) -> None:
    save_prompt(tmp_path / "p.safetensors", PROMPT, metadata=METADATA)
    here = (tmp_path / "p.safetensors").read_bytes()
    save_prompt(tmp_path / "q.safetensors", PROMPT, metadata=METADATA)
    assert (tmp_path / "q.safetensors").read_bytes() == here
    loaded, metadata = load_prompt_with_metadata(tmp_path / "p.safetensors")
    save_prompt(tmp_path / "q.safetensors", loaded, metadata=metadata)
    assert (tmp_path / "q.safetensors").read_bytes() == here
    keys = [here.index(f'"{key}"'.encode()) for key in ("created_by", "labels", "score", "task")]
    assert keys == sorted(keys)
    length = int.from_bytes(here[:8], "little")
    assert length % 8 == 0 and here[8 + length :] == PROMPT.tobytes()


def test_the_bytes_do_not_depend_on_the_order_of_the_metadata() -> None:
    letters = {letter: letter for letter in "abcdefgh"}
    orders = [letters, dict(reversed(letters.items()))]
    one, other = (safetensors_bytes(PROMPT, key="prompt", metadata=order) for order in orders)
    assert one == other


def test_text_that_is_no_unicode_does_not_make_a_file_unreadable(tmp_path: Path) -> None:
    metadata = dataclasses.replace(METADATA, model_name="caf\udce9")
    save_prompt(tmp_path / "p.safetensors", PROMPT, metadata=metadata)
    assert load_prompt_with_metadata(tmp_path / "p.safetensors")[1].model_name == "caf?"


def test_the_width_that_is_asked_for(tmp_path: Path) -> None:
    save_prompt(tmp_path / "p.npy", PROMPT)
    assert load_prompt(tmp_path / "p.npy", width=8).shape == (5, 8)
    with pytest.raises(UserError, match=r"p\.npy has width 8, but the model has width 16"):
        load_prompt(tmp_path / "p.npy", width=16)


def test_the_message_about_another_model_is_one_line() -> None:
    metadata = PromptMetadata(model_fingerprint="aa", model_name="a\nmodel\n" + "x" * 500)
    with pytest.raises(UserError, match="another model a model xxx") as caught:
        check_fits(PROMPT, metadata, embed_dim=8, fingerprint="bb", path="p")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


class Harmful:
    def __reduce__(self) -> Any:
        return (Path("harm").touch, ())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", ["pickle", "objects", "safetensors", "adapter", "torch"])
def test_no_pickle_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "p.npy"
    harmful = pickle.dumps(Harmful(), protocol=protocol)
    if form == "pickle":
        path.write_bytes(harmful)
    elif form == "objects":
        np.save(path, np.full((2, 2), Harmful(), object), allow_pickle=True)
    elif form == "safetensors":
        path = tmp_path / "p.safetensors"
        path.write_bytes(harmful)
    else:
        path = tmp_path / "adapter"
        write_peft(path, PROMPT, base_model_name_or_path="m")
        weights = path / "adapter_model.safetensors"
        weights.write_bytes(harmful)
        if form == "torch":
            weights.rename(path / "adapter_model.bin")
    with pytest.raises(UserError) as caught:
        load_prompt(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "harm").exists()


def test_a_description(tmp_path: Path) -> None:
    array = np.zeros((3, 768), np.float16)
    array[:, :4] = [[1, 1, 1, 1], [2, 2, 2, 2], [3, 0, 0, 4]]
    save_prompt(tmp_path / "p.safetensors", array, metadata=METADATA, dtype=None)
    described = describe_prompt(tmp_path / "p.safetensors")
    assert (described.format, described.length, described.width) == ("safetensors", 3, 768)
    assert (described.norm_min, described.norm_mean, described.norm_max) == (2, 11 / 3, 5)
    assert described.dtype == "float16"
    assert described.metadata.labels == METADATA.labels
    assert "base" in described.fits and "t5_1_0_base" in described.fits
    assert not {"small", "large"} & set(described.fits)
    save_prompt(tmp_path / "p.npy", PROMPT)
    bare = describe_prompt(tmp_path / "p.npy")
    assert (bare.format, bare.dtype, bare.fits) == ("npy", "float32", ())
    assert bare.metadata == PromptMetadata()


def test_descriptions_of_adapters_and_checkpoints(tmp_path: Path) -> None:
    write_peft(tmp_path / "a", PROMPT, base_model_name_or_path="org/model")
    write_t5x(tmp_path / "checkpoint_1", {PROMPT_PATH: PROMPT})
    adapter, checkpoint = (
        describe_prompt(tmp_path / "a"),
        describe_prompt(tmp_path / "checkpoint_1"),
    )
    assert (adapter.format, adapter.metadata.model_name) == ("PEFT adapter", "org/model")
    assert checkpoint.format == "T5X checkpoint"
    assert (adapter.length, adapter.norm_max) == (checkpoint.length, checkpoint.norm_max)
    with pytest.raises(UserError, match="cannot read"):
        describe_prompt(tmp_path / "none")


@pytest.mark.parametrize("task", ["sst2", "mrpc", "rte"])
def test_the_released_prompts(shared: Path, tmp_path: Path, task: str) -> None:
    path = shared / "fixtures" / "released_prompts" / "t5_1_1_lm100k_base" / f"{task}.npy"
    bare = tmp_path / "encoder.prompt.prompt.prompt"
    shutil.copyfile(path, bare)
    described = describe_prompt(bare)
    assert (described.format, described.length, described.width) == ("npy", 100, 768)
    assert "base" in described.fits
    assert 0 < described.norm_min < described.norm_mean < described.norm_max
    save_prompt(tmp_path / "p.safetensors", load_prompt(bare))
    save_prompt(tmp_path / "p.npy", load_prompt(tmp_path / "p.safetensors"))
    assert (tmp_path / "p.npy").read_bytes() == path.read_bytes()
