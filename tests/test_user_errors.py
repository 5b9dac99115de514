"""Wrong input: one line on stderr that says what and where, exit status 2, and nothing lost."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata, save_prompt
from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.methods import NoTuning
from prompt_tuning_jax.training.run import train
from tests import tiny_run
from tests.tiny_run import experiment, tree_bytes, write_config, write_rows

GOOD = [{"inputs": "red", "targets": "red"}, {"inputs": "blue", "targets": "blue"}]
Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused, and returns its one line without ``error: ``."""

    def run(*arguments: str | Path) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("error: ") and errors.count("\n") == 1, errors
        return errors.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(experiment(folder), quiet=True)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run to damage."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def lines(path: Path, *texts: str) -> str:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return str(path)


ROW = json.dumps(GOOD[0])


_OWN_TASK = {"data.train": "", "data.eval": "", "data.task": "word_valence"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda d: {"data.train": lines(d / "a.jsonl", ROW, "{'inputs': 1}")},
            "a.jsonl:2: invalid or truncated JSON",
        ),
        (
            lambda d: {"data.train": lines(d / "a.jsonl", ROW, '["red"]')},
            "a.jsonl:2: an array where",
        ),
        (
            lambda d: {"data.train": lines(d / "a.jsonl", ROW, '{"input": "x", "targets": "red"}')},
            "a.jsonl:2: no column 'inputs': did you mean 'input'",
        ),
        (
            lambda d: {"data.targets_column": "target"},
            "train.jsonl:1: no column 'target': did you mean 'targets'? There are: inputs, "
            "targets; "
            "choose one with --set data.targets_column=NAME",
        ),
        (
            lambda d: {"data.inputs_template": "{inputs} {premise}"},
            "train.jsonl:1: no column 'premise'",
        ),
        (lambda d: {"data.train": lines(d / "a.jsonl")}, "a.jsonl: no examples"),
        (lambda d: {"data.eval": lines(d / "a.jsonl", "", "")}, "a.jsonl: no examples"),
        (lambda d: {"data.eval": str(d / "b.jsonl")}, "b.jsonl does not exist"),
        (lambda d: {"data.eval": ""}, "data.eval is empty"),
        (lambda d: {"data.train": lines(d / "a.txt", ROW)}, "a.txt: unknown format"),
        (
            lambda d: {"data.labels": ("blue", "green", "read")},
            "the target 'red' is not one of the labels: did you mean 'read'",
        ),
        (
            lambda d: {"data.targets_length": 1},
            "the label 'blue' has 2 tokens, the end of sequence included",
        ),
        (
            lambda d: {
                "data.train": "",
                "data.eval": "",
                "data.task": "word_valence",
                "data.labels": ("False", "True"),
            },
            "data.labels is False, True, but the labels of word_valence are",
        ),
        (
            lambda d: {**_OWN_TASK, "data.targets_column": "y"},
            "data.targets_column applies to files, and",
        ),
        (lambda d: {"data.metrics": ("acuracy",)}, "unknown metric 'acuracy'"),
        (
            lambda d: {"evaluation.best_by": "acuracy"},
            "evaluation.best_by: no metric 'acuracy': did you mean 'accuracy'",
        ),
        (
            lambda d: {"data.train": "", "data.eval": "", "data.task": "word_valense"},
            "unknown task 'word_valense': did you mean 'word_valence'",
        ),
        (lambda d: {"model.name_or_path": str(d / "none")}, "is neither a folder"),
        (lambda d: {"model.name_or_path": "tyni"}, "there are: tiny"),
        (
            lambda d: {"model.name_or_path": "models/tiny"},
            "there is no folder models/tiny; did you mean the model tiny",
        ),
        (lambda d: {"model.name_or_path": str(d)}, "config.json"),
        (
            lambda d: {"model.vocabulary": str(tiny_run.vocabulary_file(220))},
            "320 pieces, but",
        ),
        (lambda d: {"model.vocabulary": str(d / "no.model")}, "no such vocabulary file"),
        (
            lambda d: {"method.init": "file", "method.init_path": str(d / "no.npy")},
            "cannot read the prompt",
        ),
        (lambda d: {"method.init": "file"}, "needs method.init_path"),
        (
            lambda d: {"method.init": "file", "method.init_path": _prompt(d / "w.npy", (5, 8))},
            "holds a prompt of shape [5, 8]; this run trains [5, 16]",
        ),
        (
            lambda d: {"method.init": "file", "method.init_path": _prompt(d / "w.npy", (4, 16))},
            "holds a prompt of shape [4, 16]; this run trains [5, 16]",
        ),
        (
            lambda d: {
                "method.init": "file",
                "method.init_path": _prompt(d / "i.npy", (5, 16), np.inf),
            },
            "not finite",
        ),
        (lambda d: {"method": NoTuning()}, "trains nothing"),
        (lambda d: {"training.workdir": ""}, "training.workdir is empty"),
        (lambda d: {"training.batch_size": 0}, "training.batch_size is 0"),
    ],
)
def test_training_on_wrong_input_writes_nothing(
    tmp_path: Path, refused: Refused, make: Callable[[Path], dict[str, Any]], message: str
) -> None:
    place = tmp_path / "run"
    config = write_config(tmp_path / "c.py", experiment(place, make(tmp_path)))
    assert message in refused("train", config)
    assert not place.exists()


def _prompt(path: Path, shape: tuple[int, int], value: float = 0.5) -> str:
    np.save(path, np.full(shape, value, np.float32))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "optimizer.learning_rat=1"), "did you mean 'optimizer.learning_rate'"),
        (("--set", "optimiser.learning_rate=1"), "optimizer.learning_rate"),
        (("--set", "training.steps=many"), "training.steps"),
        (("--seed", "3"), "--seeds"),
        (("--seeds", "1,1"), "training.seeds has 1 twice"),
    ],
)
def test_misspelled_fields_and_options(
    tmp_path: Path, refused: Refused, arguments: tuple[str, ...], message: str
) -> None:
    place = tmp_path / "run"
    config = write_config(tmp_path / "c.py", experiment(place))
    assert message in refused("train", config, *arguments)
    assert not place.exists()


def test_free_text_cannot_be_ranked(tmp_path: Path, refused: Refused) -> None:
    """Said before the first step, not at the first evaluation."""
    many = [{"inputs": w, "targets": f"{w} {i}"} for i, w in enumerate(tiny_run.WORDS[:60])]
    file = str(write_rows(tmp_path / "free.jsonl", many))
    changes = {"data.train": file, "data.eval": file, "evaluation.strategy": "rank"}
    config = write_config(tmp_path / "c.py", experiment(tmp_path / "run", changes))
    assert "evaluation.strategy=rank needs labels" in refused("train", config)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_left_alone(tmp_path: Path, run: Path, refused: Refused) -> None:
    before = tree_bytes(run)
    other = experiment(run, {"optimizer.learning_rate": 0.25, "method.length": 7})
    message = refused("train", write_config(tmp_path / "c.py", other))
    assert "optimizer.learning_rate: 3.0 -> 0.25" in message
    assert "method.length: 5 -> 7" in message
    assert tree_bytes(run) == before


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file/run", tmp_path / "file"):
        config = write_config(tmp_path / "c.py", experiment(place))
        message = refused("train", config, "--model", "no/model")  # said before it is looked for
        assert f"{tmp_path / 'file'} is a file; training.workdir (--workdir)" in message
        assert "is a file" in refused("suite", "glue", "--config", config, "--model", "no/model")
    config = write_config(tmp_path / "c.py", experiment(tmp_path / "new/run"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # whom the system lets in, differs
    assert f"{tmp_path} cannot be written; choose another" in refused("train", config)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_damaged_run_config(tmp_path: Path, copy: Path, refused: Refused) -> None:
    (copy / "experiment.json").write_text('{"model": ')
    before = tree_bytes(copy)
    config = write_config(tmp_path / "c.py", experiment(copy))
    assert "experiment.json" in refused("train", config)
    assert "experiment.json" in refused("eval", "--prompt", copy)
    assert tree_bytes(copy) == before


@pytest.mark.parametrize("kind", ["last", "best"])
def test_a_damaged_checkpoint(tmp_path: Path, copy: Path, refused: Refused, kind: str) -> None:
    arrays = [
        file
        for file in (copy / "checkpoints" / kind).rglob("*")
        if file.is_file() and file.parent.name == "d"
    ]
    assert arrays
    (copy / "results.json").unlink()  # of a run with results nothing is opened
    for file in arrays:
        file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])
    before = tree_bytes(copy)
    config = write_config(tmp_path / "c.py", experiment(copy))
    message = refused("train", config)
    assert f"checkpoints/{kind}" in message and "damaged" in message
    assert tree_bytes(copy) == before


def test_a_model_that_has_changed_under_a_run(tmp_path: Path, refused: Refused) -> None:
    folder = shutil.copytree(tiny_run.model_folder(), tmp_path / "model")
    changes = {"model.name_or_path": str(folder), "training.steps": 3}
    train(experiment(tmp_path / "run", changes), quiet=True)
    (tmp_path / "run/results.json").unlink()  # of a run with results nothing is opened
    shutil.rmtree(folder)
    shutil.copytree(tiny_run.model_folder(seed=1), folder)
    before = tree_bytes(tmp_path / "run")
    config = write_config(tmp_path / "c.py", experiment(tmp_path / "run", changes))
    assert "holds a run on another frozen model" in refused("train", config)
    assert "was trained for another model" in refused("eval", "--prompt", tmp_path / "run")
    assert tree_bytes(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("p.npy", lambda p: _prompt(p, (5, 8)), "has width 8, but the model has width 16"),
        ("p.npy", lambda p: _prompt(p, (5, 16), np.nan), "not finite"),
        ("p.npy", lambda p: p.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr"), "damaged"),
        (
            "p.npy",
            lambda p: (np.save(p, np.ones((5, 16))), p.write_bytes(p.read_bytes()[:200])),
            "it is truncated",
        ),
        ("p.npy", lambda p: p.write_bytes(b""), "is neither an .npy nor a .safetensors file"),
        ("p.npy", lambda p: np.save(p, np.array([{}], object), allow_pickle=True), "objects"),
        ("p.safetensors", lambda p: p.write_bytes(b"\xff" * 8 + b"{}"), "damaged"),
        (
            "p.safetensors",
            lambda p: save_prompt(
                p,
                np.zeros((5, 16), np.float32),
                metadata=PromptMetadata(model_fingerprint="0123", model_name="t5_xxl"),
            ),
            "was trained for another model t5_xxl (fingerprint 0123",
        ),
    ],
)
@pytest.mark.parametrize("command", ["eval", "predict"])
def test_prompts_that_cannot_be_used(
    tmp_path: Path,
    refused: Refused,
    command: str,
    name: str,
    make: Callable[[Path], Any],
    message: str,
) -> None:
    make(tmp_path / name)
    config = write_config(tmp_path / "c.py", experiment(tmp_path / "run"))
    arguments = [config] if command == "eval" else ["red", "--config", config]
    output = tmp_path / "output"
    assert message in refused(command, *arguments, "--prompt", tmp_path / name, "--output", output)
    assert not output.exists() and not (tmp_path / "run").exists()


def test_prompts_that_are_not_there(tmp_path: Path, copy: Path, refused: Refused) -> None:
    config = write_config(tmp_path / "c.py", experiment(tmp_path / "run"))
    assert "no such file or folder" in refused("eval", config, "--prompt", tmp_path / "none.npy")
    (tmp_path / "empty").mkdir()
    assert "a folder without a run's" in refused("eval", config, "--prompt", tmp_path / "empty")
    shutil.rmtree(copy / "prompts")
    assert "has not been evaluated" in refused("eval", "--prompt", copy)
    assert "no such file or folder" in refused("inspect", tmp_path / "none")
    message = refused("inspect", copy.parent)
    assert "is not a run" in message and f"did you mean {copy}?" in message


def test_a_loss_that_is_not_finite(
    tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last good checkpoint stays, and its best prompt is of use."""
    place = tmp_path / "run"
    # The rate falls on a wall after step 4: warm-up of a rate that is far too large.
    changes = {
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 1e38,
        "training.log_every": 1,
        "training.save_every": 1,
        "training.eval_every": 1,
        "optimizer.weight_decay": 0.0,
    }
    config = write_config(tmp_path / "c.py", experiment(place, changes))
    message = refused("train", config)
    assert "not finite" in message or "nan" in message or "inf" in message
    assert "at step " in message and str(place) in message
    assert "optimizer.learning_rate" in message
    step = int(message.split("at step ")[1].split(":")[0])
    saved = [path.name for path in (place / "checkpoints/last").glob("[0-9]*")]
    assert saved == ([str(step - 1)] if step > 1 else [])
    # The same again: it goes on from there, and fails there.
    assert refused("train", config) == message


def test_after_a_loss_that_is_not_finite_the_best_prompt_is_of_use(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule that is harmless for five steps and then is not."""
    from prompt_tuning_jax.training import optim

    def explode(config: Any, *, total_steps: int) -> Callable[[Any], Any]:
        import jax.numpy as jnp

        return lambda step: jnp.where(jnp.asarray(step) < 5, 0.1, jnp.inf)

    place = tmp_path / "run"
    changes = {"training.eval_every": 2, "training.save_every": 2, "training.log_every": 50}
    config = write_config(tmp_path / "c.py", experiment(place, changes))
    with monkeypatch.context() as patch:
        patch.setattr(optim, "make_schedule", explode)
        message = refused("train", config)
    assert "not finite at step 6" in message
    assert sorted(path.name for path in (place / "checkpoints/last").glob("[0-9]*")) == ["2", "4"]
    assert not (place / "results.json").exists()
    assert main(["eval", "--prompt", str(place), "--output", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["per_prompt"][0]["accuracy"] >= 0
    # With the cause removed, the same command finishes it.
    assert main(["train", str(config)]) == 0
    assert (place / "results.json").is_file()


def test_through_a_process(tmp_path: Path, run: Path) -> None:
    before = tree_bytes(run)
    other = experiment(run, {"optimizer.learning_rate": 0.25})
    config = write_config(tmp_path / "c.py", other)
    bad = write_config(tmp_path / "bad.py", experiment(tmp_path / "b", {"data.task": "x"}))
    bad.write_text(bad.read_text().replace('\\"training\\"', '\\"trainning\\"'))
    processes = [
        tiny_run.start("train", config),
        tiny_run.start("train", config, "--set", "optimizer.lerning_rate=1"),
        tiny_run.start("eval", "--prompt", tmp_path / "none"),
    ]
    for process, expected in zip(
        processes,
        ("optimizer.learning_rate: 3.0 -> 0.25", "optimizer.learning_rate", "no such file"),
        strict=True,
    ):
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert errors.startswith("error: ") and errors.count("\n") == 1 and expected in errors
        assert out == ""
    assert tree_bytes(run) == before


@pytest.mark.parametrize(
    ("train_targets", "eval_targets", "message"),
    [
        (("red", "du"), ("red", "Du"), "'Du' is not one of the labels of the training data: du"),
        (("be", "du"), ("Be", "Du"), "did you mean 'be'?"),
        (("yes", "no"), ("yes", "perhaps"), "(6 of 12 targets: perhaps 6)"),
        (
            ("yes", "yes"),
            ("yes", "no"),
            "'no' is not one of the labels of the training data: yes",
        ),
    ],
)
def test_what_no_prediction_can_equal_is_refused_before_the_first_step(
    tmp_path: Path,
    refused: Refused,
    train_targets: tuple[str, str],
    eval_targets: tuple[str, str],
    message: str,
) -> None:
    files = [
        str(write_rows(tmp_path / name, [{"inputs": "red", "targets": t} for t in targets * 6]))
        for name, targets in (("train.jsonl", train_targets), ("dev.jsonl", eval_targets))
    ]
    changes = {"data.train": files[0], "data.eval": files[1], "data.targets_length": 16}
    config = write_config(tmp_path / "c.py", experiment(tmp_path / "run", changes))
    assert message in refused("train", config)
    assert not (tmp_path / "run").exists()


def test_files_are_looked_for_before_anything_is_read(tmp_path: Path, refused: Refused) -> None:
    """A file that is missing is what fails, though the one before it and the model would, too."""
    damaged = lines(tmp_path / "a.jsonl", "{oops")
    changes = {"data.train": damaged, "data.eval": "no.jsonl", "model.name_or_path": "no_model"}
    config = write_config(tmp_path / "c.py", experiment(tmp_path / "run", changes))
    assert "no.jsonl: no such file" in refused("train", config, "--eval_data", "no.jsonl")
    # A name that is the config's own example is asked for by its option.
    assert "--eval_data is missing" in refused("train", config)
    changes = {
        "method.init": "file",
        "method.init_path": "no.npy",
        "model.name_or_path": "no_model",
    }
    config = write_config(tmp_path / "d.py", experiment(tmp_path / "run", changes))
    assert "no.npy" in refused("train", config)


def test_labels_that_nobody_has_named_are_asked_for(
    tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    """An evaluation file of one class would make every prediction right."""
    file = write_rows(tmp_path / "dev.jsonl", [{"inputs": w, "targets": "red"} for w in "abcdef"])
    prompt = _prompt(tmp_path / "p.npy", (5, 16))
    changes = {"data.train": "", "data.eval": str(file)}
    config = write_config(tmp_path / "c.py", experiment("", changes))
    for more in ([], ["data.targets=labels", "evaluation.strategy=greedy"]):
        sets = [word for one in more for word in ("--set", one)]
        message = refused("eval", config, "--prompt", prompt, *sets)
        assert "set of labels is unknown" in message and "data.labels" in message
    for given in ("data.labels=blue,red", "data.targets=text"):
        assert main(["eval", str(config), "--prompt", prompt, "--set", given]) == 0
    assert "accuracy" in capsys.readouterr().out
