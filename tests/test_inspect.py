"""``prompt-tuning inspect`` on everything that is read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
from prompt_tuning_jax.checkpoints.inspect import describe_model
from prompt_tuning_jax.checkpoints.parameters import parameter_shapes
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata, save_prompt
from prompt_tuning_jax.models.t5.config import PRESETS, T5Config
from tests import convert_cases as cases
from tests.convert_cases import Program, hf_model, orbax_model, prompt, t5x_model


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Program:
    return Program(capsys, tmp_path)


def rows(text: str) -> dict[str, str]:
    """Columns of the text; two blanks part them."""
    pairs = (line.split("  ", 1) for line in text.splitlines())
    return {name: value.strip() for name, value in pairs}


def test_a_t5x_checkpoint(program: Program, tmp_path: Path) -> None:
    source = t5x_model(tmp_path, with_prompt=True)
    found = rows(program("inspect", source))
    wanted = {
        "kind": "model (T5X checkpoint)",
        "layout": "T5X native, version 3",
        "size": "none of the published",
        "step": "9",
        "dtype": "float32",
        "prompt": f"[5, {cases.WIDTH}]",
        "vocabulary": "none",
        "parameters": "13,040",
        "bytes": "52,160",
    }
    assert found | wanted == found
    described = json.loads(program("inspect", source, "--json"))
    assert described["kind"] == "model" and described["step"] == 9
    assert described["prompt"] == [5, cases.WIDTH] and described["parameters"] == 13_040
    assert described["config"]["embed_dim"] == cases.WIDTH
    assert described["dtypes"] == {"float32": 13_040}
    assert described["optimizer_arrays"] == len(cases.params())
    assert described["fingerprint"] == found["fingerprint"] and len(found["fingerprint"]) == 16


def test_the_same_model_everywhere(program: Program, tmp_path: Path) -> None:
    """One fingerprint, whatever the format and the type of the numbers."""
    half = {name: array.astype(cases.BF16) for name, array in cases.params().items()}
    sources = {
        "model.safetensors": hf_model(tmp_path / "hf"),
        "T5X on Orbax, version 3": orbax_model(tmp_path / "orbax", half, use_ocdbt=True),
        "T5X native, version 3": t5x_model(tmp_path / "native"),
    }
    found = {name: rows(program("inspect", source)) for name, source in sources.items()}
    assert {name: row["layout"] for name, row in found.items()} == {name: name for name in sources}
    assert len({row["fingerprint"] for row in found.values()}) == 1
    assert found["T5X on Orbax, version 3"]["dtype"] == "bfloat16"
    assert found["T5X on Orbax, version 3"]["step"] == "5"
    assert found["model.safetensors"]["vocabulary"].startswith("spiece.model, 192 ids")
    assert "step" not in found["model.safetensors"]
    write_hf(tmp_path / "s", cases.CONFIG, cases.params(), dtype="stored", max_shard_bytes=15_000)
    shards = len(list((tmp_path / "s").glob("*.safetensors")))
    partitioner = rows(program("inspect", tmp_path / "s"))["layout"]
    assert partitioner == f"model.safetensors in {shards} files" and shards > 1


def test_mixed_types(program: Program, tmp_path: Path) -> None:
    mixed = cases.params()
    mixed["token_embedder/embedding"] = mixed["token_embedder/embedding"].astype(cases.BF16)
    write_hf(tmp_path / "hf", cases.CONFIG, mixed, dtype="stored")
    dtype = rows(program("inspect", tmp_path / "hf"))["dtype"]
    assert dtype == f"float32 ({13_040 - 208 * 16:,}), bfloat16 ({208 * 16:,})"


T5_1_0 = {"mlp_activations": ("relu",), "tie_embeddings": True}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "T5 1.1 (LM-adapted and Flan-T5 are alike)"),
        (T5_1_0, "T5 1.0"),
        ({"mlp_activations": ("relu",)}, "T5 1.0, with a separate output layer"),
        ({"vocab_size": 384}, "ByT5"),
        ({"vocab_size": 250_112, "embed_dim": 2}, "mT5"),
    ],
)
def test_architectures(tmp_path: Path, fields: dict[str, Any], name: str) -> None:
    config: T5Config = dataclasses.replace(cases.CONFIG, **fields)
    write_hf(tmp_path / "hf", config, cases.params(config), dtype="stored")
    assert describe_model(str(tmp_path / "hf")).architecture == name


def test_a_published_size_is_told_without_reading(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers say it all: the zeros of this file are a hole on the disk, never read."""
    config, header, at = PRESETS["xxl"], {}, 0
    write_hf(tmp_path / "hf", cases.CONFIG, cases.params(), dtype="stored")
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    sizes = {"vocab_size": 32_128, "d_model": 4096, "d_ff": 10_240, "num_heads": 64, "d_kv": 64}
    layers = {"num_layers": 24, "num_decoder_layers": 24}
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**described, **sizes, **layers}))
    from prompt_tuning_jax.checkpoints.hf import pretrained

    for name, shape in parameter_shapes(config).items():
        shape = shape[::-1] if pretrained._is_transposed(name) else shape
        end = at + 2 * int(np.prod(shape))
        header[pretrained.hf_name(name)] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    with (tmp_path / "hf" / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    # A real file of this size has no holes, and a hole is refused.
    for module in ("hf.weights", "array_files"):
        monkeypatch.setattr(
            f"prompt_tuning_jax.checkpoints.{module}.require_whole", lambda path: None
        )
    # Whether the head is the table takes one look at both.
    monkeypatch.setattr(pretrained, "equal_bits", lambda left, right: False)
    monkeypatch.setattr("tests.convert_cases.tree_bytes", lambda folder: {})
    found = rows(program("inspect", tmp_path / "hf"))
    assert (found["size"], found["parameters"]) == ("xxl", "11,135,332,352")
    assert found["fingerprint"].startswith("not computed")


def test_prompts(program: Program, tmp_path: Path) -> None:
    np.save(tmp_path / "encoder.prompt", prompt(3, width=768))
    (tmp_path / "encoder.prompt.npy").rename(tmp_path / "encoder.prompt")
    found = rows(program("inspect", tmp_path / "encoder.prompt"))
    assert found["kind"] == "prompt (npy)" and found["parameters"] == "2,304"
    assert found["length"] == "3" and "base" in found["fits"].split(", ")
    metadata = PromptMetadata(task="t", steps=7, score=0.5, metric="f1", model_name="org/t5")
    save_prompt(tmp_path / "p.safetensors", prompt(dtype=cases.BF16), metadata=metadata, dtype=None)
    described = json.loads(program("inspect", tmp_path / "p.safetensors", "--json"))
    assert (described["kind"], described["dtype"]) == ("prompt", "bfloat16")
    assert described["metadata"]["steps"] == 7 and described["fits"] == []
    program("convert", tmp_path / "p.safetensors", tmp_path / "peft", "--to", "peft")
    adapter = json.loads(program("inspect", tmp_path / "peft", "--json"))
    assert adapter["format"] == "PEFT adapter"
    assert adapter["metadata"]["model_name"] == "org/t5"
    assert adapter["norm_mean"] == described["norm_mean"]


def test_the_bundled_model_by_its_name(program: Program) -> None:
    found = rows(program("inspect", "tiny"))
    assert found["size"] == "tiny" and found["vocabulary"].startswith("spiece.model")


def test_what_is_nothing(program: Program, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no such file or folder" in program.refused("inspect", tmp_path / "none")
    assert "config.json" in program.refused("inspect", tmp_path / "empty")
