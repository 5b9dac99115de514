"""Training on decoder-only models gives PEFT's recorded gradients, losses and parameters."""

import dataclasses
import itertools
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
from prompt_tuning_jax.checkpoints.peft.adapter_file import CONFIG
from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.inference.loading import attach
from prompt_tuning_jax.methods import CPT, PromptTuning, TunedModel, trainable_mask
from prompt_tuning_jax.methods.cpt import ContextPrompt
from prompt_tuning_jax.methods.prompt import Prompt
from prompt_tuning_jax.models.losses import TokenSums
from prompt_tuning_jax.training.optim import make_optimizer, make_schedule
from prompt_tuning_jax.training.step import init_state, make_train_step
from tests.micro import Trainer
from tests.parity.peft_cases import MODELS, Case, model_of, mostly_slow, padded
from tests.parity.test_peft_prompts import libraries

__all__ = ["libraries"]  # a fixture


@pytest.fixture(scope="module")
def families(shared: Path) -> Path:
    return shared / "fixtures/families"


GRADIENTS = {*((name, "prompt") for name in MODELS), ("gemma2", "prefix"), ("qwen3", "cartridge")}


@pytest.mark.parametrize(
    ("name", "adapter"),
    mostly_slow(itertools.product(MODELS, ("prompt", "prefix", "cartridge")), GRADIENTS),
)
def test_gradients_are_the_recorded_ones(families: Path, name: str, adapter: str) -> None:
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
    want = case.want["prompt_grad" if adapter == "prompt" else "prefix_grad"]
    # Recorded of PEFT's trainable rows alone: a cartridge's frozen rows have none.
    rows = np.abs(want).max(axis=1) > 0
    assert rows.sum() >= len(rows) - 1
    np.testing.assert_allclose(got[rows], want[rows], atol=2e-4)


def test_training_follows_the_recorded_runs(families: Path) -> None:
    """Two recorded runs on the same batches, at two rates, are members trained at once."""
    folder = families / "train_llama_gqa_tied_sgd"
    want = [np.load(folder / f"{name}.npz") for name in ("trajectory", "trajectory_small_lr")]
    for name in ("input_ids", "attention_mask", "labels"):
        np.testing.assert_array_equal(want[0][name], want[1][name])
    model = model_of(families / "llama_gqa_tied")
    steps, _, width = want[0]["input_ids"].shape
    batches = []
    for step in range(steps):
        lengths = want[0]["attention_mask"][step].sum(axis=1)
        first = (want[0]["labels"][step] != -100).argmax(axis=1)
        rows = [row.tolist() for row in want[0]["input_ids"][step]]
        triples = list(zip(rows, first, lengths, strict=True))
        inputs = padded([row[:n] for row, n, _ in triples], width, model.token_ids.fill)
        targets = padded([row[n:end] for row, n, end in triples], width, model.token_ids.fill)
        batches.append({"inputs": np.stack([inputs] * 2), "targets": np.stack([targets] * 2)})
    trainer = Trainer(
        PromptTuning(length=8),
        Optimizer(name="sgd", weight_decay=0.0),
        [each["prompt_init"] for each in want],
        model=model,
        seeds=(0, 0),
        learning_rates=tuple(float(each["lr"]) for each in want),
        total_steps=steps,
    )
    losses, prompts = [], []
    for batch in batches:
        (metrics,) = trainer.run([batch])
        losses.append(np.asarray(metrics.loss_E))
        prompts.append(np.asarray(trainer.state.trainable["method/prompt_PD"]))
    for member, recorded in enumerate(want):
        loss, prompt = np.stack(losses)[:, member], np.stack(prompts)[:, member]
        # Differences of rounding grow from step to step; those of jax 0.12 reach 6.5e-4.
        np.testing.assert_allclose(loss, recorded["loss"], atol=1e-3)
        np.testing.assert_allclose(loss[:8], recorded["loss"][:8], atol=2e-4)
        np.testing.assert_allclose(prompt, recorded["prompts"], atol=2e-4)


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
    kept = attached.for_inference().method
    assert isinstance(kept, Prompt)  # the recorded logits of such a prompt: test_families_peft.py
    np.testing.assert_array_equal(kept.prompt_PD.get_value(), prompt_PD)
    graphdef, params = param_tree.split(attached)
    fill = case.model.token_ids.fill
    inputs, targets = padded(case.inputs, 12, fill), padded(case.targets, 8, fill)

    @jax.jit
    def sums(inputs: Any, targets: Any) -> TokenSums:
        module: TunedModel = param_tree.merge(graphdef, params)
        return module.token_sums(inputs, targets, training=True)

    with_context = [sums(inputs[[row]], targets[[row]]) for row in range(len(inputs))]
    losses = [each.loss / each.tokens for each in with_context]
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
