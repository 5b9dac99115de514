"""Decoder-only models as Hugging Face folders, against folders that transformers wrote."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.causal_parameters import causal_parameter_shapes
from prompt_tuning_jax.checkpoints.hf.causal import causal_config, described_config
from prompt_tuning_jax.checkpoints.hf.families import FAMILIES
from prompt_tuning_jax.checkpoints.hf.pretrained import open_hf, read_hf, write_hf
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference import api
from prompt_tuning_jax.inference.conversion import convert
from prompt_tuning_jax.models.base import model_class
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig, RopeScaling
from prompt_tuning_jax.models.causal_lm.rope import inverse_frequencies, rotation
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.typing import HostArray

RECORDED = (
    *("llama_mha", "llama_gqa_tied", "mistral_sliding", "qwen2", "qwen3", "gemma2"),
    *("gemma3_text", "gpt2", "bloom", "gpt_neox", "opt"),
)
HUB_KEYS = ("gpt2_hubkeys", "bloom_hubkeys")
Edit = Callable[..., Path]


@pytest.fixture
def families(shared: Path) -> Path:
    return shared / "fixtures" / "families"


@pytest.fixture
def copy(families: Path, tmp_path: Path) -> Edit:
    """Copies a recorded folder; keywords change config.json, and None removes a key."""

    def make(name: str, *, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
        folder = tmp_path / f"{name}_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copyfile(families / name / file, folder / file)
        raw = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in raw.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        return folder

    return make


def edit_tensors(folder: Path, **changes: HostArray | None) -> None:
    path = folder / "model.safetensors"
    tensors: dict[str, Any] = load_file(path) | changes
    save_file({name: x for name, x in tensors.items() if x is not None}, path)


def config_of(model_type: str, tmp_path: Path, **raw: Any) -> CausalLMConfig:
    return causal_config({"model_type": model_type, **raw}, tmp_path / "config.json")


@pytest.mark.parametrize("name", RECORDED)
def test_both_versions_of_config_json_are_one_configuration(families: Path, name: str) -> None:
    older, newer = (
        causal_config(json.loads((families / name / file).read_text()), families / name / file)
        for file in ("config.json", "config.v5.json")
    )
    assert older == newer
    assert older.token_ids.start == -1 and older.token_ids.fill == -1


def test_what_the_recorded_configurations_mean(families: Path) -> None:
    config = {name: open_hf(families / name)[0] for name in RECORDED}
    assert all(isinstance(each, CausalLMConfig) for each in config.values())
    found: Any = config
    assert found["mistral_sliding"].windows == (6, 6, 6)
    assert found["qwen2"].windows == () and found["qwen2"].qkv_bias
    assert found["qwen3"].head_dim == 12 and found["qwen3"].qk_norm == "head"
    assert found["gemma2"].windows == (5, 0, 5, 0)
    assert found["gemma2"].query_scale == 20**-0.5 and found["gemma2"].logits_softcap == 8.0
    assert found["gemma3_text"].windows == (5, 5, 0, 5, 0)
    assert found["gemma3_text"].rope_local_theta == 10_000.0
    assert found["gemma3_text"].token_ids == TokenIds(pad=0, eos=1, start=-1, more_eos=(9,))
    assert found["gpt2"].token_ids == TokenIds(pad=175, eos=175, start=-1)
    assert found["bloom"].embedding_norm and found["bloom"].positions == "alibi"
    assert found["gpt_neox"].rotary_dim == 2 and found["gpt_neox"].parallel_residual
    assert found["opt"].position_offset == 2


@pytest.mark.parametrize("name", [*RECORDED, *HUB_KEYS])
def test_logits(families: Path, name: str) -> None:
    """Of rows longer than any window; this is also the longest way through all switches."""
    model = load_model(str(families / name))
    cases = np.load(families / name.removesuffix("_hubkeys") / "cases.npz")
    tokens_BT = cases["long_input_ids"]
    graphdef, params = param_tree.split(model)
    run = jax.jit(lambda params, *tokens: param_tree.merge(graphdef, params).run(*tokens))
    logits_BSV = run(params, tokens_BT[:, :1], tokens_BT[:, 1:])
    np.testing.assert_allclose(logits_BSV, cases["long_logits"][:, :-1], atol=5e-4, rtol=0)


@pytest.mark.parametrize("name", [*RECORDED, *HUB_KEYS])
def test_a_folder_written_again_is_the_same_bit_for_bit(
    families: Path, tmp_path: Path, name: str
) -> None:
    config, params, _ = open_hf(families / name)
    write_hf(tmp_path / "m", config, params, dtype="stored")
    again, _, _ = open_hf(tmp_path / "m")
    assert again == config
    # transformers' own names, with the prefix, whatever the source had.
    source = families / name.removesuffix("_hubkeys") / "model.safetensors"
    want, got = load_file(source), load_file(tmp_path / "m" / "model.safetensors")
    assert want.keys() == got.keys()
    for tensor, array in want.items():
        assert got[tensor].dtype == array.dtype and got[tensor].shape == array.shape
        assert got[tensor].tobytes() == array.tobytes(), tensor
    old = json.loads((families / name / "config.json").read_text())
    new = json.loads((tmp_path / "m" / "config.json").read_text())
    assert new["architectures"] == old["architectures"]
    assert new["dtype"] == new["torch_dtype"] == "float32"


def test_narrow_types_and_shards_are_kept(copy: Edit, tmp_path: Path) -> None:
    """A fused tensor of bfloat16, and files of several shards."""
    folder = copy("bloom")
    path = folder / "model.safetensors"
    narrow = {name: x.astype(ml_dtypes.bfloat16) for name, x in load_file(path).items()}
    save_file(narrow, path)
    config, params, _ = open_hf(folder)
    write_hf(tmp_path / "many", config, params, dtype="stored", max_shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    again = read_hf(tmp_path / "many")[1]
    for name, array in read_hf(folder)[1].items():
        assert again[name].dtype == ml_dtypes.bfloat16
        assert again[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("name", RECORDED)
def test_the_parameters_are_those_of_the_model(families: Path, name: str) -> None:
    config, params, _ = open_hf(families / name)
    model = nnx.eval_shape(lambda: model_class(config)(config, rngs=nnx.Rngs(0)))
    wanted = {path: array.shape for path, array in param_tree.split(model)[1].items()}
    assert {path: array.shape for path, array in params.items()} == wanted
    assert isinstance(config, CausalLMConfig)
    assert causal_parameter_shapes(config) == wanted


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gpt_neox"])
def test_only_the_part_that_is_asked_for_is_read(families: Path, name: str) -> None:
    """Of a fused tensor; a device that holds some heads reads those."""
    config, params, _ = open_hf(families / name)
    assert isinstance(config, CausalLMConfig)
    width = config.head_dim
    for part in ("query", "key", "value"):
        kernel = params[f"decoder/layers_1/self_attention/{part}/kernel"]
        bias = params[f"decoder/layers_1/self_attention/{part}/bias"]
        for rows, columns in (
            (slice(2, 7), slice(width, 3 * width)),
            (slice(None), slice(1, width + 2)),
            (slice(0, 0), slice(0, 4)),
            (slice(3, 4), slice(5, 5)),
        ):
            np.testing.assert_array_equal(
                kernel.read((rows, columns)), kernel.whole()[rows, columns]
            )
            np.testing.assert_array_equal(bias.read((columns,)), bias.whole()[columns])


def test_buffers_that_no_model_uses_may_have_any_type(copy: Edit) -> None:
    folder = copy("gpt2")
    mask = np.tril(np.ones((1, 1, 96, 96), np.uint8))
    edit_tensors(folder, **{"transformer.h.0.attn.bias": mask})
    edit_tensors(folder, **{"transformer.h.0.attn.masked_bias": np.asarray(-1e4, np.float32)})
    assert open_hf(folder)[0].vocab_size == 176
    folder = copy("gpt_neox")
    edit_tensors(folder, **{"gpt_neox.layers.0.attention.bias": mask.astype(bool)})
    edit_tensors(folder, **{"gpt_neox.layers.1.attention.rotary_emb.inv_freq": np.ones(1)})
    llama = copy("llama_mha")
    edit_tensors(llama, **{"model.rotary_emb.inv_freq": np.ones(1)})
    assert open_hf(llama)[0].vocab_size == 160
    assert open_hf(folder)[0].vocab_size == 160


def test_a_head_beside_a_tied_table(copy: Edit, tmp_path: Path) -> None:
    folder = copy("llama_gqa_tied")
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(folder, **{"lm_head.weight": table})
    config, params, _ = open_hf(folder)
    assert isinstance(config, CausalLMConfig) and config.tie_embeddings
    assert "decoder/logits_dense/kernel" not in params
    edit_tensors(folder, **{"lm_head.weight": table + 1})
    config, params, _ = open_hf(folder)
    assert isinstance(config, CausalLMConfig) and not config.tie_embeddings
    np.testing.assert_array_equal(params["decoder/logits_dense/kernel"].whole(), table.T + 1)
    write_hf(tmp_path / "both", config, params, dtype="stored")
    assert json.loads((tmp_path / "both" / "config.json").read_text())["tie_word_embeddings"] is (
        False
    )
    held = load_file(tmp_path / "both" / "model.safetensors")
    np.testing.assert_array_equal(held["lm_head.weight"], table + 1)


@pytest.mark.parametrize("name", ["llama_gqa_tied", "gemma2", "gpt2", "bloom", "opt"])
def test_a_head_of_its_own_in_a_family_that_is_mostly_tied(
    families: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    described = json.loads((families / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "tie_word_embeddings": False}))
    tensors = load_file(families / name / "model.safetensors")
    ends = ("wte.weight", "word_embeddings.weight", "embed_tokens.weight")
    (table,) = (key for key in tensors if key.endswith(ends))
    tensors["lm_head.weight"] = -tensors[table]
    save_file(tensors, folder / "model.safetensors")
    rows = [[3, 4, 5, 6]]
    tied, apart = (api.logits(load_model(str(each)), rows) for each in (families / name, folder))
    np.testing.assert_allclose(apart, -tied, atol=1e-4)
    convert(folder, tmp_path / "again", to="hf")
    again = load_file(tmp_path / "again" / "model.safetensors")
    np.testing.assert_array_equal(again["lm_head.weight"], tensors["lm_head.weight"])


def test_absent_keys_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    """As transformers 4.57.1's configuration classes have them."""
    llama = config_of("llama", tmp_path)
    assert (llama.vocab_size, llama.embed_dim, llama.mlp_dim) == (32_000, 4096, 11_008)
    assert (llama.num_kv_heads, llama.head_dim, llama.max_positions) == (32, 128, 2048)
    assert llama.token_ids == TokenIds(pad=2, eos=2, start=-1) and llama.bos == 1
    mistral = config_of("mistral", tmp_path)
    assert (mistral.num_kv_heads, mistral.windows) == (8, (4096,) * 32)
    assert config_of("mistral", tmp_path, sliding_window=None).windows == ()
    gemma2 = config_of("gemma2", tmp_path)
    assert gemma2.tie_embeddings and gemma2.windows == (4096, 0) * 13
    assert (gemma2.attention_softcap, gemma2.logits_softcap) == (50.0, 30.0)
    assert config_of("gemma2", tmp_path, attn_logit_softcapping=None).attention_softcap == 0.0
    gemma3 = config_of("gemma3_text", tmp_path)
    assert gemma3.windows[:7] == (4096,) * 5 + (0, 4096) and gemma3.vocab_size == 262_208
    assert (gemma3.rope_theta, gemma3.rope_local_theta) == (1e6, 1e4)
    assert (gemma3.attention_softcap, gemma3.logits_softcap) == (0.0, 0.0)
    assert config_of("gemma3_text", tmp_path, attn_logit_softcapping=9.0) == gemma3
    neox = config_of("gpt_neox", tmp_path)
    assert (neox.rotary_dim, neox.mlp_activations) == (24, ("gelu_exact",))
    assert config_of("phi", tmp_path).rotary_dim == 32
    assert config_of("olmo", tmp_path).norm == "layer_without_weights"
    assert config_of("opt", tmp_path).mlp_activations == ("relu",)
    qwen3 = config_of("qwen3", tmp_path, eos_token_id=5)
    assert qwen3.head_dim == 128 and qwen3.windows == ()
    with pytest.raises(UserError, match="there is no eos_token_id"):
        config_of("qwen3", tmp_path)


def test_older_names_of_keys(tmp_path: Path) -> None:
    """The hub's bloom-560m has these."""
    bloom = config_of(
        "bloom", tmp_path, n_embed=1024, num_attention_heads=16, num_hidden_layers=24, n_inner=None
    )
    assert (bloom.embed_dim, bloom.num_heads, bloom.num_layers) == (1024, 16, 24)
    assert bloom.mlp_dim == 4096


def test_windows_of_qwen_and_gemma(tmp_path: Path) -> None:
    qwen = {"eos_token_id": 1, "num_hidden_layers": 4, "sliding_window": 9}
    assert config_of("qwen2", tmp_path, **qwen).windows == ()
    last = {"use_sliding_window": True, "max_window_layers": 3}
    assert config_of("qwen2", tmp_path, **qwen, **last).windows == (0, 0, 0, 9)
    types = ["sliding_attention", "full_attention"] * 2
    assert config_of("qwen2", tmp_path, **qwen, **last, layer_types=types).windows == (9, 0, 9, 0)
    gemma = {"num_hidden_layers": 4, "sliding_window": 9, "sliding_window_pattern": 2}
    assert config_of("gemma3_text", tmp_path, **gemma).windows == (9, 0, 9, 0)
    for kind in ("gemma2", "gemma3_text"):
        layers = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
        config = config_of(kind, tmp_path, **layers)
        written = described_config(config)
        assert config.windows == () and type(written["sliding_window"]) is int
        assert config_of(kind, tmp_path, **without_dtype(written)) == config


def test_heads_of_a_llama_are_rotated_as_a_whole(tmp_path: Path) -> None:
    """Transformers' Llama does not read this key, and its Phi does."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert config_of("llama", tmp_path, rope_parameters=rope).rotary_dim == 0
    assert config_of("phi", tmp_path, rope_parameters=rope | {"partial_rotary_factor": 1}) != (
        config_of("phi", tmp_path, rope_parameters=rope)
    )


def test_a_mistral_with_types_of_layers_has_windows_in_some(tmp_path: Path) -> None:
    """transformers 5 reads it as a Ministral."""
    types = ["full_attention", "sliding_attention"]
    sizes = {"num_hidden_layers": 2, "eos_token_id": 1}
    config = config_of("mistral", tmp_path, sliding_window=4, layer_types=types, **sizes)
    assert config.windows == (0, 4)
    assert config_of("mistral", tmp_path, sliding_window=4, **sizes).windows == (4, 4)


def test_scaled_rotary_positions_in_both_versions(tmp_path: Path) -> None:
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    older = config_of("llama", tmp_path, rope_scaling=llama3, rope_theta=5e5)
    newer = config_of("llama", tmp_path, rope_parameters=llama3 | {"rope_theta": 5e5})
    assert older == newer
    assert older.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_max_positions=8192)
    assert config_of("llama", tmp_path, **without_dtype(described_config(older))) == older
    named = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    yarn = config_of("qwen2", tmp_path, rope_scaling=named, eos_token_id=7)
    assert yarn.rope_scaling == RopeScaling(
        kind="yarn", factor=4.0, original_max_positions=4096, attention_factor=1 + 0.1 * math.log(4)
    )
    assert config_of("qwen2", tmp_path, **without_dtype(described_config(yarn))) == yarn
    longer = {"max_position_embeddings": 16_384, "eos_token_id": 7}
    implied = config_of("qwen2", tmp_path, rope_scaling=named | {"factor": None}, **longer)
    assert implied == config_of("qwen2", tmp_path, rope_scaling=named, **longer)
    linear = config_of("gemma3_text", tmp_path, rope_scaling={"type": "linear", "factor": 8})
    assert linear.rope_scaling == RopeScaling(kind="linear", factor=8.0)
    assert config_of("gemma3_text", tmp_path, **without_dtype(described_config(linear))) == linear


def without_dtype(described: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in described.items() if key != "model_type"}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_describes_what_it_reads(tmp_path: Path, model_type: str) -> None:
    """Its defaults, written and read again: one description serves both directions."""
    if FAMILIES[model_type].text_type:
        pytest.skip("written as its language model")
    config = config_of(model_type, tmp_path, eos_token_id=7, pad_token_id=3)
    written = described_config(config)
    assert written["model_type"] == model_type
    assert causal_config(written, tmp_path / "config.json") == config


def test_token_ids_of_both_files(copy: Edit) -> None:
    folder = copy("llama_mha", eos_token_id=[2, 5], pad_token_id=None, generation={})
    assert open_hf(folder)[0].token_ids == TokenIds(pad=2, eos=2, start=-1, more_eos=(5,))
    # generation_config.json wins, and the first of config.json's that it has is the end.
    folder = copy("llama_mha", eos_token_id=5, generation={"eos_token_id": [2, 5, 7, 2]})
    assert open_hf(folder)[0].token_ids == TokenIds(pad=0, eos=5, start=-1, more_eos=(2, 7))
    folder = copy("llama_mha", pad_token_id=-1, generation={"pad_token_id": 9})
    assert open_hf(folder)[0].token_ids.pad == 9


def test_ends_of_a_turn_are_written(copy: Edit, tmp_path: Path) -> None:
    config, params, _ = open_hf(copy("gemma3_text"))
    write_hf(tmp_path / "m", config, params)
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": [1, 9], "pad_token_id": 0}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["eos_token_id"] == 1


def test_tokenizer_files_are_copied(copy: Edit, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    folder = copy("llama_mha")
    pieces = {piece: i for i, piece in enumerate(("<unk>", "<s>", "</s>", "a", "b"))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="<unk>"))
    made.save(str(folder / "tokenizer.json"))
    files = {"tokenizer_config.json": '{"eos_token": "</s>"}', "chat_template.jinja": "{{ 1 }}"}
    for name, text in files.items():
        (folder / name).write_text(text)
    config, params, words = open_hf(folder)
    assert words == folder / "tokenizer.json"
    write_hf(tmp_path / "m", config, params, vocabulary_file=words)
    written = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {file.name for file in (tmp_path / "m").iterdir()} == {*written, *files}
    for name in ("tokenizer.json", *files):
        assert (tmp_path / "m" / name).read_bytes() == (folder / name).read_bytes()


def test_the_language_model_of_a_gemma_3_that_sees(copy: Edit, families: Path) -> None:
    folder = copy("gemma3_text")
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 9]}
    (folder / "config.json").write_text(json.dumps(outer))
    (folder / "generation_config.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    for prefix in ("language_model.", "model.language_model."):
        renamed = {
            f"{prefix}{name if prefix[0] == 'l' else name.removeprefix('model.')}": array
            for name, array in tensors.items()
        }
        seen = np.zeros((2, 2), np.float32)
        tower = f"{prefix.removesuffix('language_model.')}vision_tower.vision_model.x.weight"
        save_file({**renamed, tower: seen}, folder / "model.safetensors")
        config, params, _ = open_hf(folder)
        want, want_params, _ = open_hf(families / "gemma3_text")
        assert config == want and params.keys() == want_params.keys()
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    with pytest.raises(UserError, match="has no text_config"):
        open_hf(folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama_mha", {"model_type": "mamba"}, "model_type is 'mamba'; supported: t5, .* llama, "),
        ("llama_mha", {"hidden_size": 0}, "hidden_size is 0; it must be a positive integer"),
        ("llama_mha", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("llama_mha", {"num_hidden_layers": 4}, "no tensors of layers 3, but config.json says 4"),
        (
            "llama_mha",
            {"num_hidden_layers": 2},
            "do not match: only in .*layers.2.input_layer",
        ),
        ("llama_mha", {"hidden_act": "mish"}, "hidden_act is 'mish'; supported: gelu"),
        ("llama_mha", {"rms_norm_eps": "x"}, "rms_norm_eps is 'x'; it must be a positive number"),
        ("llama_mha", {"attention_bias": 1}, "attention_bias is 1 and must be true or false"),
        ("llama_mha", {"attention_bias": True}, "q_proj.bias"),
        ("llama_mha", {"num_key_value_heads": 3}, "4 heads cannot share 3 heads"),
        (
            "llama_mha",
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope_type is 'longrope'; supported",
        ),
        ("llama_mha", {"rope_scaling": {"rope_type": "yarn"}}, "factor of the rope is None"),
        ("llama_mha", {"rope_scaling": {"type": "linear"}}, "factor of the rope is None"),
        ("llama_mha", {"rope_scaling": 3}, "rope_scaling is 3 and not an object"),
        ("llama_mha", {"rope_theta": 0}, "rope_theta is 0; it must be a number above 1"),
        ("llama_mha", {"eos_token_id": 160}, "eos_token_id is 160; it must be an id from 0 to 159"),
        ("llama_mha", {"eos_token_id": [2, "x"]}, "eos_token_id is .* it must be an id"),
        ("llama_mha", {"vocab_size": 161}, r"makes token_embedder/embedding \[160, 32\]"),
        ("llama_mha", {"head_dim": 7}, "rotary positions need an even number"),
        ("mistral_sliding", {"sliding_window": -1}, "sliding_window is -1"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types .* must have 4 entries"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention'; supported"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "both directions is not supported"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 3}}, "neither full_attention nor"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "differs by layer is not supported"),
        ("gpt2", {"n_head": 5}, "c_attn|makes"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "after the norm"),
        ("gpt_neox", {"rotary_pct": 1.5}, "rotary_pct is 1.5; it must be above 0 and at most 1"),
        ("opt", {"do_layer_norm_before": False}, "after the residual connection is not supported"),
        ("opt", {"word_embed_proj_dim": 16}, "an embedding of another width is not supported"),
    ],
)
def test_invalid_folders_are_one_line(
    copy: Edit, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = copy(name, **changes, generation={})
    with pytest.raises(UserError, match=message) as caught:
        open_hf(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["llama_mha", "t5gemma"])
@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id"])
def test_an_id_of_generation_config_that_is_wrong_is_said_to_be_there(
    copy: Edit, name: str, key: str
) -> None:
    folder = copy(name, generation={key: 10**6})
    with pytest.raises(UserError, match=rf"generation_config\.json: {key} is 1000000; it must"):
        open_hf(folder)


@pytest.mark.parametrize("kind", ["qwen2", "olmo", "phi"])
def test_heads_may_be_wider_than_the_model_divided_among_them(tmp_path: Path, kind: str) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    usual = config_of(kind, tmp_path, eos_token_id=1, **sizes)
    wide = config_of(kind, tmp_path, eos_token_id=1, head_dim=16, **sizes)
    assert (usual.head_dim, wide.head_dim) == (8, 16)
    assert described_config(wide)["head_dim"] == 16


def test_missing_tensors_and_other_formats(copy: Edit) -> None:
    folder = copy("llama_mha")
    edit_tensors(folder, **{"model.norm.weight": None})
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        open_hf(folder)
    folder = copy("gpt2")
    edit_tensors(folder, **{"wte.weight": np.zeros((176, 32), np.float32)})
    with pytest.raises(UserError, match="twice"):
        open_hf(folder)


def test_a_model_that_its_type_cannot_be(copy: Edit, tmp_path: Path) -> None:
    """Nothing is written that transformers would read as another model."""
    config, params, _ = open_hf(copy("llama_gqa_tied"))
    assert isinstance(config, CausalLMConfig)
    for changes, message in (
        ({"logits_softcap": 3.0}, r"cannot have this model's logits_softcap \(3.0\)"),
        ({"query_scale": 2.0}, "has query_scale = 0.5, and this one has 2.0"),
        ({"windows": (3, 0, 0, 0)}, "windows"),
        ({"model_type": "gemma3"}, "model_type is 'gemma3'; only these are written: llama"),
        ({"model_type": "mistral", "windows": (3, 0, 3, 3)}, "one window in all layers"),
    ):
        wrong = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            write_hf(tmp_path / "m", wrong, params)
        assert not (tmp_path / "m").exists()


# A fourth of the frequencies without scaling; only the first two may be faster.
_SLOWER = (0.0790569, 0.025, 0.00790569, 0.0025, 0.000790569, 0.00025, 7.90569e-05)


@pytest.mark.parametrize(
    ("more", "frequencies", "factor"),
    [
        (
            {},
            [1, *_SLOWER],
            1.138629,
        ),
        (
            {
                "beta_fast": 8.0,
                "beta_slow": 0.5,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
                "truncate": False,
            },
            [1, 0.14849, *_SLOWER[1:]],
            0.929523,
        ),
    ],
)
def test_yarn_stretches_positions_as_transformers_does(
    tmp_path: Path, more: dict[str, Any], frequencies: list[float], factor: float
) -> None:
    """Recorded from transformers 5.24's function for YaRN: heads of 16, base 10,000."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **more}
    config = config_of("qwen3", tmp_path, rope_scaling=yarn, rope_theta=1e4, eos_token_id=7)
    found = inverse_frequencies(16, 1e4, config.rope_scaling)
    np.testing.assert_allclose(found, frequencies, rtol=1e-5)
    cos, sin = rotation(jnp.zeros((1, 1), jnp.int32), config, local=False)
    np.testing.assert_allclose(cos, np.full_like(cos, factor), rtol=1e-5)
    assert not np.any(sin)
