"""A folder of PEFT adapters, as convert writes it from a run: an ensemble wherever it is opened."""

import os
from pathlib import Path

import numpy as np
import pytest

import prompt_tuning_jax as pt
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata, save_prompt
from prompt_tuning_jax.checkpoints.tuned_checkpoint import save_tuned
from prompt_tuning_jax.config.overrides import to_json
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.evaluation import evaluate
from prompt_tuning_jax.inference.loading import load_prompts
from prompt_tuning_jax.methods import LoRA, PrefixTuning, PromptTuning, attach_method
from tests import tiny_run
from tests.convert_cases import Program
from tests.test_convert_tuned import METHODS, stored

NAMES = ("seed_0", "seed_1")


@pytest.fixture
def program(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Program:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    return Program(capsys, tmp_path)


def run(folder: Path, kind: str, names: tuple[str, ...] = NAMES) -> Path:
    """What a run of these members leaves for convert."""
    method = PromptTuning(length=5) if kind == "prompts" else METHODS[kind]
    folder.mkdir()
    (folder / "experiment.json").write_text(
        to_json(tiny_run.experiment(folder, {"method": method}))
    )
    for seed, name in enumerate(names):
        if kind == "prompts":
            (folder / "prompts").mkdir(exist_ok=True)
            metadata = PromptMetadata(model_name=str(tiny_run.model_folder()))
            prompt_PD = np.random.default_rng(seed).normal(size=(5, 16))
            save_prompt(folder / "prompts" / f"{name}.safetensors", prompt_PD, metadata=metadata)
            continue
        (folder / "tuned").mkdir(exist_ok=True)
        known = {"model_name": str(tiny_run.model_folder())}
        save_tuned(folder / "tuned" / f"{name}.safetensors", stored(method, seed=seed, **known))
    return folder


@pytest.mark.parametrize("kind", ["prompts", "LoRA", "PrefixTuning"])
@pytest.mark.parametrize("names", [NAMES[:1], NAMES])
def test_where_it_is_written_is_said_and_opens(
    program: Program, tmp_path: Path, kind: str, names: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    said = program("convert", run(tmp_path / "run", kind, names), out, "--to", "peft")
    assert sorted(path.name for path in out.iterdir()) == list(names)
    assert ": " + ", ".join([str(out / names[0]), *names[1:]]) + " (" in said
    model = pt.load_model(str(tiny_run.model_folder()))
    opened = load_prompts(pt.Experiment(), model, [str(out)])
    assert opened.names == tuple(str(out / name) for name in names)
    assert sum(group.number for group in opened.groups) == len(names)
    found = pt.attach(model, out, member=names[-1])
    alone = pt.attach(model, out / names[-1])
    scores = [pt.score(each, ["a"], ["red"]) for each in (found, alone)]
    np.testing.assert_array_equal(*scores)
    if len(names) > 1:
        with pytest.raises(UserError, match="seed_0, seed_1"):
            pt.attach(model, out)


def test_adapters_of_several_kinds_are_all_members(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for kind in ("prompts", "LoRA"):
        program("convert", run(tmp_path / kind, kind, NAMES[:1]), tmp_path / "x", "--to", "peft")
        (tmp_path / "x" / "seed_0").rename(out / kind)
        (tmp_path / "x").rmdir()
    np.save(out / "plain.npy", np.zeros((4, 16), np.float32))
    result = evaluate(tiny_run.experiment("", {"data.labels": tiny_run.LABELS}), prompts=[str(out)])
    assert {Path(name).name for name in result.names} == {"prompts", "LoRA", "plain.npy"}
    assert len(result.per_prompt) == 3 and result.ensemble is not None


def test_what_is_no_folder_of_adapters_alone(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program("convert", run(tmp_path / "run", "LoRA"), out, "--to", "peft")
    (out / "notes.txt").write_text("mine")
    model = pt.load_model(str(tiny_run.model_folder()))
    with pytest.raises(UserError, match="does not hold prompts alone"):
        load_prompts(pt.Experiment(), model, [str(out)])


@pytest.mark.parametrize("method", [LoRA(rank=2), PrefixTuning(length=2)])
def test_models_show_themselves_in_short(method: LoRA | PrefixTuning) -> None:
    import jax

    from prompt_tuning_jax.methods import Context

    model = pt.load_model(str(tiny_run.model_folder()))
    assert repr(model).startswith("T5(1 + 1 layers, embed_dim=16, ")
    assert "float32" in repr(model) and len(repr(model)) < 200
    attached = attach_method(model, method, key=jax.random.key(0), context=Context())
    assert type(attached.method).__name__ in repr(attached) and "parameters" in repr(attached)
    assert len(repr(attached)) < 600 and repr(model) in repr(attached)


def test_similar_leaves_out_the_prompt_itself(program: Program, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "prompts") / "prompts"
    program("convert", folder / "seed_0.safetensors", folder / "seed_0.npy")
    program("convert", folder / "seed_0.safetensors", tmp_path / "copy.npy")
    among = [folder, tmp_path / "copy.npy", folder / "seed_0.npy"]
    listed = program("similar", folder / "seed_0.npy", "--among", *among)
    assert listed.splitlines() == [line for line in listed.splitlines() if "seed_1" in line]
    assert "seed_1" in listed
