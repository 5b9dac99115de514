"""Models with a relative position bias in every layer: UMT5 and T5X's, in all formats and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.fingerprint import fingerprint
from prompt_tuning_jax.checkpoints.hf.config import model_type_of
from prompt_tuning_jax.checkpoints.hf.pretrained import open_hf, read_hf, write_hf
from prompt_tuning_jax.checkpoints.load import abstract_model, load_model
from prompt_tuning_jax.checkpoints.parameters import PROMPT, config_of, parameter_shapes
from prompt_tuning_jax.checkpoints.t5x.reader import open_t5x, read_t5x
from prompt_tuning_jax.checkpoints.t5x.writer import write_t5x
from prompt_tuning_jax.distributed import sharding
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.config import T5Config

CONFIG = T5Config(
    vocab_size=37,
    embed_dim=6,
    num_heads=3,
    head_dim=5,
    mlp_dim=10,
    num_encoder_layers=3,
    num_decoder_layers=2,
    relpos_num_buckets=8,
    relpos_max_distance=16,
    relpos_per_layer=True,
)
SHARED = dataclasses.replace(CONFIG, relpos_per_layer=False)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True, mlp_activations=("relu",))
RELPOS = "relpos_bias/rel_embedding"
HEAD = "decoder/logits_dense/kernel"
TABLE = "token_embedder/embedding"


def random_params(config: T5Config, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = parameter_shapes(config)
    return {k: random.standard_normal(s, np.float32).astype(dtype) for k, s in shapes.items()}


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        np.testing.assert_array_equal(array, right[name], err_msg=name)


def config_file(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return read


def edit_config(folder: Path, **changes: Any) -> None:
    raw = {k: v for k, v in (config_file(folder) | changes).items() if v != "drop"}
    (folder / "config.json").write_text(json.dumps(raw))


def edit_weights(folder: Path, **changes: np.ndarray | None) -> None:
    arrays = load_file(folder / "model.safetensors") | changes
    kept = {name: array for name, array in arrays.items() if array is not None}
    save_file(kept, folder / "model.safetensors")


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_umt5_folders_come_back_as_they_went(tmp_path: Path, config: T5Config, dtype: Any) -> None:
    params = random_params(config, getattr(ml_dtypes, dtype, np.float32))
    write_hf(tmp_path / "one", config, params, dtype=dtype)
    read_config, read_params, _ = read_hf(tmp_path / "one")
    assert read_config == config
    assert_same(read_params, params)
    raw = config_file(tmp_path / "one")
    assert raw["model_type"] == model_type_of(tmp_path / "one") == "umt5"
    assert raw["architectures"] == ["UMT5ForConditionalGeneration"]
    # And so do their files, bit for bit, in shards, too.
    lazy = open_hf(tmp_path / "one")[1]
    write_hf(tmp_path / "two", read_config, lazy, dtype="stored", model_type="umt5")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    write_hf(tmp_path / "many", read_config, lazy, dtype="stored", max_shard_bytes=900)
    assert_same(read_hf(tmp_path / "many")[1], params)


def test_every_block_of_a_umt5_has_its_bias_the_other_way_round(tmp_path: Path) -> None:
    params = random_params(CONFIG)
    write_hf(tmp_path, CONFIG, params, dtype="float32")
    arrays = load_file(tmp_path / "model.safetensors")
    biases = {name: array for name, array in arrays.items() if "relative" in name}
    layers = [("encoder", i) for i in range(3)] + [("decoder", i) for i in range(2)]
    end = "layer.0.SelfAttention.relative_attention_bias.weight"
    assert_same(
        biases,
        {f"{s}.block.{i}.{end}": params[f"{s}/layers_{i}/{RELPOS}"].T for s, i in layers},
    )


def test_a_umt5_and_an_mt5_are_told_apart_by_their_biases(tmp_path: Path) -> None:
    write_hf(tmp_path / "umt5", CONFIG, random_params(CONFIG))
    edit_config(tmp_path / "umt5", model_type="mt5")
    later = r"block\.[12]\.layer\.0\.SelfAttention\.relative_attention_bias\.weight"
    with pytest.raises(UserError, match=rf"only in .*model\.safetensors: .*{later}"):
        read_hf(tmp_path / "umt5")
    write_hf(tmp_path / "t5", SHARED, random_params(SHARED))
    edit_config(tmp_path / "t5", model_type="umt5")
    with pytest.raises(UserError, match=rf"only in config\.json: .*{later}"):
        read_hf(tmp_path / "t5")


def test_whether_a_umt5_scales_its_output(tmp_path: Path) -> None:
    """Both generations of transformers scale a tied one; a head of its own takes it unscaled."""
    params = random_params(CONFIG)
    write_hf(tmp_path, CONFIG, params, dtype="float32")
    for changes in (
        {"tie_word_embeddings": True, "transformers_version": "5.23.0"},
        {"tie_word_embeddings": False, "transformers_version": "4.57.1"},
        {"scalable_attention": True, "dense_act_fn": "gelu_new", "is_gated_act": True},
    ):
        edit_config(tmp_path, **changes)
        assert read_hf(tmp_path)[0] == CONFIG
    # Without a head, and with one that is the table.
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    kept = {name: array for name, array in params.items() if name != HEAD}
    for head in (None, params[TABLE]):
        edit_weights(tmp_path, **{"lm_head.weight": head})
        for flag in (True, "drop"):
            edit_config(tmp_path, tie_word_embeddings=flag)
            config, read, _ = read_hf(tmp_path)
            assert config == tied
            assert_same(read, kept)
    edit_config(tmp_path, tie_word_embeddings=False)
    config, read, _ = read_hf(tmp_path)
    assert config == CONFIG
    assert_same(read, params | {HEAD: params[TABLE].T})
    edit_weights(tmp_path, **{"lm_head.weight": None})
    with pytest.raises(UserError, match=r"only in config.json: lm_head.weight"):
        read_hf(tmp_path)


def test_defaults_of_a_umt5_are_those_of_transformers(tmp_path: Path) -> None:
    write_hf(tmp_path, CONFIG, random_params(CONFIG))
    edit_config(tmp_path, vocab_size="drop")
    with pytest.raises(UserError, match=r"\[37, 6\].*\[250112, 6\]"):
        read_hf(tmp_path)
    edit_config(tmp_path, vocab_size=37, feed_forward_proj="drop")
    assert read_hf(tmp_path)[0] == CONFIG
    edit_config(tmp_path, num_heads="drop")
    with pytest.raises(UserError, match=r"\[3, 8\].*\[6, 8\]"):
        read_hf(tmp_path)


def test_an_mt5_stays_an_mt5(shared: Path, tmp_path: Path) -> None:
    source = shared / "fixtures" / "hf" / "d_mt5"
    config, params, _ = open_hf(source)
    kind = model_type_of(source)
    write_hf(tmp_path / "mt5", config, params, dtype="stored", model_type=kind)
    raw = config_file(tmp_path / "mt5")
    assert (kind, raw["model_type"]) == ("mt5", "mt5")
    assert raw["architectures"] == ["MT5ForConditionalGeneration"]
    assert "scale_decoder_outputs" not in raw
    assert read_hf(tmp_path / "mt5")[0] == config
    assert_same(
        load_file(tmp_path / "mt5" / "model.safetensors"), load_file(source / "model.safetensors")
    )
    # A tied one is scaled by transformers 4 alone; as a T5 it is by both.
    tied = dataclasses.replace(SHARED, tie_embeddings=True)
    write_hf(tmp_path / "tied", tied, random_params(tied), model_type="mt5")
    assert (model_type_of(tmp_path / "tied"), read_hf(tmp_path / "tied")[0]) == ("t5", tied)
    for kind, message in (
        ("umt5", "no position bias in each"),
        ("bart", "'bart'; supported: t5, mt5, umt5"),
    ):
        with pytest.raises(UserError, match=message):
            write_hf(tmp_path / "no", SHARED, random_params(SHARED), model_type=kind)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("alike", [False, True], ids=["", "alike"])
def test_t5x_native_keeps_a_bias_per_layer(tmp_path: Path, alike: bool) -> None:
    params = random_params(CONFIG)
    if alike:  # a layer per name says whose the biases are, whatever is in them
        params |= {name: np.ones_like(p) for name, p in params.items() if name.endswith(RELPOS)}
    prompt = np.ones((4, CONFIG.embed_dim), np.float32)
    written = write_t5x(tmp_path, params, step=3, trained={PROMPT: prompt})
    assert (written / f"target.encoder.layers_2.{RELPOS.replace('/', '.')}").is_dir()
    checkpoint = open_t5x(written)
    assert not checkpoint.scanned
    assert config_of(checkpoint.params, relpos_max_distance=16) == CONFIG
    read = read_t5x(written)
    np.testing.assert_array_equal(read.pop(PROMPT), prompt)
    assert_same(read, params)
    again = write_t5x(tmp_path / "again", checkpoint.stored, step=3, state=checkpoint.open_state())
    assert_same(read_t5x(again), {**params, PROMPT: prompt})


@pytest.mark.parametrize("variant", ["scan_t5x", "orbax/scan"])
def test_from_scanned_t5x_to_native_to_umt5_and_back(
    shared: Path, tmp_path: Path, variant: str
) -> None:
    folder = shared / "fixtures" / "t5x"
    checkpoint = open_t5x(folder / variant / "checkpoint_7")
    config, params = config_of(checkpoint.params), read_t5x(folder / variant / "checkpoint_7")
    assert config.relpos_per_layer and checkpoint.scanned
    recorded = np.load(folder / "scan_logits.npz")
    for stack, count in (("encoder", 3), ("decoder", 2)):
        scanned = recorded[f"scanparam:{stack}/{stack}/{RELPOS}"]
        for i in range(count):
            np.testing.assert_array_equal(params[f"{stack}/layers_{i}/{RELPOS}"], scanned[:, i])
    write_hf(tmp_path / "umt5", config, checkpoint.params, dtype="stored")
    umt5_config, umt5_params, _ = open_hf(tmp_path / "umt5")
    assert umt5_config == config
    native = open_t5x(write_t5x(tmp_path, umt5_params, step=7))
    assert config_of(native.params) == config
    assert_same({name: array.whole() for name, array in native.params.items()}, params)


def test_fingerprints_know_whose_the_biases_are() -> None:
    params = random_params(CONFIG)
    seen = {fingerprint(CONFIG, params), fingerprint(SHARED, params)}
    for name in [name for name in params if name.endswith(RELPOS)]:
        seen.add(fingerprint(CONFIG, params | {name: params[name] * 1.1}))
    assert len(seen) == 2 + 5


def test_biases_of_layers_are_laid_out_as_those_of_stacks() -> None:
    """Over heads, by the one table; on a mesh that has as many devices."""
    model = abstract_model(CONFIG, dtype="float32", param_dtype="float32")
    axes, shapes = param_tree.logical_axes(model), param_tree.split(model)[1]
    assert {name: array.shape for name, array in shapes.items()} == parameter_shapes(CONFIG)
    own = {
        name: sharding.logical_to_mesh_axes(axes[name]) for name in axes if name.endswith(RELPOS)
    }
    assert len(own) == 5
    assert set(own.values()) == {jax.sharding.PartitionSpec("model", None)}


def test_load_model_reads_both(tmp_path: Path) -> None:
    params = random_params(CONFIG)
    write_hf(tmp_path / "hf", CONFIG, params, dtype="float32")
    t5x = write_t5x(tmp_path / "t5x", params, step=1)
    ids = np.array([[5, 9, 7, 1, 0]]), np.array([[0, 3, 4]])
    models = load_model(tmp_path / "hf"), load_model(t5x, relpos_max_distance=16)
    for model in models:
        assert model.config == CONFIG
    np.testing.assert_array_equal(models[0](*ids), models[1](*ids))
