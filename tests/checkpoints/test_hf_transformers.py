"""Folders written here, loaded by transformers; needs torch and transformers (extra parity)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.hf.pretrained import open_hf, read_hf, write_hf
from prompt_tuning_jax.checkpoints.parameters import parameter_shapes
from prompt_tuning_jax.models.t5.config import T5Config

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def logits(folder: Path) -> np.ndarray:
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    ids = torch.tensor([[5, 9, 7, 1], [8, 1, 0, 0]])
    with torch.no_grad():
        out = model(
            input_ids=ids,
            attention_mask=(ids != 0).long(),
            decoder_input_ids=torch.tensor([[0, 3, 4], [0, 6, 7]]),
        )
    return np.asarray(out.logits)


@pytest.mark.parametrize("name", ["a_t5_10", "b_t5_11", "c_flan", "d_mt5", "e_byt5"])
def test_recorded_models_keep_their_logits(shared: Path, tmp_path: Path, name: str) -> None:
    source = shared / "fixtures" / "hf" / name
    config, params, _ = open_hf(source)
    write_hf(tmp_path / "one", config, params, dtype="float32")
    write_hf(tmp_path / "shards", config, params, dtype="stored", max_shard_bytes=100_000)
    kind = transformers.MT5ForConditionalGeneration if name == "d_mt5" else None
    want = logits(source) if kind is None else None
    if want is not None:
        np.testing.assert_array_equal(logits(tmp_path / "one"), want)
    np.testing.assert_array_equal(logits(tmp_path / "one"), logits(tmp_path / "shards"))
    if want is None:
        recorded = np.load(source / "cases.npz")
        model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "one").eval()
        batch: dict[str, Any] = {
            key: torch.from_numpy(recorded[key]).long()
            for key in ("input_ids", "attention_mask", "decoder_input_ids")
        }
        with torch.no_grad():
            got = model(**batch).logits.numpy()
        real = recorded["labels"] != -100
        np.testing.assert_allclose(got[real], recorded["logits"][real], atol=2e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_writes_is_read(tmp_path: Path, tied: bool) -> None:
    config = T5Config(
        vocab_size=40,
        embed_dim=6,
        num_heads=2,
        head_dim=5,
        mlp_dim=12,
        num_encoder_layers=2,
        num_decoder_layers=1,
        mlp_activations=("relu",) if tied else ("gelu", "linear"),
        tie_embeddings=tied,
    )
    random = np.random.default_rng(0)
    shapes = parameter_shapes(config)
    params = {name: random.standard_normal(s, np.float32) for name, s in shapes.items()}
    write_hf(tmp_path / "ours", config, params, dtype="float32")
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="2KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    read_config, read_params, _ = read_hf(tmp_path / "theirs")
    assert read_config == config
    assert read_params.keys() == params.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(read_params[name], array, err_msg=name)
    torch.save(model.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    (tmp_path / "theirs" / "model.safetensors.index.json").unlink()
    assert read_hf(tmp_path / "theirs")[0] == config
