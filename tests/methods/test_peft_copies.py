"""Weights of the model that PEFT saves beside an adapter: passed over where they are its own."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.array_files import map_safetensors
from prompt_tuning_jax.checkpoints.destination import require_free
from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.checkpoints.parameters import EMBEDDING, LOGITS
from prompt_tuning_jax.checkpoints.peft.adapter_file import CONFIG, WEIGHTS
from prompt_tuning_jax.checkpoints.peft.modules import linear_shapes
from prompt_tuning_jax.checkpoints.peft.weights import read_peft_weights, write_peft_weights
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.lora import LoRA
from prompt_tuning_jax.untrusted_input import json_text, read_json_file
from tests.convert_cases import CONFIG as MODEL
from tests.convert_cases import params

FRONT = "base_model.model."
HEAD, TABLE = params()[LOGITS].T, params()[EMBEDDING]
OWN = params()
METHOD = LoRA(rank=2, targets=(".*/query", "decoder/logits_dense"))


def adapter(folder: Path, *, config: Any = None, **extra: np.ndarray) -> Path:
    from safetensors.numpy import save

    draw = np.random.default_rng(1)
    shapes = linear_shapes(MODEL)
    trainable = {}
    for name in shapes:
        if name.endswith("/query") or name == "decoder/logits_dense":
            inputs, outputs = shapes[name]
            adapter = f"model/{name}/adapter"
            trainable[f"{adapter}/lora_a_DR"] = draw.normal(size=(inputs, 2)).astype(np.float32)
            trainable[f"{adapter}/lora_b_RF"] = draw.normal(size=(2, outputs)).astype(np.float32)
    write_peft_weights(folder, METHOD, trainable, config=MODEL, base_model_name_or_path="some/base")
    arrays = {n: np.array(a) for n, a in map_safetensors(folder / WEIGHTS).arrays.items()}
    arrays |= {FRONT + name: np.ascontiguousarray(array) for name, array in extra.items()}
    (folder / WEIGHTS).write_bytes(save(arrays, {"format": "pt"}))
    described = read_json_file(folder / CONFIG) | (config or {})
    (folder / CONFIG).write_text(json_text(described))
    return folder


@pytest.mark.parametrize(
    "extra",
    [
        {"lm_head.base_layer.weight": HEAD},
        {"lm_head.weight": HEAD},
        {"shared.weight": TABLE, "lm_head.weight": HEAD},
        {"encoder.embed_tokens.weight": TABLE, "decoder.embed_tokens.weight": TABLE},
        {"lm_head.base_layer.weight": HEAD.astype(ml_dtypes.bfloat16)},
        {"shared.weight": TABLE.astype(np.float16)},
    ],
    ids=lambda extra: " ".join(extra),
)
def test_the_models_own_weights_are_passed_over(
    tmp_path: Path, extra: dict[str, np.ndarray]
) -> None:
    plain = read_peft_weights(adapter(tmp_path / "plain"), MODEL, OWN)
    found = read_peft_weights(adapter(tmp_path / "a", **extra), MODEL, OWN)
    assert found.method == plain.method
    assert found.trainable.keys() == plain.trainable.keys()
    for name, array in plain.trainable.items():
        np.testing.assert_array_equal(found.trainable[name], array)


def test_a_module_that_was_saved_whole_may_be_the_models_own(tmp_path: Path) -> None:
    config = {"modules_to_save": ["lm_head"]}
    folder = adapter(tmp_path / "a", config=config, **{"lm_head.weight": HEAD})
    read_peft_weights(folder, MODEL, OWN)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"lm_head.base_layer.weight": HEAD + 1e-3}, "is not the decoder/logits_dense/kernel of"),
        ({"shared.weight": np.concatenate([TABLE, TABLE[:4]])}, "another number of embeddings"),
        ({"shared.weight": TABLE[:-4]}, "another number of embeddings"),
        ({"encoder.final_layer_norm.weight": np.ones(16, np.float32)}, "is not the encoder/"),
        ({"shared.weight": np.full_like(TABLE, np.nan)}, "is not the token_embedder"),
        ({"something.weight": TABLE}, "belongs to no linear layer"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_weights_that_are_not_the_models_are_refused(
    tmp_path: Path, extra: dict[str, np.ndarray], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        read_peft_weights(adapter(tmp_path / "a", **extra), MODEL, OWN)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_compared_with_a_model_as_it_is_held(
    tmp_path: Path, dtype: str, quantization: Any
) -> None:
    write_hf(tmp_path / "model", MODEL, params(), dtype="stored")
    model = load_model(str(tmp_path / "model"), dtype=dtype, quantization=quantization)
    own = param_tree.split(model)[1]
    extra = {"lm_head.base_layer.weight": HEAD, "shared.weight": TABLE}
    read_peft_weights(adapter(tmp_path / "a", **extra), MODEL, own)
    extra["shared.weight"] = TABLE[::-1]
    with pytest.raises(UserError, match=r"shared\.weight is not the"):
        read_peft_weights(adapter(tmp_path / "b", **extra), MODEL, own)


def test_an_adapter_with_the_models_config_beside_it_may_be_replaced(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    (folder / "config.json").write_text('{"model_type": "t5"}')
    require_free(folder, overwrite=True, folder=True)
    read_peft_weights(folder, MODEL, OWN)
