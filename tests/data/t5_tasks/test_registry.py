"""The names of the 2021 code, with its splits, mixtures and rates; and examples through them."""

import json
from collections import Counter

import pytest

from prompt_tuning_jax.data.tasks.registry import get_mixture, get_task, task_names
from prompt_tuning_jax.data.tasks.t5_tasks.registry import ALIASES, TASKS, form_of
from prompt_tuning_jax.data.tasks.task import Mixture
from prompt_tuning_jax.errors import UserError
from tests.data.t5_tasks.recorded_tasks import recorded

# Those of later experiments, of tasks from elsewhere, and of none that the papers report.
LEFT_OUT = ("sentinel", "leave_one_out", "_span", "context_free", "wnli_v002_simple", "squad_v010")


def wanted(registry, kind):
    return {
        name: entry
        for name, entry in registry[kind].items()
        if name.startswith(("squad_v010_allanswers_examples", "squad_to"))
        or not any(part in name for part in LEFT_OUT)
    }


def test_every_task_is_there_with_its_splits(registry):
    tasks = wanted(registry, "tasks")
    assert len(tasks) > 170
    for name, entry in tasks.items():
        task = get_task(name)
        assert name in (task.name, f"{task.name}_examples"), name
        if entry["splits"] != "all":
            assert sorted(entry["splits"]) == sorted(task.splits), name
        has_index = "add_sentinel_to_beginning" in entry["preprocessors"]
        assert (task.index is not None) == has_index, name


def test_every_mixture_is_there_with_its_rates(registry):
    mixtures = wanted(registry, "mixtures")
    assert len(mixtures) > 30
    for name, entry in mixtures.items():
        mixture = get_mixture(name)
        # Quirk 9: these mix ordinary tasks, where those of the form are meant.
        form = form_of(name)[0] if "mnli_and_dev" in name else "ordinary"
        prefix = "" if form == "ordinary" else f"{form}_"
        expected = {prefix + task.replace("_examples", ""): r for task, r in entry["tasks"]}
        rates = dict(zip((task.name for task in mixture.tasks), mixture.rates, strict=True))
        evaluated = {task.name for task in mixture.evaluated}
        assert rates.keys() | evaluated == expected.keys(), name
        # A rate counts only for what has examples to train on.
        assert rates.items() <= expected.items(), name
        assert all("train" not in get_task(t).splits or not expected[t] for t in evaluated), name


def test_names_are_unique_and_aliases_lead_somewhere():
    names = Counter([*(task.name for task in TASKS), *ALIASES])
    assert max(names.values()) == 1
    assert set(ALIASES.values()) <= {task.name for task in TASKS}
    assert not set(ALIASES) & set(task_names())
    for alias in ALIASES:
        assert get_mixture(alias).name == ALIASES[alias]


def test_splits_decide_who_of_a_mixture_is_evaluated():
    def on(name, split):
        return [task.name for task in get_mixture(name).evaluated_on(split)]

    wsc = "taskless_super_glue_wsc_v102_simple"
    both = "taskless_super_glue_wsc_and_dev_v102_simple"
    assert [task.name for task in get_mixture(both).tasks] == [f"{wsc}_train"]
    assert on(both, "validation") == [f"{wsc}_eval"]
    assert on("glue_mnli_and_dev_v002", "validation") == [
        "glue_mnli_mismatched_v002",
        "glue_mnli_matched_v002",
    ]
    assert "mrqa_race_v100" in on("squad_to_mrqa", "validation")
    assert on("squad_to_mrqa", "nothing") == ["squad_v010_allanswers"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("super_glue_rte_v103", "did you mean 'super_glue_rte_v102'"),
        ("taskless_super_glue_rte_v102_exampels", "'taskless_super_glue_rte_v102_examples'"),
        ("copa", "super_glue_copa_v102"),
    ],
)
def test_names_that_are_nearly_right(name, hint):
    with pytest.raises(UserError, match=hint):
        get_task(name)


def test_a_mixture_is_no_task():
    with pytest.raises(UserError, match=r"mixture; name one of its tasks: super_glue_wsc.*_eval"):
        get_task("super_glue_wsc_and_dev_v102_simple")
    with pytest.raises(UserError, match="evaluated"):
        Mixture(name="m", tasks=(get_task("dpr_v001_simple"),), rates=(0,))


@pytest.mark.parametrize("short", ["boolq", "cb", "copa", "multirc", "rte", "wic", "wsc", "axb"])
def test_recorded_examples_come_from_the_complete_files(tasks_folder, shared, short):
    """By name and data_dir, in file order, as far as they are recorded."""
    lines = recorded(tasks_folder / f"{short}.jsonl")
    for split in {line["split"] for line in lines}:
        own = f"_simple_{'train' if split == 'train' else 'eval'}" if short == "wsc" else ""
        for form, prefix in (("ordinary", ""), ("taskless", "taskless_")):
            task = get_task(f"{prefix}super_glue_{short}_v102{own}_examples")
            found = list(task.load(split, str(shared / "superglue")))
            places = {json.dumps(key_of(example)): i for i, example in enumerate(found)}
            mine = [e for line in lines if line["split"] == split for e in line["examples"]]
            order = []
            for example in mine:
                key = json.dumps(key_of(example["features"]))
                text = {name: example[form][name] for name in ("inputs", "targets")}
                assert found[places[key]] == {**text, **example["features"]}
                order.append(places[key])
            assert order == sorted(order)


def key_of(example):
    return [value for name, value in sorted(example.items()) if name.startswith("idx")]


def test_data_that_is_nowhere(tmp_path, monkeypatch):
    task = get_task("super_glue_rte_v102")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    for data_dir, message in [
        ("", r"set data\.data_dir \(--data_dir\)"),
        (str(tmp_path / "no"), "no such folder"),
        (str(tmp_path), r"neither .*dataset_info\.json.* nor official files; looked for RTE/train"),
    ]:
        with pytest.raises(UserError, match=message):
            list(task.load("train", data_dir))
        with pytest.raises(UserError, match=message):
            task.fingerprint("train", data_dir)


def test_out_of_domain_sets_are_validation_as_in_the_paper(tmp_path):
    question = {"qid": "1", "question": "q?", "answers": ["a", "b"]}
    lines = [{"header": {"dataset": "RACE"}}, {"context": "c", "qas": [question]}]
    (tmp_path / "dev").mkdir()
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (tmp_path / "dev" / "RACE.jsonl").write_text(text)
    (example,) = get_task("mrqa_race_v100_examples").load("validation", str(tmp_path))
    assert example["inputs"] == "question: q ? context: c"
    assert example["answers"] == ["a", "b"]
