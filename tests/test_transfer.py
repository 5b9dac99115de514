"""A task learned and others tried with it, by prompt tuning and by model tuning."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.data.tasks.selection import build_mixture
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import FullTuning, PromptTuning
from prompt_tuning_jax.studies import runs as command
from prompt_tuning_jax.studies import suite as suites
from prompt_tuning_jax.studies import transfer
from prompt_tuning_jax.studies.runs import try_transfer
from tests import tiny_run
from tests.tiny_run import experiment, write_rows
from tests.watched_runs import watched_runs

SETTINGS: dict[str, Any] = {
    "data": Data(inputs_length=24, targets_length=6),
    "training.seeds": (0, 1),
    "training.steps": 1,
    "training.eval_every": 1,
    "training.save_every": 1,
}
SQUAD = "taskless_squad_v010_allanswers"
DROP = "taskless_mrqa_drop_v100"
FROM_QQP = "taskless_glue_mrpc_from_qqp_v002"


def words(draw: random.Random, number: int = 4) -> str:
    return " ".join(draw.choices(tiny_run.WORDS, k=number))


def write_questions(folder: Path) -> Path:
    """SQuAD's two files and DROP's."""
    draw = random.Random(0)
    for name in ("train", "dev"):
        paragraphs = []
        for i in range(4):
            context = words(draw)
            answer = {"text": context.split()[1], "answer_start": 4}
            qas = [{"id": f"{name}{i}", "question": words(draw, 2), "answers": [answer]}]
            paragraphs.append({"context": context, "qas": qas})
        file = folder / f"squad/{name}-v1.1.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    rows: list[dict[str, Any]] = [{"header": {"dataset": "DROP", "split": "dev"}}]
    for i in range(3):
        context = words(draw)
        qas = [{"qid": str(i), "question": words(draw, 2), "answers": [context.split()[0]]}]
        rows.append({"context": context, "qas": qas})
    write_rows(folder / "mrqa/DROP.jsonl", rows)
    return folder


def write_paraphrases(folder: Path) -> Path:
    draw = random.Random(1)
    heading = {
        "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    }
    for task, first in heading.items():
        for split in ("train", "dev"):
            lines = [first]
            for i in range(6):
                label = str(int(i % 3 > 0))
                sentences = [words(draw), words(draw)]
                ids = [str(i), str(i), str(i)]
                fields = (
                    [*ids, *sentences, label] if task == "QQP" else [label, *ids[:2], *sentences]
                )
                lines.append("\t".join(fields))
            file = folder / f"glue/{task}/{split}.tsv"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{line}\n" for line in lines))
    return folder


def base(workdir: Path, data_dir: Path) -> Experiment:
    of = experiment(workdir, SETTINGS)
    return replace(of, data=replace(of.data, data_dir=str(data_dir)))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is trained and evaluated, in order."""
    return watched_runs(
        monkeypatch, lambda name, of: f"{name} {Path(of.training.workdir).name} {of.data.task}"
    )


def test_from_squad_to_another_set_by_both_methods(tmp_path: Path, counted: list[str]) -> None:
    of = base(tmp_path / "w", write_questions(tmp_path / "data"))
    done = try_transfer(of, "squad", ["drop"], quiet=True)
    each = [
        f"{what} {folder} {task}"
        for folder in ("prompt_tuning", "seed_0", "seed_1")
        for what, task in (("train", SQUAD), ("evaluate", SQUAD), ("evaluate", DROP))
    ]
    assert counted == each
    written = json.loads((tmp_path / "w/squad_to_drop.json").read_text())
    for method in transfer.METHODS:
        assert [len(written["scores"][method][task]) for task in (SQUAD, DROP)] == [2, 2]
    markdown = (tmp_path / "w/squad_to_drop.md").read_text()
    assert all(line in markdown for line in done.lines)
    assert "| squad " in done.lines[2] and "| drop " in done.lines[4]
    assert "±" in done.lines[2] and "majority" not in done.lines[0]

    # With scores lost, evaluations alone are done again; then nothing.
    counted.clear()
    file = tmp_path / "w" / SQUAD / "prompt_tuning" / command.SCORES
    kept = json.loads(file.read_text())
    del kept["scores"][DROP]
    file.write_text(json.dumps(kept))
    again = try_transfer(of, "squad", ["drop"], quiet=True)
    assert counted == [f"train prompt_tuning {SQUAD}", f"evaluate prompt_tuning {DROP}"]
    assert again.lines == done.lines
    counted.clear()
    assert try_transfer(of, "squad", ["drop"], quiet=True).lines == done.lines
    assert counted == []


@pytest.mark.parametrize("direction", ["taskless", "ordinary"])
def test_labels_are_translated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    """Prompts alone; what a QQP prompt says of MRPC is scored in MRPC's words."""
    prefix = "" if direction == "ordinary" else "taskless_"
    of = base(tmp_path / "w", write_paraphrases(tmp_path / "data"))
    of = replace(of, data=replace(of.data, targets_length=24))

    def train(of: Experiment, **_: Any) -> Any:
        return SimpleNamespace(finished=True, stopped_by=0)

    def evaluate(of: Experiment, *, prompts: Any) -> Any:
        task = build_mixture(of.data).evaluated_on("validation")[0]
        assert task.labels == ("not_duplicate", "duplicate")
        examples = list(task.load("validation", of.data.data_dir))
        scores = task.score(examples, ["duplicate"] * len(examples))
        per_prompt = [scores, scores]
        return SimpleNamespace(
            names=("a", "b"),
            per_prompt=per_prompt,
            mean=scores,
            best=scores,
            ensemble=None,
            split="validation",
            title="validation",
        )

    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(command, "evaluate", evaluate)
    done = try_transfer(of, "qqp", ["mrpc"], methods=["prompt_tuning"], form=direction, quiet=True)
    target = done.scores["summary"][f"{prefix}glue_mrpc_from_qqp_v002"]
    assert target["accuracy"]["prompt_tuning"]["mean"] == pytest.approx(200 / 3)
    assert target["f1"]["prompt_tuning"] == {
        "mean": pytest.approx(80),
        "std": 0,
        "seeds": 2,
    }
    # The most frequent target of QQP is MRPC's most frequent one, too.
    assert done.scores["majority"][f"{prefix}glue_mrpc_from_qqp_v002"]["accuracy"] == pytest.approx(
        200 / 3
    )
    assert any(line.startswith("| qqp ") and "| mrpc " in line for line in done.lines)


def test_what_the_summary_computes() -> None:
    scores: dict[str, dict[str, list[dict[str, float | None]]]] = {
        "prompt_tuning": {DROP: [{"f1": 60.0, "invalid": 1.0}, {"f1": 64.0, "invalid": 0.0}]},
        "model_tuning": {DROP: [{"f1": 50.0, "invalid": 0.0}]},
    }
    found = transfer.summary(scores)[DROP]
    assert set(found) == {"f1"}
    assert found["f1"]["prompt_tuning"] == {
        "mean": 62.0,
        "std": pytest.approx(8**0.5),
        "seeds": 2,
    }
    assert found["f1"]["model_tuning"] == {"mean": 50.0, "std": None, "seeds": 1}
    assert found["f1"]["difference"] == 12
    rows = transfer.table({DROP: found}, source=SQUAD, methods=transfer.METHODS, majority={})
    assert [cell.strip() for cell in rows[2].strip("|").split("|")] == [
        "squad",
        "drop",
        "f1",
        "50.0",
        "62.0 ± 2.8",
        "+12.0",
    ]
    scores["prompt_tuning"][DROP][1]["f1"] = None
    assert transfer.summary(scores)[DROP]["f1"]["difference"] is None


def test_a_target_with_a_labeled_test_split_alone(tmp_path: Path) -> None:
    of = replace(base(tmp_path, tmp_path), data=replace(base(tmp_path, tmp_path).data, task=""))
    axb = "taskless_super_glue_axb_v102"
    assert transfer.target_tasks([axb], source="super_glue_rte_v102", form="taskless") == (axb,)
    on = suites.on_task(of, axb, workdir=str(tmp_path / "w"))
    assert on.data.eval_split == "test" and on.data.train_split == "train"
    row = {"sentence1": "a", "sentence2": "b", "idx": 0, "label": "entailment"}
    write_rows(tmp_path / "AX-b/AX-b.jsonl", [row])
    assert list(suites.data_of(on, training=False)) == [f"{axb}/test"]
    del row["label"]
    write_rows(tmp_path / "AX-b/AX-b.jsonl", [row])
    with pytest.raises(UserError, match="its test split has no labels"):
        suites.data_of(on, training=False)
    report = transfer.Report(source=SQUAD, targets=[axb], seeds=[0])
    scores = {"per_prompt": [{"accuracy": 50.0}], "labels": [], "reports": [], "split": "test"}
    report.add("prompt_tuning", {axb: scores})
    assert report.lines()[-1] == "axb: evaluated on its test split, because it has no other."


def test_names() -> None:
    assert transfer.source_task("squad", form="taskless") == SQUAD
    assert transfer.source_task("wsc", form="ordinary") == "super_glue_wsc_and_dev_v102_simple"
    assert transfer.source_task("mnli", form="taskless") == "taskless_glue_mnli_and_dev_v002"
    to = transfer.target_tasks(["mrqa"], source=SQUAD, form="taskless")
    assert len(to) == 6 and DROP in to
    qqp = transfer.source_task("qqp", form="taskless")
    assert transfer.target_tasks(["mrpc"], source=qqp, form="taskless") == (FROM_QQP,)
    mrpc = transfer.source_task("mrpc", form="ordinary")
    translated = "glue_qqp_from_mrpc_v002"
    assert transfer.target_tasks(["qqp"], source=mrpc, form="ordinary") == (translated,)
    rte, qnli = "super_glue_rte_v102", "glue_qnli_v002"
    assert transfer.target_tasks(["qnli"], source=rte, form="ordinary") == (qnli,)


@pytest.mark.parametrize(
    "source, targets, message",
    [
        ("squadd", ["mrqa"], "unknown task 'squadd'"),
        ("rte", ["qnli"], "ambiguous: .*super_glue_rte.* and .*glue_rte.*full name"),
        ("drop", ["squad"], "no training split"),
        ("squad", ["rrace"], "unknown task 'rrace'"),
        ("squad", ["mrqa", "drop"], "twice"),
        ("squad", [], "--to is empty"),
        ("squad", ["cola"], "labels are unacceptable, acceptable, and those of .* free text"),
        ("boolq", ["cb"], "choose a task with the same labels"),
    ],
)
def test_wrong_names(tmp_path: Path, source: str, targets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        try_transfer(base(tmp_path, tmp_path), source, targets, quiet=True)


def test_wrong_methods(tmp_path: Path) -> None:
    of = base(tmp_path, tmp_path)
    with pytest.raises(UserError, match="did you mean 'model_tuning'"):
        try_transfer(of, "squad", ["drop"], methods=["model_tunig"], quiet=True)
    with pytest.raises(UserError, match="PromptTuning"):
        try_transfer(replace(of, method=FullTuning()), "squad", ["drop"], quiet=True)


def test_missing_targets_are_said_at_once(tmp_path: Path, counted: list[str]) -> None:
    of = base(tmp_path / "w", write_questions(tmp_path / "data"))
    with pytest.raises(UserError, match="nothing was trained") as error:
        try_transfer(of, "squad", ["mrqa"], quiet=True)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 5 and not any("drop" in line for line in lines)
    assert counted == [] and not (tmp_path / "w").exists()


def test_model_tuning_is_one_model_at_a_time_by_its_own_recipe(tmp_path: Path) -> None:
    of = base(tmp_path, tmp_path)
    runs = list(transfer.runs_of(of, SQUAD, [DROP]))
    assert [run.experiment.training.seeds for run in runs] == [(0, 1), (0,), (1,)]
    assert isinstance(runs[0].experiment.method, PromptTuning)
    trainable = runs[1].experiment
    assert trainable.method == FullTuning() and trainable.optimizer.learning_rate == 1e-3
    assert trainable.optimizer.multiply_by_parameter_scale
    assert trainable.training.steps == of.training.steps
    assert len({run.experiment.training.workdir for run in runs}) == 3
