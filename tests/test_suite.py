"""A suite of tasks from small official files: what it prints and keeps, stopped anywhere."""

import json
import os
import random
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.data.tasks.registry import get_mixture
from prompt_tuning_jax.data.tasks.t5_tasks.metrics import SUPER_GLUE_METRICS, super_glue_score
from prompt_tuning_jax.data.tasks.t5_tasks.registry import FORMS
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import PromptTuning
from prompt_tuning_jax.studies import runs as command
from prompt_tuning_jax.studies import suite as suites
from prompt_tuning_jax.studies.runs import suite, with_seeds
from prompt_tuning_jax.training import build
from tests import tiny_run
from tests.tiny_run import experiment, tree_bytes, write_config, write_rows
from tests.watched_runs import watched_runs

SETTINGS: dict[str, Any] = {
    "data": Data(inputs_length=24, targets_length=20),
    "training.seeds": (0, 1),
    "training.steps": 2,
    "training.eval_every": 2,
    "training.save_every": 2,
}
RTE, CB, BOOLQ = (f"taskless_super_glue_{short}_v102" for short in ("rte", "cb", "boolq"))


def text(draw: random.Random) -> str:
    return " ".join(draw.choices(tiny_run.WORDS, k=3))


def write_rte(folder: Path, *, seed: int = 0) -> Path:
    for number, split in enumerate(("train", "val")):
        draw = random.Random(10 * seed + number)
        rows = [
            {
                "premise": text(draw),
                "hypothesis": text(draw),
                "label": "entailment" if i % 3 else "not_entailment",
                "idx": i,
            }
            for i in range(9)
        ]
        write_rows(folder / f"RTE/{split}.jsonl", rows)
    return folder


def write_cb(folder: Path) -> Path:
    labels = ("contradiction", "contradiction", "entailment", "neutral")
    for split in ("train", "val"):
        draw = random.Random(split)
        rows = [
            {"premise": text(draw), "hypothesis": text(draw), "label": labels[i % 4], "idx": i}
            for i in range(8)
        ]
        write_rows(folder / f"CB/{split}.jsonl", rows)
    return folder


def write_wsc(folder: Path) -> Path:
    for split in ("train", "val"):
        draw = random.Random(split)
        rows = []
        for i in range(6):
            words = [*draw.choices(tiny_run.WORDS, k=4), "he", "ran"]
            target = {
                "span1_index": 0,
                "span1_text": words[0],
                "span2_index": 4,
                "span2_text": "he",
            }
            row = {"text": " ".join(words), "target": target, "label": i % 3 == 0, "idx": i}
            rows.append(row)
        write_rows(folder / f"WSC/{split}.jsonl", rows)
    return folder


def write_boolq(folder: Path) -> Path:
    draw = random.Random(4)
    passages = [text(draw) for _ in range(12)]
    rows = [
        {"question": text(draw), "passage": passages[i // 2], "label": i % 3 > 0, "idx": i}
        for i in range(24)
    ]
    write_rows(folder / "BoolQ/val.jsonl", rows)
    return folder


def base(workdir: Path, data_dir: Path, changes: Mapping[str, Any] | None = None) -> Experiment:
    own = experiment(workdir, {**SETTINGS, **(changes or {})})
    return replace(own, data=replace(own.data, data_dir=str(data_dir)))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is trained and evaluated, in order."""
    return watched_runs(monkeypatch, lambda name, of: f"{name} {Path(of.training.workdir).name}")


def test_a_suite_end_to_end_and_again(
    tmp_path: Path, counted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir = write_cb(write_rte(tmp_path / "data"))
    of = base(tmp_path / "w", data_dir)
    first = suite(of, "super_glue", tasks=["rte", "cb"])
    assert counted == [f"{what} {name}" for name in (CB, RTE) for what in ("train", "evaluate")]
    out = capsys.readouterr().out
    # What is known of the data is said once, and stands in the file.
    about = [line for line in first.lines if line.startswith("- ")]
    sizes = [line.removeprefix("- ") for line in about if "examples, inputs of" in line]
    assert len(sizes) == 4 and all(out.count(line) == 1 for line in sizes)
    assert all(line in out for line in first.lines if line not in about)
    assert "2 of 8 tasks and not the SuperGLUE score; missing: boolq, copa" in out
    markdown = (tmp_path / "w/taskless_super_glue.md").read_text()
    assert all(line in markdown for line in first.lines)
    written = json.loads((tmp_path / "w/taskless_super_glue.json").read_text())
    assert written == json.loads(json.dumps(first.scores)) and not written["complete"]
    cb, rte = written["tasks"]["cb"], written["tasks"]["rte"]
    for column in suites.COLUMNS:
        share = (cb[column]["mean_3class_f1"] + cb[column]["accuracy"]) / 2
        assert written["score"][column] == pytest.approx((share + rte[column]["accuracy"]) / 2)
    # Half are contradictions; two thirds entailments.
    assert cb["majority"]["accuracy"] == 50 and rte["majority"]["accuracy"] == pytest.approx(
        200 / 3
    )
    assert cb["majority"]["mean_3class_f1"] == pytest.approx(100 * (2 / 3) / 3)
    assert rte["mean"]["accuracy"] == pytest.approx(
        sum(own["accuracy"] for own in rte["per_prompt"]) / 2
    )
    row = next(line for line in first.lines if line.startswith("| rte "))
    assert row.split("|")[-2].strip() == "100.0" and rte["cut"] == 100  # of 24 tokens
    assert rte["train_examples"] == 9 and "2,490" in markdown

    counted.clear()
    before = tree_bytes(tmp_path / "w")
    again = suite(of, "super_glue", tasks=["cb", "rte"], quiet=True)
    assert counted == [] and again.lines == first.lines
    assert tree_bytes(tmp_path / "w") == before


def test_killed_between_and_resumed(
    tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in the second task's training: the first is not done again, the second goes on."""
    data_dir = write_cb(write_rte(tmp_path / "data"))
    changes = {"training.steps": 3, "training.save_every": 1, "training.eval_every": 3}
    of = base(tmp_path / "w", data_dir, changes)
    build_step = build.build_step
    steps: list[int] = []

    def with_signal(*args: Any, **options: Any) -> Any:
        state, step, rates = build_step(*args, **options)

        def watched(*arguments: Any) -> Any:
            steps.append(1)
            if len(steps) == 5:  # the second of the second task
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments)

        return state, watched, rates

    monkeypatch.setattr(build, "build_step", with_signal)
    stopped = suite(of, "super_glue", tasks=["rte", "cb"], quiet=True)
    assert stopped.stopped_by == signal.SIGTERM and list(stopped.scores["tasks"]) == ["cb"]
    assert counted == [f"train {CB}", f"evaluate {CB}", f"train {RTE}"]
    assert len(steps) == 5
    table = json.loads((tmp_path / "w/taskless_super_glue.json").read_text())
    assert list(table["tasks"]) == ["cb"]

    counted.clear()
    done = suite(of, "super_glue", tasks=["rte", "cb"], quiet=True)
    assert counted == [f"train {RTE}", f"evaluate {RTE}"] and done.stopped_by == 0
    assert len(steps) == 6
    assert done.scores["tasks"]["cb"] == stopped.scores["tasks"]["cb"]


def test_a_signal_in_the_last_step_stops_the_suite_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = write_cb(write_rte(tmp_path / "data"))
    seen: list[str] = []

    def train(of: Experiment, **_: Any) -> Any:
        seen.append(of.data.task)
        return SimpleNamespace(finished=True, stopped_by=int(signal.SIGINT))

    monkeypatch.setattr(command, "train", train)
    result = suite(base(tmp_path / "w", data_dir), "super_glue", tasks=["rte", "cb"], quiet=True)
    assert seen == [CB] and result.stopped_by == signal.SIGINT


def test_results_of_other_data_or_config_are_not_taken(tmp_path: Path, counted: list[str]) -> None:
    of = base(tmp_path / "w", write_rte(tmp_path / "data"))
    suite(of, "super_glue", tasks=["rte"], quiet=True)
    counted.clear()
    other = base(tmp_path / "w", tmp_path / "data", {"training.steps": 3})
    with pytest.raises(UserError, match="steps: 2 -> 3"):
        suite(other, "super_glue", tasks=["rte"], quiet=True)
    other = base(tmp_path / "w", tmp_path / "data")
    kept_file = tmp_path / "w" / RTE / command.SCORES
    whole = kept_file.read_text()
    kept_file.write_text(whole.replace(json.loads(whole)["model"], "0" * 64))
    with pytest.raises(UserError, match="another frozen model"):
        suite(of, "super_glue", tasks=["rte"], quiet=True)
    kept_file.write_text(whole[:50])
    with pytest.raises(UserError, match=r"scores.json: invalid or truncated JSON"):
        suite(of, "super_glue", tasks=["rte"], quiet=True)
    kept_file.write_text(whole)
    write_rte(tmp_path / "data", seed=1)
    with pytest.raises(UserError, match=rf"other data: {RTE}/train, {RTE}/validation"):
        suite(of, "super_glue", tasks=["rte"], quiet=True)
    assert counted == []


def test_wsc_is_written_and_scored_by_its_own_metric(tmp_path: Path) -> None:
    of = base(tmp_path / "w", write_wsc(tmp_path / "data"), {"evaluation.strategy": "rank"})
    found = suite(of, "super_glue", tasks=["wsc"], quiet=True).scores["tasks"]["wsc"]
    assert found["train_examples"] == 2  # those with the right referent
    assert set(found["mean"]) == {"accuracy"}
    full = "taskless_super_glue_wsc_and_dev_v102_simple"
    own = suites.on_task(of, full, workdir="w")
    assert (own.evaluation.strategy, own.data.targets_length) == ("greedy", 32)
    record = suites.on_task(of, "taskless_super_glue_record_v102", workdir="w")
    assert record.evaluation.strategy == "greedy"
    assert isinstance(of.method, PromptTuning) and isinstance(record.method, PromptTuning)
    assert (of.method.init, record.method.init) == ("class_labels", "sampled_vocabulary")
    assert suites.on_task(of, RTE, workdir="w").method == of.method
    assert suites.on_task(of, RTE, workdir="w").evaluation.strategy == "rank"


def test_halves_are_disjoint_and_said_not_to_be_official(tmp_path: Path) -> None:
    data_dir = write_boolq(tmp_path / "data")
    found = suites.halves(BOOLQ, str(data_dir))
    inputs = {half: {e["inputs"] for e in examples} for half, examples in found.items()}
    assert len(inputs["train"]) + len(inputs["eval"]) == 24
    passages = {half: {i.partition(" question:")[0] for i in own} for half, own in inputs.items()}
    assert not passages["train"] & passages["eval"]
    result = suite(
        base(tmp_path / "w", data_dir),
        "super_glue",
        tasks=["boolq"],
        split_validation=["boolq"],
        quiet=True,
    )
    assert result.scores["tasks"]["boolq"]["train_examples"] == len(found["train"])
    assert any("boolq does NOT use the official splits" in line for line in result.lines)
    for short in ("multirc", "record"):
        with pytest.raises(UserError, match="cannot be halved"):
            suites.halves(f"taskless_super_glue_{short}_v102", str(data_dir))


def _raise(error: Exception) -> int:
    raise error


def test_all_that_is_missing_is_said_at_once(
    tmp_path: Path,
    counted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data_dir = write_rte(tmp_path / "data")
    (data_dir / "RTE/val.jsonl").unlink()
    with pytest.raises(UserError) as error:
        suite(base(tmp_path / "w", data_dir), "super_glue", quiet=True)
    lines = str(error.value).splitlines()
    assert "nothing was trained" in lines[0]
    assert [line.strip().partition(":")[0] for line in lines[1:]] == [*SUPER_GLUE_METRICS]
    assert "RTE/val.jsonl" in str(error.value) and "RTE/train.jsonl" not in str(error.value)
    assert counted == [] and not (tmp_path / "w").exists()
    with monkeypatch.context() as patched:  # the command prints it in as many lines
        patched.setattr("prompt_tuning_jax.cli.main._main", lambda argv: _raise(error.value))
        assert main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == len(lines)
    with pytest.raises(UserError, match="cb, rte:") as error:
        suite(base(tmp_path / "w", tmp_path / "no"), "super_glue", tasks=["rte", "cb"], quiet=True)
    assert str(error.value).count("no such folder") == 1


def test_labels_too_long_are_said_before_anything_is_trained(
    tmp_path: Path, counted: list[str]
) -> None:
    data_dir = write_cb(write_rte(tmp_path / "data"))
    of = base(tmp_path / "w", data_dir, {"data": Data(inputs_length=24, targets_length=3)})
    with pytest.raises(UserError, match="targets_length") as error:
        suite(of, "super_glue", tasks=["rte", "cb"], quiet=True)
    assert "rte:" in str(error.value) and "cb:" in str(error.value) and counted == []


@pytest.mark.parametrize(
    "name, tasks, form, message",
    [
        ("superglue", (), "taskless", "did you mean 'super_glue'"),
        ("super_glue", ("rtee",), "taskless", "did you mean 'rte'"),
        ("super_glue", ("cola",), "taskless", "no 'cola'"),
        ("super_glue", ("rte", RTE), "taskless", "rte twice"),
        ("super_glue", ("rte", "super_glue_rte_v102"), "taskless", "rte twice"),
        ("super_glue", ("rte",), "taskles", "unknown form 'taskles': did you mean 'taskless'"),
    ],
)
def test_wrong_names(
    tmp_path: Path, name: str, tasks: Sequence[str], form: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        suite(base(tmp_path, tmp_path), name, tasks=tasks, form=form, quiet=True)
    with pytest.raises(UserError, match=r"^--split_validation: super_glue has no 'rt'"):
        suite(base(tmp_path, tmp_path), "super_glue", split_validation=["rt"], quiet=True)


def test_names_in_full_and_forms() -> None:
    of = suites.get_suite("super_glue")
    assert suites.chosen_tasks(of, ["rte", "cb"], form="ordinary") == {
        "cb": "super_glue_cb_v102",
        "rte": "super_glue_rte_v102",
    }
    given = ["task_index_super_glue_rte_v102", "super_glue_cb_v102_examples"]
    assert suites.chosen_tasks(of, given, form="taskless") == {
        "cb": "super_glue_cb_v102",
        "rte": "task_index_super_glue_rte_v102",
    }
    for name, suite_of in suites.SUITES.items():
        for form in FORMS:
            for full in suites.chosen_tasks(suite_of, (), form=form).values():
                assert get_mixture(full).evaluated_on("validation"), (name, full)


def all_eight(offset: float) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for number, (short, metrics) in enumerate(SUPER_GLUE_METRICS.items()):
        values = {m: 50 + offset + 3 * number + 7 * i for i, m in enumerate(metrics)}
        own = {c: {m: v + k for m, v in values.items()} for k, c in enumerate(suites.COLUMNS)}
        found[short] = {**own, "train_examples": 0, "labels": ["a"], "reports": []}
    return found


def test_the_score_is_the_leaderboards_over_all_tasks() -> None:
    of = suites.get_suite("super_glue")
    scores = all_eight(0)
    total = suites.suite_scores(of, scores)
    for column in suites.COLUMNS:
        assert total[column] == super_glue_score({s: task[column] for s, task in scores.items()})
    assert suites.table(of, scores)[-1].startswith("| SuperGLUE score ")
    assert "over all 8 tasks" in suites.coverage(of, scores)
    scores["rte"]["ensemble"] = None
    assert suites.suite_scores(of, scores)["ensemble"] is None
    assert suites.table(of, scores)[-1].rstrip(" |").endswith("-")
    del scores["wsc"]
    assert suites.table(of, scores)[-1].startswith("| mean of these ")


def test_glue_counts_all_metrics_but_the_invalid_and_no_nan() -> None:
    of = suites.get_suite("glue")
    own = {"glue_mnli_matched_v002/accuracy": 40.0, "glue_mnli_mismatched_v002/accuracy": 50.0}
    own["glue_mnli_matched_v002/invalid"] = 9.0
    scores: dict[str, dict[str, Any]] = {"mnli": dict.fromkeys(suites.COLUMNS, own)}
    assert suites.suite_scores(of, scores)["mean"] == 45
    assert "mnli_matched accuracy / mnli_mismatched accuracy" in suites.table(of, scores)[2]
    nan = suites.without_nan({"pearson_corrcoef": float("nan"), "spearman_corrcoef": 3.0})
    scores["stsb"] = dict.fromkeys(suites.COLUMNS, nan)
    assert suites.suite_scores(of, scores)["mean"] is None
    assert "- / 3.0" in suites.table(of, scores)[3]


def test_seeds_are_five_unless_given() -> None:
    one = experiment("w")
    assert with_seeds(one).training.seeds == (0, 1, 2, 3, 4)
    two = experiment("w", {"training.seeds": (3, 4)})
    assert with_seeds(two) == two


def test_the_command_refuses_fields_of_the_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.py", experiment(tmp_path / "w"))
    arguments = ["suite", "super_glue", "--config", str(config), "--workdir", str(tmp_path / "w")]
    assert main([*arguments, "--set", "data.labels=a,b"]) == 2
    assert "--set data.labels" in capsys.readouterr().err
    assert main([*arguments, "--data_dir", str(tmp_path / "no"), "--tasks", "rte"]) == 2
    assert "nothing was trained" in capsys.readouterr().err
