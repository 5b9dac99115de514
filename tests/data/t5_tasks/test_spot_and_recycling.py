"""The tasks of SPoT and of prompt recycling: names, texts, splits, and ranked labels."""

from dataclasses import replace

import pytest

from prompt_tuning_jax.data.tasks.registry import get_mixture, get_task
from prompt_tuning_jax.data.tasks.t5_tasks import recycling, spot
from prompt_tuning_jax.data.tasks.t5_tasks.split_rows import Part, with_parts
from prompt_tuning_jax.data.tasks.task import Mixture, Source, Task

PAIR = {"hypothesis": "It  rains.", "context": "Wet\nstreets.", "premise": "Sun.", "label": 2}
QUESTION = {"question": "Who?", "context": "Ann came.", "answers": ["Ann"], "qid": "7"}


@pytest.mark.parametrize(
    ("name", "row", "inputs", "targets"),
    [
        (
            "spot_anli_r2_v010",
            PAIR,
            "anli_r2 hypothesis: It rains. context: Wet streets.",
            "contradiction",
        ),
        ("spot_snli_v110", PAIR | {"label": -1}, "snli hypothesis: It rains. premise: Sun.",
         "<unk>"),
        ("spot_doc_nli_v100", PAIR | {"label": "0"}, "doc_nli hypothesis: It rains. premise: Sun.",
         "not_entailment"),
        ("spot_mrqa_news_qa_v100", QUESTION, "news_qa question: Who ? context: Ann came . ", "Ann"),
        ("spot_aeslc_v100", {"email_body": "Hi  all", "subject_line": "Hello"},
         "aeslc summarize: Hi  all", "Hello"),
        ("spot_glue_sst2_v200", {"sentence": "fine", "label": 1, "idx": 0},
         "sst2 sentence: fine", "positive"),
        ("spot_glue_mnli_validation_matched_v200",
         {"hypothesis": "a", "premise": "b", "label": 1, "idx": 0},
         "mnli hypothesis: a premise: b", "neutral"),
        ("pr:glue_sst2_v200_train", {"sentence": "fine", "label": 0, "idx": 0},
         "sentence: fine", "negative"),
        ("pr:imdb_v100_0_1_verbalizers_test", {"text": "A  film", "label": 1}, "A  film", "1"),
        ("pr:imdb_v100_negative_positive_verbalizers_test_rc", {"text": "A", "label": -1},
         "A", "UNK"),
        ("pr:glue_qqp_v200_not_spc_duplicate_duplicate_verbalizers_rc_normed",
         {"question1": "a?", "question2": "b?", "label": 0, "idx": 0},
         "question1: a? question2: b?", "not duplicate"),
    ],
)  # fmt: skip
def test_rows_become_the_texts_of_the_original(name, row, inputs, targets):
    (example,) = get_task(name).preprocess(row)
    assert (example["inputs"], example["targets"]) == (inputs, targets)


def test_every_name_of_the_original():
    names = [task.name for task in spot.TASKS]
    assert len(names) == len(set(names)) == 30
    recycled = [task.name for task in recycling.TASKS]
    assert len(recycled) == len(set(recycled)) == 45
    for short in ("cola", "sst2", "mrpc", "qqp", "stsb", "qnli", "rte", "wnli"):
        assert get_task(f"spot_glue_{short}_v200").splits == ("train", "validation", "test")


def test_mixtures_train_on_one_task_and_test_in_two_ways():
    mixture = get_mixture("pr:imdb_v100_0_1_verbalizers")
    assert [task.name for task in mixture.tasks] == ["pr:imdb_v100_0_1_verbalizers_train"]
    on = [(task.name.rpartition("verbalizers")[2], task.ranks) for task in mixture.evaluated]
    assert on == [("_test", False), ("_test_rc", True)]
    name = "pr:glue_qqp_v200_0_1_verbalizers"
    for task in (get_task(f"{name}_rc"), get_task(f"{name}_rc_normed")):
        assert task.ranks
        assert task.normalize_length == task.name.endswith("normed")
    assert (
        get_mixture("spot_glue_mnli_and_dev_v200")
        .evaluated_on("validation")[0]
        .name.endswith("validation_matched_v200")
    )


def test_parts_of_splits():
    rows = [{"n": n} for n in range(10)]
    source = Source(
        splits=("train", "test"),
        rows=lambda split, data_dir: iter(rows if split == "train" else rows[:2]),
        fingerprint=lambda split, data_dir: split,
    )
    parts = {
        "train": Part(split="train", without_last=3),
        "validation": Part(split="train", last=3),
        "dev": Part(split="test"),
    }
    changed = with_parts(source, parts)

    def of(split):
        return [row["n"] for row in changed.rows(split, "")]

    assert of("train") == [*range(7)]
    assert of("validation") == [7, 8, 9]
    assert of("dev") == [0, 1]
    assert len({changed.fingerprint(split, "") for split in changed.splits}) == 3
    longer = with_parts(source, {"train": replace(parts["train"], without_last=99)})
    assert not list(longer.rows("train", ""))


@pytest.mark.parametrize("prefix", ["mt5_", "byt5_"])
def test_names_for_other_vocabularies_are_the_same_tasks(prefix):
    for name in (
        "taskless_super_glue_rte_v102_examples",
        "super_glue_rte_v102",
        "glue_mnli_and_dev_v200_examples",
        "xsum_v110",
    ):
        assert get_mixture(prefix + name) == get_mixture(name)


def test_the_mixture_of_ordinary_tasks_in_the_original_is_named():
    for version in ("v002", "v200"):
        meant: Task | Mixture = get_mixture(f"taskless_glue_mnli_and_dev_{version}_examples")
        assert f"glue_mnli_and_dev_{version}" in meant.description
        assert all(task.name.startswith("taskless_") for task in meant.tasks)
        ordinary = get_mixture(f"glue_mnli_and_dev_{version}")
        assert "mistake" not in ordinary.description
