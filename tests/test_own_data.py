"""What a user's own files become: said when training starts, and trained on as it was said."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompt_tuning_jax.data.batching import task_data
from prompt_tuning_jax.data.vocabularies.vocab import Vocabulary
from prompt_tuning_jax.training.run import train
from tests import tiny_run
from tests.tiny_run import experiment, write_rows

WORDS = Vocabulary(tiny_run.vocabulary_file())


def data_of(tmp_path: Path, rows: list[dict[str, str]], **fields: Any) -> task_data.TaskData:
    file = str(write_rows(tmp_path / "own.jsonl", rows))
    changes = {"data.train": file, "data.eval": file, "data.targets_length": 16}
    changes |= {f"data.{name}": value for name, value in fields.items()}
    found = task_data.build_data(experiment("w", changes), WORDS)
    return found


def test_few_training_examples_are_drawn_by_the_first_seed() -> None:
    def drawn(*seeds: int, number: int = 5) -> list[str]:
        changes = {"data.max_train_examples": number, "training.seeds": seeds}
        data = task_data.build_data(experiment("w", changes), WORDS)
        assert data.train is not None and data.train.examples_per_epoch == len(data.train_targets)
        assert len(data.labels) == 3 and sum(map(len, data.evaluation.values())) == 24
        ids = data.train.digest()
        return [*data.train_targets, ids]

    everything = [row["targets"] for row in tiny_run.rows(48, seed=1)]
    assert drawn(0, number=0)[:-1] == drawn(1, number=48)[:-1] == everything
    assert len(drawn(0)) == 6 and drawn(0) == drawn(0, 1)
    assert drawn(0)[-1] != drawn(1)[-1]


def test_labels_and_what_is_odd_are_said(tmp_path: Path) -> None:
    rows = [{"inputs": "a", "targets": t} for t in ["red"] * 5 + ["Red"] * 2 + ["be  du"] * 4]
    rows[0]["inputs"] = " "
    reports = data_of(tmp_path, rows).reports
    assert "labels: red 5, be  du 4, Red 2" in reports
    assert any("'Red' (2) and 'red' (5) look like the same label" in line for line in reports)
    assert any("'be  du' reads back as 'be du'" in line for line in reports)
    assert any("1 of 11 inputs are empty" in line for line in reports)
    assert "evaluation ranks the 3 labels of each example" in reports


def test_an_input_that_is_wording_alone_is_empty(tmp_path: Path) -> None:
    rows = [{"inputs": text, "targets": t} for text in ("a", "", " ") for t in ("red", "blue")]
    reports = data_of(tmp_path, rows, inputs_template="text: {inputs} class:").reports
    assert any("4 of 6 inputs are empty" in line for line in reports)


def test_text_is_written_and_compared_as_the_vocabulary_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = tiny_run.WORDS[:20]
    rows = [{"inputs": w, "targets": f"{w}  {w}"} for w in words]
    file = str(write_rows(tmp_path / "own.jsonl", rows))
    changes = {"data.train": file, "data.eval": file, "training.steps": 1}
    changes |= {"method.init": "class_labels", "data.targets_length": 16}
    run = train(experiment(tmp_path / "run", changes))
    out = capsys.readouterr().out
    assert "20 distinct in 20 rows: text to generate" in out
    assert "evaluation generates text (greedy)" in out
    assert "starts from sampled vocabulary" in caplog.text
    assert run.best[0] is not None and "invalid" not in run.best[0].metrics


def test_equal_class_weights_change_nothing_and_zero_takes_a_class_away(tmp_path: Path) -> None:
    def trained(name: str, **fields: Any) -> np.ndarray:
        changes = {"training.steps": 2, "training.eval_every": 2, "training.save_every": 2}
        changes |= {f"data.{field}": value for field, value in fields.items()}
        run = train(experiment(tmp_path / name, changes), quiet=True)
        (array,) = run.best_tuned.values()
        return array

    plain = trained("plain")
    np.testing.assert_allclose(trained("equal", class_weights=("red=1",)), plain, atol=1e-6)
    assert np.abs(trained("balanced", class_weights=("balanced",)) - plain).max() > 1e-3
