"""What a folder of prompts is taken for, and what survives a damaged one."""

from dataclasses import replace
from pathlib import Path

import pytest

from prompt_tuning_jax.config.experiment import Experiment, Model
from prompt_tuning_jax.config.overrides import to_json
from prompt_tuning_jax.config.serving import Serving
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import PromptTuning
from prompt_tuning_jax.serving.launch import default_experiment, open_service
from prompt_tuning_jax.serving.loading import find_tasks, limits_attention, load_tasks, task_name
from prompt_tuning_jax.serving.schema import PredictRequest, RefusedError
from prompt_tuning_jax.serving.task_store import TaskStore
from prompt_tuning_jax.serving.tasks import check_name
from prompt_tuning_jax.storage import natural_order
from tests.serving.serving_app import validator
from tests.serving.serving_micro import write_prompt
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
    (task,) = load_tasks(found, validator())
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
    with pytest.raises(UserError, match="a name starts"):
        check_name(name, field="name")


def test_runs_that_cannot_be_served(tmp_path: Path) -> None:
    (found,) = find_tasks(make_run(tmp_path / "nameless", task=""))
    with pytest.raises(UserError, match="does not name its task"):
        load_tasks(found, validator())


@pytest.mark.parametrize(
    ("method", "encoder", "causal"),
    [
        (PromptTuning(), False, False),
        (PromptTuning(prompt_to_input=False), True, False),
        (PromptTuning(prompt_to_input=False, placement="before_eos"), True, True),
        (PromptTuning(prompt_to_prompt="causal"), True, False),
        (PromptTuning(prompt_to_prompt="none"), True, True),
        (PromptTuning(input_to_prompt=False), True, True),
    ],
)
def test_a_causal_model_limits_some_attention_in_any_case(
    method: PromptTuning, encoder: bool, causal: bool
) -> None:
    assert limits_attention(method, causal=False) is encoder
    assert limits_attention(method, causal=True) is causal


def test_the_placement_of_a_run_is_kept(tmp_path: Path) -> None:
    experiment = Experiment(model=Model(name_or_path=str(model_folder())))
    run = make_run(tmp_path / "after", placement="before_eos")
    service = open_service(experiment, str(run), serving=SERVING)
    task = service.tasks.get("word_valence")
    assert task is not None
    assert {prompt.placement for prompt in task.prompts} == {2}
    assert service.engine.shapes.prompt_lengths == (5,)


def test_a_run_says_what_its_files_do_not(tmp_path: Path) -> None:
    """Also once a server has written the prompts to its own files, beside a new one."""
    experiment = Experiment(model=Model(name_or_path=str(model_folder())))
    run = make_run(tmp_path / "run", placement="before_eos")
    for file in (run / "prompts").glob("*.safetensors"):
        file.unlink()
    service = open_service(experiment, str(run), serving=SERVING)
    task = service.tasks.get("word_valence")
    assert task is not None
    store = TaskStore(run)
    with store.changing():
        store.put(task, {})
    (again,) = TaskStore(run).apply({}, service.validator).values()
    for one in (task, again):
        assert {prompt.placement for prompt in one.prompts} == {2}
        assert one.wording.template == "valence: {text}"


def test_only_the_modes_that_are_asked_for_are_answered(tmp_path: Path) -> None:
    experiment = Experiment(model=Model(name_or_path=str(model_folder())))
    write_prompt(tmp_path / "one.npy")
    service = open_service(experiment, str(tmp_path), serving=SERVING)
    for mode in ("score", "generate"):
        request = PredictRequest.model_validate({"inputs": ["ban"], "mode": mode})
        with pytest.raises(RefusedError, match=f"started without mode {mode}"):
            service._parser.parse(request)
    with pytest.raises(UserError, match="modes is empty"):
        open_service(experiment, str(tmp_path), serving=replace(SERVING, modes=()))


def test_names_in_the_order_of_their_numbers() -> None:
    names = ["b", "seed_10", "seed_2", "3", "a"]
    assert sorted(names, key=natural_order) == ["3", "a", "b", "seed_2", "seed_10"]


def test_what_a_killed_server_left_is_gone_where_another_may_change_it(tmp_path: Path) -> None:
    experiment = Experiment(model=Model(name_or_path=str(model_folder())))
    write_prompt(tmp_path / "one.npy")
    left = tmp_path / ".served" / ".tasks.json.4711.tmp"
    open_service(experiment, str(tmp_path), serving=SERVING, allow_changes=True)
    assert not left.parent.exists()  # nothing is made before there is a change
    left.parent.mkdir()
    left.write_text("half of it")
    open_service(experiment, str(tmp_path), serving=SERVING)
    assert left.exists()  # a server that may change nothing changes nothing
    open_service(experiment, str(tmp_path), serving=SERVING, allow_changes=True)
    assert not left.exists()
