import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.parameters import PROMPT, config_of
from prompt_tuning_jax.checkpoints.t5x.reader import open_t5x, read_t5x
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.config import T5Config

LARGE = np.arange(24, dtype=np.float32).reshape(6, 4)
SMALL = np.array([1.5, -2.0], np.float32)


def write_array(folder: Path, array: np.ndarray, dtype: str = "<f4") -> None:
    """What T5X does for a large leaf: a gzip zarr array, here of several chunks."""
    import tensorstore

    metadata = {"shape": array.shape, "chunks": [4, 4], "dtype": dtype}
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": metadata | {"compressor": {"id": "gzip"}},
    }
    tensorstore.open(spec, create=True).result().write(array).result()


def write_index(folder: Path, *, leaf: Any = None, **changes: Any) -> Path:
    from flax import serialization

    place = {"driver": "gfile", "path": "target.mlp.wo.kernel"}
    spec = {"driver": "zarr", "kvstore": place, "metadata": {"shape": [6, 4]}}
    target = {"mlp": {"wo": {"kernel": spec if leaf is None else leaf}}, "norm": {"scale": SMALL}}
    state = {"step": np.int32(7), "param_states": {"norm": {"scale": {"v": SMALL}}}}
    index = {"version": 3, "optimizer": {"target": target, "state": state}} | changes
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(index))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint_7"
    folder.mkdir()
    write_array(folder / "target.mlp.wo.kernel", LARGE)
    return write_index(folder)


def test_reads_inline_and_stored_leaves_and_leaves_the_optimizer_alone(checkpoint: Path) -> None:
    params = read_t5x(checkpoint)
    assert list(params) == ["mlp/wo/kernel", "norm/scale"]
    np.testing.assert_array_equal(params["mlp/wo/kernel"], LARGE)
    np.testing.assert_array_equal(params["norm/scale"], SMALL)
    assert open_t5x(checkpoint).step == 7


def test_reads_bfloat16(checkpoint: Path) -> None:
    import ml_dtypes

    shutil.rmtree(checkpoint / "target.mlp.wo.kernel")
    write_array(checkpoint / "target.mlp.wo.kernel", LARGE.astype(ml_dtypes.bfloat16), "bfloat16")
    kernel = read_t5x(checkpoint)["mlp/wo/kernel"]
    assert kernel.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(kernel.astype(np.float32), LARGE)


@pytest.mark.parametrize("where", ["../other", "target.x/../../other", "/etc", "{out}", ".", ""])
def test_refuses_arrays_outside_of_the_folder(checkpoint: Path, where: str) -> None:
    outside = checkpoint.parent / "other"
    write_array(outside, LARGE)
    kvstore = {"driver": "file", "path": where.format(out=outside)}
    write_index(checkpoint, leaf={"driver": "zarr", "kvstore": kvstore})
    with pytest.raises(UserError, match="outside the folder"):
        read_t5x(checkpoint)


def test_refuses_a_link_out_of_the_folder(checkpoint: Path) -> None:
    outside = checkpoint.parent / "other"
    shutil.move(checkpoint / "target.mlp.wo.kernel", outside)
    (checkpoint / "target.mlp.wo.kernel").symlink_to(outside)
    with pytest.raises(UserError, match="outside the folder"):
        read_t5x(checkpoint)


def test_a_lost_chunk_is_an_error_and_not_zeros(checkpoint: Path) -> None:
    (checkpoint / "target.mlp.wo.kernel" / "1.0").unlink()
    with pytest.raises(UserError, match="incomplete for mlp/wo/kernel"):
        read_t5x(checkpoint)


@pytest.mark.parametrize("damaged", [".zarray", "0.0"])
def test_damaged_array(checkpoint: Path, damaged: str) -> None:
    file = checkpoint / "target.mlp.wo.kernel" / damaged
    file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(UserError, match="mlp/wo/kernel"):
        read_t5x(checkpoint)


def test_missing_array_and_wrong_shape(checkpoint: Path) -> None:
    kvstore = {"driver": "gfile", "path": "target.mlp.wo.kernel"}
    leaf = {"driver": "zarr", "kvstore": kvstore, "metadata": {"shape": [6, 5]}}
    write_index(checkpoint, leaf=leaf)
    with pytest.raises(UserError, match=r"\[6, 4\] for mlp/wo/kernel.*\[6, 5\]"):
        read_t5x(checkpoint)
    shutil.rmtree(checkpoint / "target.mlp.wo.kernel")
    with pytest.raises(UserError, match=r"no folder .* for mlp/wo/kernel"):
        read_t5x(checkpoint)


@pytest.mark.parametrize(
    "leaf", ["text", {"driver": "n5", "kvstore": {"path": "x"}}, {"driver": "zarr", "kvstore": 3}]
)
def test_leaves_that_are_neither_arrays_nor_places(checkpoint: Path, leaf: Any) -> None:
    with pytest.raises(UserError, match="mlp/wo/kernel"):
        read_t5x(write_index(checkpoint, leaf=leaf))


def test_missing_and_damaged_index(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean .*checkpoint_7"):
        read_t5x(checkpoint.parent)
    index = checkpoint / "checkpoint"
    index.write_bytes(index.read_bytes()[:-20])
    with pytest.raises(UserError, match="damaged, or not a T5X index"):
        read_t5x(checkpoint)
    for version in (0, 1, 4, "3", None):
        with pytest.raises(UserError, match=f"version {version}; only versions 2 and 3"):
            read_t5x(write_index(checkpoint, version=version))
    with pytest.raises(UserError, match="'target'"):
        read_t5x(write_index(checkpoint, optimizer={"state": {}}))
    index.unlink()
    with pytest.raises(UserError, match="no index file"):
        read_t5x(checkpoint)


@pytest.mark.parametrize("gated", [True, False])
def test_config_from_shapes(gated: bool) -> None:
    from prompt_tuning_jax.checkpoints.parameters import parameter_shapes

    config = T5Config(
        vocab_size=11,
        embed_dim=6,
        num_heads=3,
        head_dim=4,
        mlp_dim=10,
        num_encoder_layers=3,
        num_decoder_layers=2,
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        tie_embeddings=not gated,
        relpos_num_buckets=8,
        relpos_max_distance=16,
    )
    params = {name: np.zeros(shape) for name, shape in parameter_shapes(config).items()}
    assert config_of(params, relpos_max_distance=16) == config
    assert config_of(params | {PROMPT: np.zeros((5, 6))}, relpos_max_distance=16) == config
    with pytest.raises(UserError, match="extra"):
        config_of(params | {"extra": np.zeros(3)})
    lost = params.pop("encoder/layers_1/mlp/wo/kernel")
    with pytest.raises(UserError, match="encoder/layers_1/mlp/wo/kernel"):
        config_of(params)
    with pytest.raises(UserError, match=r"encoder/layers_1/mlp/wo/kernel is \(6, 10\)"):
        config_of(params | {"encoder/layers_1/mlp/wo/kernel": lost.T})


def test_the_original_tiny_checkpoint(shared: Path) -> None:
    t5x = shared / "fixtures" / "t5x"
    tiny = read_t5x(t5x / "tiny_t5x" / "checkpoint_3")
    assert open_t5x(t5x / "tiny_t5x" / "checkpoint_3").step == 3
    table = np.load(t5x / "tiny_embeddings_32128x4.npy")
    np.testing.assert_array_equal(tiny["token_embedder/embedding"], table)
    assert config_of(tiny, relpos_max_distance=8) == T5Config(
        vocab_size=32128,
        embed_dim=4,
        num_heads=2,
        head_dim=2,
        mlp_dim=8,
        num_encoder_layers=2,
        num_decoder_layers=2,
        relpos_num_buckets=4,
        relpos_max_distance=8,
    )


def test_the_original_prompted_checkpoint(shared: Path) -> None:
    from prompt_tuning_jax.checkpoints.prompt_file import load_prompt

    folder = shared / "fixtures" / "t5x" / "prompted_tiny_t5x"
    params = read_t5x(folder / "checkpoint_3")
    prompt = load_prompt(folder / "numpy_checkpoints/checkpoint_3/encoder.prompt.prompt.prompt")
    np.testing.assert_array_equal(params.pop(PROMPT), prompt)
    tiny = read_t5x(folder.parent / "tiny_t5x" / "checkpoint_3")
    assert params.keys() == tiny.keys()
    assert all((params[name] == tiny[name]).all() for name in tiny)


def test_layers_with_biases_of_their_own(shared: Path) -> None:
    params = read_t5x(shared / "fixtures" / "t5x" / "scan_t5x" / "checkpoint_7")
    assert config_of(params) == T5Config(
        vocab_size=384,
        embed_dim=8,
        num_heads=2,
        head_dim=4,
        mlp_dim=16,
        num_encoder_layers=3,
        num_decoder_layers=2,
        relpos_per_layer=True,
    )
    name = "decoder/layers_1/relpos_bias/rel_embedding"
    table = params.pop(name)
    with pytest.raises(UserError, match=name):
        config_of(params)
    with pytest.raises(UserError, match=r"per layer or one per stack, not both"):
        config_of(params | {"decoder/relpos_bias/rel_embedding": table})
