"""model.weights=quantized: the numbers of a GGUF file as it stores them, and nothing rounded."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.gguf.model import open_gguf_model
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.config.experiment import Experiment, Model
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.setup import model_fingerprint, require_trainable
from prompt_tuning_jax.methods import FullTuning
from prompt_tuning_jax.models.base import Model as FrozenModel
from tests.micro import normal

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
from tests.gguf_cases import write_gguf  # noqa: E402

KINDS = gguf.GGMLQuantizationType
WIDTH, ROWS = 64, 48
SIZES: dict[str, Any] = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": WIDTH,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
PARTS = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
PARTS |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of all types that are kept, and one matrix of another type."""
    tensors: dict[str, Any] = {"output_norm.weight": 1 + normal(WIDTH)}
    types: dict[str, Any] = {}
    shapes = {"token_embd": (ROWS, WIDTH), "output": (ROWS, WIDTH)}
    for i in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{norm}.weight"] = 1 + normal(WIDTH, seed=i)
        shapes |= {f"blk.{i}.{part}": shape for part, shape in PARTS.items()}
    kept = [KINDS.Q8_0, KINDS.Q4_0, KINDS.Q4_1]
    for n, (name, shape) in enumerate(shapes.items()):
        kind = KINDS.Q5_0 if name == "blk.1.attn_v" else kept[n % 3]
        types[f"{name}.weight"] = kind
        tensors[f"{name}.weight"] = gguf.quants.quantize(normal(*shape, seed=n, scale=0.2), kind)
    file = tmp_path_factory.mktemp("blocks") / "m.gguf"
    return write_gguf(file, "llama", SIZES, tensors, vocab_size=ROWS, types=types)


def output(model: FrozenModel) -> Any:
    """Logits, and the gradient of a prompt."""
    graphdef, params = param_tree.split(model)
    tokens = np.arange(1, 11).reshape(2, 5)

    @jax.jit
    def run(params: Any, prompt: jax.Array) -> Any:
        def total(prompt: jax.Array) -> Any:
            model = param_tree.merge(graphdef, params)
            logits = model.write(model.read(model.embed(tokens, prompt)), tokens[:, :3])
            return jnp.sum(logits**2), logits

        return jax.grad(total, has_aux=True)(prompt)

    return run(params, jnp.asarray(normal(3, WIDTH)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_in_blocks_is_the_dequantised_one(
    path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    plain = load_model(path, dtype=dtype)
    kept = load_model(path, dtype=dtype, weights="quantized")
    told = capsys.readouterr().err
    assert "keeps Q8_0, Q4_0, Q4_1;" in told and "2,048 of Q5_0: these weights are deq" in told
    params = param_tree.split(kept)[1]
    types = {str(p.dtype) for n, p in params.items() if n.endswith(("kernel", "embedding"))}
    assert types == {"int8", "int4", "uint4", dtype}
    assert model_fingerprint(kept) == model_fingerprint(load_model(path))
    ids = jnp.asarray([[0, 7], [ROWS - 1, 7]])
    for one, other in (
        (plain.embed_tokens(ids), kept.embed_tokens(ids)),
        (load_model(path).output_vectors(ids[0]), kept.output_vectors(ids[0])),
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    (gradient, logits), (own, mine) = output(plain), output(kept)
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(mine, logits, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(own, gradient, atol=tolerance * np.abs(gradient).max())


def test_every_weight_has_the_same_bits(path: Path) -> None:
    """Before any product, the permuted rows of query and key included, and of any part."""
    opened = open_gguf_model(path)
    assert len(opened.blocks) == 15 and dict(opened.dequantized) == {"Q5_0": 2048}
    for name, blocks in opened.blocks.items():
        inputs = 1 if name.endswith("embedding") else 0
        scale, whole = blocks.scale.whole(), blocks.whole.whole()
        full = whole.astype(np.float32) * scale.repeat(32, inputs)
        if blocks.minimum is not None:
            full += blocks.minimum.whole().repeat(32, inputs)
        np.testing.assert_array_equal(full, opened.params[name].whole(), err_msg=name)
        part = (slice(5, 41), slice(3, 29))
        np.testing.assert_array_equal(blocks.whole.read(part), whole[part])
        some = (slice(0, 2), slice(1, 2))
        np.testing.assert_array_equal(blocks.scale.read(some), scale[some])


def test_it_is_for_gguf_files_and_weights_that_stay_frozen(path: Path) -> None:
    with pytest.raises(UserError, match=r"model.weights=quantized needs a GGUF file, and .*tiny"):
        load_model("tiny", weights="quantized")
    with pytest.raises(UserError, match=r"model.weights is quantized and model.quantization is i"):
        load_model(path, weights="quantized", quantization="int8")
    kept = load_model(path, weights="quantized")
    with pytest.raises(UserError, match=r"set model.quantization=none and model.weights=deq"):
        require_trainable(param_tree.split(kept)[1])
    model = Model(weights="quantized")
    for experiment, message in (
        (Experiment(model=model, method=FullTuning()), r"FullTuning trains the weights"),
        (Experiment(model=Model(weights="quantized", quantization="int4")), r"drop one"),
        (Experiment(model=Model(weights="quantized", random_weights=True)), r"reads no file"),
        (Experiment(model=Model(weights="int8")), r"model.weights.*int8.*quantized"),
        (Experiment(model=Model(logits_mb=0)), r"model.logits_mb is 0; must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            validate(experiment)
