"""Opening models by name, exactly their arrays, and the host's memory meanwhile."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.hf.pretrained import read_hf
from prompt_tuning_jax.checkpoints.load import _vocabulary, load_model, open_model
from prompt_tuning_jax.checkpoints.t5x.reader import T5XCheckpoint, open_t5x, read_t5x
from prompt_tuning_jax.checkpoints.t5x.writer import write_t5x
from prompt_tuning_jax.data.vocabularies.vocab import load_vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.registry import preset
from prompt_tuning_jax.models.t5.config import T5Config

ROOT = Path(__file__).resolve().parents[2]
GONE, NEW = "encoder/layers_0/mlp/wo/kernel", "encoder/layers_0/mlp/spare/kernel"


@pytest.fixture
def tiny_t5x(shared: Path) -> Path:
    return shared / "fixtures" / "t5x" / "tiny_t5x" / "checkpoint_3"


def test_what_is_opened(tiny_t5x: Path, tiny_model_dir: Path) -> None:
    opened = open_model("tiny")
    assert Path(opened.location) == tiny_model_dir and opened.source == tiny_model_dir
    assert opened.vocabulary_file is not None
    for path in (str(tiny_t5x), tiny_t5x):
        opened = open_model(path)
        assert isinstance(opened.source, T5XCheckpoint) and opened.vocabulary_file is None


def test_the_distance_that_t5x_does_not_store(tiny_t5x: Path) -> None:
    config = open_model(tiny_t5x, relpos_max_distance=64).config
    assert isinstance(config, T5Config) and config.relpos_max_distance == 64
    with pytest.raises(UserError, match="relpos_max_distance is 0; it must be a positive"):
        open_model(tiny_t5x, relpos_max_distance=0)
    with pytest.raises(UserError, match=r"is for T5X checkpoints, .* and tiny is none"):
        open_model("tiny", relpos_max_distance=64)


def test_a_t5x_folder_may_hold_its_vocabulary(
    tiny_t5x: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_t5x, tmp_path / "checkpoint_3"))
    shutil.copy(tiny_model_dir / "spiece.model", folder / "sentencepiece.model")
    assert open_model(str(folder)).vocabulary_file == folder / "sentencepiece.model"


def test_t5x_every_parameter_and_every_array(tiny_t5x: Path, tmp_path: Path) -> None:
    params = read_t5x(tiny_t5x)
    params[NEW] = params.pop(GONE)
    folder = write_t5x(tmp_path, params, step=1)
    with pytest.raises(UserError, match=rf"only in the checkpoint: {NEW}; .*: {GONE}$"):
        load_model(str(folder))


def test_hf_every_parameter_and_every_array(tiny_model_dir: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "m"))
    arrays = load_file(folder / "model.safetensors")
    gone, new = "encoder.block.0.layer.1.DenseReluDense.wo.weight", "encoder.block.0.spare.weight"
    arrays[new] = arrays.pop(gone)
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"only in .*model\.safetensors: {new}; .*: {gone}$"):
        load_model(str(folder))


def as_in_the_hubs_cache(folder: Path, cache: Path, name: str) -> Path:
    """The files of a folder as the cache of the hub has them: blobs, and a snapshot of links."""
    model = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "blobs").mkdir()
    snapshot = model / "snapshots" / commit
    for number, file in enumerate(sorted(folder.rglob("*"))):
        if file.is_file():
            link = snapshot / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob = model / "blobs" / f"{number:040x}"
            shutil.copy(file, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


LOAD = """
import sys
from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.load import load_model
model = load_model(sys.argv[1])
print(param_tree.count(param_tree.split(model)[1]), model.vocabulary is not None)
"""


def test_by_its_name_from_the_hubs_cache_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    snapshot = as_in_the_hubs_cache(tiny_model_dir, tmp_path, "google/t5-v1_1-small")
    assert (snapshot / "config.json").is_symlink()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",  # read when the library is imported
        "HF_HUB_CACHE": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", LOAD, "google/t5-v1_1-small"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    number = sum(array.size for array in read_hf(tiny_model_dir)[1].values())
    assert done.stdout.split() == [str(number), "True"]


def test_t5x_in_the_hubs_cache(tiny_t5x: Path, tmp_path: Path) -> None:
    snapshot = as_in_the_hubs_cache(tiny_t5x.parent, tmp_path, "org/name")
    for name, array in open_t5x(snapshot / tiny_t5x.name).params.items():
        np.testing.assert_array_equal(array.whole(), read_t5x(tiny_t5x)[name])
    # From there to the blobs of the whole cache, as newer versions of the library have it.
    blobs = snapshot.parent.parent / "blobs"
    (tmp_path / "blobs").mkdir()
    for blob in list(blobs.iterdir()):
        blob.rename(tmp_path / "blobs" / blob.name)
        blob.symlink_to(f"../../blobs/{blob.name}")
    assert open_t5x(snapshot / tiny_t5x.name).step == open_t5x(tiny_t5x).step
    # But nowhere else.
    chunk = next(snapshot.rglob("0.0"))
    shutil.copy(chunk, tmp_path / "elsewhere")
    chunk.unlink()
    chunk.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="outside the folder"):
        open_t5x(snapshot / tiny_t5x.name)


def test_links_of_any_other_folder_lead_nowhere_else(tiny_t5x: Path, tmp_path: Path) -> None:
    snapshot = as_in_the_hubs_cache(tiny_t5x, tmp_path, "org/name")
    for other in ("models--org--name/saved/1", "org--name/snapshots/1"):
        folder = tmp_path / "x" / other
        folder.parent.mkdir(parents=True)
        shutil.copytree(snapshot, folder, symlinks=True)
        shutil.copytree(snapshot.parent.parent / "blobs", folder.parent.parent / "blobs")
        with pytest.raises(UserError, match="outside the folder"):
            open_t5x(folder)


@pytest.mark.parametrize("kind", ["t5x", "hf"])
def test_the_host_never_holds_the_model(tmp_path: Path, kind: str) -> None:
    """A model of about 100 MB; ``scripts/bench_loading`` measures one of more than 1 GB."""
    script = [sys.executable, "scripts/bench_loading", "--megabytes", "100", "--ways", "direct"]
    subprocess.run(
        [*script, "--formats", kind, "--meshes", "model=8", "--json", str(tmp_path / "n.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        check=True,
        capture_output=True,
        timeout=600,
    )
    (row,) = json.loads((tmp_path / "n.json").read_text())
    assert row["model"] > 80e6 and row["held"] >= row["model"]
    # One shard and one array twice, as it is stored and as it is laid out, and what the allocator
    # keeps: 50 to 70 MB.  Reading all of it first takes more than the model once more.
    assert row["above_own"] < 0.8 * row["model"], row


def test_a_model_is_what_it_was(tiny_t5x: Path) -> None:
    params = param_tree.split(load_model(str(tiny_t5x)))[1]
    for name, array in read_t5x(tiny_t5x).items():
        np.testing.assert_array_equal(params[name], array)


def test_a_table_may_be_padded_further_for_the_models_own_vocabulary(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """DeepSeek's has 2,385 rows that no token uses; another model's vocabulary is refused."""
    own = Path(shutil.copy(tiny_model_dir / "spiece.model", tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 20_000}))
    size = load_vocabulary(own).size
    config = dataclasses.replace(preset("t5_1_0_small"), vocab_size=size + 2385)
    words = _vocabulary("", own, config, model="m")
    assert words is not None and words.size == size
    with pytest.raises(UserError, match=rf"has only {size} pieces for the {size + 2385} embedd"):
        _vocabulary(own, None, config, model="m")
    with pytest.raises(UserError, match="has only"):
        _vocabulary("", own, dataclasses.replace(config, vocab_size=2 * size), model="m")
