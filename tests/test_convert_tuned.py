"""``prompt-tuning convert`` and ``inspect`` of what other methods than prompts tuned."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import run_folder
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.checkpoints.peft.adapter_file import CONFIG, WEIGHTS
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata, read_prompt
from prompt_tuning_jax.checkpoints.tuned_checkpoint import TunedCheckpoint, open_tuned, save_tuned
from prompt_tuning_jax.config.overrides import method_from_json, method_to_json
from prompt_tuning_jax.methods import (
    IA3,
    Adapters,
    Context,
    LoRA,
    MethodConfig,
    MultitaskPrompts,
    PrefixTuning,
    attach_method,
    trainable_mask,
)
from prompt_tuning_jax.training.resume import claim
from tests import tiny_run
from tests.convert_cases import Program
from tests.micro import normal

LORA = LoRA(rank=2, alpha=3.0, dropout=0.25, targets=(".*/query", ".*/wi_0"))
METHODS: dict[str, MethodConfig] = {
    "LoRA": LORA,
    "IA3": IA3(),
    "PrefixTuning": PrefixTuning(
        length=3, encoder=False, cross=False, before=True, hidden=0, init="uniform"
    ),
    "MultitaskPrompts": MultitaskPrompts(
        length=3, combine="low_rank", rank=2, tasks=2, init="uniform"
    ),
}
METADATA = PromptMetadata(task="colors", labels=("red",), seed=4, steps=2)


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Program:
    return Program(capsys, tmp_path)


def stored(method: MethodConfig, *, seed: int = 0, **known: Any) -> TunedCheckpoint:
    """Random arrays where the method has its own on the micro model."""
    model = load_model(str(tiny_run.model_folder()))
    attached = attach_method(model, method, key=jax.random.key(0), context=Context(num_tasks=2))
    params = param_tree.split(attached)[1]
    names = [name for name, trains in trainable_mask(method, list(params)).items() if trains]
    trainable = {n: normal(*params[n].shape, seed=100 * seed + i) for i, n in enumerate(names)}
    return TunedCheckpoint(
        trainable=trainable,
        method=method_to_json(method),
        metadata=dataclasses.replace(METADATA, **known),
    )


def require_same(found: TunedCheckpoint, wanted: TunedCheckpoint) -> None:
    assert found.trainable.keys() == wanted.trainable.keys()
    for name, array in wanted.trainable.items():
        assert found.trainable[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("kind", METHODS)
def test_to_peft_and_back(program: Program, tmp_path: Path, kind: str) -> None:
    model, method = tiny_run.model_folder(), METHODS[kind]
    kept = stored(method, model_name=str(model))
    path = tmp_path / "kept.safetensors"
    save_tuned(path, kept)
    # The model that it names is there: nothing more needs to be said.
    said = program("convert", path, tmp_path / "a", "--to", "peft")
    assert f"wrote what {kind} tuned as a PEFT adapter: {tmp_path / 'a'} (" in said
    assert "does not hold the task" in said
    described = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert described["base_model_name_or_path"] == str(model.resolve())
    back = tmp_path / "back.safetensors"
    said = program("convert", tmp_path / "a", back, "--model", model)
    assert f"wrote what {kind} tuned as a .safetensors file" in said
    require_same(open_tuned(back), kept)
    found = method_from_json(open_tuned(back).method)
    assert type(found) is type(method)
    if isinstance(found, LoRA):
        assert found == LORA or found.targets != LORA.targets
        assert (found.rank, found.alpha, found.dropout) == (2, 3.0, 0.25)
    fingerprint = json.loads(program("inspect", model, "--json"))["fingerprint"]
    metadata = open_tuned(back).metadata
    assert (metadata.model_name, metadata.model_fingerprint) == (str(model.resolve()), fingerprint)
    # And there again: the same adapter.
    program("convert", back, tmp_path / "b", "--to", "peft")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_adapters_that_peft_wrote(program: Program, tmp_path: Path, shared: Path) -> None:
    """Every kind, there and back again, in what PEFT itself called them."""
    hf = shared / "fixtures/hf"
    count = 0
    for folder in sorted((hf / "peft/b_t5_11").iterdir()):
        kind = json.loads((folder / CONFIG).read_text())["peft_type"]
        if kind in ("PROMPT_TUNING", "P_TUNING"):
            continue
        file, again = tmp_path / f"{folder.name}.safetensors", tmp_path / folder.name
        program("convert", folder, file, "--model", hf / "b_t5_11")
        program("convert", file, again, "--to", "peft", "--model", hf / "b_t5_11")
        theirs, ours = load_file(folder / WEIGHTS), load_file(again / WEIGHTS)
        if kind != "PREFIX_TUNING":  # which holds pairs that no layer gets
            assert theirs.keys() == ours.keys()
            for name, array in theirs.items():
                np.testing.assert_array_equal(ours[name], array)
        program("convert", again, tmp_path / "again.safetensors", "--overwrite")
        require_same(open_tuned(tmp_path / "again.safetensors"), open_tuned(file))
        rows = program("inspect", folder)
        assert kind in rows and "PEFT adapter" in rows and "b_t5_11" in rows
        count += 1
    assert count >= 4


def test_p_tuning_becomes_a_prompt(program: Program, tmp_path: Path, shared: Path) -> None:
    hf = shared / "fixtures/hf"
    folder = hf / "peft/b_t5_11/ptuning_mlp_sub1"
    rows = load_file(folder / WEIGHTS)["prompt_embeddings"]
    for name in ("p.safetensors", "p.npy"):
        program("convert", folder, tmp_path / name, "--model", hf / "b_t5_11")
        np.testing.assert_array_equal(read_prompt(tmp_path / name).prompt_PD, rows)
    assert read_prompt(tmp_path / "p.safetensors").metadata.model_fingerprint
    lora = hf / "peft/b_t5_11/lora_qv_r4"
    message = program.refused("convert", lora, tmp_path / "l.npy", "--model", hf / "b_t5_11")
    assert "more than a prompt" in message


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of LoRA with two members, as one leaves it."""
    folder = tmp_path / "run"
    claim(folder, tiny_run.experiment(folder, {"method": LORA}))
    for seed in (0, 1):
        kept = stored(LORA, seed=seed)
        known = dataclasses.replace(
            kept.metadata, seed=seed, model_name=str(tiny_run.model_folder()), score=50.0
        )
        kept = dataclasses.replace(kept, metadata=known)
        run_folder.export_tuned(folder, f"seed_{seed}", kept)
    return folder


def test_a_run_of_another_method(run: Path, program: Program, tmp_path: Path) -> None:
    said = program("convert", run, tmp_path / "adapters", "--to", "peft")
    assert (
        "wrote 2 sets of what LoRA tuned" in said and "a PEFT adapter" in said and "4 files" in said
    )
    program("convert", tmp_path / "adapters", tmp_path / "files", "--to", "safetensors")
    kept = [open_tuned(run / "tuned" / f"seed_{seed}.safetensors") for seed in (0, 1)]
    for seed in (0, 1):
        require_same(open_tuned(tmp_path / "files" / f"seed_{seed}.safetensors"), kept[seed])
    # Of a folder with one file it is that one.
    (run / "tuned" / "seed_0.safetensors").unlink()
    said = program("convert", run, tmp_path / "lora.safetensors")
    assert "wrote what LoRA tuned as a .safetensors file" in said
    require_same(open_tuned(tmp_path / "lora.safetensors"), kept[1])
    said = program("convert", run, tmp_path / "adapter", "--to", "peft")
    assert "wrote what LoRA tuned as a PEFT adapter" in said
    assert any(
        (kept[0].trainable[name] != kept[1].trainable[name]).any() for name in kept[0].trainable
    )


def test_a_run_that_holds_nothing_yet(program: Program, tmp_path: Path) -> None:
    claim(tmp_path / "new", tiny_run.experiment(tmp_path / "new", {"method": LORA}))
    message = program.refused("convert", tmp_path / "new", tmp_path / "a", "--to", "peft")
    assert "neither prompts/ nor tuned/" in message


def test_inspect_says_what_was_tuned(run: Path, program: Program, tmp_path: Path) -> None:
    file = run / "tuned" / "seed_1.safetensors"
    kept = open_tuned(file)
    count = sum(array.size for array in kept.trainable.values())
    rows = program("inspect", file)
    for part in ("LoRA", f"{count:,} in {len(kept.trainable)} arrays", "colors"):
        assert part in rows
    described = json.loads(program("inspect", file, "--json"))
    assert (described["kind"], described["method"]) == ("tuned", "LoRA")
    assert described["parameters"] == count and described["dtypes"] == {"float32": count}
    assert described["settings"]["rank"] == 2 and described["metadata"]["seed"] == 1
    program("convert", file, tmp_path / "a", "--to", "peft")
    adapter = json.loads(program("inspect", tmp_path / "a", "--json"))
    assert (adapter["method"], adapter["parameters"]) == ("LORA", count)
    assert adapter["settings"]["r"] == 2 and adapter["format"] == "PEFT adapter"
    assert adapter["metadata"]["model_name"] == str(tiny_run.model_folder().resolve())
    assert "2 files of trainable parameters" in program("inspect", run / "tuned")
    of_run = json.loads(program("inspect", run, "--json"))
    assert [t["parameters"] for t in of_run["tuned"].values()] == [count, count]
    assert "LoRA, " in program("inspect", run)


def test_a_model_in_the_cache_is_found_by_its_name(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "kept.safetensors"
    save_tuned(path, stored(LORA, model_name="smollm2"))
    words = ("convert", path, tmp_path / "a", "--to", "peft")
    assert "the model smollm2 is not in the cache" in program.refused(*words)


def test_what_is_refused(program: Program, tmp_path: Path) -> None:
    model = tiny_run.model_folder()
    kept = stored(LORA, model_name="org/elsewhere")
    path = tmp_path / "kept.safetensors"
    save_tuned(path, kept)
    to = [tmp_path / "a", "--to", "peft"]
    message = program.refused("convert", path, *to)
    assert "org/elsewhere, which is not on this machine" in message and "--model" in message
    wide = dataclasses.replace(tiny_run.CONFIG, embed_dim=24)
    other = tiny_run.model_folder(config=wide)
    message = program.refused("convert", path, *to, "--model", other)
    assert "kept.safetensors: its adapter" in message and "[2, 16], but this model" in message
    foreign = tmp_path / "foreign.safetensors"
    save_tuned(foreign, stored(LORA, model_fingerprint="0" * 16))
    assert "another model" in program.refused("convert", foreign, *to, "--model", model)
    program("convert", foreign, *to, "--model", model, "--allow_other_model")
    assert "--overwrite" in program.refused("convert", path, *to, "--model", model)
    program("convert", path, *to, "--model", model, "--overwrite")
    message = program.refused("convert", path, tmp_path / "m", "--to", "hf")
    assert "merge" in message and "format of models" in message
    message = program.refused("convert", path, tmp_path / "b", "--to", "peft", "--step", 3)
    assert "--step only goes with" in message
    message = program.refused("convert", path, tmp_path / "b", "--to", "peft", "--dtype=bfloat16")
    assert "--dtype bfloat16" in message
    save_tuned(tmp_path / "adapters.safetensors", stored(Adapters(width=4)))
    bottlenecks = tmp_path / "adapters.safetensors"
    message = program.refused("convert", bottlenecks, tmp_path / "b", "--to=peft", "--model", model)
    assert "no adapter for adapters; it has them for adaption_prompt, ia3, lora, multi" in message
    damaged = tmp_path / "damaged.safetensors"
    save_tuned(damaged, dataclasses.replace(kept, method='{"class": "Nothing"}'))
    for words in (("inspect", damaged), ("convert", damaged, *to, "--overwrite", "--model", model)):
        assert "damaged.safetensors" in program.refused(*words)
    (tmp_path / "two").mkdir()
    for name in ("x", "y"):
        save_tuned(tmp_path / "two" / f"{name}.safetensors", kept)
    message = program.refused("convert", tmp_path / "two", tmp_path / "o.safetensors")
    assert "several" in message
