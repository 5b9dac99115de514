"""What the comparison scripts keep: rows of the same settings, of runs that are finished."""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.errors import UserError
from tests.script import SCRIPTS, load_script


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    return load_script


def test_a_run_that_a_signal_stopped_is_not_scored(
    scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = SimpleNamespace(stopped_by=15, best=(None,))
    visual, tuning = scripts("compare_visual"), scripts("compare_tuning")
    monkeypatch.setattr(tuning, "train", lambda of: stopped)
    for act in (lambda: visual.scores(stopped), lambda: tuning.finish(Experiment())):
        with pytest.raises(SystemExit) as error:
            act()
        assert error.value.code == 143


def test_visual_rows_of_other_settings_are_refused(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    visual = scripts("compare_visual")
    monkeypatch.setattr(visual, "measured", lambda *_: {"method": "LoRA", "mean": 1.0})
    digits = {split: str(tmp_path / f"{split}.npz") for split in visual.SPLITS}
    (one,) = (each for each in visual.compared(2) if each.name == "LoRA")
    tmp_path.joinpath("LoRA").mkdir()
    first = visual.row_of(one, "m", digits, tmp_path / "LoRA", 40)
    monkeypatch.setattr(visual, "measured", None)
    assert visual.row_of(one, "m", digits, tmp_path / "LoRA", 40) == first
    for model, steps in (("m", 80), ("other", 40)):
        with pytest.raises(UserError, match="has other settings"):
            visual.row_of(one, model, digits, tmp_path / "LoRA", steps)


def test_rows_of_other_test_examples_are_refused(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models = scripts("compare_models")
    score = {"accuracy": 50.0}
    result = SimpleNamespace(per_prompt=[score], mean=score, best=score, ensemble=None)
    monkeypatch.setattr(models, "evaluate", lambda *_, **__: result)
    data = Data(task="", train="t.jsonl", eval="e.jsonl")
    task = models.TextTask(name="qc", validation=data, test=data)

    def row(test: int) -> Any:
        args = argparse.Namespace(
            length=2, steps=4, batch_size=2, seeds=1, validation=5, test=test, peer_python=""
        )
        return models.row_of("tiny", "none", task, args, runs=tmp_path)

    first = row(3)
    monkeypatch.setattr(models, "evaluate", None)
    assert row(3) == first
    with pytest.raises(UserError, match="has other settings"):
        row(0)
