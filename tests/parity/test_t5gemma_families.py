"""T5Gemma and T5Gemma 2 against transformers: its folders read, and folders written for it."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.hf.pretrained import open_hf, write_hf
from prompt_tuning_jax.checkpoints.load import load_model

torch: Any = pytest.importorskip("torch", reason="torch is not installed")
transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

V, T, S = 96, 20, 12
_STACK: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "sliding_window": 5,
    "query_pre_attn_scalar": 20,
}
_WIDER = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 3}
_BIASES = {"attention_bias": True, "attn_logit_softcapping": None, "final_logit_softcapping": None}
_LINEAR = {"rope_type": "linear", "factor": 2.0}
_OTHER = {"num_key_value_heads": 4, "sliding_window": 4, "hidden_activation": "gelu"}
# What differs from _STACK in the encoder and in the decoder, and in the model.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "balanced": ("t5gemma", {}, {}, {}),
    "unbalanced": ("t5gemma", _WIDER, {}, {}),
    "biases, no caps, own head": ("t5gemma", _BIASES, _BIASES, {"tie_word_embeddings": False}),
    "text": ("t5gemma2", {"num_hidden_layers": 6}, {}, {}),
    "stacks of other sizes": (
        "t5gemma2",
        {**_OTHER, "layer_types": ["full_attention", "sliding_attention"]},
        {"final_logit_softcapping": 3.0, "sliding_window": 3},
        {},
    ),
    "own head": (
        "t5gemma2",
        {"attention_bias": True, "rope_theta": 1e5, "rope_scaling": _LINEAR},
        {"rope_local_base_freq": 50.0},
        {"tie_word_embeddings": False},
    ),
}


def config_for(case: str) -> Any:
    kind, encoder, decoder, whole = CASES[case]
    encoder, decoder = {**_STACK, **encoder}, {**_STACK, **decoder}
    if kind == "t5gemma2":
        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 8,
            "patch_size": 4,
            "vision_use_head": False,
        }
        encoder = {
            "text_config": encoder,
            "vision_config": vision,
            "mm_tokens_per_image": 4,
            "eoi_token_index": V - 2,
        }
        whole = {**whole, "image_token_index": V - 1}
    return transformers.AutoConfig.for_model(kind, encoder=encoder, decoder=decoder, **whole)


def with_window(folder: Path, more: int) -> None:
    """Changes the encoder's window: transformers 5's T5Gemma sees one more than version 4's."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    if raw["model_type"] == "t5gemma" and int(transformers.__version__.split(".")[0]) >= 5:
        raw["encoder"]["sliding_window"] += more
        path.write_text(json.dumps(raw))


def logits_of(folder: Path, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    model = load_model(str(folder))
    graphdef, params = param_tree.split(model)
    run = jax.jit(lambda params, *tokens: param_tree.merge(graphdef, params).run(*tokens))
    return np.asarray(run(params, inputs, targets))


def torch_logits(model: Any, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    shifted = np.concatenate([np.full((len(targets), 1), 2), targets[:, :-1]], axis=1)
    with torch.no_grad():
        logits = model.eval()(
            input_ids=torch.tensor(inputs).long(),
            attention_mask=torch.ones(inputs.shape, dtype=torch.long),
            decoder_input_ids=torch.tensor(shifted).long(),
        ).logits
    return np.asarray(logits.numpy())


@pytest.mark.parametrize("case", CASES)
def test_folders_read_and_written(tmp_path: Path, case: str) -> None:
    try:
        config = config_for(case)
    except ValueError as error:  # version 4 has no T5Gemma 2
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    torch.manual_seed(0)
    auto = transformers.AutoModelForSeq2SeqLM
    model = auto.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():  # biases start as zeros, and norms as ones
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "theirs")
    random = np.random.default_rng(0)
    tokens = random.integers(3, V - 1, (2, T)), random.integers(3, V - 1, (2, S))
    tokens[0][0, 4] = V - 2  # the end of an image
    want = torch_logits(model, *tokens)
    with_window(tmp_path / "theirs", 1)
    np.testing.assert_allclose(logits_of(tmp_path / "theirs", *tokens), want, atol=2e-4)
    ours, params, _ = open_hf(tmp_path / "theirs")
    write_hf(tmp_path / "ours", ours, params, dtype="stored")
    with_window(tmp_path / "ours", -1)
    again, info = auto.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    images = ("vision_tower", "multi_modal_projector")
    assert not info["unexpected_keys"]
    assert not [key for key in info["missing_keys"] if not any(part in key for part in images)]
    np.testing.assert_allclose(torch_logits(again, *tokens), want, atol=1e-5)
