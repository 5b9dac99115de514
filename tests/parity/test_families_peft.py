"""Adapters of decoder-only models give PEFT's recorded numbers, and are written bit for bit."""

import itertools
import json
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.peft.adapter_file import CONFIG, WEIGHTS
from prompt_tuning_jax.checkpoints.peft.weights import read_peft_weights, write_peft_weights
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.checkpoints.tuned_checkpoint import TunedCheckpoint, save_tuned
from prompt_tuning_jax.config.overrides import method_to_json
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference import api
from prompt_tuning_jax.inference.conversion import convert
from prompt_tuning_jax.inference.loading import attach
from prompt_tuning_jax.methods import IA3, Context, LoRA, MethodConfig, TunedModel, attach_method
from prompt_tuning_jax.models.base import Model
from tests.parity.peft_cases import MODELS, Case, model_of, mostly_slow
from tests.parity.test_peft_prompts import libraries

__all__ = ["libraries"]  # a fixture

PROMPTS = ("prompt", "ptuning_mlp", "ptuning_lstm", "cpt")
PREFIXES = ("prefix", "prefix_proj", "cartridge")
AROUND_LAYERS = ("lora_qv", "lora_all_rslora", "ia3")
ADAPTERS = (*PROMPTS, *PREFIXES, *AROUND_LAYERS)
ADAPTION = "adaption"
WITH_ADAPTION = ("llama_gqa_tied", "gpt2")  # PEFT has adaption prompts for these alone
METHODS = {"prompt": "Prompt", "prefix": "Prefixes", "lora_qv": "LoRAModule", "ia3": "IA3Module"}


@pytest.fixture(scope="module")
def families(shared: Path) -> Path:
    return shared / "fixtures/families"


@pytest.fixture(scope="module")
def hf(shared: Path) -> Path:
    return shared / "fixtures/hf"


@pytest.mark.parametrize(
    ("name", "adapter"),
    [*itertools.product(MODELS, ADAPTERS), *((name, ADAPTION) for name in WITH_ADAPTION)],
)
def test_adapters_give_the_recorded_logits(families: Path, name: str, adapter: str) -> None:
    case = Case(families, name, adapter)
    attached = attach(case.model, case.folder)
    assert type(attached.method).__name__ == METHODS.get(adapter, type(attached.method).__name__)
    case.require_logits(attached)
    bare = api.logits(case.model, case.rows)
    assert np.abs(bare[0, :4] - case.want["logits"][0, :4]).max() > 0.03  # the adapter matters


@pytest.mark.parametrize("name", MODELS)
def test_each_row_gets_the_prompt_of_its_task(families: Path, name: str) -> None:
    case = Case(families, name, "multitask")
    for number, task in enumerate(case.want["task_ids"]):
        attached = attach(case.model, case.folder, task=str(task))
        case.require_logits(attached, slice(number, number + 1))


# Each compiles programs: those that differ most are tried always, and the others in a long run.
GENERATED = {
    *[("llama_gqa_tied", "prompt"), ("gemma2", "prompt"), ("gemma2", "cartridge")],
    *[("gpt2", "cartridge"), ("gpt2", "lora_qv"), ("bloom", "prompt"), ("qwen3", "ia3")],
    *[(name, ADAPTION) for name in WITH_ADAPTION],
}


@pytest.mark.parametrize(
    ("name", "adapter"),
    mostly_slow(
        [
            *itertools.product(MODELS, ("prompt", "cartridge")),
            *[("llama_gqa_tied", "ia3"), ("gpt2", "lora_qv"), ("bloom", "ia3")],
            *[("gemma2", "lora_qv"), ("qwen3", "ia3")],
            *((name, ADAPTION) for name in WITH_ADAPTION),
        ],
        GENERATED,
    ),
)
def test_targets_are_scored_and_text_generated_as_recorded(
    families: Path, name: str, adapter: str
) -> None:
    case = Case(families, name, adapter)
    attached = attach(case.model, case.folder)
    case.require_scores(attached)
    case.require_greedy(attached)


WRITTEN_AS = {
    "prompt": "PROMPT_TUNING",
    "ptuning_mlp": "PROMPT_TUNING",  # a plain prompt here, and of no encoder any more
    "cpt": "PROMPT_TUNING",
    "multitask": "MULTITASK_PROMPT_TUNING",
    "prefix": "PREFIX_TUNING",
    "cartridge": "PREFIX_TUNING",
    "lora_qv": "LORA",
    "lora_all_rslora": "LORA",
    "ia3": "IA3",
}


@pytest.mark.parametrize(
    ("name", "adapter"),
    [*itertools.product(MODELS, WRITTEN_AS), *((name, ADAPTION) for name in WITH_ADAPTION)],
)
def test_arrays_survive_both_conversions_bit_for_bit(
    families: Path, tmp_path: Path, name: str, adapter: str
) -> None:
    folder, model = families / "peft" / name / adapter, str(families / name)
    convert(folder, tmp_path / "ours.safetensors", model=model)
    convert(tmp_path / "ours.safetensors", tmp_path / "peft", to="peft", model=model)
    want, got = load_file(folder / WEIGHTS), load_file(tmp_path / "peft" / WEIGHTS)
    assert got.keys() == want.keys()
    for tensor, array in want.items():
        assert got[tensor].tobytes() == array.tobytes() and got[tensor].shape == array.shape
    theirs, ours = (json.loads((f / CONFIG).read_text()) for f in (folder, tmp_path / "peft"))
    assert ours["peft_type"] == WRITTEN_AS.get(adapter, "ADAPTION_PROMPT")
    assert ours["task_type"] == "CAUSAL_LM"
    fields = {"num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "r"}
    fields |= {"num_ranks", "num_tasks", "lora_alpha", "use_rslora", "fan_in_fan_out"}
    fields |= {"adapter_len", "adapter_layers"}
    for field in fields & ours.keys() & theirs.keys():
        assert ours[field] == theirs[field], field
    if adapter == ADAPTION:
        assert ours.keys() == theirs.keys() - {"peft_version"}
        assert ours["target_modules"] == theirs["target_modules"]
    names = ("target_modules", "feedforward_modules")
    if ours["peft_type"] in ("LORA", "IA3") and name not in ("gpt2", "bloom"):
        for field in set(names) & ours.keys():
            assert sorted(ours[field]) == sorted(theirs[field])


def logits_in_peft(libraries: Any, model: Path, adapter: Path, case: Case) -> list[np.ndarray]:
    """PEFT's logits of each row's real positions, as its forward gives them for the row alone."""
    torch, transformers, peft = libraries
    rows = []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            model, attn_implementation="eager"
        )
        theirs = peft.PeftModel.from_pretrained(theirs, adapter).eval()
        for number, row in enumerate(case.rows):
            given = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row))}
            if "task_ids" in case.want.files:
                given["task_ids"] = torch.tensor([case.want["task_ids"][number]])
            rows.append(theirs(**given).logits[0, -len(row) :].numpy())
    return rows


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_gives_the_same_logits_in_peft(
    libraries: Any, families: Path, tmp_path: Path, name: str
) -> None:
    written = ("prompt", "multitask", "prefix", "lora_qv", "ia3")
    for adapter in (*written, *([ADAPTION] if name in WITH_ADAPTION else [])):
        case = Case(families, name, adapter)
        model = families / name
        convert(case.folder, tmp_path / adapter, to="peft", model=str(model))
        for number, got in enumerate(logits_in_peft(libraries, model, tmp_path / adapter, case)):
            want = case.want["logits"][number, : len(got)]
            np.testing.assert_allclose(got, want, atol=2e-4, err_msg=f"{adapter} {number}")


TRAINED_HERE = {
    "lora": LoRA(rank=2, alpha=3.0),
    "lora of some": LoRA(
        rank=3, rank_stabilized=True, targets=(".*/(key|value|out)", ".*layers_1/mlp/.*")
    ),
    "ia3": IA3(),
    "ia3 elsewhere": IA3(outputs=(".*layers_0/.*/(query|out)",), inputs=(".*layers_1/mlp/wi.*",)),
}


def drawn(model: Model, method: MethodConfig) -> tuple[TunedModel, dict[str, np.ndarray]]:
    """A method with random arrays, and these by path."""
    attached = attach_method(model, method, key=jax.random.key(0), context=Context())
    graphdef, params = param_tree.split(attached)
    random = np.random.default_rng(0)
    own = {
        name: random.normal(size=array.shape).astype(np.float32) * 0.3
        for name, array in params.items()
        if method.trains(name)
    }
    arrays = {name: jnp.asarray(array) for name, array in own.items()}
    merged: TunedModel = param_tree.merge(graphdef, {**params, **arrays})
    return merged, own


@pytest.mark.parametrize("kind", TRAINED_HERE)
@pytest.mark.parametrize("name", ["llama_gqa_tied", "gpt2", "bloom"])
def test_layers_that_transformers_fuses_are_joined_and_split_again(
    families: Path, tmp_path: Path, name: str, kind: str
) -> None:
    model, method = model_of(families / name), TRAINED_HERE[kind]
    _, arrays = drawn(model, method)
    write_peft_weights(
        tmp_path / "a", method, arrays, config=model.config, base_model_name_or_path=name
    )
    read = read_peft_weights(tmp_path / "a", model.config)
    for path, array in arrays.items():
        np.testing.assert_array_equal(read.trainable[path], array)
    added = read.trainable.keys() - arrays.keys()
    assert all((read.trainable[path] == 1).all() for path in added)  # scales of other parts
    if isinstance(method, LoRA):
        assert not added and isinstance(read.method, LoRA)
        assert read.method.rank == method.rank
        np.testing.assert_allclose(read.method.scale_of("x"), method.scale_of("x"), rtol=1e-6)


@pytest.mark.parametrize("name", ["llama_gqa_tied", "gpt2", "bloom"])
def test_layers_that_transformers_fuses_do_the_same_in_peft(
    libraries: Any, families: Path, tmp_path: Path, name: str
) -> None:
    case = Case(families, name, "prompt")
    case.rows = case.rows[:1]
    for kind, method in TRAINED_HERE.items():
        attached, arrays = drawn(case.model, method)
        folder = tmp_path / kind
        write_peft_weights(
            folder, method, arrays, config=case.model.config, base_model_name_or_path=name
        )
        (want,) = logits_in_peft(libraries, families / name, folder, case)
        got = api.logits(attached, case.rows)[0]
        np.testing.assert_allclose(got[: len(want)], want, atol=3e-4, err_msg=kind)


def test_an_adapter_of_another_kind_of_model_is_refused(families: Path, hf: Path) -> None:
    model = model_of(families / "llama_gqa_tied")
    for kind in ("prompt_sub1", "lora_qv_r4", "prefix"):
        with pytest.raises(UserError, match=r"task_type is .SEQ_2_SEQ_LM.; for this model it"):
            attach(model, hf / "peft/b_t5_11" / kind)
    with pytest.raises(UserError, match="adaption prompts for llama, mistral, gpt2, not for qwen3"):
        attach(model_of(families / "qwen3"), families / "peft/llama_gqa_tied/adaption")
    with pytest.raises(UserError, match=r"c_attn|attn\.adaption_"):
        attach(model_of(families / "gpt2"), families / "peft/llama_gqa_tied/adaption")
    with pytest.raises(UserError, match=r"q_proj\.lora_A\.weight is"):
        attach(model, families / "peft/gemma2/lora_qv")
    with pytest.raises(UserError, match="num_layers is 4, but the number of this model's layers"):
        attach(model_of(families / "qwen3"), families / "peft/gemma2/prefix")


@pytest.mark.parametrize("adapter", [*ADAPTERS, ADAPTION])
def test_options_that_nobody_knows_are_refused(
    families: Path, tmp_path: Path, adapter: str
) -> None:
    """A later version of PEFT may compute something else with them."""
    folder = tmp_path / adapter
    shutil.copytree(families / "peft/gpt2" / adapter, folder)
    described = json.loads((folder / CONFIG).read_text())
    for value, refused in ((None, False), (False, False), (0.5, True)):
        (folder / CONFIG).write_text(json.dumps(described | {"new_trick": value}))
        with pytest.raises(UserError, match=r"new_trick is 0\.5") if refused else nullcontext():
            attach(model_of(families / "gpt2"), folder)


def test_the_head_of_gpt_neox_has_the_name_of_both_versions(families: Path, tmp_path: Path) -> None:
    model = model_of(families / "gpt_neox")
    method = LoRA(rank=2, targets=(".*/query", "decoder/logits_dense"))
    attached, arrays = drawn(model, method)
    folder = tmp_path / "a"
    write_peft_weights(
        folder, method, arrays, config=model.config, base_model_name_or_path="gpt_neox"
    )
    assert "lm_head" in json.loads((folder / CONFIG).read_text())["target_modules"]
    tensors = load_file(folder / WEIGHTS)
    assert any(name.startswith("base_model.model.lm_head.") for name in tensors)
    for older in (False, True):
        if older:
            held = {name.replace("lm_head", "embed_out"): each for name, each in tensors.items()}
            save_file(held, folder / WEIGHTS)
        want, got = (api.logits(one, [[3, 4, 5]]) for one in (attached, attach(model, folder)))
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_peft_computes_the_adapted_head_of_gpt_neox(
    libraries: Any, families: Path, tmp_path: Path
) -> None:
    torch, transformers, peft = libraries
    model = model_of(families / "gpt_neox")
    method = LoRA(rank=2, targets=(".*/query", "decoder/logits_dense"))
    attached, arrays = drawn(model, method)
    write_peft_weights(
        tmp_path / "a", method, arrays, config=model.config, base_model_name_or_path="gpt_neox"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(families / "gpt_neox")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor([[3, 4, 5]])).logits.numpy()
    np.testing.assert_allclose(api.logits(attached, [[3, 4, 5]]), want, atol=3e-4)


@pytest.mark.parametrize("method", [LoRA(rank=2), IA3()])
def test_peft_computes_adapters_of_a_gemma_3_that_reads_images(
    libraries: Any, tmp_path: Path, method: LoRA | IA3
) -> None:
    torch, transformers, peft = libraries
    text = {
        **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        **{"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    }
    images = {
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
    }
    ids = {"image_token_index": 63, "boi_token_index": 61, "eoi_token_index": 62}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=images, mm_tokens_per_image=4, **ids
    )
    base, folder = tmp_path / "model", tmp_path / "adapter"
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(base)
    run = tmp_path / "run.safetensors"
    model = model_of(base)
    attached, arrays = drawn(model, method)
    stored = TunedCheckpoint(
        trainable=arrays,
        method=method_to_json(method),
        metadata=PromptMetadata(model_name=str(base)),
    )
    save_tuned(run, stored)
    convert(run, folder, to="peft", model=str(base))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor([[3, 4, 5]])).logits.numpy()
    for one in (attached, attach(model, folder)):
        np.testing.assert_allclose(api.logits(one, [[3, 4, 5]]), want, atol=3e-4)
