"""Every decoder-only family against transformers: its folders read, and folders written for it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.hf.families import FAMILIES
from prompt_tuning_jax.checkpoints.hf.pretrained import open_hf, write_hf
from prompt_tuning_jax.checkpoints.load import load_model

torch: Any = pytest.importorskip("torch", reason="torch is not installed")
transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

V, T = 96, 24
_SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# What "truncate" keeps whole and the factors imply, and the same with all of it given.
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_YARN_GIVEN = {
    **_YARN,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
    "truncate": False,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 40}
CASES: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {**_GROUPED, "rope_scaling": _LLAMA3, "head_dim": 12},
        {**_SIZES, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ],
    "mistral": [{**_GROUPED, "sliding_window": 5}],
    "qwen2": [
        {**_GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ],
    "qwen3": [
        {**_GROUPED, "head_dim": 16, "attention_bias": True},
        {**_GROUPED, "head_dim": 16, "rope_scaling": _YARN},
        {**_GROUPED, "head_dim": 16, "rope_scaling": _YARN_GIVEN},
    ],
    "olmo": [{**_GROUPED, "clip_qkv": 0.05}, _SIZES],
    "gemma2": [{**_GROUPED, "head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 20}],
    "gemma3_text": [
        {
            **_GROUPED,
            "num_hidden_layers": 6,
            "head_dim": 12,
            "sliding_window": 5,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        }
    ],
    "gpt2": [{**_SIZES, **_GPT2}],
    "bloom": [{**_SIZES, "n_layer": 2, "n_head": 4}],
    "gpt_neox": [_SIZES, {**_SIZES, "use_parallel_residual": False, "attention_bias": False}],
    "opt": [{**_SIZES, "ffn_dim": 48}, {**_SIZES, "ffn_dim": 48, "enable_bias": False}],
    "phi": [{**_GROUPED, "partial_rotary_factor": 0.5}],
}


def logits_of(folder: Path, tokens_BT: np.ndarray) -> np.ndarray:
    model = load_model(str(folder))
    graphdef, params = param_tree.split(model)
    run = jax.jit(lambda params, *tokens: param_tree.merge(graphdef, params).run(*tokens))
    return np.asarray(run(params, tokens_BT[:, :1], tokens_BT[:, 1:]))


def torch_logits(model: Any, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        mask = torch.ones(tokens_BT.shape, dtype=torch.long)
        logits = model.eval()(torch.tensor(tokens_BT).long(), attention_mask=mask).logits
    return np.asarray(logits.numpy())[:, :-1]


def test_every_family_is_tried() -> None:
    assert CASES.keys() == {name for name, family in FAMILIES.items() if not family.text_type}


@pytest.mark.parametrize(
    ("model_type", "number"),
    [(name, number) for name, cases in CASES.items() for number in range(len(cases))],
)
def test_folders_read_and_written(tmp_path: Path, model_type: str, number: int) -> None:
    config = transformers.AutoConfig.for_model(model_type, **CASES[model_type][number])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():  # biases start as zeros, and norms as ones
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "theirs")
    tokens_BT = np.random.default_rng(0).integers(3, V, (2, T))
    want = torch_logits(model, tokens_BT)
    np.testing.assert_allclose(logits_of(tmp_path / "theirs", tokens_BT), want, atol=2e-4)
    ours, params, _ = open_hf(tmp_path / "theirs")
    write_hf(tmp_path / "ours", ours, params, dtype="stored")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    np.testing.assert_allclose(torch_logits(again, tokens_BT), want, atol=1e-5)
