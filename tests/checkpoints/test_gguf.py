"""GGUF files: small ones of each architecture and type, and two real models."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.gguf.model import open_gguf, stored_types
from prompt_tuning_jax.checkpoints.gguf.tensors import open_tensors
from prompt_tuning_jax.checkpoints.hub import model_location
from prompt_tuning_jax.checkpoints.load import open_model
from prompt_tuning_jax.data.vocabularies.gguf_metadata import TensorInfo
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig, RopeScaling
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.typing import HostArray

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
from tests.gguf_cases import gguf_metadata, gguf_of, gguf_tensors, write_gguf  # noqa: E402

SIZES: dict[str, Any] = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 32,
    "attention.head_count": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
ROWS = 48


def tiny_tensors(seed: int = 0) -> dict[str, HostArray]:
    random = np.random.default_rng(seed)
    shapes = {
        "token_embd.weight": (ROWS, 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,),
        **{f"blk.0.attn_{part}.weight": (32, 32) for part in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{part}.weight": (32, 32) for part in ("gate", "up", "down")},
    }
    return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def tiny(path: Path, *, eos: int | None = 2, **changes: Any) -> Path:
    """A llama of one layer; keywords change or, with None, leave out tensors and metadata."""
    tensors: dict[str, Any] = tiny_tensors()
    metadata = dict(SIZES)
    for name, value in changes.items():
        target = tensors if isinstance(value, np.ndarray) or name in tensors else metadata
        target[name] = value
    return write_gguf(
        path,
        "llama",
        {key: value for key, value in metadata.items() if value is not None},
        {name: array for name, array in tensors.items() if array is not None},
        eos=eos,
        vocab_size=ROWS,
    )


@pytest.mark.parametrize(
    "name",
    ["llama_mha", "llama_gqa_tied", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "bloom"],
)
def test_every_architecture_is_as_its_folder(shared: Path, tmp_path: Path, name: str) -> None:
    folder = shared / "fixtures" / "families" / name
    path, want, want_params = gguf_of(folder, tmp_path / "m.gguf")
    config, params = open_gguf(path)
    # What llama.cpp's metadata cannot say: these small models differ from what it implies.
    implied: dict[str, Any] = {"token_ids": config.token_ids, "bos": config.bos}
    if name.startswith("gemma"):
        implied["query_scale"] = want.head_dim**-0.5
    if name == "gemma3_text":
        implied["windows"] = (5,) * 5
    assert config == dataclasses.replace(want, **implied)
    assert params.keys() == want_params.keys()
    for key, array in want_params.items():
        read = params[key].whole()
        part = tuple(slice(size // 3, size - 1) for size in read.shape)
        np.testing.assert_array_equal(params[key].read(part), read[part], err_msg=key)
        assert read.dtype == np.float32 and read.shape == array.shape
        if name.startswith("gemma") and key.endswith("scale"):
            np.testing.assert_allclose(read, array, atol=2e-7)  # 1 is added and subtracted
        else:
            np.testing.assert_array_equal(read, array, err_msg=key)


# All types of which numbers can be computed, by the package itself.
TYPES = [kind for kind in gguf.GGMLQuantizationType if kind.name not in ("F32", "F16", "BF16")]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_is_dequantised_part_by_part(tmp_path: Path, kind: Any) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    stored = random.integers(0, 255, (5, 3 * size), np.uint8)
    path = tmp_path / "blocks"
    path.write_bytes(bytes(64) + stored.tobytes())
    info = TensorInfo(shape=(5, 3 * block), kind=int(kind), offset=64)
    try:
        want = gguf.quants.dequantize(stored, kind)
    except (NotImplementedError, KeyError):
        with pytest.raises(UserError, match=f"w is stored as {kind.name}, which is not supported"):
            open_tensors(path, {"w": info})
        return
    array = open_tensors(path, {"w": info})["w"]
    assert array.shape == want.shape and array.dtype == np.float32
    np.testing.assert_array_equal(array.whole(), want)
    for rows, columns in (
        (slice(1, 3), slice(None)),
        (slice(None), slice(1, block + 1)),
        (slice(4, 5), slice(3 * block - 1, 3 * block)),
        (slice(2, 2), slice(0, 3)),
        (slice(0, 2), slice(2, 2)),
    ):
        np.testing.assert_array_equal(array.read((rows, columns)), want[rows, columns])


def test_the_types_that_llama_cpp_writes_are_supported() -> None:
    supported = set()
    for kind in TYPES:
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            supported.add(kind.name)
        except (NotImplementedError, KeyError):
            pass
    usual = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    assert usual <= supported


def test_half_precision_keeps_its_type(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    half = tensors["token_embd.weight"].astype(np.float16)
    brain = tensors["blk.0.attn_v.weight"].astype(ml_dtypes.bfloat16)
    path = write_gguf(
        tmp_path / "m.gguf",
        "llama",
        SIZES,
        {**tensors, "token_embd.weight": half, "blk.0.attn_v.weight": brain.view(np.uint8)},
        vocab_size=ROWS,
        types={"blk.0.attn_v.weight": gguf.GGMLQuantizationType.BF16},
    )
    _, params = open_gguf(path)
    table = params["token_embedder/embedding"]
    value = params["decoder/layers_0/self_attention/value/kernel"]
    assert table.dtype == np.float16 and value.dtype == ml_dtypes.bfloat16
    assert table.whole().tobytes() == half.tobytes()
    np.testing.assert_array_equal(value.whole(), brain.T)
    counted, size = stored_types(path)
    assert counted["F16"] == ROWS * 32 and counted["BF16"] == 32 * 32
    assert size == sum(x.nbytes for x in tensors.values()) - 2 * half.size - 2 * brain.size


def test_a_head_that_is_the_table_is_tied(tmp_path: Path) -> None:
    table = tiny_tensors()["token_embd.weight"]
    config, _ = open_gguf(tiny(tmp_path / "none.gguf"))
    assert config.tie_embeddings
    config, params = open_gguf(tiny(tmp_path / "copy.gguf", **{"output.weight": table}))
    assert config.tie_embeddings and "decoder/logits_dense/kernel" not in params
    config, params = open_gguf(tiny(tmp_path / "other.gguf", **{"output.weight": table + 1}))
    assert not config.tie_embeddings
    np.testing.assert_array_equal(params["decoder/logits_dense/kernel"].whole(), table.T + 1)


def test_a_head_of_another_type_than_the_table_is_kept(tmp_path: Path) -> None:
    """Even where both are the same numbers, stored in 8 bits and in full."""
    table = tiny_tensors()["token_embd.weight"]
    tensors = {**tiny_tensors(), "output.weight": table}
    tensors["token_embd.weight"] = gguf.quants.quantize(table, gguf.GGMLQuantizationType.Q8_0)
    path = write_gguf(
        tmp_path / "m.gguf",
        "llama",
        SIZES,
        tensors,
        vocab_size=ROWS,
        types={"token_embd.weight": gguf.GGMLQuantizationType.Q8_0},
    )
    config, params = open_gguf(path)
    assert not config.tie_embeddings
    np.testing.assert_array_equal(params["decoder/logits_dense/kernel"].whole(), table.T)
    assert 0 < np.abs(params["token_embedder/embedding"].whole() - table).max() < 0.02


def test_the_pattern_of_windows_that_a_file_names(shared: Path, tmp_path: Path) -> None:
    """Newer files say which layers are global, and the base of the others' positions."""
    folder = shared / "fixtures" / "families" / "gemma3_text"
    _, config, params = gguf_of(folder, tmp_path / "m.gguf")
    for number, (pattern, windows) in enumerate(
        [
            *[(2, (5, 0, 5, 0, 5)), (0, (5,) * 5), (9.5, None), (6, (5,) * 5)],
            ([True, False, False, True, True], (5, 0, 0, 5, 5)),
        ]
    ):
        path = tmp_path / f"{number}.gguf"
        more = {"attention.sliding_window_pattern": pattern, "rope.freq_base_swa": 5e3}
        more |= {"final_logit_softcapping": 3.0}
        metadata = gguf_metadata(config) | more
        tensors = gguf_tensors(config, params)
        write_gguf(path, "gemma3", metadata, tensors, vocab_size=config.vocab_size)
        if windows is None:
            with pytest.raises(UserError, match=r"sliding_window_pattern is 9\.5; it must be a"):
                open_gguf(path)
            continue
        opened = open_gguf(path)[0]
        assert (opened.windows, opened.rope_local_theta) == (windows, 5e3)
        assert opened.logits_softcap == 3


def test_a_gemma_3_whose_layers_are_all_global(shared: Path, tmp_path: Path) -> None:
    folder = shared / "fixtures" / "families" / "gemma3_text"
    _, config, params = gguf_of(folder, tmp_path / "m.gguf")
    metadata = gguf_metadata(dataclasses.replace(config, windows=()))
    tensors = gguf_tensors(config, params)
    path = write_gguf(
        tmp_path / "g.gguf", "gemma3", metadata, tensors, vocab_size=config.vocab_size
    )
    assert open_gguf(path)[0].windows == ()


def test_a_size_of_every_layer(tmp_path: Path) -> None:
    """llama.cpp may write sizes as one number per layer; they must be equal."""
    once = open_gguf(tiny(tmp_path / "once.gguf"))[0]
    again = {"attention.head_count_kv": [2], "feed_forward_length": [32]}
    assert open_gguf(tiny(tmp_path / "each.gguf", **again))[0] == once
    with pytest.raises(UserError, match=r"feed_forward_length is array\(\[32, 16\]"):
        open_gguf(tiny(tmp_path / "differ.gguf", feed_forward_length=[32, 16]))


def test_scaled_rotary_positions(tmp_path: Path) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    config, _ = open_gguf(tiny(tmp_path / "linear.gguf", **linear))
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 4096,
    }
    config, _ = open_gguf(tiny(tmp_path / "yarn.gguf", **yarn))
    assert config.rope_scaling == RopeScaling(
        kind="yarn", factor=4.0, original_max_positions=4096, attention_factor=1 + 0.1 * math.log(4)
    )
    for name, none in (("no", {}), ("zero", {"rope.scaling.factor": 0.0})):  # as in llama.cpp
        unscaled = {"rope.scaling.type": "linear", **none}
        assert open_gguf(tiny(tmp_path / f"{name}.gguf", **unscaled))[0].rope_scaling is None
    for name, key in (("alone", "rope.scaling.factor"), ("old", "rope.scale_linear")):
        config, _ = open_gguf(tiny(tmp_path / f"{name}.gguf", **{key: 4.0}))
        assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0), name
    del yarn["rope.scaling.original_context_length"]
    betas = {"yarn_beta_fast": 8.0, "yarn_beta_slow": 0.5, "yarn_attn_factor": 1.5}
    yarn |= {f"rope.scaling.{key}": value for key, value in betas.items()}
    config, _ = open_gguf(tiny(tmp_path / "betas.gguf", **yarn))
    assert config.rope_scaling == RopeScaling(
        kind="yarn",
        factor=4.0,
        original_max_positions=config.max_positions,
        attention_factor=1.5,
        beta_fast=8.0,
        beta_slow=0.5,
    )
    with pytest.raises(UserError, match=r"rope.scaling.attn_factor is not supported"):
        open_gguf(tiny(tmp_path / "attn.gguf", **yarn, **{"rope.scaling.attn_factor": 2.0}))
    with pytest.raises(UserError, match=r"scaling.type is 'longrope'; supported: none, linear"):
        open_gguf(tiny(tmp_path / "long.gguf", **{"rope.scaling.type": "longrope"}))
    # As llama.cpp's converter computes them from transformers' parameters (width 16, base 500,000).
    wavelengths = 2 * np.pi * 5e5 ** (np.arange(8) / 8)
    factors = []
    for wavelength in wavelengths:
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 32 + smooth))
    assert sorted(factors)[-3] > 1.0 or factors.count(32.0) > 1
    freqs = {"rope_freqs.weight": np.array(factors, np.float32), "rope.freq_base": 5e5}
    config, _ = open_gguf(tiny(tmp_path / "llama3.gguf", **freqs))
    assert config.rope_scaling == RopeScaling(
        kind="llama3", factor=32.0, original_max_positions=8192
    )
    freqs["rope_freqs.weight"] = np.linspace(1, 9, 8, dtype=np.float32)
    with pytest.raises(UserError, match=r"rope_freqs.weight is not Llama 3's scaling"):
        open_gguf(tiny(tmp_path / "other.gguf", **freqs))


def test_the_largest_gemmas_scale_by_their_width(shared: Path, tmp_path: Path) -> None:
    """Gemma 2 27B: 1 / sqrt(width / heads), which differs from the width of a head."""
    folder = shared / "fixtures" / "families" / "gemma2"
    _, config, params = gguf_of(folder, tmp_path / "m.gguf")
    deep = dataclasses.replace(config, num_layers=46)
    many = {
        name.replace("layers_0", f"layers_{i}"): array
        for name, array in params.items()
        for i in range(46)
        if "layers_0" in name or "layers" not in name
    }
    path = tmp_path / "27b.gguf"
    write_gguf(
        path,
        "gemma2",
        gguf_metadata(dataclasses.replace(deep, windows=(5, 0) * 23)),
        gguf_tensors(deep, many),
        vocab_size=config.vocab_size,
    )
    assert open_gguf(path)[0].query_scale == (32 // 4) ** -0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": 2}, r"only in a llama: blk\.1\.attn_k\.weight"),
        ({"block_count": 4000}, "has 11 tensors, which are too few for 4000 layers"),
        ({"block_count": 0}, "llama.block_count is 0; it must be a positive integer"),
        ({"block_count": None}, "llama.block_count is None"),
        ({"embedding_length": 64}, r"makes token_embedder/embedding \[48, 32\]"),
        ({"attention.head_count": 3}, r"blk\.0\.attn_q\.weight makes .* it is \[32, 30\]"),
        ({"attention.head_count_kv": 3}, "2 heads of width 16 and 3 heads of keys and values"),
        ({"attention.key_length": 8}, r"attn_q\.weight makes .* it is \[32, 16\]"),
        ({"attention.value_length": 8}, "keys and values of different width are not supported"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "must be a positive number"),
        ({"rope.dimension_count": 8}, "for a part of a head are not supported"),
        ({"blk.0.ffn_up.weight": None}, r"blk\.0\.ffn_up\.weight"),
        ({"token_embd.weight": None}, r"has no token_embd\.weight: it is not a language model"),
        ({"blk.0.ffn_up.weight": np.zeros((32, 64), np.float32)}, r"ffn_up\.weight makes"),
        ({"eos": None}, r"no end of sequence \(tokenizer.ggml.eos_token_id\)"),
        ({"eos": ROWS}, "eos_token_id is 48; the tokenizer has 48 tokens"),
    ],
)
def test_files_that_do_not_fit_together(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tiny(tmp_path / "m.gguf", **changes)
    with pytest.raises(UserError, match=message) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_part_of_a_model_is_said_to_be_one(tmp_path: Path) -> None:
    path = tiny(tmp_path / "m-00001-of-00003.gguf", **{"split.count": 3})
    with pytest.raises(UserError, match="is one of 3 parts of a model: join them"):
        open_gguf(path)
    assert open_gguf(tiny(tmp_path / "whole.gguf", **{"split.count": 1}))


@pytest.mark.parametrize(("stored", "bos"), [(-1, -1), (2**32 - 1, -1), (1, 1)])
def test_no_beginning_of_a_text_is_written_in_two_ways(
    tmp_path: Path, stored: int, bos: int
) -> None:
    config, _ = open_gguf(tiny(tmp_path / "m.gguf", **{"tokenizer.ggml.bos_token_id": stored}))
    assert config.bos == bos


def test_unknown_architectures_and_other_files(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "mamba", SIZES, tiny_tensors(), vocab_size=ROWS)
    with pytest.raises(UserError, match=r"general\.architecture is 'mamba'; supported: llama"):
        open_gguf(path)
    (tmp_path / "text.gguf").write_text("no model at all")
    with pytest.raises(UserError, match="not a GGUF file"):
        open_gguf(tmp_path / "text.gguf")
    with pytest.raises(UserError, match=r"there is no file .*absent\.gguf"):
        model_location(str(tmp_path / "absent.gguf"))


def test_truncated_and_changed_files(tmp_path: Path) -> None:
    whole = tiny(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 900, 37), len(whole) - 1, len(whole) // 2]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError) as caught:
            open_gguf(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    random = np.random.default_rng(0)
    header = whole.index(b"blk.0.ffn_down") + 60
    for at in random.integers(4, header, 200):
        changed = bytearray(whole)
        changed[at] = random.integers(0, 256)
        path.write_bytes(bytes(changed))
        try:
            for array in open_gguf(path)[1].values():
                array.whole()
        except UserError as error:
            assert "\n" not in str(error)


def test_a_type_that_nobody_knows(tmp_path: Path) -> None:
    info = TensorInfo(shape=(4, 32), kind=999, offset=0)
    (tmp_path / "m").write_bytes(bytes(4096))
    with pytest.raises(UserError, match="w has the type 999, which is not supported"):
        open_tensors(tmp_path / "m", {"w": info})


def test_the_tensors_of_smollm2(smollm2: Path, shared: Path) -> None:
    """Bit for bit as transformers dequantizes them, and puts the rows of q and k in its order."""
    recorded = np.load(shared / "fixtures" / "families" / "smollm2" / "cases.npz")
    opened = open_model(str(smollm2))
    assert opened.vocabulary_file == smollm2
    config = opened.config
    assert isinstance(config, CausalLMConfig)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert config.rope_theta == 100_000.0 and config.norm_eps == 1e-5 and config.tie_embeddings
    assert config.token_ids == TokenIds(pad=2, eos=2, start=-1)
    names = {
        "embed_tokens": "token_embedder/embedding",
        "layers_0_self_attn_q_proj": "decoder/layers_0/self_attention/query/kernel",
        "layers_0_mlp_down_proj": "decoder/layers_0/mlp/wo/kernel",
        "layers_29_self_attn_k_proj": "decoder/layers_29/self_attention/key/kernel",
        "norm": "decoder/decoder_norm/scale",
    }
    for theirs, ours in names.items():
        array = opened.params[ours]
        stored = array.transposed() if ours.endswith("kernel") else array
        assert stored.shape == tuple(recorded[f"tensor_{theirs}_shape"])
        rows = (slice(0, 2), slice(0, 8)) if len(stored.shape) == 2 else (slice(0, 8),)
        want = recorded[f"tensor_{theirs}_rows01"]
        np.testing.assert_array_equal(stored.read(rows).reshape(want.shape), want)
        whole = stored.whole().astype(np.float64)
        np.testing.assert_allclose(
            [whole.mean(), whole.std()], recorded[f"tensor_{theirs}_mean_std"], rtol=1e-6
        )


def test_the_configuration_of_gemma3(gemma3_270m: Path, shared: Path) -> None:
    """As transformers builds it from the file, which does not say all of it."""
    folder = shared / "fixtures" / "families" / "gemma3_270m"
    said = json.loads((folder / "texts.json").read_text())["config"]
    config = open_model(str(gemma3_270m)).config
    assert isinstance(config, CausalLMConfig)
    local = [kind == "sliding_attention" for kind in said["layer_types"]]
    assert config.windows == tuple(said["sliding_window"] if each else 0 for each in local)
    assert config.query_scale == said["query_pre_attn_scalar"] ** -0.5
    bases = said["rope_parameters"]
    assert config.rope_theta == bases["full_attention"]["rope_theta"]
    assert config.rope_local_theta == bases["sliding_attention"]["rope_theta"]
    assert config.embedding_scale == said["hidden_size"] ** 0.5
    assert config.norm == "rms_plus_one" and config.qk_norm == "head"
    assert config.token_ids.pad == 0 and config.token_ids.eos == 1 and config.bos == 2
