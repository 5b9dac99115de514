"""The example configs: in the wheel, listed, written, and the default for a user's own data."""

import tomllib
from pathlib import Path

import pytest

from prompt_tuning_jax.cli import init
from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.config.config_file import load_config
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.gin import experiment_from_gin
from prompt_tuning_jax.config.overrides import diff
from prompt_tuning_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(
    [path.name for path in (ROOT / "configs").glob("*.py")]
    + [f"gin/{path.name}" for path in (ROOT / "configs/gin").glob("*.gin")]
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_wheel_holds_them_where_they_are_looked_for() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert settings["targets"]["wheel"]["force-include"] == {"configs": "prompt_tuning_jax/configs"}
    package = Path(init.__file__).parents[1]
    assert (package / "configs", package.parent / "configs") == init._FOLDERS


def test_all_are_listed_with_what_they_say_of_themselves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["init"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert sorted(listed) == NAMES
    assert all(len(title) > 20 for title in listed.values())


@pytest.mark.parametrize("name", NAMES)
def test_each_is_written_as_it_is_but_for_the_command_in_it(name: str, folder: Path) -> None:
    path = init.init(name)
    assert path == Path(Path(name).name)
    original = ROOT / "configs" / name
    text = path.read_text()
    assert f"configs/{name}" not in text
    assert text == original.read_text().replace(f"configs/{name}", path.name)
    if path.suffix == ".py":
        assert load_config(str(path)) == load_config(str(original))
    else:
        assert experiment_from_gin([str(path)]) == experiment_from_gin([str(original)])


@pytest.mark.parametrize("given", ["lora", "lora.py", "configs/lora.py"])
def test_names_as_people_type_them(given: str) -> None:
    assert init.init(given) == Path("lora.py")


def test_nothing_is_overwritten_unless_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine.py").write_text("mine")
    assert main(["init", "lora", "--output", "mine.py"]) == 2
    assert "mine.py exists already" in capsys.readouterr().err
    assert (folder / "mine.py").read_text() == "mine"
    assert main(["init", "lora", "--output", "mine.py", "--overwrite"]) == 0
    assert capsys.readouterr().out == "wrote mine.py\n"
    assert "train mine.py" in (folder / "mine.py").read_text()
    assert [path.name for path in folder.iterdir()] == ["mine.py"]


@pytest.mark.parametrize("name", ["lroa", "../pyproject.toml", "/etc/passwd", ""])
def test_what_is_no_example(name: str, folder: Path) -> None:
    with pytest.raises(UserError, match="no example config"):
        init.init(name)
    assert not [*folder.iterdir()]


def test_own_data_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Experiment] = []

    def train(experiment: Experiment) -> None:
        seen.append(experiment)
        raise UserError("enough")

    monkeypatch.setattr("prompt_tuning_jax.training.run.train", train)
    assert main(["train", "--data", "a.jsonl", "--eval_data", "b.jsonl", "--steps", "7"]) == 2
    (found,) = seen
    assert diff(load_config(str(ROOT / "configs/own_data.py")), found) == [
        'data.train: "train.jsonl" -> "a.jsonl"',
        'data.eval: "dev.jsonl" -> "b.jsonl"',
        "training.steps: 1000 -> 7",
    ]
