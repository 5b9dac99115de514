"""A module is imported where the user names it, never because some file does."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata, save_prompt
from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.config.config_file import load_config, run_config, saved_config
from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.config.gin import experiment_from_gin
from prompt_tuning_jax.config.overrides import to_json
from prompt_tuning_jax.config.serving import Serving
from prompt_tuning_jax.data.tasks.selection import build_mixture, trained_tasks
from prompt_tuning_jax.data.tasks.t5_tasks.sources import tfds_rows
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.loading import attach
from prompt_tuning_jax.methods import MethodConfig, MultitaskPrompts, PromptTuning
from prompt_tuning_jax.serving.launch import default_experiment, open_service
from tests import tiny_run

MODULE = """
import dataclasses, pathlib
pathlib.Path(__file__).with_suffix(".imported").touch()
from prompt_tuning_jax.data.tasks.files import file_task
from prompt_tuning_jax.data.tasks.registry import (register,)
register(
    dataclasses.replace(file_task(train={train!r}, eval={eval!r}), name="task_of_{name}"),
    replace=True,
)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current folder, which leaves a file where it is imported."""
    name = f"named_{tmp_path.name}"
    files = {"train": str(tiny_run.train_file()), "eval": str(tiny_run.eval_file())}
    (tmp_path / f"{name}.py").write_text(MODULE.format(name=name, **files))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield name
    sys.modules.pop(name, None)


def imported(name: str) -> bool:
    return Path(f"{name}.imported").exists()


def run_folder(module: str, *, method: MethodConfig | None = None) -> Path:
    """What somebody may send: a run whose config names a module, and a prompt."""
    folder = Path("sent")
    experiment = tiny_run.experiment(folder, {"method": method or PromptTuning(length=5)})
    data = Data(
        task=f"task_of_{module}", module=module, inputs_length=16, targets_length=4, cache=False
    )
    (folder / "prompts").mkdir(parents=True)
    (folder / "experiment.json").write_text(to_json(dataclasses.replace(experiment, data=data)))
    metadata = PromptMetadata(task="sent", labels=tiny_run.LABELS)
    prompt_PD = np.random.default_rng(0).normal(size=(5, tiny_run.CONFIG.embed_dim))
    save_prompt(folder / "prompts" / "seed_0.safetensors", prompt_PD, metadata=metadata)
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "eval --prompt sent",
        "eval --prompt sent/prompts/seed_0.safetensors",
        "predict --prompt sent text",
        "predict --prompt sent/prompts/seed_0.safetensors text",
        "inspect sent",
        "convert sent out.npy",
        "similar sent --among sent/prompts",
        "merge sent out",
        "recycle sent --from tiny --to tiny --output out",
        "train --gin_file=sent.gin --workdir w",
    ],
)
def test_no_command_imports_what_a_file_names(
    module: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(module)
    Path("sent.gin").write_text(f"Data.module = '{module}'\n")
    sys.path.insert(0, str(Path.cwd()))  # as with python -m
    status = main(line.split(" "))
    assert not imported(module) and module not in sys.modules
    if status:
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("command", ["eval --prompt sent", "eval --prompt sent --split train"])
def test_a_module_that_is_needed_is_asked_for_and_imported_where_it_is_named(
    module: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(module)
    assert main(command.split(" ")) == 2
    error = capsys.readouterr().err
    assert f"--set data.module={module}" in error and error.count("\n") == 1
    # From the current folder, which is not on the path of the installed command.
    assert str(Path.cwd()) not in sys.path
    assert main([*command.split(" "), "--set", f"data.module={module}"]) == 0
    assert imported(module)


def test_tasks_of_a_module_are_shown_where_it_is_named(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["tasks", f"task_of_{module}", "--limit", "1"]
    line += ["--vocabulary", str(tiny_run.vocabulary_file())]
    assert main(line) == 2
    assert main([*line, "--module", module]) == 0
    assert "targets: " in capsys.readouterr().out


def test_python_and_the_server_do_not_import_it_either(module: str) -> None:
    folder = run_folder(module)
    sys.path.insert(0, str(Path.cwd()))
    model = load_model(str(tiny_run.model_folder()))
    attach(model, folder)
    experiment = default_experiment(str(folder))
    open_service(experiment, str(folder), serving=Serving(lengths=(8,), batch_sizes=(1,)))
    saved = run_config(str(folder))
    assert saved is not None
    for of in (saved, dataclasses.replace(saved, method=MultitaskPrompts())):
        with pytest.raises(UserError, match=f"data.module={module}"):
            trained_tasks(of.data)
    assert not imported(module)
    # What is compared on resuming is as it was written.
    assert saved_config(str(folder)).data.module == module  # type: ignore[union-attr]


def test_a_config_of_the_user_names_one_beside_it(module: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "configs"
    elsewhere.mkdir()
    Path(f"{module}.py").rename(elsewhere / f"{module}.py")
    config = elsewhere / "c.py"
    config.write_text(
        "from prompt_tuning_jax.config.experiment import Data, Experiment\n"
        "def get_config():\n"
        f"    return Experiment(data=Data(module={module!r}, task='task_of_{module}'))\n"
    )
    mixture = build_mixture(load_config(str(config)).data)
    assert mixture.name == f"task_of_{module}"


@pytest.mark.parametrize("name", ["my-tasks", "my_tasks.py ", ".tasks", "a..b", "tasks/mine", " "])
def test_names_that_are_none_of_modules(name: str) -> None:
    with pytest.raises(UserError, match="as in an import statement"):
        build_mixture(Data(module=name))


def test_a_module_that_is_not_there_says_where_it_was_looked_for() -> None:
    with pytest.raises(UserError, match=r"cannot import 'no_such_module'.*current folder"):
        build_mixture(Data(module="no_such_module"))


def test_gin_takes_a_module_from_the_command_line_alone(tmp_path: Path) -> None:
    file = tmp_path / "c.gin"
    file.write_text("Data.module = 'my_tasks'\n")
    with pytest.raises(UserError, match=r"c\.gin line 1: .*--set data\.module=my_tasks"):
        experiment_from_gin([str(file)])
    assert experiment_from_gin([], ["Data.module='my_tasks'"]).data.module == "my_tasks"


@pytest.mark.parametrize("key", ["pythonClassName", "type"])
def test_prepared_data_names_no_class_of_others(module: str, key: str) -> None:
    """tensorflow-datasets would import the module of such a class."""
    folder = Path("tfds/super_glue/rte/1.0.2")
    folder.mkdir(parents=True)
    info = {"name": "rte", "splits": [{"name": "train", "shardLengths": ["1"]}]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    own = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    features = {key: own, "featuresDict": {"features": {"a": {key: f"{module}.Feature"}}}}
    (folder / "features.json").write_text(json.dumps(features))
    sys.path.insert(0, str(Path.cwd()))
    with pytest.raises(UserError, match=f"{module}.Feature"):
        next(tfds_rows("super_glue/rte", "train", "tfds"))
    assert not imported(module)


def test_the_default_experiment_names_none() -> None:
    assert Experiment().data.module == ""
