"""T5Gemma and T5Gemma 2 as Hugging Face folders, against folders that transformers wrote."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prompt_tuning_jax.checkpoints.convert import convert
from prompt_tuning_jax.checkpoints.hf.pretrained import open_hf, write_hf
from prompt_tuning_jax.checkpoints.hf.t5gemma import described_t5gemma, t5gemma_config
from prompt_tuning_jax.checkpoints.inspect import architecture, open_source, size_name
from prompt_tuning_jax.checkpoints.peft.adapter_file import write_peft
from prompt_tuning_jax.checkpoints.peft.prompts import read_peft_prompts, write_peft_prompts
from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    load_prompt_with_metadata,
    save_prompt,
)
from prompt_tuning_jax.checkpoints.tuned_checkpoint import TunedCheckpoint, save_tuned
from prompt_tuning_jax.config.methods import MultitaskPrompts, PromptTuning
from prompt_tuning_jax.config.overrides import method_to_json
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.conversion import convert_tuned
from prompt_tuning_jax.methods.base import PROMPT
from prompt_tuning_jax.methods.multitask import COLS, ROWS, SHARED
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.models.t5gemma.config import T5GemmaConfig
from prompt_tuning_jax.models.t5gemma.presets import PRESETS, SIZES

RECORDED = ("t5gemma", "t5gemma_unbalanced", "t5gemma2_text")
IDS = TokenIds(pad=0, eos=1, start=2, inputs_have_eos=False)
Edit = Callable[..., Path]


@pytest.fixture
def families(shared: Path) -> Path:
    return shared / "fixtures" / "families"


@pytest.fixture
def copy(families: Path, tmp_path: Path) -> Edit:
    """Copies a recorded folder; ``edit`` changes its config.json, and keywords its tensors."""

    def make(
        name: str,
        edit: Callable[[dict[str, Any]], object] = len,
        *,
        generation: dict[str, Any] | None = None,
        tensors: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / f"{name}_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copyfile(families / name / file, folder / file)
        raw = json.loads((folder / "config.json").read_text())
        edit(raw)
        (folder / "config.json").write_text(json.dumps(raw))
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        if tensors:
            path = folder / "model.safetensors"
            held: dict[str, Any] = load_file(path) | tensors
            save_file({name: x for name, x in held.items() if x is not None}, path)
        return folder

    return make


def config_of(folder: Path) -> T5GemmaConfig:
    config = open_hf(folder)[0]
    assert isinstance(config, T5GemmaConfig)
    return config


def test_what_the_recorded_configurations_mean(families: Path) -> None:
    for name in ("t5gemma", "t5gemma_unbalanced"):
        older, newer = (
            t5gemma_config(json.loads((families / name / file).read_text()), families / name / file)
            for file in ("config.json", "config.v5.json")
        )
        assert older == newer
    first, wide, second = (config_of(families / name) for name in RECORDED)
    assert first.token_ids == IDS and IDS.fill == 0 and not IDS.inputs_end
    assert first.encoder.windows == (4, 0, 4) and first.decoder.windows == (4, 0)
    assert first.encoder.attention_softcap == 6.0 and first.decoder.logits_softcap == 8.0
    assert (wide.embed_dim, wide.decoder.embed_dim) == (40, 24)
    assert wide.embedding_scale == 40**0.5 and wide.decoder.embedding_scale == 24**0.5
    assert (wide.peft_prompt_scale, second.peft_prompt_scale) == (40**0.5, 1.0)
    assert second.shares_table and not first.shares_table
    assert (second.eoi, second.token_ids) == (158, dataclasses.replace(IDS, image=159))
    assert second.encoder.rope_local_theta == 10_000.0 and second.encoder.qk_norm == "head"


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("most", [5_000_000_000, 30_000])
def test_a_folder_written_again_is_the_same_bit_for_bit(
    families: Path, tmp_path: Path, name: str, most: int
) -> None:
    config, params, _ = open_hf(families / name)
    write_hf(tmp_path / "m", config, params, dtype="stored", max_shard_bytes=most)
    assert open_hf(tmp_path / "m")[0] == config
    files = list((tmp_path / "m").glob("*.safetensors"))
    assert (len(files) > 1) == (most < 100_000)
    got = {name: array for file in files for name, array in load_file(file).items()}
    images = ("vision_tower", "multi_modal_projector")
    want = {
        tensor: array
        for tensor, array in load_file(families / name / "model.safetensors").items()
        if not any(part in tensor for part in images)
    }
    assert want.keys() == got.keys()
    for tensor, array in want.items():
        assert got[tensor].dtype == array.dtype and got[tensor].shape == array.shape
        assert got[tensor].tobytes() == array.tobytes(), tensor
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (
        raw["architectures"]
        == json.loads((families / name / "config.json").read_text())["architectures"]
    )
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation["decoder_start_token_id"] == 2


@pytest.mark.parametrize("size", SIZES)
def test_presets_are_written_as_they_are_read(tmp_path: Path, size: str) -> None:
    described, generation = described_t5gemma(SIZES[size])
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert t5gemma_config(described, tmp_path / "config.json") == SIZES[size]


def test_absent_keys_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    raw: dict[str, Any] = {"model_type": "t5gemma", "encoder": {}, "decoder": {}}
    assert t5gemma_config(raw, tmp_path / "config.json") == PRESETS["google/t5gemma-2b-2b-ul2"]
    raw = {"model_type": "t5gemma2", "encoder": {"text_config": {}}, "decoder": {}}
    second = t5gemma_config(raw, tmp_path / "config.json")
    assert second.encoder.windows[:7] == (4096,) * 5 + (0, 4096)
    assert (second.vocab_size, second.eoi) == (262_208, 256_000)
    assert second.token_ids == dataclasses.replace(IDS, image=256_001)
    assert second.decoder.rope_theta == 1e6


def test_heads_and_copies_of_tables(copy: Edit, families: Path, tmp_path: Path) -> None:
    for name, table in (
        ("t5gemma", "model.decoder.embed_tokens.weight"),
        ("t5gemma2_text", "model.encoder.embed_tokens.weight"),
    ):
        held = load_file(families / name / "model.safetensors")[table]
        tied = copy(name, tensors={"lm_head.out_proj.weight": held})
        assert config_of(tied) == config_of(families / name)
        other = copy(name, tensors={"lm_head.out_proj.weight": held + 1})
        config, params, _ = open_hf(other)
        assert isinstance(config, T5GemmaConfig) and not config.tie_embeddings
        np.testing.assert_array_equal(params["decoder/logits_dense/kernel"].whole(), held.T + 1)
        np.testing.assert_array_equal(params["decoder_embedder/embedding"].whole(), held)
        write_hf(tmp_path / name, config, params, dtype="stored")
        assert open_hf(tmp_path / name)[0] == config
    copied = {"model.decoder.embed_tokens.weight": held}
    assert config_of(copy("t5gemma2_text", tensors=copied)).shares_table
    with pytest.raises(UserError, match=r"decoder\.embed_tokens\.weight is not a copy of encoder"):
        open_hf(copy("t5gemma2_text", tensors={"model.decoder.embed_tokens.weight": held + 1}))


def test_other_names_of_the_tensors(copy: Edit, families: Path) -> None:
    """transformers' module has text_model in its name, and a model without its head no prefix."""
    held = load_file(families / "t5gemma2_text" / "model.safetensors")
    text = [
        name
        for name in held
        if name.startswith("model.encoder.") and "vision" not in name and "projector" not in name
    ]
    inside = {name.replace("encoder.", "encoder.text_model.", 1): held[name] for name in text}
    renamed = copy("t5gemma2_text", tensors={**dict.fromkeys(text), **inside})
    bare = {name.removeprefix("model."): array for name, array in held.items()}
    without_head = copy("t5gemma2_text", tensors={**dict.fromkeys(held), **bare})
    want = open_hf(families / "t5gemma2_text")[1]
    for folder in (renamed, without_head):
        got = open_hf(folder)[1]
        assert got.keys() == want.keys()
        np.testing.assert_array_equal(got["eoi_embedding"].whole(), want["eoi_embedding"].whole())


def in_encoder(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw["encoder"].update(changes)


def in_text(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw["encoder"]["text_config"].update(changes)


def in_decoder(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw["decoder"].update(changes)


def whole(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw.update(changes)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("t5gemma", whole(decoder=None), "decoder is None; it must describe a stack"),
        ("t5gemma2_text", whole(encoder={}), "encoder.text_config is None"),
        ("t5gemma", whole(is_encoder_decoder=False), "an encoder alone is not supported"),
        ("t5gemma", whole(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'"),
        ("t5gemma", in_encoder(hidden_size=-1), "encoder: hidden_size is -1"),
        ("t5gemma", in_decoder(num_key_value_heads=3), "decoder: 4 heads cannot share 3"),
        ("t5gemma", in_decoder(vocab_size=99), "decoder.vocab_size 99"),
        ("t5gemma", in_encoder(layer_types=["chunked"] * 3), "layer_types has 'chunked'"),
        ("t5gemma", in_encoder(sliding_window=0), "encoder: sliding_window is 0"),
        ("t5gemma", in_encoder(model_type="gemma3"), "encoder.model_type is 'gemma3'"),
        ("t5gemma", in_decoder(bos_token_id=None), "decoder.bos_token_id is null"),
        ("t5gemma", in_decoder(bos_token_id=5), "decoder_start_token_id is 2, but decoder.bos"),
        ("t5gemma2_text", in_text(hidden_size=64), "the stacks of a t5gemma2 have one width"),
        ("t5gemma2_text", in_encoder(eoi_token_index="x"), "encoder.eoi_token_index is 'x'"),
        (
            "t5gemma2_text",
            in_text(num_hidden_layers=5, layer_types=None),
            "no tensors of the encoder's layers 3, 4",
        ),
        ("t5gemma2_text", in_text(rope_parameters=7), "encoder.text_config: rope_parameters is 7"),
    ],
)
def test_odd_values_are_named(copy: Edit, name: str, edit: Any, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        open_hf(copy(name, edit))


def test_ids_of_the_files(copy: Edit) -> None:
    generation = {"eos_token_id": [1, 107], "decoder_start_token_id": 2}
    ids = config_of(copy("t5gemma", generation=generation)).token_ids
    assert ids.all_eos == (1, 107) and ids.start == 2
    moved = config_of(copy("t5gemma", whole(eos_token_id=9), generation={})).token_ids
    assert moved.all_eos == (9,)


def test_what_is_said_of_a_folder(families: Path) -> None:
    opened = [open_source(str(families / name)) for name in RECORDED]
    assert [architecture(each) for each in opened] == [
        "T5Gemma (encoder-decoder)",
        "T5Gemma (encoder-decoder)",
        "T5Gemma 2, text alone (encoder-decoder)",
    ]
    assert size_name(PRESETS["google/t5gemma-9b-2b-ul2"]) == "9b-2b"
    assert size_name(opened[0].config) == ""


def test_a_prompt_of_peft_is_in_another_space(families: Path, tmp_path: Path) -> None:
    """transformers multiplies a T5Gemma's prompts as it does the embeddings of its tokens."""
    folder, scale = str(families / "t5gemma"), 32**0.5
    prompt = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    about = PromptMetadata(model_name=folder, model_type="t5gemma", embedding_scale=scale)
    save_prompt(tmp_path / "p.safetensors", prompt, metadata=about)
    done = convert(str(tmp_path / "p.safetensors"), str(tmp_path / "adapter"), to="peft")
    assert any(f"divided by {scale:g}" in note for note in done.notes)
    theirs = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
    np.testing.assert_allclose(theirs[:3] * scale, prompt, rtol=1e-6)
    back = str(tmp_path / "back.npy")
    convert(str(tmp_path / "adapter"), back, to="npy", model=folder)
    np.testing.assert_allclose(np.load(back), prompt, rtol=1e-6)
    ours, _ = load_prompt_with_metadata(tmp_path / "adapter", peft_scale=scale)
    np.testing.assert_allclose(ours, prompt, rtol=1e-6)
    write_peft(
        tmp_path / "two", prompt, base_model_name_or_path=str(families / "t5gemma2_text"),
        task_type="SEQ_2_SEQ_LM",
    )  # fmt: skip
    convert(
        str(tmp_path / "two"), str(tmp_path / "two.npy"), to="npy",
        model=str(families / "t5gemma2_text"),
    )  # fmt: skip
    np.testing.assert_array_equal(np.load(tmp_path / "two.npy"), prompt)


def test_so_are_prompts_of_other_methods(families: Path, tmp_path: Path) -> None:
    """P-tuning's prompts, and multitask prompts: the factor is that of the shared prompt."""
    folder, scale = str(families / "t5gemma"), 32**0.5
    config = open_source(folder).config
    draw = np.random.default_rng(0).normal
    tasks = MultitaskPrompts(length=3, rank=2, tasks=2, init="uniform")
    shapes: dict[str, tuple[int, ...]] = {SHARED: (3, 32), COLS: (2, 3, 2), ROWS: (2, 2, 32)}
    for method, of in (
        (PromptTuning(length=3, init="uniform"), {PROMPT: (3, 32)}),
        (tasks, shapes),
    ):
        made = {name: draw(size=shape).astype(np.float32) for name, shape in of.items()}
        place = tmp_path / type(method).__name__
        write_peft_prompts(place, method, made, config=config, base_model_name_or_path=folder)
        theirs = load_file(place / "adapter_model.safetensors")
        scaled = next(iter(of))
        np.testing.assert_allclose(theirs["prompt_embeddings"] * scale, made[scaled], rtol=1e-6)
        found = read_peft_prompts(place, config).trainable
        assert found.keys() == made.keys()
        for name, array in made.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-6)
        stored = TunedCheckpoint(
            trainable=made, method=method_to_json(method), metadata=PromptMetadata()
        )
        save_tuned(tmp_path / "tuned.safetensors", stored)
        again = convert_tuned(
            str(tmp_path / "tuned.safetensors"), tmp_path / "again", to="peft", model=folder,
            overwrite=True,
        )  # fmt: skip
        np.testing.assert_array_equal(
            load_file(again.path / "adapter_model.safetensors")["prompt_embeddings"],
            theirs["prompt_embeddings"],
        )
