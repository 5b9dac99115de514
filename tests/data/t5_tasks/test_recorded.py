"""Every recorded string, id and metric value of the original, to the letter and the last digit."""

import json

import pytest

from prompt_tuning_jax.data.tasks.metrics import score
from prompt_tuning_jax.data.tasks.t5_tasks.tables import T5_TASKS
from prompt_tuning_jax.data.vocabularies.vocab import EOS_ID
from tests.data.t5_tasks.recorded_tasks import NAMES, examples_of, recorded, task_of

RESULTS = [
    *(
        f"{name}/validation"
        for name in ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
    ),
    *(f"glue_{name}/validation" for name in ("sst2", "mrpc", "mrpc_from_qqp", "rte")),
    "record/train",
    "axb/test",
    "axg/test",
]


@pytest.mark.parametrize("short", [*NAMES, "wsc"])
def test_strings_and_ids_of_both_forms(tasks_folder, t5_vocabulary, short):
    number = 0
    lines = recorded(tasks_folder / f"{short}.jsonl")
    for line in lines:
        task = task_of(short, line["split"])
        assert line["split"] in task.splits
        for form in ("ordinary", "taskless"):
            found = examples_of(line, form)
            assert len(found) == line.get("examples_in_row", len(line["examples"]))
            # Of the last row of a split, the examples beyond the first are not recorded.
            found = found[: len(line["examples"])]
            for example, expected in zip(found, line["examples"], strict=True):
                wanted = expected[form]
                assert example == {
                    "inputs": wanted["inputs"],
                    "targets": wanted["targets"],
                    **expected["features"],
                }
                for key in ("inputs", "targets"):
                    assert [*t5_vocabulary.encode(example[key]), EOS_ID] == wanted[f"{key}_ids"]
                json.dumps(example)
                number += 1
    assert number == 2 * sum(
        len(line["examples"]) for line in recorded(tasks_folder / f"{short}.jsonl")
    )
    assert number >= 40


@pytest.mark.parametrize("name", RESULTS)
def test_metric_values(tasks_folder, t5_vocabulary, results, name):
    short, _, split = name.partition("/")
    result = results[name]
    source = {"glue_mrpc_from_qqp": "glue_mrpc"}.get(short, short)
    task = task_of(short, split)
    lines = [line for line in recorded(tasks_folder / f"{source}.jsonl") if line["split"] == split]
    examples = [
        example
        for line in lines
        for example in examples_of(line, "taskless")[: len(line["examples"])]
    ][: result["n"]]
    predictions = [each["prediction"] for each in result["examples"]]
    assert [e["targets"] for e in examples] == [e["target_text"] for e in result["examples"]]

    targets = [task.postprocess(e["targets"], e, True) for e in examples]
    wanted = [e["postprocessed_target"] for e in result["examples"]]
    assert json.loads(json.dumps(targets)) == wanted

    def compared(texts):
        return [task.postprocess(t, e, False) for t, e in zip(texts, examples, strict=True)]

    plain = [
        each["prediction"] if isinstance(each, dict) and "prediction" in each else each
        for each in (e["postprocessed_prediction"] for e in result["examples"])
    ]
    assert compared(predictions) == plain
    # The original measures nothing on the diagnostics, and has no Matthews' correlation there.
    found = score(task.metrics, targets, compared(predictions))
    found.pop("matthews_corrcoef", None)
    assert found == result["metrics_from_strings"]
    if "metrics_from_token_ids" in result:
        decoded = [t5_vocabulary.decode(t5_vocabulary.encode(text)) for text in predictions]
        assert score(task.metrics, targets, compared(decoded)) == result["metrics_from_token_ids"]


def test_no_recorded_result_is_left_out(results):
    assert sorted(results) == sorted(RESULTS)


def test_the_table_agrees_with_the_registry(registry):
    """TFDS names, splits, labels, metrics and rates of every task that both have."""
    metric_names = {
        "accuracy": ["accuracy"],
        "f1_score_with_invalid": ["f1"],
        "multirc_f1_over_all_answers": ["f1"],
        "mean_group_metric.my_metric": ["exact_match"],
        "deduplicate_metric._deduplicated_metric": ["em", "f1"],
        "squad": ["em", "f1"],
        "pearson_corrcoef": ["pearson_corrcoef"],
        "spearman_corrcoef": ["spearman_corrcoef"],
    }
    number = 0
    for full_name, entry in registry["tasks"].items():
        name = full_name.removesuffix("_examples")
        for prefix in ("taskless_", "task_index_"):
            name = name.removeprefix(prefix)
        task = T5_TASKS.get(name)
        if task is None:
            continue
        number += 1
        assert task.tfds == entry["tfds"], full_name
        if entry["splits"] != "all":
            assert sorted(task.splits) == sorted(entry["splits"]), full_name
        if "label_classes" in (entry["postprocess"] or "") and "_from_" not in name:
            assert str(list(task.labels)) in entry["postprocess"], full_name
        wanted = [
            metric.removeprefix("metric_with_examples(").removesuffix(")")
            for metric in entry["metrics"]
            if "text_examples" not in metric
        ]
        if "sklearn_metrics_wrapper.fn" in wanted:
            at = wanted.index("sklearn_metrics_wrapper.fn")
            own = {"cb": "mean_3class_f1", "cola": "matthews_corrcoef"}[task.short]
            assert task.metrics[at].name == own
        elif wanted and task.benchmark != "dpr":
            names = [metric.name for metric in task.metrics]
            assert all(n in metric_names[w] for n, w in zip(names, wanted, strict=True)), full_name
    assert number > 200
    rates = {
        name: rate
        for mixture in ("super_glue_v102_proportional", "glue_v002_proportional")
        for name, rate in registry["mixtures"][mixture]["tasks"]
    }
    assert {name: T5_TASKS[name].rate for name in rates} == rates


def test_what_the_registry_has_and_the_table_has_not(registry):
    known = {
        f"{prefix}{name}{suffix}"
        for name in T5_TASKS
        for prefix in ("", "taskless_", "task_index_")
        for suffix in ("", "_examples")
    }
    missing = {name for name in registry["tasks"] if name not in known}
    missing -= {name for name in missing if "_sentinel" in name}
    assert missing == {
        "glue_wnli_v002_simple_eval",
        "squad_v010",
        "squad_v010_allanswers_span",
        "squad_v010_context_free",
    }
