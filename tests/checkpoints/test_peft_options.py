"""PEFT's options of LoRA: its recorded logits, there and back again, and what is refused."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.peft.adapter_file import CONFIG, WEIGHTS
from prompt_tuning_jax.checkpoints.peft.modules import PREFIX
from prompt_tuning_jax.checkpoints.peft.weights import read_peft_weights, write_peft_weights
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference import api
from prompt_tuning_jax.inference.loading import attach
from prompt_tuning_jax.methods import IA3, Context, LoRA, attach_method
from tests.micro import make_t5, normal
from tests.peft_options import CASES, LOGITS, RECORDED, ROWS, SOURCE, TARGET, Case
from tests.tiny_lm import make_lm


def logits(case: Case, attached: Any) -> np.ndarray:
    if not case.is_t5:
        return np.asarray(api.logits(attached, ROWS.tolist()))
    return np.asarray(api.logits(attached, SOURCE, TARGET))


@pytest.mark.parametrize("name", CASES)
def test_adapters_give_pefts_logits(name: str) -> None:
    case = CASES[name]
    attached = attach(case.model(), RECORDED / name)
    assert attached.method.config == replace(case.method, dropout=0.0)
    got, want = logits(case, attached), np.load(RECORDED / name / LOGITS)
    if case.is_t5:
        want, got = want[TARGET != 0], got[TARGET != 0]
    np.testing.assert_allclose(got[..., : want.shape[-1]], want, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_adapters_are_written_as_peft_does(tmp_path: Path, name: str) -> None:
    model = CASES[name].model()
    config = model.config
    read = read_peft_weights(RECORDED / name, config, param_tree.split(model)[1])
    assert isinstance(read.method, LoRA)
    write_peft_weights(
        tmp_path / "a", read.method, read.trainable, config=config, base_model_name_or_path="m"
    )
    theirs, ours = load_file(RECORDED / name / WEIGHTS), load_file(tmp_path / "a" / WEIGHTS)
    # Except for biases that it saves twice, and a head that it saves as it was.
    own = {n for n in theirs if n in ours}
    left = [n.rpartition("ln_f")[2] or n for n in theirs.keys() - own]
    assert all(n.endswith(("_module.bias", "to_save.bias", "base_layer.weight")) for n in left)
    for tensor in own:
        assert ours[tensor].tobytes() == theirs[tensor].tobytes()
    assert ours.keys() == own
    again = read_peft_weights(tmp_path / "a", config)
    assert again.method == read.method and again.trainable.keys() == read.trainable.keys()


def test_parts_of_layers_that_are_fused_by_head_come_back(tmp_path: Path) -> None:
    model = make_lm("bloom", model_type="bloom", num_layers=1)
    method = LoRA(rank=1, dora=True, targets=(".*/(query|key|value)",), parameters=(".*/bias",))
    attached = attach_method(model, method, key=jax.random.key(0), context=Context())
    arrays = {
        name: np.asarray(array) + normal(*array.shape, seed=number)
        for number, (name, array) in enumerate(param_tree.split(attached)[1].items())
        if method.trains(name)
    }
    write_peft_weights(
        tmp_path / "a", method, arrays, config=model.config, base_model_name_or_path="m"
    )
    read = read_peft_weights(tmp_path / "a", model.config)
    assert isinstance(read.method, LoRA) and read.method.parameters == (".*/bias",)
    assert read.trainable.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read.trainable[name], array)


def changed(
    name: str, to: Path, arrays: Callable[[dict[str, Any]], Any] = dict, **fields: Any
) -> Path:
    to.mkdir()
    described = json.loads((RECORDED / name / CONFIG).read_text()) | fields
    (to / CONFIG).write_text(json.dumps(described))
    save_file(arrays(load_file(RECORDED / name / WEIGHTS)), to / WEIGHTS)
    return to


def without(end: str) -> Callable[[dict[str, Any]], Any]:
    return lambda held: {name: array for name, array in held.items() if not name.endswith(end)}


@pytest.mark.parametrize(
    ("name", "arrays", "fields", "said"),
    [
        ("t5", dict, {"use_dora": False}, "lora_magnitude_vector, which belongs to another type"),
        ("t5", without("q.lora_magnitude_vector"), {}, "q.lora_magnitude_vector: the copy is"),
        ("t5", dict, {"rank_pattern": {}}, "this model and config require [2, 16]"),
        ("t5", dict, {"rank_pattern": [1]}, "rank_pattern is [1]; it must be numbers by name"),
        (
            *("t5", dict, {"rank_pattern": {f"q{i}": 1 for i in range(5000)}}),
            "rank_pattern has 5,000 entries; at most 4,096 are read",
        ),
        ("t5", dict, {"rank_pattern": {"q": 2.5}}, "rank_pattern has 2.5 for q; it must be a pos"),
        (
            "t5",
            dict,
            {"alpha_pattern": {"q": "x"}},
            'alpha_pattern has "x" for q; it must be a num',
        ),
        ("t5", dict, {"alpha_pattern": {"(": 1}}, "alpha_pattern: '(' is not a valid regular"),
        ("t5", dict, {"bias": "some"}, 'bias is "some"; it is one of none, all, lora_only'),
        (
            "t5",
            dict,
            {"modules_to_save": "lm_head"},
            'modules_to_save is "lm_head"; it must be a l',
        ),
        ("t5", dict, {"modules_to_save": ["lm_head"]}, "is not the decoder/decoder_norm/scale of"),
        (
            "t5",
            dict,
            {"modules_to_save": ["lm_head", "final_layer_norm", "score"]},
            'modules_to_save has "score", but adapter_model.safetensors has no weights',
        ),
        ("t5", dict, {"lora_bias": True}, "lora_bias is true, which is not supported; supported"),
        (
            "t5",
            dict,
            {"trainable_token_indices": [1]},
            "trainable_token_indices is [1], which",
        ),
        ("t5", without("lora_embedding_A"), {}, "embed_tokens.lora_embedding_A: the copy is"),
        (
            "t5",
            lambda held: {n: a[:-1] if "lm_head" in n else a for n, a in held.items()},
            {},
            "lm_head.weight is [63, 16], but this model has [64, 16]",
        ),
        (
            "t5",
            lambda held: {n: a * np.nan if "lm_head" in n else a for n, a in held.items()},
            {},
            "lm_head.weight has numbers that are not finite",
        ),
        ("gpt2", without("mlp.c_fc.bias"), {}, "mlp.c_fc.bias: the copy is incomplete"),
        (
            "gpt2",
            dict,
            {"bias": "none"},
            "c_attn.base_layer.bias is not the decoder/layers_0/self_",
        ),
        (
            "gpt2",
            lambda held: {n: a[:-2] if n.endswith("e_layer.bias") else a for n, a in held.items()},
            {},
            "c_attn.base_layer.bias is [34], but this model has [36]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, name: str, arrays: Any, fields: Any, said: str
) -> None:
    folder = changed(name, tmp_path / "a", arrays, **fields)
    model = CASES[name].model()
    with pytest.raises(UserError) as caught:
        read_peft_weights(folder, model.config, param_tree.split(model)[1])
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_what_transformers_does_not_use_is_left_out(tmp_path: Path) -> None:
    """PEFT's changes of a T5's shared table, which has copies for its encoder and decoder."""

    def with_shared(held: dict[str, Any]) -> dict[str, Any]:
        table, a_RV, b_DR = (np.ones(shape, np.float32) for shape in ((64, 16), (2, 64), (16, 2)))
        shared = f"{PREFIX}shared"
        more = {"weight": table, "lora_embedding_A": a_RV, "lora_embedding_B": b_DR}
        return held | {f"{shared}.{end}": array for end, array in more.items()}

    modules = ["lm_head", "final_layer_norm", "shared"]
    folder = changed("t5", tmp_path / "a", with_shared, modules_to_save=modules)
    model = CASES["t5"].model()
    found, plain = (
        read_peft_weights(place, model.config, param_tree.split(model)[1])
        for place in (folder, RECORDED / "t5")
    )
    assert found.method == plain.method and found.trainable.keys() == plain.trainable.keys()


def test_modules_that_were_saved_as_they_are_train_nothing(tmp_path: Path) -> None:
    model = CASES["t5"].model()
    params = param_tree.split(model)[1]
    own = {
        "lm_head": params["decoder/logits_dense/kernel"].T,
        "encoder.final_layer_norm": params["encoder/encoder_norm/scale"],
        "decoder.final_layer_norm": params["decoder/decoder_norm/scale"],
    }

    def as_it_is(held: dict[str, Any]) -> dict[str, Any]:
        return held | {f"{PREFIX}{n}.weight": np.ascontiguousarray(a) for n, a in own.items()}

    read = read_peft_weights(changed("t5", tmp_path / "a", as_it_is), model.config, params)
    assert read.method == replace(CASES["t5"].method, parameters=())


@pytest.mark.parametrize(
    ("family", "method", "said"),
    [
        ("t5", LoRA(parameters=("token_embedder/.*",)), "PEFT has no counterpart of token_embed"),
        ("gpt2", LoRA(parameters=(".*/query/bias",)), "is decoder/layers_0/self_attention/query"),
        ("gpt2", LoRA(parameters=(".*_norm/bias",)), "PEFT saves all biases, those of the layers"),
        ("gpt2", LoRA(dora=True), "PEFT has a norm for each of its outputs: add decoder/layers_0"),
        ("gpt2", LoRA(ranks=(".*/query=2",)), "PEFT has one rank and alpha for it: give these"),
    ],
)
def test_what_peft_cannot_hold_is_not_written(
    tmp_path: Path, family: str, method: LoRA, said: str
) -> None:
    model = make_t5() if family == "t5" else make_lm("gpt2", model_type="gpt2")
    attached = attach_method(model, method, key=jax.random.key(0), context=Context())
    arrays = {n: a for n, a in param_tree.split(attached)[1].items() if method.trains(n)}
    with pytest.raises(UserError) as caught:
        write_peft_weights(
            tmp_path / "a", method, arrays, config=model.config, base_model_name_or_path="m"
        )
    assert said in str(caught.value) and not (tmp_path / "a").exists()


@pytest.mark.parametrize("method", [LoRA(targets=(".*/query",), alphas=(".*_1/.*=3",)), IA3()])
def test_adapters_beside_an_image_tower_have_the_names_of_their_base_model(
    tmp_path: Path, method: LoRA | IA3
) -> None:
    """A Gemma 3 that reads images holds its language model as one of its parts."""
    model = make_lm("gemma", model_type="gemma3_text")
    attached = attach_method(model, method, key=jax.random.key(0), context=Context())
    arrays = {
        name: np.asarray(array) + normal(*array.shape, seed=number)
        for number, (name, array) in enumerate(param_tree.split(attached)[1].items())
        if method.trains(name)
    }
    for kind, inside in (("gemma3_text", "model."), ("gemma3", "model.language_model.")):
        folder = tmp_path / kind
        write_peft_weights(
            *(folder, method, arrays),
            config=model.config,
            base_model_name_or_path="m",
            base_model_type=kind,
        )
        held = load_file(folder / WEIGHTS)
        assert all(name.startswith(f"{PREFIX}{inside}layers.") for name in held)
        excluded = json.loads((folder / CONFIG).read_text())["exclude_modules"]
        assert (excluded is None) == (kind == "gemma3_text")
        if excluded:
            assert re.fullmatch(excluded, "model.vision_tower.encoder.layers.0.q_proj")
            assert not re.fullmatch(excluded, f"{inside}layers.0.self_attn.q_proj")
            # PEFT adapts an image tower, too, whose layers have the same names.
            tower = f"{PREFIX}model.vision_tower.encoder.layers.0.q_proj.lora_A.weight"
            save_file({**held, tower: np.ones((2, 3), np.float32)}, folder / WEIGHTS)
        renamed = {}
        if excluded:  # transformers before 4.52
            old = f"{PREFIX}language_model.model."
            new = f"{PREFIX}{inside}"
            renamed = {name.replace(new, old): array for name, array in held.items()}
        for stored in (held, renamed):
            if not stored:
                continue
            if stored is renamed:
                save_file(renamed, folder / WEIGHTS)
            read = read_peft_weights(folder, model.config)
            assert read.trainable.keys() == arrays.keys()
            for name, array in arrays.items():
                assert np.array_equal(read.trainable[name], array)
        if isinstance(method, LoRA):
            assert isinstance(read.method, LoRA)
            for layer in (f"decoder/layers_{n}/self_attention/query" for n in (0, 1)):
                assert read.method.scale_of(layer) == method.scale_of(layer)


@pytest.mark.parametrize("declared", ["embed_tokens", "lm_head"])
def test_tables_that_peft_keeps_tied_are_trained_together(tmp_path: Path, declared: str) -> None:
    """With ``ensure_weight_tying`` PEFT names one use of the table, and saves all of them."""
    model = make_lm("llama", model_type="llama", tie_embeddings=True)
    method = LoRA(targets=(".*/query",), copies=(".*/(embed_tokens|tied_logits)",))
    attached = attach_method(model, method, key=jax.random.key(0), context=Context())
    arrays = {n: a for n, a in param_tree.split(attached)[1].items() if method.trains(n)}
    table = normal(*model.embedding_table().shape)
    arrays |= {name: table for name in arrays if name.endswith("table_VD")}
    write_peft_weights(
        tmp_path / "a", method, arrays, config=model.config, base_model_name_or_path="m"
    )
    described = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert described["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    described |= {"modules_to_save": [declared], "ensure_weight_tying": True}
    (tmp_path / "a" / CONFIG).write_text(json.dumps(described))
    read = read_peft_weights(tmp_path / "a", model.config, param_tree.split(model)[1])
    assert read.trainable.keys() == arrays.keys()
    for name in arrays:
        assert np.array_equal(read.trainable[name], arrays[name])
