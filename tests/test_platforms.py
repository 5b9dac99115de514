"""Where libtpu is installed and no TPU is, JAX does not try one; libtpu would print its errors."""

import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prompt_tuning_jax.distributed import processes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With libtpu, and with nothing for it."""
    spec = importlib.machinery.ModuleSpec("libtpu", None)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(processes.importlib.metadata, "entry_points", lambda **_: ())
    monkeypatch.setattr(processes, "_GPU_DEVICES", ())
    monkeypatch.setattr(processes, "_has_tpu", lambda: False)
    monkeypatch.setenv("JAX_PLATFORMS", "")  # so that it is put back
    monkeypatch.delenv("JAX_PLATFORMS")


def test_the_cpu_alone() -> None:
    processes.leave_out_missing_tpu()
    assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("there", ["set", "no libtpu", "a tpu", "a gpu", "a plugin"])
def test_everything_else_is_for_jax_to_choose(there: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if there == "set":
        monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    elif there == "no libtpu":
        monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    elif there == "a tpu":
        monkeypatch.setattr(processes, "_has_tpu", lambda: True)
    elif there == "a gpu":
        monkeypatch.setattr(processes, "_GPU_DEVICES", (os.devnull,))
    else:
        monkeypatch.setattr(processes.importlib.metadata, "entry_points", lambda **_: ("metal",))
    before = os.environ.get("JAX_PLATFORMS")
    processes.leave_out_missing_tpu()
    assert os.environ.get("JAX_PLATFORMS") == before


@pytest.mark.parametrize("name", processes._TPU_VARIABLES)
def test_a_tpu_that_the_surroundings_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for each in processes._TPU_VARIABLES:
        monkeypatch.delenv(each, raising=False)
    if processes._has_tpu():
        pytest.skip("this machine has a TPU")
    monkeypatch.setenv(name, "1")
    assert processes._has_tpu()


def test_a_command_does_it_before_jax_is_imported(tmp_path: Path) -> None:
    (tmp_path / "libtpu.py").write_text("raise SystemError('libtpu was tried')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    environment.pop("JAX_PLATFORMS", None)
    code = (
        "import sys\n"
        "from prompt_tuning_jax.distributed import processes\n"
        "processes._has_tpu = lambda: False; processes._GPU_DEVICES = ()\n"
        "processes.importlib.metadata.entry_points = lambda **_: ()\n"
        "from prompt_tuning_jax.cli.main import main\n"
        "assert 'jax' not in sys.modules\n"
        "assert main(['inspect', 'no such']) == 2\n"
        "import os; print(os.environ['JAX_PLATFORMS'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "cpu\n", done.stderr
