"""What users see and must not change unnoticed; ``tests/golden/record.py`` records it."""

import difflib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prompt_tuning_jax as pt
from prompt_tuning_jax.cli.main import main
from tests.golden import record
from tests.golden.record import FINAL_PROMPTS, GOLDEN, SEEDS, STOPPED_RUN

ANEW = "if the change is meant, record it anew: python -m tests.golden.record"


def require_recorded(name: str, value: Any) -> None:
    """Fails, with the difference, where the value is another than the one in ``tests/golden``."""
    file = GOLDEN / name
    before, after = file.read_text(encoding="utf-8"), record.as_text(value)
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), f"recorded in {name}", "now", lineterm=""
    )
    if before != after:
        pytest.fail("\n".join([*lines, ANEW]), pytrace=False)


def test_python_names_and_parameters() -> None:
    require_recorded("python.json", record.python_names())


def test_fields_of_the_config() -> None:
    require_recorded("config.json", record.config_fields())


def test_commands_and_their_options() -> None:
    require_recorded("commands.json", record.command_line())


def test_paths_and_bodies_of_the_server() -> None:
    require_recorded("http.json", record.served_schema())


def test_a_run_leaves_the_same_files_and_the_same_prompts(tmp_path: Path) -> None:
    assert main(record.train_arguments(tmp_path / "run")) == 0
    require_recorded("run_folder.json", record.run_folder(tmp_path / "run"))
    # Adafactor's first update is the sign of the gradient, and where that is almost zero, rounding
    # decides it: on other machines runs part from the start.  A resumed run is past that.
    if record.is_machine_of_recording():
        require_final_prompts(tmp_path / "run")


def test_a_run_of_ia3_leaves_the_same_files(tmp_path: Path) -> None:
    assert main(record.ia3_arguments(tmp_path / "run")) == 0
    require_recorded("run_folder_ia3.json", record.run_folder(tmp_path / "run"))


def test_a_run_stopped_by_older_code_resumes_to_the_same_bits(tmp_path: Path) -> None:
    record.copy_stopped_run(tmp_path / "run")
    assert main(record.train_arguments(tmp_path / "run")) == 0
    # Its lines are still there, speeds included: it has resumed, not started again.
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert metrics.startswith((STOPPED_RUN / "metrics.jsonl").read_text(encoding="utf-8"))
    require_final_prompts(tmp_path / "run")


def test_prompt_files_written_by_older_code_are_read() -> None:
    for seed in SEEDS:
        file = STOPPED_RUN / "prompts" / f"seed_{seed}.safetensors"
        np.testing.assert_array_equal(pt.load_prompt(file), np.load(file.with_suffix(".npy")))


def require_final_prompts(folder: Path) -> None:
    """Fails where a run has ended with other prompts than the recorded ones."""
    anew = "the docstring of tests/golden/record.py says when and how to record the run anew"
    for seed in SEEDS:
        recorded = np.load(FINAL_PROMPTS / f"seed_{seed}.npy")
        prompt = np.asarray(pt.load_prompt(folder / f"prompts/seed_{seed}.safetensors"))
        if record.is_machine_of_recording():
            np.testing.assert_array_equal(prompt, recorded, err_msg=anew)
        else:
            # Another XLA, or other vector instructions, add up the same terms in another order,
            # and each step of training starts from the differences of those before it.
            atol = 1e-4 * abs(recorded).max()
            np.testing.assert_allclose(prompt, recorded, rtol=0, atol=atol, err_msg=anew)
