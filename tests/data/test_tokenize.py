import dataclasses
import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from prompt_tuning_jax.data.batching import example_cache
from prompt_tuning_jax.data.batching.example_cache import make_ragged
from prompt_tuning_jax.data.batching.task_data import _labeled
from prompt_tuning_jax.data.batching.tokenize import check_labels, tokenize
from prompt_tuning_jax.data.tasks.registry import get_task
from prompt_tuning_jax.data.tasks.task import Source, Task
from prompt_tuning_jax.data.vocabularies.vocab import ByteVocabulary, Vocabulary
from prompt_tuning_jax.errors import UserError

ROWS = [
    {"inputs": "short", "targets": "yes", "idx": 7},
    {"inputs": "a much longer text of many words " * 5, "targets": "no", "idx": 8},
    {"inputs": "", "targets": "yes", "idx": 9},
]


@pytest.fixture(scope="module")
def vocabulary(tiny_model_dir):
    return Vocabulary(tiny_model_dir / "spiece.model")


class Calls:
    """Not a list: the values that a function closes over are part of its fingerprint."""

    def __init__(self):
        self.splits = []


def make(rows=ROWS, *, version="1", calls=None, **fields):
    calls = Calls() if calls is None else calls

    def read(split, data_dir):
        calls.splits.append(split)
        return rows

    source = Source(splits=("train",), rows=read, fingerprint=lambda split, data_dir: version)
    return Task(name="mine", source=source, **fields)


def run(task, vocabulary, cache_dir, **fields):
    fields = {"inputs_length": 16, "targets_length": 4, "cache_dir": cache_dir, **fields}
    return tokenize(task, "train", vocabulary, **fields)


def ids_of(examples):
    return [
        [ragged[i].tolist() for i in range(len(ragged))]
        for ragged in (examples.inputs, examples.targets)
    ]


def assert_equal(a, b):
    assert ids_of(a) == ids_of(b)
    assert a.texts == b.texts


def test_ids_are_the_vocabularys_and_end_in_eos(vocabulary, tmp_path):
    examples = run(make(), vocabulary, tmp_path)
    inputs, targets = ids_of(examples)
    assert inputs == [[*vocabulary.encode(row["inputs"]), 1] for row in ROWS]
    assert targets == [[*vocabulary.encode(row["targets"]), 1] for row in ROWS]
    assert examples.texts == ROWS
    assert len(examples) == 3
    assert examples.inputs.flat.dtype == np.int32


def test_cut_inputs_end_in_eos_and_are_counted(vocabulary, tmp_path):
    examples = run(make(), vocabulary, tmp_path)
    padded = examples.inputs.padded(np.arange(3), 16)
    whole = [*vocabulary.encode(ROWS[1]["inputs"]), 1]
    assert padded[1].tolist() == [*whole[:15], 1]
    assert padded[0].tolist() == ids_of(examples)[0][0] + [0] * (16 - len(examples.inputs[0]))
    assert padded[2].tolist() == [1] + [0] * 15
    assert (examples.num_inputs_cut, examples.num_targets_cut) == (1, 0)
    assert "1 input (33.3 %) cut to 16 tokens" in examples.report()
    # The cache holds them uncut: a greater length needs no new entry.
    calls = Calls()
    longer = run(make(calls=calls), vocabulary, tmp_path, inputs_length=len(whole))
    assert not calls.splits
    assert longer.num_inputs_cut == 0
    assert "cut" not in longer.report()
    assert longer.inputs.padded(np.array([1]), len(whole))[0].tolist() == whole


class WithoutEnd(ByteVocabulary):
    input_end = ()


def test_an_ending_that_leaves_no_room_for_a_text_is_refused(tmp_path):
    """Where inputs have no end of sequence, it is kept, and nothing else would be left."""
    words = WithoutEnd()
    run(make(inputs_ending=" of it"), words, tmp_path, inputs_length=len(" of it") + 1)
    with pytest.raises(UserError, match=r"inputs_length is 6, .* ' of it', has 6 tokens"):
        run(make(inputs_ending=" of it"), words, tmp_path, inputs_length=len(" of it"))


def test_only_labeled_examples_are_evaluated_on(vocabulary, tmp_path):
    task = make(has_label=lambda example: example["idx"] != 8)
    (labeled,), (note,) = _labeled([run(task, vocabulary, tmp_path)])
    assert [example["idx"] for example in labeled.texts] == [7, 9]
    assert "1 examples have no label and do not count" in note
    assert _labeled([run(make(), vocabulary, tmp_path)])[1] == []
    with pytest.raises(UserError, match="has no labels, so nothing can be scored"):
        _labeled([run(make(has_label=lambda example: False), vocabulary, tmp_path)])


def test_cutting_is_that_of_the_original(shared, tmp_path):
    """Recorded ids of SeqIO's pipeline for BoolQ at 32 input tokens and one target token."""
    vocabulary = Vocabulary(shared / "fixtures/t5_vocab.model")
    cases = json.loads((shared / "fixtures/tasks/cases.json").read_text())["truncation"]
    lines = (shared / "fixtures/tasks/boolq.jsonl").read_text().splitlines()
    found = 0
    for line in lines:
        for texts in json.loads(line)["examples"]:
            row = {key: texts["ordinary"][key] for key in ("inputs", "targets")}
            examples = run(make([row]), vocabulary, tmp_path, use_cache=False)
            assert examples.inputs[0].tolist() == texts["ordinary"]["inputs_ids"]
            assert examples.targets[0].tolist() == texts["ordinary"]["targets_ids"]
            for form in ("ordinary", "taskless"):
                row = {key: texts[form][key] for key in ("inputs", "targets")}
                examples = run(make([row]), vocabulary, tmp_path, use_cache=False)
                cut = {
                    "sequence_length": {"inputs": 32, "targets": 1},
                    "inputs_ids": examples.inputs.padded(np.array([0]), 32)[0].tolist(),
                    "targets_ids": examples.targets.padded(np.array([0]), 1)[0].tolist(),
                }
                found += cut in cases
    assert found >= len(cases)


def test_padding_is_that_of_each_row_alone():
    rng = np.random.default_rng(0)
    rows = [[*rng.integers(2, 99, rng.integers(0, 12)), 1] for _ in range(30)]
    ragged = make_ragged(rows)
    order = rng.integers(0, 30, 50)
    for length in (1, 5, 13, 20):
        padded = ragged.padded(order, length)
        assert padded.shape == (50, length) and padded.dtype == np.int32
        for got, index in zip(padded, order, strict=True):
            row = rows[index] if len(rows[index]) <= length else [*rows[index][: length - 1], 1]
            assert got.tolist() == row + [0] * (length - len(row))


def test_the_second_time_comes_from_the_disk(vocabulary, tmp_path):
    calls = Calls()
    first = run(make(calls=calls), vocabulary, tmp_path)
    second = run(make(calls=calls), vocabulary, tmp_path)
    assert calls.splits == ["train"]
    assert isinstance(second.inputs.flat, np.memmap)
    assert_equal(first, second)
    assert_equal(first, run(make(), vocabulary, tmp_path / "unused", use_cache=False))
    assert not (tmp_path / "unused").exists()


def test_what_decides_the_examples_decides_the_entry(vocabulary, tmp_path, monkeypatch):
    calls = Calls()
    run(make(calls=calls), vocabulary, tmp_path)
    run(make(calls=calls, version="2"), vocabulary, tmp_path)
    run(make(calls=calls), Vocabulary(vocabulary.path, extra_ids=7), tmp_path)
    run(make(calls=calls), ByteVocabulary(), tmp_path)
    monkeypatch.setattr(example_cache, "FORMAT_VERSION", 99)
    run(make(calls=calls), vocabulary, tmp_path)
    assert len(calls.splits) == 5


def test_the_default_place_follows_xdg(vocabulary, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run(make(), vocabulary, None)
    [entry] = (tmp_path / "prompt_tuning_jax/examples").iterdir()
    assert len(entry.name) == 64


@pytest.mark.parametrize("name", [*example_cache._ARRAYS, "examples", "meta"])
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "remove"])
def test_a_damaged_entry_is_rebuilt(vocabulary, tmp_path, name, harm):
    calls = Calls()
    whole = run(make(calls=calls), vocabulary, tmp_path)
    expected = ids_of(whole), whole.texts
    [entry] = tmp_path.iterdir()
    [path] = entry.glob(f"{name}.*")
    content = path.read_bytes()
    # A new file each time: changing a memory-mapped one would change the arrays above.
    path.unlink()
    if harm == "flip":
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    elif harm != "remove":
        path.write_bytes(b"" if harm == "empty" else content[: len(content) // 2])
    again = run(make(calls=calls), vocabulary, tmp_path)
    assert (ids_of(again), again.texts) == expected
    assert os.listdir(tmp_path) == [entry.name]
    assert calls.splits == ["train", "train"] or (name, harm) == ("meta", "flip")
    run(make(calls=calls), vocabulary, tmp_path)
    assert len(calls.splits) <= 2


def _tokenize_in_process(arguments):
    path, cache_dir = arguments
    examples = run(get_task("word_valence"), Vocabulary(path), cache_dir)
    return int(examples.inputs.flat.sum()), len(examples.texts)


def test_many_writers_at_once(vocabulary, tmp_path):
    """Threads, and processes of their own, all begin with an empty cache."""
    arguments = [(vocabulary.path, tmp_path)] * 8
    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(_tokenize_in_process, arguments))
    [entry] = tmp_path.iterdir()
    (entry / "meta.json").write_text("{}")  # damaged: now they all replace it
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results |= set(pool.map(_tokenize_in_process, arguments))
    assert len(results) == 1
    assert os.listdir(tmp_path) == [entry.name]


def test_an_interrupted_writer_leaves_no_entry(vocabulary, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(example_cache.os, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        run(make(), vocabulary, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written(vocabulary, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the example cache .*data\.cache=False"):
        run(make(), vocabulary, tmp_path / "file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert run(make(), vocabulary, None).texts == ROWS
    assert "stay in memory" in caplog.text


def test_a_label_must_fit_and_be_told_apart(vocabulary, tmp_path):
    long = "a label of many words indeed"
    with pytest.raises(
        UserError, match=rf"label '{long}' has \d+ tokens.*data.targets_length is 4"
    ):
        run(make(labels=("yes", long)), vocabulary, tmp_path)
    number = len(vocabulary.encode(long)) + 1
    check_labels(make(labels=(long,)), vocabulary, targets_length=number)
    with pytest.raises(UserError):
        check_labels(make(labels=(long,)), vocabulary, targets_length=number - 1)
    with pytest.raises(UserError, match="'a b' and 'a  b' have the same tokens"):
        run(make(labels=("a b", "a  b")), vocabulary, tmp_path)
    # A hit in the cache does not skip the check.
    run(make(), vocabulary, tmp_path)
    with pytest.raises(UserError, match="targets_length"):
        run(make(labels=(long,)), vocabulary, tmp_path)


def test_an_empty_split_and_bad_lengths(vocabulary, tmp_path):
    with pytest.raises(UserError, match="'mine', split 'train': there are no examples"):
        run(make(rows=[]), vocabulary, tmp_path)
    assert os.listdir(tmp_path) == []
    for field in ("inputs_length", "targets_length"):
        with pytest.raises(UserError, match=f"data.{field} is 0"):
            run(make(), vocabulary, tmp_path, **{field: 0})


def test_a_selection_keeps_ids_and_texts_together(vocabulary, tmp_path):
    rows = [{"inputs": f"number {i}", "targets": "yes"} for i in range(10)]
    examples = run(make(rows), vocabulary, tmp_path)
    some = examples.at_most(4)
    assert [row["inputs"] for row in some.texts] == [f"number {i}" for i in (0, 2, 5, 7)]
    assert [some.inputs[i].tolist() for i in range(4)] == [
        [*vocabulary.encode(row["inputs"]), 1] for row in some.texts
    ]
    assert examples.at_most(0) is examples and examples.at_most(10) is examples
    assert dataclasses.replace(some, inputs_length=2).num_inputs_cut == 4


@pytest.mark.parametrize(("number", "questions"), [(1, [0]), (10, [0, 5]), (39, range(9))])
def test_what_is_scored_together_is_selected_together(vocabulary, tmp_path, number, questions):
    """MultiRC's exact match is over all answers to a question."""
    rows = [{"inputs": f"answer {i}", "targets": "yes", "question": i % 10} for i in range(40)]

    def grouped(text, example, is_target):
        return {"value": text, "group": example["question"]} if is_target else {"value": text}

    examples = run(make(rows, postprocess=grouped), vocabulary, tmp_path)
    some = [row["question"] for row in examples.at_most(number).texts]
    expected = [10 * i // len(questions) for i in range(len(questions))]
    assert sorted(some) == sorted([*expected] * 4)
    assert examples.at_most(40) is examples


def test_examples_may_hold_numbers_and_bytes_that_json_does_not(vocabulary, tmp_path):
    """SeqIO's examples have NaN for a missing score, and bytes that are not UTF-8."""
    odd = b"caf\xe9".decode(errors="surrogateescape")
    task = make([{"inputs": "a", "targets": "b", "score": float("nan"), "name": odd}])
    for _ in range(2):  # written, and read again
        ((example,),) = [run(task, vocabulary, tmp_path).texts]
        assert example["score"] != example["score"] and example["name"] == odd
