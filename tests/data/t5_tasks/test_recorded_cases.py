"""The recorded edge cases of the original."""

from prompt_tuning_jax.data.batching.tokenize import encode_inputs
from prompt_tuning_jax.data.tasks.metric_functions import squad as squad_scores
from prompt_tuning_jax.data.tasks.metrics import score
from prompt_tuning_jax.data.tasks.t5_tasks import metrics, postprocess
from prompt_tuning_jax.data.tasks.t5_tasks.glue_tables import GLUE
from prompt_tuning_jax.data.tasks.t5_tasks.postprocess import (
    DUPLICATE_TO_EQUIVALENT,
    EQUIVALENT_TO_DUPLICATE,
    translate,
)
from prompt_tuning_jax.data.tasks.t5_tasks.registry import make_task, preprocess_in_form
from prompt_tuning_jax.data.tasks.t5_tasks.tables import T5_TASKS
from prompt_tuning_jax.data.tasks.task import task_index_id
from prompt_tuning_jax.data.vocabularies.vocab import EOS_ID
from tests.data.t5_tasks.recorded_tasks import examples_of, recorded


def test_glue_on_hand_made_rows(cases, t5_vocabulary):
    number = 0
    for short, each_case in cases["glue_synthetic"].items():
        for task in (t for t in GLUE if t.short == short):
            for case in each_case:
                for form in ("ordinary", "taskless"):
                    (example,) = preprocess_in_form(task.preprocess, form)(case["tfds"])
                    assert example["inputs"] == case[form]
                    assert example["targets"] == case["targets"]
                    assert example["idx"] == case["tfds"]["idx"]
                    for key, ids in (("inputs", f"inputs_ids_{form}"), ("targets", "targets_ids")):
                        if ids in case:
                            assert [*t5_vocabulary.encode(example[key]), EOS_ID] == case[ids]
                number += 1
    assert number == 2 * sum(map(len, cases["glue_synthetic"].values()))


def test_dpr(cases):
    task = T5_TASKS["dpr_v001_simple"]
    for case in cases["dpr_synthetic"]:
        for form in ("ordinary", "taskless"):
            (example,) = preprocess_in_form(task.preprocess, form)(case["in"])
            assert example == {"inputs": case[form], "targets": case["targets"]}
    assert task.postprocess is None  # compared as texts
    assert cases["dpr"]["taskless_dpr_v001_simple"] == "Tom"


def test_questions_about_a_passage(cases):
    for case in cases["squad_preprocess"]:
        (example,) = T5_TASKS["squad_v010_allanswers"].preprocess(case["raw"])
        wanted = {k: v for k, v in case["out"].items() if not k.endswith("_pretokenized")}
        assert example == {"inputs": case["inputs"], "targets": case["targets"], **wanted}
    rows = [case["raw"] for case in cases["squad_preprocess"]]
    assert len(rows) == len(cases["mrqa_preprocess"])
    for row, wanted in zip(rows, cases["mrqa_preprocess"], strict=True):
        row = {**row, "answers": row["answers"]["text"], "qid": row["id"]}
        for task in T5_TASKS.values():
            if task.benchmark == "mrqa":
                (example,) = task.preprocess(row)
                assert {key: example[key] for key in wanted} == wanted


def test_wsc_with_marked_spans(cases, tasks_folder):
    rows = {
        line["tfds"][0]["idx"]: line["tfds"][0]
        for line in recorded(tasks_folder / "wsc.jsonl")
        if line["split"] == "validation"
    }
    assert len(cases["wsc_marked_val_first20"]) == 20
    for case in cases["wsc_marked_val_first20"]:
        (example,) = T5_TASKS["super_glue_wsc_v102"].preprocess(rows[case["idx"]])
        assert example == case


def test_answers_are_scored_as_squad_does(cases):
    for case in cases["squad_cases"]:
        found = squad_scores([case["answers"]], [case["prediction"]])
        assert found == {"em": case["em"], "f1": case["f1"]}, case
    answers = [case["answers"] for case in cases["squad_cases"]]
    predictions = [case["prediction"] for case in cases["squad_cases"]]
    assert squad_scores(answers, predictions) == cases["squad_all"]


def test_metrics_on_hand_made_values(cases):
    recorded_cases = cases["metric_cases"]
    simple = {
        "f1_score_with_invalid": metrics.F1_WITH_INVALID,
        "mean_3class_f1": metrics.mean_multiclass_f1(3),
        "accuracy": metrics.ACCURACY,
    }
    for name, metric in simple.items():
        for case in recorded_cases[name]:
            assert score([metric], case["t"], case["p"]) == case["out"], (name, case)
    for case in recorded_cases["multirc"]:
        targets = [{"group": group, "value": value} for group, value in case["t"]]
        predictions = [{"value": value} for value in case["p"]]
        assert score([metrics.MULTIRC_F1], targets, predictions) == case["f1"]
        assert score([metrics.MULTIRC_EXACT_MATCH], targets, predictions) == case["em"]
    for case in recorded_cases["record_dedup"]:
        targets = [{"group": tuple(group), "value": value} for group, value in case["t"]]
        predictions = [{"value": value} for value in case["p"]]
        assert score([metrics.RECORD], targets, predictions) == case["out"]
    assert set(recorded_cases) == {*simple, "multirc", "record_dedup"}


def test_texts_as_class_ids(cases):
    for case in cases["string_label_to_class_id"]:
        found = postprocess.class_id(case["in"], {}, False, labels=("False", "True"))
        assert found == case["out"], case
    for case in cases["wsc_simple_postprocess"]:
        example = {"targets": case["referent"], "label": 1}
        assert postprocess.wsc_referent(case["prediction"], example, False) == case["out"], case
    for case in cases["remove_extra_id_0"]:
        assert postprocess.without_sentinel(case["in"]) == case["out"], case


def test_transfer_between_the_paraphrase_tasks(cases):
    words = {"mrpc": DUPLICATE_TO_EQUIVALENT, "qqp": EQUIVALENT_TO_DUPLICATE}
    for name, recorded_case in cases["transfer"].items():
        task = T5_TASKS[name.removesuffix("_examples")]
        assert list(task.splits) == recorded_case["splits"]
        short = name.split("_")[1]
        for case in recorded_case.get("cases", ()):
            assert translate(case["in"], words[short]) == case["translated"], case
            assert task.postprocess(case["in"], {}, False) == case["out"], case
        for case in recorded_case.get("as_target", ()):
            assert task.postprocess(case["in"], {}, True) == case["out"], case
        if "metric" in recorded_case:  # the original raises; the ids are what it meant
            assert [task.postprocess(t, {}, False) for t in task.labels] == [0, 1]


def test_task_index(cases, t5_vocabulary):
    for benchmark, indices in cases["task_index"].items():
        for short, index in indices.items():
            short = short.removesuffix(".fixed")
            found = {
                t.index for t in T5_TASKS.values() if (t.benchmark, t.short) == (benchmark, short)
            }
            assert found == {index}, (benchmark, short)
    for case in cases["task_index_examples"]:
        name = case["task"].removeprefix("task_index_")
        task = make_task(T5_TASKS[name], "task_index")
        (ids,) = encode_inputs(t5_vocabulary, [case["inputs_pretokenized"]], index=task.index)
        assert ids == case["inputs_ids"]


def test_the_task_index_form_starts_from_the_taskless_text(cases, tasks_folder):
    by_text = {case["inputs_pretokenized"]: case for case in cases["task_index_examples"]}
    seen = set()
    for short in ("rte", "wsc", "glue_sst2"):
        for line in recorded(tasks_folder / f"{short}.jsonl"):
            for example in examples_of(line, "task_index"):
                if case := by_text.get(example["inputs"]):
                    assert task_index_id(32_100, example["task_index"]) == case["inputs_ids"][0]
                    seen.add(example["inputs"])
    assert len(seen) == 5  # the sixth is of an empty sentence


def test_the_vocabulary(cases, t5_vocabulary):
    wanted = cases["vocab"]
    assert t5_vocabulary.size == wanted["vocab_size"]
    assert t5_vocabulary.encode("<extra_id_0>") == wanted["extra_id_0"]
    assert t5_vocabulary.encode("<extra_id_99>") == wanted["extra_id_99"]
    assert [wanted["eos"]] == [EOS_ID]
    for case in cases["vocab_cases"]:
        assert t5_vocabulary.encode(case["text"]) == case["ids"], case
        assert t5_vocabulary.decode(case["ids"]) == case["decoded"], case


def test_cut_examples_keep_the_end_of_sequence(cases, tasks_folder, t5_vocabulary):
    whole = {
        tuple(e["taskless"]["inputs_ids"][:31])
        for line in recorded(tasks_folder / "boolq.jsonl")
        for e in line["examples"]
    }
    for case in cases["truncation"]:
        length = case["sequence_length"]["inputs"]
        assert tuple(case["inputs_ids"][: length - 1]) in whole
        assert case["inputs_ids"][length - 1 :] == [EOS_ID]
        assert case["targets_ids"] == [EOS_ID]


def test_every_kind_of_case_is_tried(cases):
    assert set(cases) == {
        "transfer",
        "dpr",
        "squad_cases",
        "squad_all",
        "squad_preprocess",
        "mrqa_preprocess",
        "wsc_simple_postprocess",
        "string_label_to_class_id",
        "remove_extra_id_0",
        "metric_cases",
        "glue_synthetic",
        "dpr_synthetic",
        "wsc_marked_val_first20",
        "task_index",
        "vocab",
        "task_index_examples",
        "vocab_cases",
        "truncation",
    }
