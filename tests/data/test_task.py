import datetime
import functools
import subprocess
import sys

import numpy as np
import pytest

from prompt_tuning_jax.data.tasks import registry as registry_module
from prompt_tuning_jax.data.tasks.metrics import get_metric
from prompt_tuning_jax.data.tasks.registry import get_mixture, get_task, register, task_names
from prompt_tuning_jax.data.tasks.task import (
    Mixture,
    Source,
    Task,
    as_mixture,
    with_targets_prefix,
)
from prompt_tuning_jax.errors import UserError

SOURCE = Source(
    splits=("train", "test"),
    rows=lambda split, data_dir: [{"a": 1, "split": split}, {"a": 2, "split": split}],
    fingerprint=lambda split, data_dir: f"v1 {data_dir}",
)


def twice(row):
    return [{"inputs": f"{row['split']} {row['a']}", "targets": t} for t in ("x", "y")]


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(registry_module, "_registered", {})


def make(name="mine", **fields):
    return Task(name=name, source=SOURCE, **{"preprocess": twice, **fields})


def test_a_row_may_give_several_examples_or_none():
    assert [e["inputs"] for e in make().load("test")] == ["test 1", "test 1", "test 2", "test 2"]
    assert list(make(preprocess=lambda row: []).load("test")) == []


def test_an_unknown_split_is_named_with_those_there_are():
    for use in (lambda t: list(t.load("tests")), lambda t: t.fingerprint("tests")):
        with pytest.raises(UserError, match=r"no split 'tests': did you mean 'test'.*train"):
            use(make())


def test_examples_must_be_text():
    bad = make(preprocess=lambda row: [{"inputs": "a", "targets": row["a"]}])
    with pytest.raises(UserError, match="example 0: 'targets' must be text, not int"):
        list(bad.load("train"))


@pytest.mark.parametrize("value", [np.int64(3), [np.float32(1)], {1, 2}, datetime.date(2020, 1, 1)])
def test_the_fields_of_examples_must_be_json(value):
    bad = make(preprocess=lambda row: [{"inputs": "a", "targets": "b", "more": value}])
    with pytest.raises(UserError, match=f"'more' has a value of type {type(value).__name__}"):
        list(bad.load("train"))
    plain = {"inputs": "a", "targets": "b", "more": [1, 2.5, None, {"x": [True, float("nan")]}]}
    assert next(make(preprocess=lambda row: [plain]).load("train")) == plain


def test_the_fingerprint_changes_with_rows_split_name_and_preprocessor():
    def prefixed(prefix):
        return make(preprocess=functools.partial(twice, prefix))

    def closed_over(word):
        return make(preprocess=lambda row: [{"inputs": word, "targets": word}])

    assert make().fingerprint("train") == make().fingerprint("train")
    assert closed_over("a").fingerprint("train") == closed_over("a").fingerprint("train")
    different = [
        make().fingerprint("train"),
        make().fingerprint("test"),
        make().fingerprint("train", "elsewhere"),
        make(name="other").fingerprint("train"),
        prefixed("a").fingerprint("train"),
        prefixed("b").fingerprint("train"),
        closed_over("a").fingerprint("train"),
        closed_over("b").fingerprint("train"),
    ]
    assert len(set(different)) == len(different)


def test_the_fingerprint_changes_when_the_module_of_the_preprocessor_is_edited(tmp_path):
    path = tmp_path / "their_tasks.py"

    def fingerprint(text):
        path.write_text(text)
        namespace: dict = {}
        exec(compile(text, str(path), "exec"), namespace)
        return make(preprocess=namespace["preprocess"]).fingerprint("train")

    code = "def helper(x):\n    return x\n\ndef preprocess(row):\n    return helper([])\n"
    assert fingerprint(code) == fingerprint(code)
    assert fingerprint(code) != fingerprint(code.replace("return x", "return x * 2"))


NOTEBOOK = """
SUFFIXES = {"a": 1}

def helper(x):
    return [one + "b" for one in x if one in {"a", "c", "d"}]

def preprocess(row):
    return [{"inputs": y, "targets": "x"} for y in helper(SUFFIXES)]
"""


@pytest.mark.parametrize(
    ("old", "new"), [('"targets": "x"', '"targets": "y"'), ('"b"', '"c"'), ('"a": 1', '"c": 1')]
)
def test_the_fingerprint_changes_when_code_without_a_file_is_edited(old, new):
    def fingerprint(text):
        namespace: dict = {"__name__": "__main__"}
        exec(compile(text, "<cell 1>", "exec"), namespace)
        return make(preprocess=namespace["preprocess"]).fingerprint("train")

    assert fingerprint(NOTEBOOK) == fingerprint("\n" + NOTEBOOK)
    assert fingerprint(NOTEBOOK) != fingerprint(NOTEBOOK.replace(old, new))


def test_a_version_takes_the_place_of_the_digest_of_the_code():
    def versioned(version, word="a"):
        return make(preprocess=lambda row: [{"inputs": word}], version=version).fingerprint("train")

    assert versioned("1", "a") == versioned("1", "b")
    assert len({versioned("1"), versioned("2"), versioned("")}) == 3
    assert versioned("", "a") != versioned("", "b")


def test_the_fingerprint_is_the_same_in_another_process():
    code = (
        "from prompt_tuning_jax.data.tasks.registry import get_task;"
        "print(get_task('word_valence').fingerprint('test'))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == get_task("word_valence").fingerprint("test")


def test_scores_postprocess_both_sides_and_count_invalid_outputs():
    seen = []

    def postprocess(text, example, is_target):
        seen.append((text, example["inputs"], is_target))
        return text.lower()

    mine = make(labels=("a", "b"), metrics=(get_metric("accuracy"),), postprocess=postprocess)
    examples = [{"inputs": "1", "targets": "A"}, {"inputs": "2", "targets": "b"}]
    assert mine.score(examples, ["a", "B"]) == {"accuracy": 100, "invalid": 50}
    assert ("A", "1", True) in seen and ("B", "2", False) in seen


def test_registered_tasks_are_found_and_names_are_not_taken_twice():
    mine = make()
    register(mine)
    assert get_task("mine") is mine
    assert get_mixture("mine") == as_mixture(mine)
    assert set(task_names()) >= {"mine", "word_valence"}
    for name in ("mine", "word_valence"):
        with pytest.raises(UserError, match="registered already"):
            register(make(name=name))
    other = make(description="new")
    register(other, replace=True)
    assert get_task("mine") is other


def test_mixtures_are_looked_up_like_tasks():
    mixed = Mixture(name="both", tasks=(make("a"), make("b")), rates=(1, 2))
    register(mixed)
    assert get_mixture("both") is mixed
    with pytest.raises(UserError, match="is a mixture; name one of its tasks: a, b"):
        get_task("both")
    for rates in ((1,), (1, 0), (1, float("inf"))):
        with pytest.raises(UserError, match="'both'"):
            Mixture(name="both", tasks=mixed.tasks, rates=rates)


def test_an_unknown_task_is_answered_with_the_nearest_name():
    with pytest.raises(UserError, match="unknown task 'word_valance': did you mean 'word_valence'"):
        get_task("word_valance")


def test_tasks_need_neither_tensorflow_nor_jax():
    code = """
import sys
from prompt_tuning_jax.data.batching import loader, tokenize
from prompt_tuning_jax.data.tasks import files, from_seqio
from prompt_tuning_jax.data.tasks.registry import get_task
from prompt_tuning_jax.errors import UserError
list(get_task("word_valence").load("test"))
try:
    get_task("nothing_like_it")
except UserError:
    pass
heavy = {"jax", "tensorflow", "seqio", "grain", "orbax", "requests", "sklearn"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_prefix_is_in_front_of_all_that_a_model_writes():
    choices = ["Paris", "Rome"]
    task = make(
        preprocess=lambda row: [{"inputs": "a", "targets": "Rome", "places": list(choices)}],
        postprocess=lambda text, example, is_target: (text, example["places"], example["targets"]),
        choices_field="places",
    )
    prefixed = with_targets_prefix(task, "to: ")
    example = next(prefixed.load("train"))
    assert (example["targets"], example["places"]) == ("to: Rome", ["to: Paris", "to: Rome"])
    seen = prefixed.postprocess("to: Paris", example, False)
    assert seen == ("Paris", choices, "Rome")
