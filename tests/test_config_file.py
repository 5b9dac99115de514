from pathlib import Path

import pytest

from prompt_tuning_jax.config.config_file import load_config, run_config
from prompt_tuning_jax.config.experiment import Experiment, Training
from prompt_tuning_jax.config.overrides import to_json
from prompt_tuning_jax.errors import UserError

HEAD = """
import dataclasses
from prompt_tuning_jax.config.experiment import Experiment, Optimizer, Training
from prompt_tuning_jax.methods import PromptTuning
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.py"


def write(config: Path, body: str) -> str:
    config.write_text(f"{HEAD}def get_config():\n    return {body}\n")
    return str(config)


def test_the_file_is_run_each_time(config: Path) -> None:
    for seeds in ([3], [4]):  # the same size and, to a clock of seconds, the same time
        loaded = load_config(write(config, f"Experiment(training=Training(seeds={seeds}))"))
        assert loaded == Experiment(training=Training(seeds=tuple(seeds)))
    assert [path.name for path in config.parent.iterdir()] == ["config.py"]


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (
            "Experiment(optimizer=Optimizer(learning_rat=1))",
            ["line 6", "Optimizer has no field 'learning_rat'", "'learning_rate'"],
        ),
        (
            "dataclasses.replace(Experiment(method=PromptTuning(\n  lenght=3)))",
            ["line 6", "PromptTuning has no field 'lenght'", "'length'"],
        ),
        ("dataclasses.replace(Experiment(), trainin=1)", ["line 6", "'trainin'", "'training'"]),
        ("Experiment(training=Training(steps='5'))", ["training.steps", "whole number", "'5'"]),
        ("Experiment(training=3)", ["training", "expected Training", "3"]),
        ("Experiment", ["must return an Experiment", "type"]),
        ("None", ["must return an Experiment", "NoneType"]),
        ("Training()", ["must return an Experiment", "Training"]),
        ("(", ["line 6", "'(' was never closed"]),
    ],
)
def test_wrong_configs_get_one_line(config: Path, body: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(write(config, body))
    message = str(error.value)
    assert message.startswith(str(config)) and "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("get_confg = dict", "has no get_config() function"),
        ("get_config = 3", "has no get_config() function"),
        ("def get_config(arg): return arg", "must not require arguments"),
        ("x = 'a\x00'", "config.py"),
        ("# -*- coding: nonsense -*-", "config.py"),
    ],
)
def test_files_that_are_no_configs(config: Path, text: str, part: str) -> None:
    config.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(str(config))
    assert part in str(error.value) and str(config) in str(error.value)


def test_a_file_that_is_not_there(config: Path) -> None:
    write(config, "Experiment()")
    with pytest.raises(
        UserError, match=r"no config file .*confg\.py \(did you mean 'config\.py'\?\); prompt"
    ):
        load_config(str(config.with_name("confg.py")))
    with pytest.raises(UserError, match="cannot read the config file"):
        load_config(str(config.parent))
    with pytest.raises(UserError, match=r"--gin_file=a/b\.gin"):
        load_config("a/b.gin")


@pytest.mark.parametrize(
    ("body", "kind"),
    [("1 / 0", ZeroDivisionError), ("len(3)", TypeError), ("dict(a=1, **{3: 3})", TypeError)],
)
def test_a_mistake_in_the_code_keeps_its_traceback(
    config: Path, body: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        load_config(write(config, body))


def test_the_config_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(training=Training(steps=7))
    run = tmp_path / "run"
    (run / "prompts").mkdir(parents=True)
    prompt = run / "prompts" / "0.npy"
    prompt.touch()
    assert run_config(str(run)) is None
    assert run_config(str(prompt)) is None
    (run / "experiment.json").write_text(to_json(experiment))
    assert run_config(str(run)) == experiment
    assert run_config(str(prompt)) == experiment
    monkeypatch.chdir(prompt.parent)
    assert run_config(prompt.name) == run_config(".") == experiment
    (run / "experiment.json").write_text('{"trainin": {}}')
    for path in (run, prompt):
        with pytest.raises(UserError, match=r"run/experiment\.json: there is no field 'trainin'"):
            run_config(str(path))


def test_the_json_of_a_run_is_no_config(tmp_path: Path) -> None:
    file = tmp_path / "experiment.json"
    file.write_text(to_json(Experiment()))
    with pytest.raises(UserError, match=r"is JSON, and a config is a Python file") as error:
        load_config(str(file))
    assert "\n" not in str(error.value)
