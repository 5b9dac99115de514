"""Ablations: which runs they need, what is kept of them, and what is written."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.hf.config_files import CONFIG
from prompt_tuning_jax.checkpoints.run_folder import Best, member_names
from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.config.experiment import Data, Model
from prompt_tuning_jax.data.tasks.selection import build_mixture
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.evaluation import evaluate
from prompt_tuning_jax.inference.predictor import Predictions
from prompt_tuning_jax.methods import (
    CPT,
    METHODS,
    AdaptionPrompt,
    DescribedPrompts,
    PromptDesign,
    PromptTuning,
    method_name,
)
from prompt_tuning_jax.studies.ablations import adaptation, points, run
from prompt_tuning_jax.studies.ablations import ensembles as ensemble_study
from prompt_tuning_jax.studies.ablations.axes import AXES, Value, get_axis, values_of
from prompt_tuning_jax.studies.ablations.ensembles import SCORES, ensembles
from prompt_tuning_jax.studies.ablations.grid import Grid
from prompt_tuning_jax.studies.ablations.methods import compared
from prompt_tuning_jax.studies.ablations.points import Settings
from prompt_tuning_jax.studies.ablations.results import Cell, Results, lines_of
from prompt_tuning_jax.studies.ablations.run import ablate
from prompt_tuning_jax.training.resume import claim
from tests import tiny_run
from tests.tiny_run import experiment, write_config

SHORT: dict[str, Any] = {
    "training.steps": 2,
    "training.eval_every": 2,
    "training.save_every": 2,
    "training.seeds": (0, 1),
}


def grid(name: str, *texts: str, lines: str = "") -> Grid:
    axis = AXES[name]
    values = values_of(axis, texts, option="--values")
    if not lines:
        return Grid(axis=axis, values=values)
    named, _, listed = lines.partition("=")
    each = values_of(AXES[named], listed.split(","), option="--lines")
    return Grid(axis=axis, values=values, line_axis=AXES[named], lines=each)


def test_any_field_of_the_config_can_vary() -> None:
    axis = get_axis("method.prompt_to_input", option="ablate")
    values = values_of(axis, ("true", "false"), option="--values")
    lines = values_of(AXES["method"], ("prompt_tuning", "multitask_prompts"), option="--lines")
    of = Grid(axis=axis, values=values, line_axis=AXES["method"], lines=lines)
    groups = of.groups(experiment("w"), (0, 1))
    found = [(group.experiment.method, group.experiment.training.seeds) for group in groups]
    assert [getattr(method, "prompt_to_input", None) for method, _ in found] == [True] * 2 + [
        False
    ] * 2
    assert [method_name(method) for method, _ in found] == [
        "prompt_tuning",
        "multitask_prompts",
    ] * 2
    assert len({group.name for group in groups}) == 4
    assert found[0][1] == (0, 1)
    assert axis.label == "method.prompt_to_input" and AXES["lm_steps"].label == "lm steps"


def test_points_that_share_a_program_are_one_run() -> None:
    base = experiment("w")
    groups = grid("length", "1", "3", lines="init=uniform,class_labels").groups(base, (0, 1))
    assert [group.name for group in groups] == ["length_1", "length_3"]
    training = groups[1].experiment.training
    assert training.seeds == (0, 1, 0, 1) and not training.learning_rates
    assert training.inits == ("uniform", "uniform", "class_labels", "class_labels")
    both = grid("learning_rate", "0.1", "0.3", lines="init=uniform,class_labels")
    (group,) = both.groups(base, (5,))
    assert group.experiment.training.learning_rates == (0.1, 0.1, 0.3, 0.3)
    assert [p.seed for p in group.points] == [5] * 4
    # A device that holds three prompts, and one that held fewer than was thought.
    parts = both.groups(base, (5,), at_once=3)
    assert [len(part.points) for part in parts] == [3, 1]
    assert parts[1].experiment.training.inits == ("class_labels",)
    assert [half.points for half in group.halves()] == [group.points[:2], group.points[2:]]
    names = {one.name for one in (*parts, *group.halves(), group)}
    assert len(names) == 5
    # Models whose paths look alike in a folder's name are not one run.
    models = grid("size", "a/b", "a:b", lines="method=prompt_tuning")
    assert len({group.name for group in models.groups(base, (0,))}) == 2


def test_an_ablation_is_written_and_never_computed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are those of the runs; a device that is too small gets half of a run at a time."""
    real, sizes = points.train, []

    def train(of: Any, **options: Any) -> Any:
        sizes.append(len(of.training.seeds))
        if len(of.training.seeds) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(of, **options)

    monkeypatch.setattr(points, "train", train)
    of = experiment(tmp_path, SHORT)
    test = dataclasses.replace(of.data, eval=str(tiny_run.train_file()))
    settings = Settings(test=test)
    grid_of_inits = grid("init", "uniform", "class_labels")
    done = ablate(of, grid_of_inits, settings, quiet=True)
    assert sizes == [4, 2, 2] and not done.stopped_by
    written = json.loads((tmp_path / "init.json").read_text())
    assert written["complete"] and written["split"] == tiny_run.train_file().name
    assert [point["value"] for point in written["points"]] == ["uniform", "class_labels"]
    for point, part in zip(written["points"], ("0_to_1", "2_to_3"), strict=True):
        kept = json.loads((tmp_path / f"all_{part}" / points.POINT).read_text())
        assert point["scores"] == [member["test"] for member in kept["members"]]
        assert point["mean"] == pytest.approx(sum(point["scores"]) / 2)
        # 48 training examples are the test data here.
        assert all((x * 48 / 100) == pytest.approx(round(x * 48 / 100)) for x in point["scores"])
    assert (tmp_path / "init.png").read_bytes().startswith(b"\x89PNG")
    assert done.results is not None
    assert all(line in (tmp_path / "init.md").read_text() for line in lines_of(done.results))

    sizes.clear()
    again = ablate(of, grid_of_inits, Settings(test=test, at_once=2), quiet=True)
    assert not sizes and again.results == done.results
    # Costs may be asked for later; changed test examples are noticed.
    of_one = grid("init", "uniform")
    training = dataclasses.replace(of.training, workdir=str(tmp_path / "measured"))
    one = dataclasses.replace(of, training=training)
    own = tmp_path / "own.jsonl"
    shutil.copy(tiny_run.train_file(), own)
    test = dataclasses.replace(of.data, eval=str(own))
    plain = ablate(one, of_one, Settings(test=test, at_once=2), quiet=True)
    measured = ablate(one, of_one, Settings(test=test, at_once=2, measure=True), quiet=True)
    assert plain.results is not None and measured.results is not None
    for before, after in zip(plain.results.cells, measured.results.cells, strict=True):
        assert after.cost and dataclasses.replace(after, cost=None) == before
    # A study's folder may move.
    sizes.clear()
    moved = (tmp_path / "measured").rename(tmp_path / "moved")
    one = dataclasses.replace(of, training=dataclasses.replace(training, workdir=str(moved)))
    again = ablate(one, of_one, Settings(test=test, at_once=2, measure=True), quiet=True)
    assert not sizes and again.results == measured.results
    own.write_text("".join(own.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="other settings, data or weights"):
        ablate(one, of_one, Settings(test=test, at_once=2), quiet=True)
    with pytest.raises(UserError, match="other settings, data or weights"):
        ablate(of, grid_of_inits, Settings(at_once=2), quiet=True)


@pytest.mark.parametrize("search", [False, True])
def test_a_run_on_other_data_is_not_scored(tmp_path: Path, search: bool) -> None:
    """Even if what was stopped before it had scores was a finished training."""
    own = tmp_path / "train.jsonl"
    shutil.copy(tiny_run.train_file(), own)
    of = experiment(tmp_path / "study", {**SHORT, "data.train": str(own)})
    values, settings = grid("method", "prompt_tuning"), Settings(search=search)
    ablate(of, values, settings, quiet=True)
    for file in (tmp_path / "study").rglob(points.POINT):
        file.unlink()
    own.write_text("".join(own.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="a run on other data or weights"):
        ablate(of, values, settings, quiet=True)


def test_another_initial_prompt_in_the_same_file_is_noticed(tmp_path: Path) -> None:
    start = tmp_path / "start.npy"
    np.save(start, np.ones((tiny_run.LENGTH, 16), np.float32))
    method = PromptTuning(length=tiny_run.LENGTH, init="file", init_path=str(start))
    of = experiment(tmp_path / "study", {**SHORT, "method": method})
    ablate(of, grid("learning_rate", "0.1"), Settings(), quiet=True)
    np.save(start, np.zeros((tiny_run.LENGTH, 16), np.float32))
    with pytest.raises(UserError, match="other settings, data or weights"):
        ablate(of, grid("learning_rate", "0.1"), Settings(), quiet=True)


def test_the_best_of_a_loss_is_the_lowest() -> None:
    axis = AXES["length"]
    scores = (math.nan, 0.9, 0.3)
    cell = Cell(value=Value(name="1"), line=None, seeds=(0, 1, 2), scores=scores)
    results = Results(
        grid=Grid(axis=axis, values=(cell.value,)),
        cells=(cell,),
        metric="loss",
        direction="min",
        split="validation",
        task="t",
        model="m",
        majority=None,
        notes=(),
        number=1,
    )
    assert lines_of(results)[2].split("|")[3].strip() == "0.3"


def test_methods_are_compared_after_a_search(tmp_path: Path) -> None:
    """What trains nothing is scored alone; the learning rate is the best of the search."""
    of = experiment(tmp_path, {**SHORT, "data.inputs_length": 12})
    values = ("none", "prompt_design", "prompt_tuning")
    settings = Settings(search=True, measure=True)
    results = ablate(of, grid("method", *values), settings, quiet=True).results
    assert results is not None
    none, design, tuning = results.cells
    assert none.seeds == (0,) and none.trained == design.trained == 0
    assert design.chosen.endswith(" shots") and len(design.scores) == 2
    assert tuning.chosen.startswith("rate ") and tuning.trained == tiny_run.LENGTH * 16
    assert tuning.cost is not None and tuning.cost["step_bytes"] > 0 < tuning.cost["step_seconds"]
    assert tuning.model_parameters == none.model_parameters > 1000
    assert results.majority is not None
    table = "\n".join(lines_of(results))
    assert "| prompt design " in table and "trained parameters" in table


def test_every_registered_method_can_be_compared() -> None:
    # For decoder-only models, and for pre-training.
    for_others = {CPT, AdaptionPrompt, DescribedPrompts}
    known = compared(length=3, init="uniform")
    assert {type(one.method) for one in known.values()} == {*METHODS.values()} - for_others
    base = experiment("w", {"data.inputs_length": 12})
    for name in known:
        of = AXES["method"].apply(base, Value(name=name))
        assert type(of.method) is METHODS[name]
        longer = isinstance(of.method, PromptDesign)
        assert (of.data.inputs_length > 12) == longer


def test_sentinels_in_targets_are_in_labels_but_not_in_metrics() -> None:
    base = experiment("w")
    value = Value(name="sentinel", model="other")
    of = AXES["objective"].apply(base, value)
    assert of.model.name_or_path == "other"
    (task,) = build_mixture(of.data).tasks
    assert set(task.labels) == {f"<extra_id_0> {label}" for label in tiny_run.LABELS}
    examples = list(task.load("validation"))
    assert all(one["targets"].startswith("<extra_id_0> ") for one in examples)
    targets = [one["targets"] for one in examples]
    assert task.score(examples, targets) == {"accuracy": 100.0, "invalid": 0.0}
    plain = list(build_mixture(base.data).tasks[0].load("validation"))
    bare = [one["targets"] for one in plain]
    assert task.score(examples, bare)["accuracy"] == 100.0
    wrong = ["<extra_id_0> none" for _ in targets]
    assert task.score(examples, wrong) == {"accuracy": 0.0, "invalid": 100.0}
    # Labels that a prompt's metadata give have the prefix already.
    known = dataclasses.replace(of.data, labels=task.labels)
    assert build_mixture(known).tasks[0].labels == task.labels
    (other,) = build_mixture(base.data).tasks
    assert task.fingerprint("validation") != other.fingerprint("validation")


_EACH = ("--seeds", "0,1", "--set")
_ADAPT = str(tiny_run.ROOT / "configs/lm_adapt_tiny.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["size"], "--values is needed for size"),
        (["objective", "--values", "tiny"], "needs NAME=MODEL"),
        (["objective", "--values", "spam=tiny"], "span_corruption"),
        (["lm_steps", "--values", "a=tiny"], "not a number of steps"),
        (["length", "--values", "1,1"], "names 1 twice"),
        (["length", "--lines", "length=1"], "varies already"),
        (["length", "--lines", "depth=1"], "unknown setting 'depth'"),
        (["method", "--values", "prompt_tunin"], "prompt_tuning"),
        (["method.lenght", "--values", "1,2"], "method.length"),
        (["method.length"], "--values is needed for method.length"),
        (["method.length", "--values", "1,long"], "method.length"),
        (["init", "--values", "best"], "method.init"),
        (["length", "--adapt", "x.py"], "--adapt is for lm_steps and objective"),
        (["length", "--test_split", "a", "--test_data", "b"], "not both"),
        # What would have no effect.
        (["ensemble", "--adapt", "x.py"], "--adapt is for lm_steps and objective"),
        (["length", "--test_split", "test"], "--test_split is for registered tasks"),
        (["learning_rate", "--search"], "--search chooses the learning rate"),
        (["length", "--lines", "learning_rate=1,2", "--search"], "--search chooses the learning"),
        (["optimizer.learning_rate", "--values", "1,2", "--search"], "--search chooses the learn"),
        (["training.seeds", "--values", "1,2"], "training.seeds cannot vary"),
        (
            ["length", *_EACH, "training.learning_rates=1,2"],
            "training.learning_rates has no effect",
        ),
        (["length", *_EACH, "training.inits=uniform,uniform"], "training.inits has no effect"),
        (["ensemble", *_EACH, "training.learning_rates=1,2"], "training.learning_rates has no"),
        (["ensemble", *_EACH, "evaluation.best_by=loss"], "ensembles are scored by their answers"),
        (["lm_steps", "--values", "0,0", "--adapt", _ADAPT], "give different numbers of steps"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.py", experiment(tmp_path / "w"))
    assert main(["ablate", *arguments, "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_the_data_of_a_run_is_not_changed_by_a_test_split() -> None:
    of = experiment("w")
    test = dataclasses.replace(Data(), eval_split="test", eval="other.jsonl")
    assert points.tested_on(of, Settings(test=test)).data.train == of.data.train


def test_ensembles_of_all_subsets(tmp_path: Path) -> None:
    """One member is itself, all of them are the vote that ``eval`` reports; kept for a second."""
    of = experiment(tmp_path, {**SHORT, "training.seeds": (0, 1, 2)})
    methods = (Value(name="prompt_tuning"),)
    done = ensembles(of, methods, Settings(), quiet=True)
    assert done.results is not None
    written = json.loads((tmp_path / "ensemble.json").read_text())
    scores = {(p["line"], p["value"]): p["scores"] for p in written["points"]}
    result = evaluate(of, prompts=[tmp_path / "method_prompt_tuning"])
    each = [one["accuracy"] for one in result.per_prompt]
    assert scores["prompts: vote", "1"] == scores["prompts: mean of probabilities", "1"] == each
    assert result.ensemble is not None
    assert scores["prompts: vote", "3"] == [result.ensemble["accuracy"]]
    assert [len(scores["prompts: vote", str(n)]) for n in (1, 2, 3)] == [3, 3, 1]
    assert "over all subsets of 3 members" in (tmp_path / "ensemble.md").read_text()
    file = tmp_path / "method_prompt_tuning" / SCORES
    kept = json.loads(file.read_text())
    kept["scores"]["vote"][0] = [1.0, 2.0, 3.0]
    file.write_text(json.dumps(kept))
    again = ensembles(of, methods, Settings(), quiet=True)
    assert again.results is not None and again.results.cells[0].scores == (1.0, 2.0, 3.0)
    data = file.with_name(points.DATA)
    data.write_text(data.read_text().replace("train", "other"))
    with pytest.raises(UserError, match="has a run on other data or weights"):
        ensembles(of, methods, Settings(), quiet=True)
    with pytest.raises(UserError, match="trains nothing"):
        ensembles(of, (Value(name="none"),), Settings(), quiet=True)


def test_the_mean_of_probabilities_hears_how_sure_members_are() -> None:
    """Two members are slightly for one label, and one is sure of the other."""
    sure = {"red": 0.9, "blue": 0.1, "green": 0.0001}
    unsure = {"red": 0.4, "blue": 0.5, "green": 0.1}
    members = Predictions(
        texts_EN=[["red"], ["blue"], ["blue"]],
        log_probs_EN=[
            [{label: math.log(p) for label, p in one.items()}] for one in (sure, unsure, unsure)
        ],
    )
    assert ensemble_study.vote((0, 1, 2), members, 0) == "blue"
    assert ensemble_study._most_probable((0, 1, 2), members, 0) == "red"
    assert ensemble_study._most_probable((1, 2), members, 0) == "blue"
    # Each member's probabilities are normalized: what is beside the labels does not count.
    flat, clear = {"red": 0.4, "blue": 0.3, "green": 0.3}, {"red": 0.38, "blue": 0.5, "green": 0.12}
    members = Predictions(
        texts_EN=[["red"], ["blue"]],
        log_probs_EN=[
            [{label: math.log(p) - 7 for label, p in flat.items()}],
            [{label: math.log(p) for label, p in clear.items()}],
        ],
    )
    assert ensemble_study._most_probable((0, 1), members, 0) == "blue"


def test_parts_of_a_cell_share_its_search_and_claim_no_ensemble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a limit or a full device divides a group: one learning rate, no vote of a part."""
    trained: list[tuple[str, tuple[int, ...], tuple[float, ...]]] = []

    def train(of: Any, **options: Any) -> Any:
        del options
        training = of.training
        folder = str(Path(training.workdir).relative_to(tmp_path))
        if len(training.seeds) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        trained.append((folder, training.seeds, training.learning_rates))
        # Each seed would choose another rate.
        scores = [
            -abs(rate - (0.1, 0.3, 1.0)[training.seeds[0]]) for rate in training.learning_rates
        ]
        best = tuple(Best(step=2, metrics={"accuracy": score}) for score in scores or [50.0] * 2)
        names = member_names(of)
        return SimpleNamespace(
            finished=True,
            best=best[: len(names)],
            best_tuned={"prompt": np.zeros((1, 2))},
            workdir=of.training.workdir,
        )

    def votes(result: Any, metric: str, group: Any) -> dict[str, Any]:
        del result, metric
        return {"split": "s", "ensembles": {points.cell_key(group.points[0].value, None): 99.0}}

    per_prompt = [{"accuracy": 50.0}] * 2
    monkeypatch.setattr(points, "train", train)
    monkeypatch.setattr(points, "_scores_of", votes)
    monkeypatch.setattr(
        points,
        "evaluate",
        lambda of, prompts: SimpleNamespace(per_prompt=per_prompt[: len(of.training.seeds)]),
    )
    for number, at_once in enumerate((2, 0)):
        trained.clear()
        of = experiment(tmp_path / str(number), {**SHORT, "training.seeds": (0, 1, 2)})
        settings = Settings(search=True, at_once=at_once, test=of.data)
        results = ablate(of, grid("method", "prompt_tuning"), settings, quiet=True).results
        assert results is not None
        (cell,) = results.cells
        assert cell.chosen == "rate 0.1" and cell.ensemble is None
        assert len(cell.scores) == 3
        root = f"{number}/method_prompt_tuning"
        searches = [
            (f"{root}/search_0_to_1", (0, 0), (0.1, 0.3)),
            (f"{root}/search_2_to_2", (0,), (1.0,)),
        ]
        seeds = [(f"{root}_0_to_1/seeds", (0, 1), ()), (f"{root}_2_to_2/seeds", (2,), ())]
        assert trained == [*searches, seeds[0], *searches, seeds[1]]


def test_every_metric_of_a_table_is_named() -> None:
    of = experiment("w", SHORT)
    lengths = grid("length", "1", "3")
    result = {
        "members": [{"validation": 1.0}, {"validation": 2.0}],
        "direction": "max",
        "split": "validation",
        "majority": None,
        "ensembles": {},
        "chosen": "",
        "trained": 1,
        "model_parameters": 1,
    }
    kept = [
        (group, {**result, "metric": metric})
        for group, metric in zip(lengths.groups(of, (0, 1)), ("accuracy", "f1"), strict=True)
    ]
    assert run._results(of, lengths, kept, Settings(), 2).metric == "accuracy, f1"


def test_adapted_models_of_another_config_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretrain(of: Any, **options: Any) -> Any:
        del options
        trained.append(of.training.steps)
        claim(Path(of.training.workdir), of)
        return SimpleNamespace(stopped_by=0)

    def export(run: Path, place: str) -> None:
        del run
        Path(place).mkdir()
        (Path(place) / CONFIG).write_text("{}")

    trained: list[int] = []
    monkeypatch.setattr(adaptation, "pretrain", pretrain)
    monkeypatch.setattr(adaptation, "export_model", export)
    of = experiment("", {"data.objectives": ("prefix_lm",)})
    models = {0: of.model.name_or_path} | {n: str(tmp_path / f"steps_{n}") for n in (2, 4)}
    for _ in range(2):
        found = adaptation.adapted_models(of, of.model, (4, 0, 2), tmp_path, quiet=True)
        assert found == (models, 0) and trained == [2, 4]
    other = experiment("", {"data.objectives": ("prefix_lm",), "optimizer.learning_rate": 1.0})
    with pytest.raises(UserError, match=r"optimizer\.learning_rate"):
        adaptation.adapted_models(other, of.model, (0, 2, 4), tmp_path, quiet=True)
    with pytest.raises(UserError, match=r"model\.name_or_path"):
        adaptation.adapted_models(of, Model(name_or_path="tiny"), (0, 2), tmp_path, quiet=True)


def test_notes_name_what_each_run_had(tmp_path: Path) -> None:
    each = [experiment(tmp_path, {"training.steps": steps}) for steps in (1000, 20, 20)]
    (note,) = run._notes(each, Settings())
    assert note.startswith(f"1,000, 20 steps of {each[0].training.batch_size} examples")
