"""Images from a folder to a trained, evaluated, resumed and asked vision transformer."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import prompt_tuning_jax as pt
from prompt_tuning_jax.checkpoints.hf.pretrained import open_hf
from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.config.experiment import (
    Data,
    Evaluation,
    Experiment,
    Model,
    Optimizer,
    Training,
)
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.evaluation import evaluate
from prompt_tuning_jax.methods import DeepPrompts
from prompt_tuning_jax.training.run import train
from tests.tiny_vit import LABELS, colored, write_images, write_vit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and images to train and to evaluate on."""
    root = tmp_path_factory.mktemp("images")
    write_vit(root / "model")
    write_images(root / "train", 6)
    write_images(root / "eval", 2, seed=1)
    return root


def experiment(folder: Path, run: str, *, steps: int = 12) -> Experiment:
    return Experiment(
        model=Model(name_or_path=str(folder / "model"), dropout_rate=0.0),
        method=DeepPrompts(length=2, init="xavier_uniform", dropout=0.1),
        data=Data(
            task="",
            train=str(folder / "train"),
            eval=str(folder / "eval"),
            labels=LABELS[::-1],  # other than the model's own: a new classifier
            augment=("flip",),
        ),
        optimizer=Optimizer(
            name="sgd", momentum=0.9, learning_rate=0.1, schedule="cosine", decay_steps=12,
            weight_decay=0.0,
        ),
        training=Training(
            steps=steps, batch_size=6, seeds=(0, 1), eval_every=6, save_every=6, log_every=6,
            workdir=str(folder / run),
        ),
        evaluation=Evaluation(batch_size=6),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    result = train(experiment(folder, "run"), quiet=True)
    assert result.finished
    return folder / "run"


def test_a_run_learns_the_colors_and_saves_prompts_with_their_classifier(run: Path) -> None:
    stored = load_file(run / "tuned" / "seed_0.safetensors")
    assert {name: array.shape for name, array in stored.items()} == {
        "method/vectors/prompts_PD": (4, 16),
        "model/classifier/kernel": (16, 3),
        "model/classifier/bias": (3,),
    }
    best = json.loads((run / "results.json").read_text())["best"]
    assert max(one["accuracy"] for one in best.values()) > 60
    line = (run / "metrics.jsonl").read_text().splitlines()[0]
    assert "tokens_per_second" not in line and "padding_percent" not in line


def test_a_stopped_run_ends_like_an_uninterrupted_one(folder: Path, run: Path) -> None:
    train(experiment(folder, "stopped", steps=6), quiet=True)
    (folder / "stopped" / "results.json").unlink()
    train(experiment(folder, "stopped"), quiet=True)
    whole, parts = (json.loads((f / "results.json").read_text()) for f in (run, folder / "stopped"))
    assert whole == parts


def test_prompts_are_scored_alone_and_together_whatever_the_order_of_labels(
    folder: Path, run: Path
) -> None:
    both = dataclasses.replace(experiment(folder, "run").data, metrics=("accuracy", "loss"))
    with_loss = dataclasses.replace(experiment(folder, "run"), data=both)
    result = evaluate(with_loss, prompts=str(run))
    best = json.loads((run / "results.json").read_text())["best"]
    assert [one["accuracy"] for one in result.per_prompt] == [
        one["accuracy"] for one in best.values()
    ]
    assert result.ensemble is not None
    # Targets are the numbers of the trained classes, in whatever order the data names them.
    again = evaluate(with_loss, prompts=str(run), labels=LABELS)
    for one, other in zip(result.per_prompt, again.per_prompt, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    with pytest.raises(UserError, match="'gray' is not one of the 3 classes of this model"):
        evaluate(experiment(folder, "run"), prompts=str(run), labels=(*LABELS, "gray"))


def test_predict_takes_files_folders_and_arrays(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(folder / "eval/red/0.png"), str(folder / "eval/blue/1.jpg")]
    assert main(["predict", "--prompt", str(run), *files]) == 0
    labels = capsys.readouterr().out.splitlines()
    assert len(labels) == 2 and {*labels} <= {*LABELS}
    inside = str(folder / "eval/red")
    assert main(["predict", "--prompt", str(run), "--json", "--input", inside]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(row["input"]).name for row in rows] == ["0.png", "1.jpg"]
    assert rows[0]["prediction"] == labels[0] and sum(rows[0]["votes"].values()) == 2
    model = pt.load_model(str(folder / "model"))
    (from_array,) = pt.predict(model, [colored("red", 100)], str(run))
    assert from_array.log_probs == pytest.approx(rows[0]["log_probs"], abs=1e-4)
    (bare,) = pt.predict(model, [colored("red", 100)])
    assert bare.log_probs is not None and [*bare.log_probs] == [*LABELS]
    assert np.exp([*bare.log_probs.values()]).sum() == pytest.approx(1, abs=1e-4)
    assert main(["predict", "--prompt", str(run), "lovely"]) == 2
    assert "lovely: no such image file" in capsys.readouterr().err


def test_text_and_images_are_not_mixed_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(folder / "train"), "--eval_data", str(folder / "eval")]
    assert main(["train", *data, "--workdir", str(folder / "x")]) == 2
    assert "holds images, and this model reads text" in capsys.readouterr().err
    rows = folder / "rows.jsonl"
    rows.write_text('{"inputs": "a", "targets": "b"}\n' * 4)
    text = ["--data", str(rows), "--eval_data", str(rows)]
    model = ["--set", f"model.name_or_path={folder / 'model'}"]
    image = ["--set", "method.init=xavier_uniform", "--workdir", str(folder / "x")]
    assert main(["train", *text, *model, *image]) == 2
    assert "has texts, and this model reads images" in capsys.readouterr().err
    assert not (folder / "x").exists()


def test_a_folder_without_its_preprocessor_config_has_the_usual_one(
    folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder / "model", copy)
    file = copy / "preprocessor_config.json"
    usual = open_hf(copy)[0]
    described = json.loads(file.read_text())
    file.unlink()
    assert open_hf(copy)[0] == usual
    # Fast processors of transformers 4 write null for what is not set.
    unset = dict.fromkeys(("crop_size", "do_center_crop", "do_convert_rgb", "resample"))
    file.write_text(json.dumps({**described, **unset}))
    assert open_hf(copy)[0] == usual
    for change, says in (
        ({"size": 224}, "size is 224 without a center crop"),
        ({"image_mean": [0.5]}, "image_mean is .* it must have 3 numbers"),
        ({"image_std": [0, 1, 1]}, "it must be above 0"),
        ({"resample": 9}, "resample is 9"),
        ({"do_center_crop": True, "crop_size": 7}, "crop_size is 7, but the model reads"),
        ({"size": {"longest_edge": 8}}, "size is .*longest_edge"),
    ):
        file.write_text(json.dumps({**described, **change}))
        with pytest.raises(UserError, match=says):
            open_hf(copy)
