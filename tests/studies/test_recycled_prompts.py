"""Prompts on another version of their model: the scores of each way, and what is kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from prompt_tuning_jax.analysis.recycling import Fit, recycle
from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.studies import recycling as study
from prompt_tuning_jax.studies.ablations import points
from prompt_tuning_jax.studies.recycling import NEW, NONE, OLD, RECYCLED, UNTOUCHED
from tests import tiny_run
from tests.studies.test_spot import SHORT
from tests.tiny_run import experiment, rows, write_config, write_rows


def test_old_prompts_on_a_new_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tmp_path / "color"
    for seed, split in enumerate(("train", "validation", "test")):
        write_rows(task / f"{split}.jsonl", rows(12, seed=seed))
    new = str(tiny_run.model_folder(seed=1))
    of = experiment(tmp_path / "w", SHORT)

    def again() -> Any:
        return study.recycled_prompts(of, [str(task)], model=new, test_split="test", quiet=True)

    done = again()
    written = json.loads((tmp_path / "w/recycling.json").read_text())
    assert written["complete"] and written["new_model"] == new and written["split"] == "test"
    means = {point["line"]: point["scores"] for point in written["points"]}
    for way, folder in ((OLD, "old"), (NEW, "new")):
        point = json.loads((tmp_path / "w" / folder / "color" / points.POINT).read_text())
        assert means[str(way)] == [member["test"] for member in point["members"]]
    assert len(means[str(NONE)]) == 1 and len(means[str(UNTOUCHED)]) == 2
    # As the command recycle does it.
    prompt = tmp_path / "w/old/color/prompts/seed_1.safetensors"
    by_hand = tmp_path / "mine.safetensors"
    recycle(
        prompt, source=of.model.name_or_path, target=new, output=by_hand, fit=Fit(by="combination")
    )
    kept = tmp_path / "w/recycled/color/combination/seed_1.safetensors"
    assert kept.read_bytes()[-320:] == by_hand.read_bytes()[-320:]  # 5 x 16 numbers of 4 bytes
    assert len(means[str(RECYCLED["combination"])]) == 2
    assert (tmp_path / "w/recycling.png").is_file()
    assert "| color " in (tmp_path / "w/recycling.md").read_text()

    monkeypatch.setattr(study, "recycle", None)
    monkeypatch.setattr(study, "evaluate", None)
    assert again().results == done.results
    # Scores of other prompts in the same files are not those of these.
    file = tmp_path / "w/old/color/prompts/seed_1.safetensors"
    file.write_bytes((tmp_path / "w/old/color/prompts/seed_0.safetensors").read_bytes())
    with pytest.raises(TypeError, match="not callable"):
        again()


def test_wrong_input_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = experiment(tmp_path / "w", SHORT)
    own, new = of.model.name_or_path, str(tiny_run.model_folder(seed=1))
    with pytest.raises(UserError, match="is the config's model"):
        study.recycled_prompts(of, ["word_valence"], model=own)
    with pytest.raises(UserError, match="different vocabularies"):
        study.recycled_prompts(of, ["word_valence"], model="tiny")
    # A model with more rows of padding has the same vocabulary.
    padded = dataclasses.replace(tiny_run.CONFIG, vocab_size=224)
    with pytest.raises(UserError, match="did you mean 'word_valence'"):
        study.recycled_prompts(
            of, ["word_valenc"], model=str(tiny_run.model_folder(seed=2, config=padded))
        )
    config = str(write_config(tmp_path / "c.py", of))
    line = ["transfer", "--from", "word_valence", "--config", config, "--to_model", new]
    for options, message in {
        ("--to", "word_valence"): "--to has no effect with --to_model",
        ("--spot",): "give --spot or --to_model, not both",
    }.items():
        assert main([*line, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
