"""LoRA and IA3 from PEFT give PEFT's logits here, and those from here give the same in PEFT."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.checkpoints.peft.adapter_file import CONFIG, WEIGHTS
from prompt_tuning_jax.checkpoints.peft.weights import (
    peft_kind,
    read_peft_weights,
    write_peft_weights,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import (
    IA3,
    Context,
    LoRA,
    MethodConfig,
    TunedModel,
    attach_method,
    trainable_mask,
)
from prompt_tuning_jax.methods.merging import merge
from prompt_tuning_jax.models.t5.model import T5
from tests.micro import T5_1_0, T5_1_1, make_t5, normal, shifted, token_rows
from tests.parity.test_peft_prompts import in_peft, libraries

__all__ = ["libraries"]  # a fixture

KINDS = ["lora_qv_r4", "ia3"]
SOURCE, TARGET = token_rows([5, 3], 7), token_rows([4, 6], 6, seed=1)


@pytest.fixture(scope="module")
def hf(shared: Path) -> Path:
    return shared / "fixtures/hf"


def attached_with(model: T5, method: MethodConfig, trainable: Any) -> TunedModel:
    fresh = attach_method(model, method, key=jax.random.key(0), context=Context())
    graphdef, params = param_tree.split(fresh)
    own, frozen = param_tree.partition(params, trainable_mask(method, list(params)))
    param_tree.require_same_shapes(trainable, own, of="what is read", and_of="the method")
    merged: TunedModel = param_tree.merge(
        graphdef, {**frozen, **jax.tree.map(jnp.asarray, dict(trainable))}
    )
    return merged


def logits(module: TunedModel | T5, source: Any, target: Any) -> np.ndarray:
    graphdef, params = param_tree.split(module)

    def run(params: Any) -> jax.Array:
        merged: Any = param_tree.merge(graphdef, params)
        call = merged if isinstance(merged, TunedModel) else merged.run
        computed: jax.Array = call(source, target)
        return computed

    return np.asarray(jax.jit(run)(params))


def random_tuned(model: T5, method: MethodConfig) -> dict[str, np.ndarray]:
    fresh = attach_method(model, method, key=jax.random.key(0), context=Context())
    names = [
        n
        for n, trains in trainable_mask(method, list(param_tree.split(fresh)[1])).items()
        if trains
    ]
    params = param_tree.split(fresh)[1]
    return {n: normal(*params[n].shape, seed=i, scale=0.3) for i, n in enumerate(names)}


@pytest.mark.parametrize("kind", KINDS)
def test_imported_adapters_give_the_recorded_logits(hf: Path, kind: str) -> None:
    folder = hf / "peft/b_t5_11" / kind
    want, inputs = np.load(folder / "cases.npz"), np.load(hf / "b_t5_11/cases.npz")
    model = load_model(str(hf / "b_t5_11"))
    read = read_peft_weights(folder, model.config)
    assert read.base_model_name_or_path == "b_t5_11" and read.peft_version == "0.21.2"
    assert read.method == (IA3() if kind == "ia3" else LoRA(rank=4, alpha=8.0))
    assert peft_kind(folder) == ("IA3" if kind == "ia3" else "LORA")
    attached = attached_with(model, read.method, read.trainable)
    source = inputs["input_ids"] * inputs["attention_mask"]
    real = inputs["labels"] != -100
    target = np.where(real, inputs["labels"], 0)
    got = logits(attached, source, target)
    np.testing.assert_allclose(got[real], want["logits"][real], atol=2e-4)
    bare = logits(model, source, target)
    assert np.abs(bare[real] - got[real]).max() > 1e-2  # the adapter matters to what is compared


@pytest.mark.parametrize("kind", KINDS)
def test_exported_adapters_are_what_was_imported(hf: Path, tmp_path: Path, kind: str) -> None:
    folder, config = hf / "peft/b_t5_11" / kind, load_model(str(hf / "b_t5_11")).config
    read = read_peft_weights(folder, config)
    write_peft_weights(
        tmp_path / "a",
        read.method,
        read.trainable,
        config=config,
        base_model_name_or_path="b_t5_11",
    )
    assert (tmp_path / "a" / WEIGHTS).stat().st_size > 0
    again = read_peft_weights(tmp_path / "a", config)
    assert again.method == read.method and again.trainable.keys() == read.trainable.keys()
    for name, array in read.trainable.items():
        np.testing.assert_array_equal(again.trainable[name], array)
    theirs, ours = (json.loads((f / CONFIG).read_text()) for f in (folder, tmp_path / "a"))
    for field in set(ours) - {"base_model_name_or_path"}:
        both = [
            sorted(x[field]) if isinstance(x[field], list) else x[field] for x in (ours, theirs)
        ]
        assert both[0] == both[1], field


METHODS = {
    "lora": LoRA(rank=3, alpha=5.0, dropout=0.25),
    "lora stabilized, mlps of one layer": LoRA(
        rank=2, rank_stabilized=True, targets=("encoder/layers_1/mlp/.*", ".*self_attention/out")
    ),
    "ia3": IA3(),
    "ia3 elsewhere": IA3(outputs=("decoder/.*/query",), inputs=("encoder/layers_0/mlp/wi.*",)),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("config", [T5_1_0, T5_1_1], ids=["1.0", "1.1"])
def test_adapters_from_here_do_the_same_in_peft(
    libraries: Any, tmp_path: Path, name: str, config: Any
) -> None:
    method, model = METHODS[name], make_t5(config)
    trainable = random_tuned(model, method)
    write_hf(tmp_path / "m", config, param_tree.split(model)[1], dtype="float32")
    write_peft_weights(
        tmp_path / "a",
        method,
        trainable,
        config=config,
        base_model_name_or_path=str(tmp_path / "m"),
    )
    read = read_peft_weights(tmp_path / "a", config)
    assert read.trainable.keys() == trainable.keys()
    inputs = {
        "input_ids": SOURCE,
        "attention_mask": SOURCE != 0,
        "decoder_input_ids": shifted(TARGET),
    }
    theirs = in_peft(libraries, tmp_path / "m", tmp_path / "a", inputs)
    attached = attached_with(model, read.method, read.trainable)
    np.testing.assert_allclose(logits(attached, SOURCE, TARGET), theirs, atol=2e-4)
    np.testing.assert_allclose(logits(merge(attached), SOURCE, TARGET), theirs, atol=2e-4)


def changed(folder: Path, to: Path, arrays: Any = None, **fields: Any) -> Path:
    from safetensors.numpy import load_file, save_file

    to.mkdir()
    config = json.loads((folder / CONFIG).read_text()) | fields
    (to / CONFIG).write_text(json.dumps(config))
    held = load_file(folder / WEIGHTS)
    save_file(held if arrays is None else arrays(held), to / WEIGHTS)
    return to


FIRST = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"


@pytest.mark.parametrize(
    ("arrays", "fields", "said"),
    [
        (None, {"peft_type": "LOHA"}, 'peft_type is "LOHA"; supported: LORA and IA3'),
        (None, {"task_type": "CAUSAL_LM"}, "task_type is"),
        (None, {"use_dora": True}, "q.lora_magnitude_vector: the copy is incomplete"),
        (None, {"rank_pattern": {"q": 8}}, "this model and config require [8, 16]"),
        (None, {"some_day": [1]}, "some_day is [1]"),
        (None, {"init_lora_weights": "pissa"}, "changes the model's weights"),
        (None, {"r": 8}, "this model and config require [8, 16]"),
        (None, {"r": "4"}, "r is"),
        (None, {"lora_dropout": 1.5}, "method.dropout is 1.5"),
        (lambda held: {n: a for n, a in held.items() if n != FIRST}, {}, f"has no {FIRST}"),
        (
            lambda held: {**held, "x": held[FIRST]},
            {},
            "contains x, which belongs to no linear layer",
        ),
        (lambda held: {**held, FIRST: held[FIRST] * np.nan}, {}, "not finite"),
    ],
)
def test_what_is_no_plain_adapter_of_this_model_is_refused(
    tmp_path: Path, arrays: Any, fields: Any, said: str
) -> None:
    method, config = LoRA(rank=4), T5_1_1
    trainable = random_tuned(make_t5(config), method)
    write_peft_weights(
        tmp_path / "a", method, trainable, config=config, base_model_name_or_path="m"
    )
    folder = changed(tmp_path / "a", tmp_path / "b", arrays, **fields)
    with pytest.raises(UserError) as caught:
        read_peft_weights(folder, config)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_arrays_of_another_method_or_model_are_not_written(tmp_path: Path) -> None:
    trainable = random_tuned(make_t5(T5_1_1), LoRA(rank=2))
    deeper = dataclasses.replace(T5_1_1, num_encoder_layers=3)
    for method, config in ((IA3(), T5_1_1), (LoRA(rank=2), deeper)):
        with pytest.raises(UserError, match="do not match"):
            write_peft_weights(
                tmp_path / "a", method, trainable, config=config, base_model_name_or_path="m"
            )
    assert not (tmp_path / "a").exists()
