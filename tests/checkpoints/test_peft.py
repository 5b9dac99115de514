import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prompt_tuning_jax.checkpoints.peft.adapter_file import (
    CONFIG,
    KEY,
    WEIGHTS,
    read_peft,
    write_peft,
)
from prompt_tuning_jax.checkpoints.peft.prompts import write_peft_prompts
from prompt_tuning_jax.checkpoints.peft.weights import write_peft_weights
from prompt_tuning_jax.checkpoints.prompt_file import (
    load_prompt,
    load_prompt_with_metadata,
    save_prompt,
)
from prompt_tuning_jax.config.methods import LoRA, PromptTuning
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.config import T5Config

PROMPT = np.random.default_rng(0).standard_normal((5, 8), np.float32)
BOTH = np.concatenate([PROMPT, PROMPT + 1])  # one copy for each stack, and they differ


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    write_peft(folder, PROMPT, base_model_name_or_path="org/model")
    return folder


def change(folder: Path, rows: np.ndarray | None = None, **fields: Any) -> Path:
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))
    if rows is not None:
        save_file({KEY: rows}, folder / WEIGHTS)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_prompt(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_reads_back_what_was_written(adapter: Path) -> None:
    prompt, metadata = load_prompt_with_metadata(adapter)
    assert prompt.dtype == np.float32
    np.testing.assert_array_equal(prompt.view(np.uint32), PROMPT.view(np.uint32))
    assert metadata.model_name == "org/model"
    assert sorted(p.name for p in adapter.iterdir()) == [CONFIG, WEIGHTS]
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"]


def test_names_in_any_alphabet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are UTF-8 whatever the locale's encoding is."""
    monkeypatch.setattr("io.text_encoding", lambda given, stacklevel=2: given or "ascii")
    name = "org/modèle"
    lora, shape = LoRA(rank=1, targets=("encoder/layers_0/mlp/wo",)), {"a_DR": (12, 1)}
    arrays = {
        f"model/encoder/layers_0/mlp/wo/adapter/lora_{end}": np.ones(size, np.float32)
        for end, size in (shape | {"b_RF": (1, 8)}).items()
    }
    config = T5Config(
        vocab_size=9, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=12, num_encoder_layers=1,
        num_decoder_layers=1,
    )  # fmt: skip
    write_peft(tmp_path / "prompt", PROMPT, base_model_name_or_path=name)
    write_peft_weights(tmp_path / "lora", lora, arrays, config=config, base_model_name_or_path=name)
    write_peft_prompts(
        tmp_path / "p", PromptTuning(length=5), {"method/prompt_PD": PROMPT}, config=config,
        base_model_name_or_path=name,
    )  # fmt: skip
    for kind in ("prompt", "lora", "p"):
        described = json.loads((tmp_path / kind / CONFIG).read_bytes())
        assert described["base_model_name_or_path"] == name


def test_what_peft_reads(adapter: Path) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    told = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM",
        "num_virtual_tokens": 5,
        "token_dim": 8,
        "num_transformer_submodules": 1,
        "num_layers": None,
        "inference_mode": True,
    }
    assert told.items() <= config.items()
    assert list(load_file(adapter / WEIGHTS)) == [KEY]


def test_the_first_of_two_copies_is_the_prompt(adapter: Path) -> None:
    change(adapter, BOTH, num_transformer_submodules=2)
    np.testing.assert_array_equal(load_prompt(adapter), PROMPT)
    for rows in (PROMPT, BOTH):  # by old configs either is possible
        change(adapter, rows, num_transformer_submodules=None, token_dim=None, task_type=None)
        np.testing.assert_array_equal(load_prompt(adapter), PROMPT)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_peft_to_ours_to_peft_is_bit_exact(adapter: Path, dtype: Any) -> None:
    rows = BOTH.astype(dtype)
    change(adapter, rows, num_transformer_submodules=2)
    ours = adapter.parent / "p.safetensors"
    loaded, metadata = load_prompt_with_metadata(adapter, dtype=None)
    save_prompt(ours, loaded, metadata=metadata, dtype=None)
    loaded, metadata = load_prompt_with_metadata(ours, dtype=None)
    again = adapter.parent / "again"
    write_peft(again, loaded, base_model_name_or_path=metadata.model_name, dtype=None)
    stored = load_file(again / WEIGHTS)[KEY]
    assert stored.dtype == dtype
    assert stored.tobytes() == rows[:5].tobytes()
    config = json.loads((again / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "org/model"
    np.testing.assert_array_equal(load_prompt(again), rows[:5].astype(np.float32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 4}, r"has shape [5, 8], but adapter_config.json requires [4, 8]"),
        ({"num_virtual_tokens": 10}, "requires [10, 8]"),
        ({"num_transformer_submodules": 2}, "requires [10, 8]"),
        ({"token_dim": 9}, "requires [5, 9]"),
        ({"num_virtual_tokens": 3, "num_transformer_submodules": None}, "requires [3 or 6, 8]"),
        ({"num_virtual_tokens": None}, "no num_virtual_tokens"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"num_virtual_tokens": -5}, "num_virtual_tokens is -5"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens is true"),
        ({"num_virtual_tokens": "5"}, 'num_virtual_tokens is "5"'),
        ({"token_dim": 8.0}, "token_dim is 8.0"),
        ({"num_transformer_submodules": [1]}, "num_transformer_submodules is [1]"),
        ({"num_transformer_submodules": 3}, "a T5 has two stacks"),
        (
            {"peft_type": "LORA"},
            "a LORA adapter is not a plain prompt; use its folder with predict, eval",
        ),
        (
            {"peft_type": "ADALORA"},
            "ADAPTION_PROMPT, LORA, IA3; merge others",
        ),
        ({"peft_type": "P_TUNING"}, "P_TUNING"),
        ({"peft_type": None}, "peft_type is null"),
        ({"peft_type": {"a\nb": 1}}, "peft_type is"),
        (
            {"task_type": "TOKEN_CLS"},
            'task_type is "TOKEN_CLS"; for a language model it is SEQ_2_SEQ_LM',
        ),
        ({"task_type": "CAUSAL_LM", "num_transformer_submodules": 2}, "model has one stack"),
        (
            {"modules_to_save": ["lm_head"]},
            'modules_to_save is ["lm_head"], which is not',
        ),
        ({"gated": True}, "gated is true, which is not supported; supported adapters: PROMPT_TUN"),
    ],
)
def test_configs_that_contradict(adapter: Path, fields: dict[str, Any], message: str) -> None:
    assert message in refusal(change(adapter, **fields))


ROWS = {
    "1-D": (PROMPT[0], "two dimensions"),
    "3-D": (PROMPT[None], "two dimensions"),
    "integers": (PROMPT.astype(np.int32), "int32"),
    "NaN": (np.where(PROMPT > 1, np.nan, PROMPT), "not finite"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_are_no_prompt(adapter: Path, case: str) -> None:
    rows, message = ROWS[case]
    assert message in refusal(change(adapter, rows))


def test_rows_of_the_second_copy_are_checked_too(adapter: Path) -> None:
    rows = BOTH.copy()
    rows[7, 3] = np.inf
    assert "not finite" in refusal(change(adapter, rows, num_transformer_submodules=2))


@pytest.mark.parametrize(
    "config",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": ' * 100_000, b'{"a": 1' + b"0" * 5000 + b"}"],
)
def test_damaged_configs(adapter: Path, config: bytes) -> None:
    (adapter / CONFIG).write_bytes(config)
    assert "adapter_config.json" in refusal(adapter)


def test_a_config_of_any_size_is_not_read(adapter: Path) -> None:
    (adapter / CONFIG).write_bytes(b" " * 1_000_001)
    assert "too large" in refusal(adapter)


def test_missing_and_damaged_files(adapter: Path) -> None:
    weights, config = (adapter / WEIGHTS).read_bytes(), (adapter / CONFIG).read_bytes()
    for length in (0, 7, 50, len(weights) - 1):
        (adapter / WEIGHTS).write_bytes(weights[:length])
        assert "damaged" in refusal(adapter)
    (adapter / WEIGHTS).unlink()
    assert "has a PEFT config but no adapter_model.safetensors" in refusal(adapter)
    (adapter / WEIGHTS).mkdir()
    assert "adapter_model.safetensors" in refusal(adapter)
    (adapter / WEIGHTS).rmdir()
    (adapter / WEIGHTS).write_bytes(weights)
    (adapter / CONFIG).unlink()
    assert "cannot read the PEFT config" in refusal(adapter)
    (adapter / CONFIG).write_bytes(config)
    save_file({KEY: PROMPT, "base_model.lm_head.weight": PROMPT}, adapter / WEIGHTS)
    assert "contains base_model.lm_head.weight, prompt_embeddings" in refusal(adapter)


def test_the_weights_alone_are_told_to_come_with_their_folder(adapter: Path) -> None:
    with pytest.raises(UserError, match=f"use its folder {adapter}$"):
        load_prompt(adapter / WEIGHTS)


def test_paths_in_a_config_are_not_followed(adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_peft(other, PROMPT + 5, base_model_name_or_path="elsewhere")
    paths = dict.fromkeys(
        ("base_model_name_or_path", "tokenizer_name_or_path", "auto_mapping", "revision"),
        str(other),
    )
    change(adapter, **paths)
    np.testing.assert_array_equal(load_prompt(adapter), PROMPT)
    change(adapter, base_model_name_or_path=["a"])
    assert read_peft(adapter).base_model_name_or_path == ""


def test_what_is_not_a_prompt_is_not_written(tmp_path: Path) -> None:
    for rows in (PROMPT[0], PROMPT * np.nan, PROMPT.astype(int)):
        with pytest.raises(UserError):
            write_peft(tmp_path / "a", rows, base_model_name_or_path="m")
    assert list(tmp_path.iterdir()) == []


def test_writing_over_an_adapter_keeps_other_files(adapter: Path) -> None:
    (adapter / "README.md").write_text("a model card")
    write_peft(adapter, PROMPT[:2], base_model_name_or_path="m", num_layers=2)
    assert load_prompt(adapter).shape == (2, 8)
    assert (adapter / "README.md").read_text() == "a model card"
    (adapter.parent / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_peft(adapter.parent / "file", PROMPT, base_model_name_or_path="m")


def test_the_same_prompt_gives_the_same_bytes(adapter: Path) -> None:
    other = adapter.parent / "other"
    write_peft(other, PROMPT, base_model_name_or_path="org/model")
    for name in (CONFIG, WEIGHTS):
        assert (adapter / name).read_bytes() == (other / name).read_bytes()


def test_weights_of_pytorch_without_pytorch(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    assert "PyTorch is not installed; save the adapter as" in refusal(adapter)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_of_pytorch(adapter: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: parity)")
    rows = torch.tensor(BOTH).to(getattr(torch, dtype))
    (adapter / WEIGHTS).unlink()
    torch.save({KEY: rows}, adapter / "adapter_model.bin")
    change(adapter, num_transformer_submodules=2)
    loaded = load_prompt(adapter, dtype=None)
    assert loaded.dtype.name == dtype
    np.testing.assert_array_equal(loaded.astype(np.float32), rows[:5].float().numpy())


@pytest.mark.parametrize("content", ["a list", "another name", "a number", "no tensors"])
def test_pytorch_files_of_something_else(adapter: Path, content: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: parity)")
    rows = torch.tensor(PROMPT)
    contents = {
        "a list": [rows],
        "another name": {"weight": rows},
        "a number": {KEY: 1},
        "no tensors": {},
    }
    (adapter / WEIGHTS).unlink()
    torch.save(contents[content], adapter / "adapter_model.bin")
    assert "contains" in refusal(adapter)


@pytest.mark.parametrize("name", ["a_t5_10", "b_t5_11", "c_flan", "d_mt5", "e_byt5"])
def test_recorded_adapters(shared: Path, tmp_path: Path, name: str) -> None:
    folder = shared / "fixtures/hf/peft" / name
    config = json.loads((folder / "prompt_sub1" / CONFIG).read_text())
    length = config["num_virtual_tokens"]
    for kind in ("prompt_sub1", "prompt_sub2"):
        rows = load_file(folder / kind / WEIGHTS)[KEY]
        loaded = read_peft(folder / kind)
        assert loaded.prompt_PD.tobytes() == rows[:length].tobytes()
        assert (loaded.base_model_name_or_path, loaded.peft_version) == (name, "0.21.2")
    # The same bytes as PEFT's, and a config that tells the same.
    write_peft(
        tmp_path / "a",
        read_peft(folder / "prompt_sub1").prompt_PD,
        base_model_name_or_path=name,
        num_layers=config["num_layers"],
        num_attention_heads=config["num_attention_heads"],
    )
    recorded = (folder / "prompt_sub1" / WEIGHTS).read_bytes()
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == recorded
    assert config.pop("peft_version")
    assert json.loads((tmp_path / "a" / CONFIG).read_text()) == config


OTHER_KINDS = ["ia3", "lora_qv_r4", "multitask_sub1", "multitask_sub2", "prefix", "prefix_proj"]
OTHER_KINDS += ["ptuning_lstm_sub1", "ptuning_mlp_sub2"]


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_recorded_adapters_of_other_kinds(shared: Path, kind: str) -> None:
    assert "is not a plain prompt" in refusal(shared / "fixtures/hf/peft/b_t5_11" / kind)
