"""What a folder of prompts is taken for, and what survives a damaged one."""

import json
from pathlib import Path

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.commands.serving import Serving, default_experiment, open_service
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.experiment import Experiment, Model
from prompt_tuning_jax.methods import PromptTuning
from prompt_tuning_jax.overrides import to_json
from prompt_tuning_jax.serving.folder import KeptChanges, find_tasks, load_found, task_name
from prompt_tuning_jax.serving.tasks import check_name, natural
from tests.serving.serving_app import fits
from tests.serving.serving_micro import made_prompt, write_prompt
from tests.tiny_run import LABELS, model_folder

SERVING = Serving(lengths=(8,), batch_sizes=(1,), modes=("label",), max_new_tokens=6)


def make_run(folder: Path, *, task: str = "word_valence", **method: object) -> Path:
    experiment = Experiment(
        model=Model(name_or_path=str(model_folder())),
        method=PromptTuning(**method),  # type: ignore[arg-type]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.json").write_text(to_json(experiment))
    for seed in (0, 2, 10):
        for suffix in ("npy", "safetensors"):
            write_prompt(folder / "prompts" / f"seed_{seed}.{suffix}", seed=seed, task=task)
    return folder


def test_a_run_is_one_task_with_its_seeds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (found,) = find_tasks(run)
    (task,) = load_found(found, fits())
    assert (task.name, task.labels) == ("word_valence", LABELS)
    assert [prompt.name for prompt in task.prompts] == ["seed_0", "seed_2", "seed_10"]
    assert default_experiment(str(run)).model.name_or_path == str(model_folder())


def test_a_folder_of_everything(tmp_path: Path) -> None:
    make_run(tmp_path / "valence")
    write_prompt(tmp_path / "alone.safetensors")
    write_prompt(tmp_path / "alone.npy", 9)  # the other says more
    write_prompt(tmp_path / "bare.npy")
    write_prompt(tmp_path / "votes" / "b.npy")
    write_prompt(tmp_path / "votes" / "a.safetensors")
    write_prompt(tmp_path / ".hidden.npy")
    (tmp_path / "README.md").write_text("not a prompt")
    (tmp_path / "empty").mkdir()
    found = {task.name: [file.name for file in task.files] for task in find_tasks(tmp_path)}
    assert found == {
        "alone": ["alone.safetensors"],
        "bare": ["bare.npy"],
        "valence": ["seed_0.safetensors", "seed_2.safetensors", "seed_10.safetensors"],
        "votes": ["a.safetensors", "b.npy"],
    }


@pytest.mark.parametrize(
    ("trained_on", "name"),
    [
        ("word_valence", "word_valence"),
        ("taskless_super_glue_rte_v102", "taskless_super_glue_rte_v102"),
        ("data/qc/train.jsonl", "qc"),
        ("data/questions.tsv", "questions"),
        ("train.jsonl", "train"),
        ("", ""),
    ],
)
def test_the_name_of_what_a_run_was_trained_on(trained_on: str, name: str) -> None:
    assert task_name(trained_on) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", ".a", "-a", "a" * 101, "a b", "é", "a\n"]
)
def test_names_that_leave_the_folder(name: str) -> None:
    with pytest.raises(UserError, match="a name is"):
        check_name(name, field="name")


def test_runs_that_cannot_be_served(tmp_path: Path) -> None:
    experiment = Experiment(model=Model(name_or_path=str(model_folder())))
    run = make_run(tmp_path / "blind", input_to_prompt=False)
    with pytest.raises(UserError, match="limits who sees"):
        open_service(experiment, str(run), serving=SERVING)
    run = make_run(tmp_path / "nameless", task="")
    with pytest.raises(UserError, match="does not say its task"):
        open_service(experiment, str(run), serving=SERVING)


def test_the_placement_of_a_run_is_kept(tmp_path: Path) -> None:
    experiment = Experiment(model=Model(name_or_path=str(model_folder())))
    run = make_run(tmp_path / "after", placement="before_eos")
    service = open_service(experiment, str(run), serving=SERVING)
    task = service.tasks.get("word_valence")
    assert task is not None
    assert {prompt.placement for prompt in task.prompts} == {2}
    assert service.engine.shapes.prompt_lengths == (5,)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", '{"put": {}}', '{"removed": [], "put": {"a": {"prompts": {"p": "../../x.npy"}}}}'],
)
def test_a_damaged_index_is_said(tmp_path: Path, index: str) -> None:
    (tmp_path / ".served").mkdir()
    (tmp_path / ".served" / "tasks.json").write_text(index)
    with pytest.raises(UserError, match="damaged"):
        KeptChanges(tmp_path)


def test_a_write_that_fails_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write_prompt(tmp_path / "new.npy").read_bytes()
    kept = KeptChanges(tmp_path)
    prompt = kept.check_upload(content, fits(), name="p")
    kept.put(fits().task("first", [prompt]), {"p": content})
    before = (tmp_path / ".served" / "tasks.json").read_bytes()

    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(UserError, match="No space left"):
        kept.put(fits().task("second", [prompt]), {"p": content})
    monkeypatch.undo()
    assert (tmp_path / ".served" / "tasks.json").read_bytes() == before
    assert [*KeptChanges(tmp_path).apply({}, fits())] == ["first"]
    # What the failed one has left is cleared away by the next.
    kept.remove("first")
    assert [file.name for file in (tmp_path / ".served").iterdir()] == ["tasks.json"]


def test_a_new_prompt_beside_those_of_the_users_folder(tmp_path: Path) -> None:
    """All of the task is kept then, as it was served."""
    old, new = made_prompt(3, seed=1), made_prompt(4, seed=2)
    content = write_prompt(tmp_path / "new.npy").read_bytes()
    kept = KeptChanges(tmp_path)
    kept.put(fits().task("both", [old, new], LABELS), {"seed_2": content})
    (task,) = KeptChanges(tmp_path).apply({}, fits()).values()
    np.testing.assert_array_equal(task.prompts[0].prompt_PD, old.prompt_PD)
    assert [prompt.name for prompt in task.prompts] == ["seed_1", "seed_2"]
    assert task.prompts[0].metadata == PromptMetadata(
        created_by=task.prompts[0].metadata.created_by
    )


def test_names_in_the_order_of_their_numbers() -> None:
    names = ["b", "seed_10", "seed_2", "3", "a"]
    assert sorted(names, key=natural) == ["3", "a", "b", "seed_2", "seed_10"]
