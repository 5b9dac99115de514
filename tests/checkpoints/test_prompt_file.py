import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    check_fits,
    load_prompt,
    load_prompt_with_metadata,
    save_prompt,
)
from prompt_tuning_jax.checkpoints.tuned_checkpoint import TunedCheckpoint, save_tuned
from prompt_tuning_jax.errors import UserError

PROMPT = np.random.default_rng(0).standard_normal((5, 8), np.float32)
METADATA = PromptMetadata(
    model_fingerprint="0123456789abcdef",
    model_name="tiny",
    task="word_valence",
    init="class_labels",
    seed=0,
    steps=1000,
    metric="accuracy",
    score=0.8125,
    labels=("positive", 'ne"ga\ntive', "中"),
    chat=True,
    normalize_length=True,
    combine="prefix",
    created_by="a test",
)


@pytest.mark.parametrize("name", ["p.npy", "p.safetensors"])
def test_reads_back_what_was_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "deep" / name
    save_prompt(path, PROMPT, metadata=METADATA)
    loaded, metadata = load_prompt_with_metadata(path)
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded.view(np.uint32), PROMPT.view(np.uint32))
    assert metadata == (METADATA if name.endswith("safetensors") else PromptMetadata())
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_unknown_metadata_stays_unknown(tmp_path: Path) -> None:
    save_prompt(tmp_path / "p.safetensors", PROMPT)
    _, metadata = load_prompt_with_metadata(tmp_path / "p.safetensors")
    assert metadata.created_by.startswith("prompt_tuning_jax")
    assert metadata == PromptMetadata(created_by=metadata.created_by)


def test_accepts_jax_arrays_slices_and_a_named_format(tmp_path: Path) -> None:
    import jax.numpy as jnp

    save_prompt(tmp_path / "p", jnp.asarray(PROMPT), format="npy")
    np.testing.assert_array_equal(load_prompt(tmp_path / "p"), PROMPT)
    transposed = np.asfortranarray(PROMPT)[:, ::2]
    for name in ("p.npy", "p.safetensors"):
        save_prompt(tmp_path / name, transposed)
        np.testing.assert_array_equal(load_prompt(tmp_path / name), transposed)
    with pytest.raises(UserError, match="prompt is saved as"):
        save_prompt(tmp_path / "p.txt", PROMPT)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floating_types_become_float32(tmp_path: Path, dtype: Any) -> None:
    array = PROMPT.astype(dtype)
    save_file({"prompt": array}, tmp_path / "p.safetensors")
    np.testing.assert_array_equal(load_prompt(tmp_path / "p.safetensors"), array.astype(np.float32))
    if dtype != ml_dtypes.bfloat16:
        np.save(tmp_path / "p.npy", array)
        np.testing.assert_array_equal(load_prompt(tmp_path / "p.npy"), array.astype(np.float32))


NOT_PROMPTS = {
    "1-D": (PROMPT[0], "two dimensions"),
    "3-D": (PROMPT[None], r"\[1, 5, 8\].*two dimensions"),
    "integers": (np.ones((5, 8), np.int32), "int32"),
    "no rows": (PROMPT[:0], "empty"),
    "NaN": (np.where(PROMPT > 1, np.nan, PROMPT), "not finite"),
    "too large for float32": (np.full((5, 8), 1e300), "not finite"),
    "booleans": (PROMPT > 0, "bool"),
}


@pytest.mark.parametrize("case", NOT_PROMPTS)
@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_what_is_not_a_prompt(tmp_path: Path, case: str, kind: str) -> None:
    array, message = NOT_PROMPTS[case]
    path = tmp_path / f"p.{kind}"
    with pytest.raises(UserError, match=message):
        save_prompt(path, array)
    assert list(tmp_path.iterdir()) == []
    if kind == "npy":
        np.save(path, array)
    else:
        save_file({"prompt": array}, path)
    with pytest.raises(UserError, match=message if array.size else "empty|damaged") as caught:
        load_prompt(path)
    assert str(path) in str(caught.value)


def npy_with_header(header: str) -> bytes:
    data = header.encode()
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(data)) + data


def npy_that_claims(shape: str, descr: str = "'<f4'") -> bytes:
    return npy_with_header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n")


DAMAGED = {
    "empty": b"",
    "text": b"a prompt",
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00]\x94.",
    "npy magic alone": b"\x93NUMPY",
    "npy header cut": npy_that_claims("(5, 8)")[:30],
    "npy data cut": npy_that_claims("(5, 8)") + bytes(5 * 8 * 4 - 1),
    "npy claims petabytes": npy_that_claims("(99999999, 99999999)"),
    "npy claims more than there is": npy_that_claims("(9" + "9" * 30 + ", 8)"),
    "npy of objects": npy_that_claims("(5, 8)", "'|O'") + bytes(400),
    "npy negative": npy_that_claims("(-5, 8)") + bytes(400),
    "npy huge header": npy_with_header("{" + " " * 20_000 + "}"),
    "npy header is code": npy_with_header("__import__('os').getcwd()"),
    "npy header nests": npy_with_header("(" * 5000 + ")" * 4000),
    "zip": b"PK\x03\x04" + bytes(100),
    "safetensors header cut": struct.pack("<Q", 5000) + b'{"prompt":',
    "safetensors claims petabytes": struct.pack("<Q", 2**50) + b'{"prompt":',
    "safetensors data cut": struct.pack("<Q", 64)
    + b'{"prompt":{"dtype":"F32","shape":[5,8],"data_offsets":[0,160]}} '
    + bytes(159),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_give_one_line(tmp_path: Path, case: str) -> None:
    path = tmp_path / "p.npy"
    path.write_bytes(DAMAGED[case])
    with pytest.raises(UserError) as caught:
        load_prompt(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    told = {"empty": "is empty", "pickle": "pickles are never loaded", "zip": "zip archive"}
    assert told.get(case, "") in str(caught.value)


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    for name in ("p.npy", "p.safetensors"):
        path = tmp_path / name
        save_prompt(path, PROMPT[:2, :3], metadata=METADATA)
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(UserError):
                load_prompt(path)


def test_missing_files_folders_and_other_arrays(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_prompt(tmp_path / "none.npy")
    with pytest.raises(UserError, match="is a folder"):
        load_prompt(tmp_path)
    save_file({"weight": PROMPT, "bias": PROMPT[0]}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="contains bias, weight; a prompt's file has one array"):
        load_prompt(tmp_path / "m.safetensors")
    save_file({}, tmp_path / "n.safetensors")
    with pytest.raises(UserError, match="contains nothing; a prompt's file has one array"):
        load_prompt(tmp_path / "n.safetensors")
    for method, name in (('{"class": "LoRA"}', "LoRA"), ("[]", "another method"), ("{", "another")):
        kept = TunedCheckpoint(trainable={"a": PROMPT}, method=method, metadata=PromptMetadata())
        save_tuned(tmp_path / "t.safetensors", kept)
        with pytest.raises(
            UserError, match=rf"t.safetensors contains the arrays of {name}.* not a prompt"
        ):
            load_prompt(tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", "one", "seed must be a number"),
        ("score", "x", "score must be a number"),
        ("labels", "[1]", "labels must be a list of strings"),
        ("mixture", "{}", "mixture must be a list of tasks"),
        ("mixture", "[{}]", "each task of a mixture must have a name"),
    ],
)
def test_damaged_metadata(tmp_path: Path, key: str, value: str, message: str) -> None:
    save_file({"prompt": PROMPT}, tmp_path / "p.safetensors", metadata={key: value, "format": "np"})
    with pytest.raises(UserError, match=message):
        load_prompt(tmp_path / "p.safetensors")


def test_metadata_is_readable_by_others(tmp_path: Path) -> None:
    save_prompt(tmp_path / "p.safetensors", PROMPT, metadata=METADATA)
    data = (tmp_path / "p.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert header["__metadata__"]["task"] == "word_valence"
    assert header["__metadata__"]["steps"] == "1000"


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.npy"
    save_prompt(path, PROMPT)

    def full_disk(file: Any, array: np.ndarray, **_: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*p\.npy: No space left"):
        save_prompt(path, PROMPT + 1)
    np.testing.assert_array_equal(load_prompt(path), PROMPT)
    assert [p.name for p in tmp_path.iterdir()] == ["p.npy"]


def test_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_prompt(tmp_path / "file" / "p.npy", PROMPT)
    with pytest.raises(UserError, match="cannot read"):
        load_prompt(tmp_path / "file" / "p.npy")


def test_fits() -> None:
    this = METADATA.model_fingerprint
    check_fits(PROMPT, METADATA, embed_dim=8, fingerprint=this, path="p.npy")
    check_fits(PROMPT, PromptMetadata(), embed_dim=8, fingerprint="other", path="p.npy")
    with pytest.raises(UserError, match=r"p\.npy has width 8, but the model has width 16"):
        check_fits(PROMPT, METADATA, embed_dim=16, fingerprint=this, path="p.npy")
    other: dict[str, Any] = {"embed_dim": 8, "fingerprint": "fedc", "path": "p.npy"}
    with pytest.raises(UserError, match=r"p\.npy .* tiny .*0123456789abcdef.*fedc"):
        check_fits(PROMPT, METADATA, **other)
    check_fits(PROMPT, METADATA, **other, allow_other_model=True)
    with pytest.raises(UserError, match="width"):
        check_fits(PROMPT, METADATA, **other | {"embed_dim": 16}, allow_other_model=True)


@pytest.mark.parametrize("task", ["sst2", "mrpc", "rte"])
def test_the_released_prompts(shared: Path, tmp_path: Path, task: str) -> None:
    path = shared / "fixtures" / "released_prompts" / "t5_1_1_lm100k_base" / f"{task}.npy"
    prompt = load_prompt(path)
    assert prompt.shape == (100, 768)
    save_prompt(tmp_path / "p.npy", prompt)
    assert (tmp_path / "p.npy").read_bytes() == path.read_bytes()


def test_a_prompt_written_by_t5x(shared: Path) -> None:
    folder = shared / "fixtures/t5x/prompted_tiny_t5x/numpy_checkpoints/checkpoint_3"
    assert load_prompt(folder / "encoder.prompt.prompt.prompt").shape == (5, 4)
