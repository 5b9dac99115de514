"""Soft prompt transfer: what starts where, what is chosen, and what is kept."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompt_tuning_jax.analysis.similarity import similarity
from prompt_tuning_jax.checkpoints.prompt_file import load_prompt
from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.config.config_file import saved_config
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import LoRA
from prompt_tuning_jax.studies import spot as study
from prompt_tuning_jax.studies.ablations import points
from prompt_tuning_jax.studies.ablations.run import AblationResult
from prompt_tuning_jax.studies.named_tasks import tasks_of
from prompt_tuning_jax.studies.spot import BEST, NEAREST, OWN, Start, chosen, correlation, spot
from prompt_tuning_jax.studies.suite import SUITE_FIELDS
from tests import tiny_run
from tests.tiny_run import experiment, rows, write_config, write_rows

SHORT: dict[str, Any] = {
    "training.steps": 1,
    "training.eval_every": 1,
    "training.save_every": 1,
    "training.seeds": (0, 1),
    "data.buckets": "none",
}


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two tasks, whose answers are the color in the text and another color."""
    turned = dict(zip(tiny_run.LABELS, (*tiny_run.LABELS[1:], tiny_run.LABELS[0]), strict=True))
    for seed, split in enumerate(("train", "validation", "test")):
        examples = rows(12, seed=seed)
        write_rows(tmp_path / "color" / f"{split}.jsonl", examples)
        other = [{**row, "targets": turned[row["targets"]]} for row in examples]
        write_rows(tmp_path / "other" / f"{split}.jsonl", other)
    return [str(tmp_path / name) for name in ("color", "other")]


def test_targets_start_from_the_prompts_of_sources(
    tmp_path: Path, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    for module in (study, points):
        real = module.train

        def train(of: Any, _real: Any = real, **options: Any) -> Any:
            trained.append(str(Path(of.training.workdir).relative_to(tmp_path / "w")))
            return _real(of, **options)

        monkeypatch.setattr(module, "train", train)
    of = experiment(tmp_path / "w", SHORT)

    def again(examples: int) -> AblationResult:
        goals = folders[1:]
        return spot(
            *(of, folders, goals), examples=examples, source_steps=2, test_split="test", quiet=True
        )

    done = again(6)
    assert trained == [
        "sources/color",
        "sources/other",
        *(f"targets/other/seed_{s}" for s in (0, 1)),
    ]
    config = saved_config(str(tmp_path / "w/targets/other/seed_1"))
    assert config is not None and config.data.max_train_examples == 6
    source = tmp_path / "w/sources/color/prompts/seed_0.safetensors"
    assert config.training.seeds == (1, 1)
    assert config.training.inits == ("class_labels", f"file={source}")
    assert saved_config(str(tmp_path / "w/sources/color")).training.steps == 2  # type: ignore[union-attr]

    written = json.loads((tmp_path / "w/spot.json").read_text())
    assert written["complete"] and len(written["points"]) == 4 and written["split"] == "test"
    own, color = (written["pairs"]["other"][name] for name in ("own", "color"))
    for seed in (0, 1):
        folder = tmp_path / f"w/targets/other/seed_{seed}"
        kept = json.loads((folder / points.POINT).read_text())
        assert [own[seed]["score"], color[seed]["score"]] == [m["test"] for m in kept["members"]]
        target = load_prompt(folder / f"prompts/seed_{seed}_class_labels.safetensors")
        near = similarity(target, load_prompt(source))
        assert color[seed]["similarity"] == pytest.approx(near) and not own[seed]["similarity"]
        # A step of Adafactor moves each entry by the learning rate, 3, at most.
        moved = load_prompt(folder / f"prompts/seed_{seed}_file_1.safetensors") - load_prompt(
            source
        )
        assert 0 < abs(moved).max() <= 3.01
    means = {point["line"]: point["mean"] for point in written["points"]}
    assert means[str(OWN)] == pytest.approx(np.mean([one["score"] for one in own]))
    # With a single source, all ways to choose one are the same.
    assert means[str(NEAREST)] == means[str(BEST)] == np.mean([one["score"] for one in color])
    assert (tmp_path / "w/spot.png").read_bytes().startswith(b"\x89PNG")
    assert "| other " in (tmp_path / "w/spot.md").read_text()

    trained.clear()
    assert again(6).results == done.results
    assert trained == ["sources/color", "sources/other"]  # finished; nothing else is asked for
    with pytest.raises(UserError, match="max_train_examples"):
        again(5)
    write_rows(Path(folders[0]) / "train.jsonl", rows(12, seed=5))
    with pytest.raises(UserError, match="sources/color has a run on other data"):
        again(6)
    # Targets do not keep scores of prompts that started from another one.
    shutil.rmtree(tmp_path / "w/sources/color")
    with pytest.raises(UserError, match=r"other/seed_0/point\.json has the scores of other"):
        again(6)


def test_what_is_chosen() -> None:
    """The nearest by similarity and the best by validation, neither by the reported score."""

    def start(source: str, validation: float, score: float, near: float | None) -> Start:
        return Start(source=source, validation=validation, score=score, similarity=near)

    one = [
        start("own", 50, 51, None),
        start("a", 60, 40, 0.1),
        start("b", 55, 70, 0.7),
        start("c", 54, 99, 0.2),
    ]
    assert list(chosen(one, "max").values()) == [51, 70, pytest.approx(209 / 3), 40]
    assert chosen(one, "min")[BEST] == 99
    line = [
        start("own", 0, 10, None),
        *(start(n, 0, 10 + s, s / 10) for n, s in zip("abc", (1, 2, 4), strict=True)),
    ]
    assert correlation({"t": [line]}) == pytest.approx(1)
    assert correlation({"t": [line[:3]]}) is None


def test_wrong_input_is_refused_before_training(
    tmp_path: Path, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    of = experiment(tmp_path / "w", SHORT)
    with pytest.raises(UserError, match="use a config with PromptTuning"):
        spot(dataclasses.replace(of, method=LoRA()), folders, folders, examples=0)
    with pytest.raises(UserError, match="no task besides other"):
        spot(of, folders[1:], folders[1:], examples=0)
    with pytest.raises(UserError, match="--to names color twice"):
        spot(of, folders, [folders[0]] * 2, examples=0)
    with pytest.raises(UserError, match=r"dev\.jsonl is missing"):
        spot(of, folders, folders, examples=0, test_split="dev")
    with pytest.raises(UserError, match="did you mean 'word_valence'"):
        spot(of, ["word_valenc"], folders, examples=0)
    with pytest.raises(UserError, match="--from no/folder: no such folder"):
        spot(of, ["no/folder"], folders, examples=0)
    rates = dataclasses.replace(of.training, learning_rates=(1.0, 2.0))
    with pytest.raises(UserError, match=r"training\.learning_rates has no effect"):
        spot(dataclasses.replace(of, training=rates), folders, folders, examples=0)
    assert not (tmp_path / "w").exists()
    config = str(write_config(tmp_path / "c.py", of))
    for options, message in {
        ("--examples", "3"): "--examples has no effect without --spot",
        ("--spot", "--methods", "prompt_tuning"): "--methods has no effect with --spot",
        (): "--from: name one task; several are for --spot",
    }.items():
        assert main(["transfer", "--from", ",".join(folders), "--config", config, *options]) == 2
        assert message in capsys.readouterr().err


def test_a_folder_has_nothing_of_the_task_of_the_config(folders: list[str]) -> None:
    """As for a registered task: what the command refuses to set is not left from the config."""
    of = experiment(
        "w",
        {
            "evaluation.best_by": "f1",
            "data.metrics": ("f1",),
            "data.labels": ("a", "b"),
            "data.eval_split": "test",
            "data.probes": ("word_valence",),
            "data.objectives": ("prefix_lm",),
        },
    )
    first, task = tasks_of(
        of, ["word_valence", folders[0]], form="taskless", test_split="", option="--from"
    )
    for one in (first.experiment, task.experiment):
        for field in SUITE_FIELDS:
            group, _, name = field.partition(".")
            if name not in ("task", "train", "eval"):
                default = getattr(getattr(Experiment(), group), name)
                assert getattr(getattr(one, group), name) == default, field
    assert task.experiment.data.train == f"{folders[0]}/train.jsonl"
