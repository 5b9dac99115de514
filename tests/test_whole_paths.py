"""What a run keeps of paths is found from another folder, and after the run has moved."""

import os
from pathlib import Path

import pytest

from prompt_tuning_jax.config.config_file import run_config, saved_config
from prompt_tuning_jax.config.experiment import Data, Experiment, Model, Training
from prompt_tuning_jax.config.overrides import to_dict, to_json
from prompt_tuning_jax.config.paths import with_whole_paths
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import METHODS, PromptTuning
from prompt_tuning_jax.training.resume import claim, require_run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with files to name."""
    folder = tmp_path / "home"
    for name in ("model", "data", "words", "runs/mine/model"):
        (folder / name).mkdir(parents=True)
    for name in ("v.model", "t.jsonl", "e.jsonl", "p.npy", "data/x.jsonl"):
        (folder / name).touch()
    monkeypatch.chdir(folder)
    return folder


def relative(**model: str) -> Experiment:
    return Experiment(
        model=Model(**{"name_or_path": "model", "vocabulary": "v.model", **model}),
        method=PromptTuning(init="file", init_path="p.npy"),
        data=Data(
            task="",
            train="t.jsonl",
            eval="./e.jsonl",
            data_dir="data",
            dictionary="words",
            probes=("word_valence", "t.jsonl:data/x.jsonl"),
        ),
        training=Training(workdir="runs/mine", seeds=(0, 0), inits=("uniform", "file=p.npy")),
    )


def test_what_is_there_is_named_from_the_root(home: Path) -> None:
    found = with_whole_paths(relative())
    assert found.model == Model(name_or_path=str(home / "model"), vocabulary=str(home / "v.model"))
    assert found.method.init_path == str(home / "p.npy")  # type: ignore[attr-defined]
    assert found.data.train == str(home / "t.jsonl")
    assert found.data.eval == str(home / "e.jsonl")
    assert found.data.data_dir == str(home / "data")
    assert found.data.dictionary == str(home / "words")
    assert found.data.probes == ("word_valence", f"{home}/t.jsonl:{home}/data/x.jsonl")
    assert found.training.workdir == str(home / "runs/mine")
    assert found.training.inits == ("uniform", f"file={home}/p.npy")
    assert with_whole_paths(found) == found


@pytest.mark.parametrize(
    "name", ["tiny", "t5_1_1_lm100k_base", "google/flan-t5-small", "gs://bucket/model", "not_here"]
)
def test_names_and_addresses_stay(home: Path, name: str) -> None:
    (home / "tiny").mkdir()  # a folder of that name is not what the bundled one is
    assert with_whole_paths(relative(name_or_path=name)).model.name_or_path == name
    assert with_whole_paths(relative(vocabulary="bytes")).model.vocabulary == "bytes"
    assert with_whole_paths(Experiment()) == Experiment()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method(home: Path, method: str) -> None:
    experiment = Experiment(method=METHODS[method]())
    assert with_whole_paths(experiment) == experiment


def test_a_path_of_pathlib_is_taken_for_any_field_that_is_a_text() -> None:
    data = Data(train=Path("a"), probes=(Path("b"),))  # type: ignore[arg-type]
    assert (data.train, data.probes) == ("a", ("b",))
    assert PromptTuning(init_path=Path("c")).init_path == "c"  # type: ignore[arg-type]
    assert Model(vocabulary=Path("v")) == Model(vocabulary="v")  # type: ignore[arg-type]
    assert to_dict(Training(workdir=Path("w")))["workdir"] == "w"  # type: ignore[arg-type]


def test_a_run_is_resumed_from_another_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = home / "runs/mine"
    claim(run, with_whole_paths(relative()))
    saved = saved_config(str(run))
    assert saved is not None and os.path.isabs(saved.data.train)
    claim(run, with_whole_paths(relative()))
    elsewhere = home / "data"
    monkeypatch.chdir(elsewhere)
    for name in ("t.jsonl", "e.jsonl", "v.model", "p.npy"):  # others of the same names
        (elsewhere / name).touch()
    (elsewhere / "model").mkdir()
    with pytest.raises(UserError, match=r"data\.train"):
        claim(run, with_whole_paths(relative()))
    claim(run, saved)


def test_a_run_that_kept_relative_paths_is_compared_by_where_they_lead(home: Path) -> None:
    run = home / "runs/mine"
    (run / "experiment.json").write_text(to_json(relative()))
    claim(run, with_whole_paths(relative()))


def test_a_study_that_names_relative_paths_resumes(home: Path) -> None:
    """Studies claim folders, and look at them, before a run makes the paths absolute."""
    run = home / "runs/mine"
    for _ in range(2):
        claim(run, relative())
        assert require_run(run, relative(), exactly=True) is not None
        claim(run, with_whole_paths(relative()))
    saved = saved_config(str(run))
    assert saved is not None and saved.data.train == str(home / "t.jsonl")


def test_what_is_in_a_run_moves_with_it(home: Path) -> None:
    run = home / "runs/mine"
    claim(run, with_whole_paths(relative(name_or_path="runs/mine/model")))
    moved = home / "elsewhere"
    run.rename(moved)
    found = run_config(str(moved))
    assert found is not None
    assert found.model.name_or_path == str(moved / "model")
    assert found.data.train == str(home / "t.jsonl")
