"""``convert`` and ``inspect`` on decoder-only models, of folders and GGUF files."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from prompt_tuning_jax.checkpoints.hf.pretrained import read_hf
from prompt_tuning_jax.checkpoints.load import load_model, open_model
from tests.convert_cases import Program


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Program:
    return Program(capsys, tmp_path)


def rows(text: str) -> dict[str, str]:
    pairs = (line.split("  ", 1) for line in text.splitlines())
    return {name: value.strip() for name, value in pairs}


def test_a_folder_is_described_and_converted(
    program: Program, shared: Path, tmp_path: Path
) -> None:
    source = shared / "fixtures" / "families" / "gpt2_hubkeys"
    found = rows(program("inspect", source))
    assert found["kind"] == "model (Hugging Face folder)"
    assert found["architecture"] == "gpt2 (decoder-only) with tied embeddings"
    assert found["parameters"] == "46,880" and found["num_layers"] == "3"
    assert "size" not in found and found["vocabulary"] == "none"
    described = json.loads(program("inspect", source, "--json"))
    assert described["config"]["model_type"] == "gpt2" and not described["is_gguf"]
    program("convert", source, tmp_path / "hf", "--to", "hf")
    again = rows(program("inspect", tmp_path / "hf"))
    assert again["fingerprint"] == found["fingerprint"]
    plain = shared / "fixtures" / "families" / "gpt2" / "model.safetensors"
    converted = load_file(tmp_path / "hf" / "model.safetensors")
    assert {n: x.tobytes() for n, x in load_file(plain).items()} == {
        n: x.tobytes() for n, x in converted.items()
    }
    program("convert", source, tmp_path / "bf16", "--to", "hf", "--dtype", "bfloat16")
    narrow = read_hf(tmp_path / "bf16")[1]
    assert {array.dtype.name for array in narrow.values()} == {"bfloat16"}


def test_t5x_holds_t5s_alone(program: Program, shared: Path, tmp_path: Path) -> None:
    source = shared / "fixtures" / "families" / "llama_mha"
    error = program.refused("convert", source, tmp_path / "t5x", "--to", "t5x")
    assert "is a llama, and a T5X checkpoint holds a T5: convert it to hf" in error
    assert not list(tmp_path.glob("t5x*"))


def test_a_gguf_file(program: Program, shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    from tests.gguf_cases import gguf_of

    folder = shared / "fixtures" / "families" / "bloom"
    path, config, params = gguf_of(folder, tmp_path / "m.gguf")
    found = rows(program("inspect", path))
    assert found["kind"] == "model (GGUF file)" and found["layout"] == "m.gguf"
    assert found["architecture"] == "bloom (decoder-only) with tied embeddings"
    size = sum(array.nbytes for array in params.values())
    assert found["dtype"] == "F32" and found["bytes"] == f"{size:,}"
    error = program.refused("convert", path, tmp_path / "p.npy")
    assert "is a model, and npy is a format of prompts" in error
    assert open_model(str(path)).config.embed_dim == config.embed_dim


def test_smollm2_becomes_a_folder(
    smollm2: Path, shared: Path, program: Program, tmp_path: Path
) -> None:
    """With its tokenizer; the folder has the file's numbers, and the probabilities recorded."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    output = program("convert", smollm2, tmp_path / "hf", "--to", "hf")
    assert "its quantized weights are written as float32" in output
    names = {file.name for file in (tmp_path / "hf").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    model = load_model(str(tmp_path / "hf"))
    recorded = np.load(shared / "fixtures" / "families" / "smollm2" / "cases.npz")
    texts = json.loads((shared / "fixtures" / "families" / "smollm2" / "texts.json").read_text())
    length = int(recorded["attention_mask"][0].sum())
    tokens_T = model.vocabulary.encode(texts["sentences"][0])
    assert tokens_T == recorded["input_ids"][0, :length].tolist()
    tokens_1T = np.array([tokens_T])
    logits_SV = np.asarray(model.run(tokens_1T[:, :1], tokens_1T[:, 1:]))[0].astype(np.float64)
    log_probs_SV = logits_SV - np.logaddexp.reduce(logits_SV, axis=-1, keepdims=True)
    got = np.take_along_axis(log_probs_SV, tokens_1T[0, 1:, None], -1)[:, 0]
    np.testing.assert_allclose(got, recorded["token_logprobs"][0, 1:length], atol=5e-4)
