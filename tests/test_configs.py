import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from prompt_tuning_jax.cli.experiment import ConfigOptions
from prompt_tuning_jax.cli.main import parse
from prompt_tuning_jax.config.config_file import load_config
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.gin import experiment_from_gin
from prompt_tuning_jax.config.overrides import apply_overrides, diff, from_json, to_json
from prompt_tuning_jax.config.paths import T5X_MODELS
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.methods import FullTuning

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
GIN = sorted(path.stem for path in (ROOT / "configs" / "gin").glob("*.gin"))


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_there_are_configs() -> None:
    assert set(PYTHON) >= {"quickstart", "own_data", "model_tuning", "paper", "released"}
    assert set(GIN) <= set(PYTHON)
    assert set(GIN) >= {"quickstart", "own_data", "model_tuning", "paper", "released"}


@pytest.mark.parametrize("name", GIN)
def test_python_and_gin_build_equal_experiments(name: str) -> None:
    python = load_config(f"configs/{name}.py")
    gin = experiment_from_gin([f"configs/gin/{name}.gin"])
    assert diff(python, gin) == []
    assert python == gin
    assert python != Experiment()


@pytest.mark.parametrize("name", PYTHON)
def test_a_config_makes_sense_and_can_be_saved(name: str) -> None:
    experiment = load_config(f"configs/{name}.py")
    assert validate(experiment) == experiment
    assert from_json(to_json(experiment)) == experiment


def test_the_configs_do_not_import_jax() -> None:
    code = f"""
import sys
from prompt_tuning_jax.config.config_file import load_config
for name in {PYTHON!r}:
    load_config(f"configs/{{name}}.py")
sys.exit("jax" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def commands_in(comment: str) -> list[str]:
    """The shell commands of a docstring, lines that a backslash continues joined."""
    joined = re.sub(r"\\\n\s*#?\s*", " ", comment)
    return [m[1] for m in re.finditer(r"^#?\s*(prompt-tuning .*)$", joined, flags=re.MULTILINE)]


@pytest.mark.parametrize(
    "path", [*(f"configs/{n}.py" for n in PYTHON), *(f"configs/gin/{n}.gin" for n in GIN)]
)
def test_its_docstring_is_a_command_that_runs_it(path: str) -> None:
    commands = commands_in((ROOT / path).read_text())
    if not commands:
        assert "scripts/" in (ROOT / path).read_text(), "no command in the docstring"
        return
    for command in commands:
        args = parse(shlex.split(command)[1:])
        assert isinstance(args, ConfigOptions)
        if config := getattr(args, "config", None):
            assert config == path
            experiment = load_config(config)
        else:
            assert args.gin_file == [path]
            experiment = experiment_from_gin(args.gin_file, args.gin_bindings)
        validate(apply_overrides(experiment, args.overrides))


@pytest.mark.parametrize("name", GIN)
def test_the_macros_of_a_gin_config_do_something(name: str) -> None:
    file = f"configs/gin/{name}.gin"
    plain = experiment_from_gin([file])
    values = {"DROPOUT_RATE": "0.5", "MODEL_DIR": "'x'", "MODEL": "'x'"}
    values["MIXTURE_OR_TASK_NAME"] = "'x'"
    macros = re.findall(r"^([A-Z_]+) =", (ROOT / file).read_text(), flags=re.MULTILINE)
    assert {"MODEL", "MODEL_DIR", "TRAIN_STEPS", "BATCH_SIZE"} <= set(macros)
    for macro in macros:
        changed = experiment_from_gin([file], [f"{macro}={values.get(macro, '3')}"])
        assert len(diff(plain, changed)) == 1, macro


def test_the_facts_of_the_recipes() -> None:
    quickstart, paper, released, model_tuning = (
        load_config(f"configs/{n}.py") for n in ("quickstart", "paper", "released", "model_tuning")
    )
    assert quickstart.training.seeds == (0, 1, 2, 3, 4)
    assert model_tuning.method == FullTuning()
    assert model_tuning.data == quickstart.data and model_tuning.model == quickstart.model
    for one in (paper, released):
        # A name that opens anywhere, and nothing that holds for one task alone.
        assert one.model.name_or_path in T5X_MODELS and one.data.labels == ()
    # Lester et al. 2021 in numbers, and where the released configs differ.
    assert (paper.optimizer.learning_rate, paper.training.batch_size) == (0.3, 32)
    assert (paper.training.steps, paper.optimizer.weight_decay) == (30_000, 1e-5)
    assert (released.optimizer.initial_step, released.training.batch_size) == (1_100_000, 128)
    assert (released.training.loss_normalization, released.training.z_loss) == ("sum", 1e-4)
