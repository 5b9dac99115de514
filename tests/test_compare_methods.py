"""The comparison of all methods, on micro sizes: what it chooses, tests, counts and keeps."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from prompt_tuning_jax.config.experiment import Data
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import CPT, METHODS, DescribedPrompts
from tests import tiny_run
from tests.script import SCRIPTS, load_script

LENGTH = 3


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return load_script("compare_methods")


def arguments(**changes: Any) -> argparse.Namespace:
    model = str(tiny_run.model_folder())
    return argparse.Namespace(
        **{"model": model, "steps": 2, "seeds": 2, "design_length": 64, **changes}
    )


def task(script: Any, folder: Path) -> Any:
    files = {
        split: str(tiny_run.write_rows(folder / f"{split}.jsonl", tiny_run.rows(number, seed=seed)))
        for seed, (split, number) in enumerate({"train": 64, "dev": 20, "test": 30}.items())
    }
    of = {"inputs_length": 12, "targets_length": 4}
    return script.TextTask(
        name="colours",
        validation=Data(train=files["train"], eval=files["dev"], **of),
        test=Data(train=files["train"], eval=files["test"], **of),
    )


def test_a_method_is_chosen_on_validation_and_kept(script: Any, tmp_path: Path) -> None:
    """The rate by the search, the numbers by the test split; a second time nothing is computed."""
    what = script.compared(length=LENGTH, init="uniform")["prompt_tuning"]
    colours = task(script, tmp_path)
    folder = tmp_path / "row"
    row = script.row_of("prompt_tuning", what, colours, arguments(), folder=folder)
    best = max(row["search"], key=row["search"].__getitem__)
    assert row["chosen"] == f"rate {float(best):g}" and len(row["search"]) == 3
    assert row["trained"] == LENGTH * 16 and row["saved_bytes"] > 4 * LENGTH * 16
    assert len(row["test"]) == 2 and row["mean"] == pytest.approx(sum(row["test"]) / 2)
    # The test split has 30 examples, validation 20.
    assert all((one * 30 / 100) == pytest.approx(round(one * 30 / 100)) for one in row["test"])
    assert row["step_seconds"] > 0 and row["step_bytes"] > 0
    (folder / "row.json").write_text(json.dumps({**row, "mean": -1.0}))
    again = script.row_of("prompt_tuning", what, colours, arguments(), folder=folder)
    assert again["mean"] == -1.0
    with pytest.raises(UserError, match="has other settings; use another --runs"):
        script.row_of("prompt_tuning", what, colours, arguments(steps=3), folder=folder)


def test_what_trains_nothing_is_tested_alone(script: Any, tmp_path: Path) -> None:
    """The bare model, and demonstrations whose number validation chooses."""
    methods = script.compared(length=LENGTH, init="uniform")
    colours, made = task(script, tmp_path), {}
    for name in ("none", "prompt_design"):
        made[name] = script.row_of(
            name, methods[name], colours, arguments(), folder=tmp_path / name
        )
    assert made["none"]["trained"] == made["prompt_design"]["trained"] == 0
    assert len(made["none"]["test"]) == 1 and len(made["prompt_design"]["test"]) == 2
    assert [*made["prompt_design"]["search"]] == ["2", "4", "8"]
    table = script.markdown([*made.values()])
    assert "| prompt design | " in table and table.startswith("colours\n")
    output = tmp_path / "out" / "table.md"
    script.write([*made.values()], output)
    assert output.read_text() == table + "\n"
    assert json.loads(output.with_suffix(".json").read_text())[0]["method"] == "none"


def test_every_registered_method_is_compared(script: Any) -> None:
    compared = script.compared(length=LENGTH, init="uniform")
    for_others = {CPT, DescribedPrompts}  # for pre-training, and for decoder-only models
    assert {type(one.method) for one in compared.values()} == {*METHODS.values()} - for_others
