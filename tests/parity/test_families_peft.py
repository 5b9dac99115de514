"""Adapters of decoder-only models give PEFT's recorded numbers, and are written bit for bit."""

import dataclasses
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.checkpoints.peft.adapter_file import CONFIG, WEIGHTS
from prompt_tuning_jax.checkpoints.peft.weights import read_peft_weights, write_peft_weights
from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference import api
from prompt_tuning_jax.inference.conversion import convert
from prompt_tuning_jax.inference.loading import attach
from prompt_tuning_jax.methods import (
    CPT,
    IA3,
    Context,
    LoRA,
    MethodConfig,
    PromptTuning,
    TunedModel,
    attach_method,
    trainable_mask,
)
from prompt_tuning_jax.methods.cpt import ContextPrompt
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.losses import TokenSums
from prompt_tuning_jax.training.optim import make_optimizer, make_schedule
from prompt_tuning_jax.training.step import init_state, make_train_step
from tests.micro import Trainer
from tests.parity.test_peft_prompts import libraries

__all__ = ["libraries"]  # a fixture

MODELS = ("llama_gqa_tied", "gpt2", "bloom", "gemma2", "qwen3")
PROMPTS = ("prompt", "ptuning_mlp", "ptuning_lstm", "cpt")
PREFIXES = ("prefix", "prefix_proj", "cartridge")
AROUND_LAYERS = ("lora_qv", "lora_all_rslora", "ia3")
ADAPTERS = (*PROMPTS, *PREFIXES, *AROUND_LAYERS)
METHODS = {"prompt": "Prompt", "prefix": "Prefixes", "lora_qv": "LoRAModule", "ia3": "IA3Module"}


@pytest.fixture(scope="module")
def families(shared: Path) -> Path:
    return shared / "fixtures/families"


@pytest.fixture(scope="module")
def hf(shared: Path) -> Path:
    return shared / "fixtures/hf"


@functools.cache
def model_of(folder: Path) -> Model:
    loaded: Model = load_model(str(folder))
    return loaded


class Case:
    """A recorded adapter: its rows as lists of token ids, and PEFT's numbers."""

    def __init__(self, families: Path, model: str, adapter: str):
        self.folder = families / "peft" / model / adapter
        self.model = model_of(families / model)
        self.want = np.load(self.folder / "cases.npz")
        lengths = self.want["attention_mask"].sum(axis=1)
        ids = self.want["input_ids"]
        self.rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
        first = (self.want["labels"] != -100).argmax(axis=1)
        self.inputs = [row[:n] for row, n in zip(self.rows, first, strict=True)]
        self.targets = [row[n:] for row, n in zip(self.rows, first, strict=True)]

    def require_logits(self, attached: TunedModel, rows: slice = slice(None)) -> None:
        got = api.logits(attached, self.rows)
        for number in range(len(self.rows))[rows]:
            length = len(self.rows[number])
            want = self.want["logits"][number, :length]
            np.testing.assert_allclose(got[number, :length], want, atol=2e-4)

    def require_scores(self, attached: TunedModel) -> None:
        got = api.score(attached, self.inputs, self.targets)
        np.testing.assert_allclose(got, self.want["row_logprob_sum"], atol=1e-3)
        loss = -got.sum() / sum(map(len, self.targets))
        np.testing.assert_allclose(loss, self.want["loss"], atol=2e-4)

    def require_greedy(self, attached: TunedModel) -> None:
        got = api.generate(attached, self.rows, max_length=8).ids
        for row, ids, length in zip(
            got, self.want["greedy_ids"], self.want["greedy_len"], strict=True
        ):
            assert row[:length].tolist() == ids[:length].tolist()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
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


@pytest.mark.parametrize("adapter", ["prompt", "cartridge", "lora_qv", "ia3"])
@pytest.mark.parametrize("name", MODELS)
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


@pytest.mark.parametrize("adapter", WRITTEN_AS)
@pytest.mark.parametrize("name", MODELS)
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
    assert ours["peft_type"] == WRITTEN_AS[adapter] and ours["task_type"] == "CAUSAL_LM"
    fields = {"num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "r"}
    fields |= {"num_ranks", "num_tasks", "lora_alpha", "use_rslora", "fan_in_fan_out"}
    for field in fields & ours.keys() & theirs.keys():
        assert ours[field] == theirs[field], field
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
    for adapter in ("prompt", "multitask", "prefix", "lora_qv", "ia3"):
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
        np.testing.assert_allclose(read.method.scale, method.scale, rtol=1e-6)


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
    with pytest.raises(UserError, match="ADAPTION_PROMPT"):
        attach(model, families / "peft/llama_gqa_tied/adaption")
    with pytest.raises(UserError, match=r"q_proj\.lora_A\.weight is"):
        attach(model, families / "peft/gemma2/lora_qv")
    with pytest.raises(UserError, match="num_layers is 4, but the number of this model's layers"):
        attach(model_of(families / "qwen3"), families / "peft/gemma2/prefix")


def padded(rows: list[list[int]], width: int, fill: int) -> np.ndarray:
    array = np.full((len(rows), width), fill, np.int32)
    for row, ids in zip(array, rows, strict=True):
        row[: len(ids)] = ids
    return array


@pytest.mark.parametrize(
    ("adapter", "recorded"),
    [("prompt", "prompt_grad"), ("prefix", "prefix_grad"), ("cartridge", "prefix_grad")],
)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_recorded_ones(
    families: Path, name: str, adapter: str, recorded: str
) -> None:
    case = Case(families, name, adapter)
    attached = attach(case.model, case.folder)
    graphdef, params = param_tree.split(attached)
    own = {path: array for path, array in params.items() if path.startswith("method/")}
    fill = case.model.token_ids.fill
    inputs, targets = padded(case.inputs, 12, fill), padded(case.targets, 8, fill)

    def loss(own: Any) -> jax.Array:
        module: TunedModel = param_tree.merge(graphdef, {**params, **own})
        sums = module.token_sums(inputs, targets)
        mean: jax.Array = sums.loss / sums.tokens
        return mean

    value, gradient = jax.jit(jax.value_and_grad(loss))(own)
    np.testing.assert_allclose(value, case.want["loss"], atol=2e-4)
    if adapter == "prompt":
        got = gradient["method/prompt_PD"]
    else:  # PEFT's columns are those of keys and values in turns, layer by layer
        pair = [gradient[f"method/decoder/{kind}_LPHK"] for kind in ("key", "value")]
        got = np.moveaxis(np.stack(pair, axis=1), 2, 0).reshape(pair[0].shape[1], -1)
    want = case.want[recorded]
    # Recorded of PEFT's trainable rows alone: a cartridge's frozen rows have none.
    rows = np.abs(want).max(axis=1) > 0
    assert rows.sum() >= len(rows) - 1
    np.testing.assert_allclose(got[rows], want[rows], atol=2e-4)


@pytest.mark.parametrize("record", ["trajectory", "trajectory_small_lr"])
def test_training_follows_the_recorded_run(families: Path, record: str) -> None:
    want = np.load(families / "train_llama_gqa_tied_sgd" / f"{record}.npz")
    model = model_of(families / "llama_gqa_tied")
    steps, _, width = want["input_ids"].shape
    batches = []
    for step in range(steps):
        lengths = want["attention_mask"][step].sum(axis=1)
        first = (want["labels"][step] != -100).argmax(axis=1)
        rows = [row.tolist() for row in want["input_ids"][step]]
        triples = list(zip(rows, first, lengths, strict=True))
        inputs = padded([row[:n] for row, n, _ in triples], width, model.token_ids.fill)
        targets = padded([row[n:end] for row, n, end in triples], width, model.token_ids.fill)
        batches.append({"inputs": inputs[None], "targets": targets[None]})
    trainer = Trainer(
        PromptTuning(length=8),
        Optimizer(name="sgd", learning_rate=float(want["lr"]), weight_decay=0.0),
        [want["prompt_init"]],
        model=model,
        total_steps=steps,
    )
    losses, prompts = [], []
    for batch in batches:
        (metrics,) = trainer.run([batch])
        losses.append(float(metrics.loss_E[0]))
        prompts.append(np.asarray(trainer.state.trainable["method/prompt_PD"][0]))
    np.testing.assert_allclose(losses, want["loss"], atol=5e-4)
    np.testing.assert_allclose(losses[:8], want["loss"][:8], atol=2e-4)
    np.testing.assert_allclose(np.stack(prompts), want["prompts"], atol=2e-4)


def context_prompt(case: Case, **arrays: np.ndarray) -> TunedModel:
    """The recorded CPT adapter as it was before PEFT saved the sum of its parts."""
    described = json.loads((case.folder / CONFIG).read_text())
    full = load_file(case.folder / "prompt_encoder_full.safetensors")
    types = tuple(described["cpt_tokens_type_mask"])
    rows = [number for number, kind in enumerate(types) if kind % 4]
    method = CPT(
        epsilon=described["opt_projection_epsilon"],
        format_epsilon=described["opt_projection_format_epsilon"],
        decay=described["opt_loss_decay_factor"],
    )
    module = ContextPrompt(
        method,
        tuple(described["cpt_token_ids"]),
        types,
        full["delta_embedding.weight"][rows],
    )
    return TunedModel(case.model, module)


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_context_is_bounded_and_weighed_as_in_peft(families: Path, name: str) -> None:
    case = Case(families, name, "cpt")
    attached = context_prompt(case)
    assert isinstance(attached.method, ContextPrompt)
    prompt_PD = attached.method.prompt(case.model)
    np.testing.assert_allclose(prompt_PD, case.want["encoded_prompt"], atol=1e-5)
    full = load_file(case.folder / "prompt_encoder_full.safetensors")
    raw = np.linalg.norm(full["delta_embedding.weight"], axis=1)
    cut = np.linalg.norm(full["delta_embedding.projected"], axis=1)
    assert (cut < raw - 1e-3).any() and (np.abs(cut - raw) < 1e-6).any()  # some are bounded
    case.require_logits(attached.for_inference())
    graphdef, params = param_tree.split(attached)
    fill = case.model.token_ids.fill
    inputs, targets = padded(case.inputs, 12, fill), padded(case.targets, 8, fill)

    @jax.jit
    def sums(inputs: Any, targets: Any) -> tuple[TokenSums, TokenSums]:
        module: TunedModel = param_tree.merge(graphdef, params)
        return module.token_sums(inputs, targets), module.token_sums(inputs, targets, training=True)

    losses = []
    for number in range(len(inputs)):
        plain, with_context = sums(inputs[number : number + 1], targets[number : number + 1])
        losses.append(with_context.loss / with_context.tokens)
        np.testing.assert_allclose(-plain.loss, case.want["row_logprob_sum"][number], atol=1e-3)
    np.testing.assert_allclose(losses, case.want["cpt_loss_rows"], atol=2e-4)


def test_a_context_is_trained_as_in_peft(libraries: Any, families: Path) -> None:
    torch, transformers, peft = libraries
    case = Case(families, "llama_gqa_tied", "cpt")
    rate, row = 0.05, slice(1, 2)
    described = json.loads((case.folder / CONFIG).read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(families / "llama_gqa_tied")
        names = [name for name in described if name.startswith(("cpt_", "opt_"))]
        fields = {name: described[name] for name in names}
        fields |= {"opt_projection_epsilon": 2.0, "opt_projection_format_epsilon": 1.0}
        config = peft.CPTConfig(task_type="CAUSAL_LM", **fields)
        theirs = peft.get_peft_model(theirs, config).eval()
        given = {
            "input_ids": torch.tensor([case.rows[1]]),
            "attention_mask": torch.ones(1, len(case.rows[1])),
            "labels": torch.tensor(case.want["labels"][row][:, : len(case.rows[1])].astype(int)),
        }
        weight = theirs.prompt_encoder["default"].delta_embedding.weight
        optimizer = torch.optim.SGD([weight], lr=rate)
        want = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = theirs(**given).loss
            loss.backward()
            want.append(loss.item())
            optimizer.step()
        saved = peft.get_peft_model_state_dict(theirs)["prompt_embeddings"].detach().numpy()
    module = context_prompt(case).method
    module.config = dataclasses.replace(module.config, epsilon=2.0, format_epsilon=1.0)
    module.delta_QD.set_value(jnp.zeros_like(module.delta_QD.get_value()))
    attached = TunedModel(case.model, module)
    graphdef, params = param_tree.split(attached)
    method = module.config
    mask = trainable_mask(method, list(params))
    own, frozen = param_tree.partition(params, mask)
    settings = Optimizer(name="sgd", learning_rate=rate, weight_decay=0.0)
    optimizer = make_optimizer(settings, mask)
    state = init_state({name: array[None] for name, array in own.items()}, optimizer)
    step = make_train_step(
        graphdef,
        optimizer,
        make_schedule(settings, total_steps=6),
        learning_rates=(rate,),
        seeds=(0,),
    )
    fill = case.model.token_ids.fill
    batch = {
        "inputs": padded(case.inputs[row], 12, fill)[None],
        "targets": padded(case.targets[row], 8, fill)[None],
    }
    got = []
    for _ in range(6):
        state, metrics = step(state, frozen, batch)
        got.append(float(metrics.loss_E[0]))
    np.testing.assert_allclose(got, want, atol=5e-4)
    arrays = {name: array[0] for name, array in state.trainable.items()}
    trained: Any = param_tree.merge(graphdef, {**frozen, **arrays})
    np.testing.assert_allclose(trained.method.prompt(case.model), saved, atol=5e-4)
    assert want[-1] < want[0] - 0.1
    norms = np.linalg.norm(arrays["method/delta_QD"], axis=1) / (36 / 2048) ** 0.5
    assert (np.abs(norms - 2) < 1e-3).any() or (np.abs(norms - 1) < 1e-3).any()  # at their bound
