import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prompt_tuning_jax.checkpoints.hf.pretrained import open_hf, read_hf, write_hf
from prompt_tuning_jax.checkpoints.parameters import parameter_shapes
from prompt_tuning_jax.data.vocabularies.vocab import ByteVocabulary, load_vocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.config import T5Config

MODELS = ["a_t5_10", "b_t5_11", "c_flan", "d_mt5", "e_byt5"]
DEAD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def small_config(*, tied: bool = False) -> T5Config:
    return T5Config(
        vocab_size=40,
        embed_dim=6,
        num_heads=2,
        head_dim=5,
        mlp_dim=12,
        num_encoder_layers=2,
        num_decoder_layers=1,
        mlp_activations=("relu",) if tied else ("gelu", "linear"),
        tie_embeddings=tied,
        relpos_num_buckets=8,
        relpos_max_distance=16,
        layer_norm_eps=1e-5,
    )


def random_params(config: T5Config, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = parameter_shapes(config)
    return {k: random.standard_normal(s, np.float32).astype(dtype) for k, s in shapes.items()}


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype, name
        np.testing.assert_array_equal(array, right[name], err_msg=name)


def edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value != "drop"}
    (folder / "config.json").write_text(json.dumps(raw))


def edit_weights(folder: Path, **changes: np.ndarray | None) -> None:
    arrays = load_file(folder / "model.safetensors") | changes
    kept = {name: array for name, array in arrays.items() if array is not None}
    save_file(kept, folder / "model.safetensors")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_back_what_was_written(tmp_path: Path, tied: bool, dtype: Any) -> None:
    config = small_config(tied=tied)
    params = random_params(config, getattr(ml_dtypes, dtype, np.float32))
    write_hf(tmp_path / "deep" / "m", config, params, dtype=dtype)
    read_config, read_params, vocabulary = read_hf(tmp_path / "deep" / "m")
    assert read_config == config
    assert vocabulary is None
    assert_same(read_params, params)
    assert all(array.flags.c_contiguous for array in read_params.values())
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["m"]


def test_accepts_jax_arrays_and_rounds_to_bfloat16_by_default(tmp_path: Path) -> None:
    import jax.numpy as jnp

    config = small_config()
    params = random_params(config)
    write_hf(tmp_path / "m", config, {name: jnp.asarray(p) for name, p in params.items()})
    rounded = {name: p.astype(ml_dtypes.bfloat16) for name, p in params.items()}
    assert_same(read_hf(tmp_path / "m")[1], rounded)


def test_torch_keeps_kernels_the_other_way_round(tmp_path: Path) -> None:
    config = small_config()
    params = random_params(config)
    write_hf(tmp_path / "m", config, params, dtype="float32")
    arrays = load_file(tmp_path / "m" / "model.safetensors")
    relative = "layer.0.SelfAttention.relative_attention_bias.weight"
    for theirs, ours in {
        f"decoder.block.0.{relative}": "decoder/relpos_bias/rel_embedding",
        "encoder.block.1.layer.0.SelfAttention.o.weight": "encoder/layers_1/attention/out/kernel",
        "decoder.block.0.layer.2.DenseReluDense.wi_1.weight": "decoder/layers_0/mlp/wi_1/kernel",
        "lm_head.weight": "decoder/logits_dense/kernel",
    }.items():
        np.testing.assert_array_equal(arrays[theirs], params[ours].T)
    np.testing.assert_array_equal(arrays["shared.weight"], params["token_embedder/embedding"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config_file", ["config.json", "config.v5.json"])
def test_the_recorded_folders(shared: Path, tmp_path: Path, name: str, config_file: str) -> None:
    source = shared / "fixtures" / "hf" / name
    for file, target in {
        config_file: "config.json",
        "model.safetensors": "model.safetensors",
    }.items():
        shutil.copyfile(source / file, tmp_path / target)
    config, params, _ = read_hf(tmp_path)
    sizes = json.loads((source.parent / "spec.json").read_text())["models"][name]
    assert config.vocab_size == sizes["vocab_size"]
    assert config.head_dim == sizes["d_kv"]
    assert config.num_heads == sizes["num_heads"]
    assert config.num_encoder_layers == sizes["num_layers"]
    assert config.num_decoder_layers == sizes.get("num_decoder_layers", sizes["num_layers"])
    assert config.tie_embeddings == (name == "a_t5_10")
    assert config.mlp_activations == (("relu",) if name == "a_t5_10" else ("gelu", "linear"))
    write_hf(tmp_path / "again", config, params, dtype="float32")
    assert read_hf(tmp_path / "again")[0] == config
    # The folder written has every array of the original, bit for bit, but for what nothing uses.
    original = load_file(source / "model.safetensors")
    used = {key: array for key, array in original.items() if key not in (DEAD, *COPIES)}
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), used)


def test_both_generations_of_transformers_config_say_the_same(tmp_path: Path, tied: bool) -> None:
    config = small_config(tied=tied)
    params = random_params(config)
    write_hf(tmp_path, config, params, dtype="float32")
    edit_config(tmp_path, scale_decoder_outputs="drop")
    assert read_hf(tmp_path)[0] == config
    edit_config(tmp_path, scale_decoder_outputs=tied, tie_word_embeddings=True)
    assert read_hf(tmp_path)[0] == config
    shared_table = params["token_embedder/embedding"]
    if tied:  # an lm_head that is the shared table does not untie
        edit_weights(tmp_path, **{"lm_head.weight": shared_table})
        assert_same(read_hf(tmp_path)[1], params)
        edit_weights(tmp_path, **{"lm_head.weight": shared_table + 1})
    else:
        edit_config(tmp_path, scale_decoder_outputs=True)
    with pytest.raises(UserError, match="ties the logits to the embeddings, but"):
        read_hf(tmp_path)


def test_every_array_has_one_use_and_every_parameter_one_source(tmp_path: Path) -> None:
    config = small_config()
    params = random_params(config)
    write_hf(tmp_path, config, params, dtype="float32")
    table = params["token_embedder/embedding"]
    edit_weights(tmp_path, **{DEAD: np.zeros((8, 2), np.float32), COPIES[0]: table})
    assert_same(read_hf(tmp_path)[1], params)
    edit_weights(tmp_path, **{COPIES[0]: table + 1})
    with pytest.raises(UserError, match=r"encoder.embed_tokens.weight is not a copy"):
        read_hf(tmp_path)
    wo = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    edit_weights(tmp_path, **{COPIES[0]: None, "lora.weight": table, wo: None})
    with pytest.raises(UserError, match=rf"lora.weight.*{wo}"):
        read_hf(tmp_path)
    edit_weights(tmp_path, **{"lora.weight": None, wo: np.zeros((12, 6), np.float32)})
    with pytest.raises(UserError, match=rf"{wo} makes .*\[6, 12\].*\[12, 6\]"):
        read_hf(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "longt5"}, "model_type is 'longt5', which has local attention"),
        ({"model_type": "bart"}, "model_type is 'bart'; supported: t5, mt5, umt5"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'"),
        ({"d_model": "6"}, "d_model is '6'"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon"),
        ({"tie_word_embeddings": "yes", "scale_decoder_outputs": "drop"}, "true or false"),
        ({"num_layers": 3}, "encoder.block.2"),
        ({"num_layers": 10**7}, "has 2 encoder layers, but .* requires 10000000"),
        ({"num_decoder_layers": 10**9}, "has 1 decoder layers, but .* requires 1000000000"),
        ({"num_layers": 10**30}, "num_layers is 1000000000.*; it must be a positive integer"),
        ({"d_model": 2**31 - 1}, "shared.weight makes token_embedder/embedding"),
        ({"vocab_size": 2**31 - 1}, "shared.weight makes token_embedder/embedding"),
    ],
)
def test_wrong_config(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = small_config()
    write_hf(tmp_path, config, random_params(config))
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        read_hf(tmp_path)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        read_hf(tmp_path)
    config = small_config()
    write_hf(tmp_path, config, random_params(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(UserError, match="damaged, or not a safetensors file"):
        read_hf(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        read_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_hf(tmp_path)


def test_wrong_parameters_are_not_written(tmp_path: Path) -> None:
    config = small_config()
    params = random_params(config)
    lost = params.pop("encoder/encoder_norm/scale")
    with pytest.raises(UserError, match=r"encoder/encoder_norm/scale"):
        write_hf(tmp_path / "m", config, params)
    with pytest.raises(UserError, match=r"encoder/encoder_norm/scale is \(5,\)"):
        write_hf(tmp_path / "m", config, params | {"encoder/encoder_norm/scale": lost[:5]})
    with pytest.raises(UserError, match="int8"):
        whole = params | {"encoder/encoder_norm/scale": lost}
        write_hf(tmp_path / "m", config, whole, dtype="int8")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "CARD.md").write_text("card")
    config = small_config()
    write_hf(tmp_path / "m", config, random_params(config))
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert names == ["CARD.md", "config.json", "model.safetensors"]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()}
    assert len(modes) == 1


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = small_config()
    with pytest.raises(UserError, match="cannot write"):
        write_hf(tmp_path / "file" / "m", config, random_params(config))
    with pytest.raises(UserError, match="cannot write"):
        write_hf(tmp_path / "file", config, random_params(config))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_vocabulary_and_tokenizer(shared: Path, tmp_path: Path) -> None:
    import dataclasses

    vocabulary = shared / "fixtures" / "t5_vocab.model"
    config = dataclasses.replace(small_config(), vocab_size=32_128)
    write_hf(tmp_path / "m", config, random_params(config), vocabulary_file=vocabulary)
    copied = read_hf(tmp_path / "m")[2]
    assert copied is not None
    assert copied.read_bytes() == vocabulary.read_bytes()
    tokenizer = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert tokenizer == {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 100,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    config = small_config()
    with pytest.raises(UserError, match=r"32000 pieces.* 40"):
        write_hf(tmp_path / "n", config, random_params(config), vocabulary_file=vocabulary)
    with pytest.raises(UserError, match="not a SentencePiece model"):
        write_hf(tmp_path / "n", config, random_params(config), vocabulary_file=__file__)


def test_byte_vocabulary_goes_with_the_folder(tmp_path: Path) -> None:
    import dataclasses

    config = dataclasses.replace(small_config(), vocab_size=384)
    write_hf(tmp_path / "m", config, random_params(config), vocabulary_file="bytes")
    found = read_hf(tmp_path / "m")[2]
    assert found is not None
    assert load_vocabulary(found) == ByteVocabulary()
    # Written from the file found, it is the same again.
    write_hf(tmp_path / "n", config, random_params(config), vocabulary_file=found)
    assert load_vocabulary(tmp_path / "n") == ByteVocabulary()
    with pytest.raises(UserError, match=r"384 ids.* 40"):
        write_hf(
            tmp_path / "o", small_config(), random_params(small_config()), vocabulary_file=found
        )


def test_shards_hold_what_one_file_holds(tmp_path: Path, tied: bool) -> None:
    config = small_config(tied=tied)
    params = random_params(config)
    folder = tmp_path / "m"
    write_hf(folder, config, params, dtype="float32", max_shard_bytes=2000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 3
    assert not (folder / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in params.values())
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    for file in files:
        arrays = load_file(file)
        assert len(arrays) == 1 or sum(array.nbytes for array in arrays.values()) <= 2000
    assert_same(read_hf(folder)[1], params)
    # A later model of another number of files replaces this one wholly, both ways.
    for most in (10**6, 3000):
        params = {name: array + 1 for name, array in params.items()}
        write_hf(folder, config, params, dtype="float32", max_shard_bytes=most)
        assert_same(read_hf(folder)[1], params)
    with pytest.raises(UserError, match="max_shard_bytes is 0"):
        write_hf(folder, config, params, max_shard_bytes=0)


def test_stored_keeps_each_dtype_bit_for_bit(tmp_path: Path) -> None:
    config = small_config()
    params = random_params(config, np.float16)
    wo = "encoder/layers_0/mlp/wo/kernel"  # as transformers keeps it in half precision
    params[wo] = params[wo].astype(np.float32)
    write_hf(tmp_path / "m", config, params, dtype="stored")
    assert_same(read_hf(tmp_path / "m")[1], params)
    write_hf(
        tmp_path / "n", config, open_hf(tmp_path / "m")[1], dtype="stored", max_shard_bytes=999
    )
    assert_same(read_hf(tmp_path / "n")[1], params)
    assert json.loads((tmp_path / "n" / "config.json").read_text())["dtype"] == "float16"
    doubles = {name: array.astype(np.float64) for name, array in params.items()}
    with pytest.raises(UserError, match="is float64"):
        write_hf(tmp_path / "n", config, doubles, dtype="stored")


def test_parts_are_parts_of_the_whole(tmp_path: Path) -> None:
    config = small_config()
    params = random_params(config)
    write_hf(tmp_path, config, params, dtype="float32", max_shard_bytes=3000)
    _, lazy, _ = open_hf(tmp_path)
    assert lazy.keys() == params.keys()
    for name, array in lazy.items():
        assert (array.shape, array.dtype) == (params[name].shape, params[name].dtype)
        for part in (slice(None), slice(1, 3), slice(-2, None), slice(2, 2), slice(1, 99)):
            for index in ((part,) * len(array.shape), (slice(None), part)[-len(array.shape) :]):
                np.testing.assert_array_equal(array.read(index), params[name][index], err_msg=name)


def test_the_table_may_lie_under_another_name(tmp_path: Path, tied: bool) -> None:
    config = small_config(tied=tied)
    params = random_params(config)
    write_hf(tmp_path, config, params, dtype="float32")
    edit_weights(tmp_path, **{"shared.weight": None, COPIES[1]: params["token_embedder/embedding"]})
    assert_same(read_hf(tmp_path)[1], params)


def test_a_head_that_is_the_table_unscaled(tmp_path: Path) -> None:
    # What transformers 5 writes for an untied model whose head it has tied.
    config = small_config()
    params = random_params(config)
    params["decoder/logits_dense/kernel"] = params["token_embedder/embedding"].T
    write_hf(tmp_path, config, params, dtype="float32")
    edit_weights(tmp_path, **{"lm_head.weight": None})
    with pytest.raises(UserError, match=r"only in config.json: lm_head.weight"):
        read_hf(tmp_path)
    v5 = {"tie_word_embeddings": True, "transformers_version": "5.23.0"}
    edit_config(tmp_path, **v5)
    assert read_hf(tmp_path)[0] == config
    assert_same(read_hf(tmp_path)[1], params)
    # Version 5 scales no mT5, 4 scales one that is tied.
    edit_config(tmp_path, model_type="mt5", scale_decoder_outputs="drop", **v5)
    assert_same(read_hf(tmp_path)[1], params)
    edit_config(tmp_path, transformers_version="4.57.1")
    assert read_hf(tmp_path)[0].tie_embeddings
    edit_config(tmp_path, tie_word_embeddings="drop")
    with pytest.raises(UserError, match=r"only in config.json: lm_head.weight"):
        read_hf(tmp_path)
