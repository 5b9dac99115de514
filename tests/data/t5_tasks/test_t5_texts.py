"""Rows that the recorded files do not have: other scripts, no labels, odd blanks, wrong rows."""

import json
import pickle

import numpy as np
import pytest

from prompt_tuning_jax.data.tasks.code_digest import code_digest
from prompt_tuning_jax.data.tasks.t5_tasks.preprocess import has_label, spaced
from prompt_tuning_jax.data.tasks.t5_tasks.registry import preprocess_in_form, without_task_word
from prompt_tuning_jax.data.tasks.t5_tasks.tables import T5_TASKS
from prompt_tuning_jax.data.tasks.task import task_index_id
from prompt_tuning_jax.errors import UserError

ODD_TEXTS = (
    "",
    " ",
    "日本語 ﬁ é",
    "e\u0301 \U0001f600",
    "a\r\nb",
    "tab\there",
    "<unk>",
    "x" * 9000,
)


def examples(name, row, form="ordinary"):
    task = T5_TASKS[name]
    preprocess = preprocess_in_form(
        task.preprocess, form, has_task_word=task.has_task_word, index=task.index
    )
    return list(preprocess(row))


def wsc_row(text="Ann told Bo that she won.", *, index=4, **changes):
    row = {"text": text, "span1_text": "Ann", "span1_index": 0, "span2_text": "she"}
    return {**row, "span2_index": index, "label": 1, "idx": 0, **changes}


def record_row(**changes):
    row = {"query": "@placeholder won", "passage": "Ann ran.", "entities": ["Ann", "Bo"]}
    return {**row, "answers": ["Ann"], "idx": {"passage": 3, "query": 4}, **changes}


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_texts_pass_through_untouched(text):
    (example,) = examples(
        "super_glue_boolq_v102", {"passage": text, "question": text, "label": 1, "idx": 7}
    )
    assert example["inputs"] == f"boolq passage: {text} question: {text}"
    assert (example["targets"], example["idx"]) == ("True", 7)
    (example,) = examples("glue_sst2_v200", {"sentence": text, "label": 0, "idx": 0}, "taskless")
    assert example["inputs"] == f"sentence: {text}"
    (example,) = examples("xsum_v110", {"document": text, "summary": text})
    assert example == {"inputs": f"summarize: {text}", "targets": text}


def test_the_forms_differ_in_the_task_word_alone():
    row = {"premise": "p", "hypothesis": "h", "label": 0, "idx": 0}
    (ordinary,) = examples("super_glue_rte_v102", row)
    (taskless,) = examples("super_glue_rte_v102", row, "taskless")
    (indexed,) = examples("super_glue_rte_v102", row, "task_index")
    assert ordinary["inputs"] == f"rte {taskless['inputs']}"
    assert indexed == {**taskless, "task_index": 5}
    question = {"question": "q", "context": "c", "id": "1", "answers": {"text": ["a"]}}
    forms = [examples("squad_v010_allanswers", question, f) for f in ("ordinary", "taskless")]
    assert forms[0] == forms[1]
    with pytest.raises(ValueError, match="index"):
        examples("squad_v010_allanswers", question, "task_index")


def test_the_task_word_goes_with_the_first_blank_and_nothing_else():
    assert without_task_word("a\nb c d") == "c d"
    assert without_task_word("word") == "word"
    assert without_task_word(" x") == "x"
    assert without_task_word("a  b") == " b"


def test_task_indices_count_down_from_the_last_id():
    assert [task_index_id(384, index) for index in range(3)] == [383, 382, 381]


@pytest.mark.parametrize("label", [-1, np.int64(-1), None])
def test_rows_without_label(label):
    row = {"premise": "p", "hypothesis": "h", "idx": 0, "label": label}
    if label is None:
        del row["label"]
    (example,) = examples("super_glue_cb_v102", row)
    assert example["targets"] == "<unk>"
    assert not has_label(example)
    (example,) = examples("super_glue_record_v102", record_row(answers=[]))
    assert (example["targets"], example["answers"]) == ("<unk>", [])
    (example,) = examples("super_glue_wsc_v102_simple_eval", wsc_row(label=-1))
    assert example["targets"] == "Ann"
    assert not has_label(example)
    (example,) = examples("glue_stsb_v002", {"sentence1": "", "sentence2": "", "idx": 0})
    assert not has_label(example)
    (example,) = examples(
        "mrqa_drop_v100", {"question": "", "context": "", "qid": "", "answers": []}
    )
    assert example["inputs"] == "question: context: "
    assert not has_label(example)


def test_labels_of_numpy_give_json():
    row = {"sentence": "s", "label": np.int64(1), "idx": np.int32(5)}
    (example,) = examples("glue_cola_v002", row)
    assert json.loads(json.dumps(example)) == example
    assert has_label(example)


def test_a_label_out_of_range_is_named():
    with pytest.raises(UserError, match=r"row 8: label 2 .*unacceptable, acceptable"):
        examples("glue_cola_v002", {"sentence": "s", "label": 2, "idx": 8})
    idx = {"paragraph": 1, "question": 2, "answer": 3}
    with pytest.raises(UserError, match="1/2/3"):
        examples(
            "super_glue_multirc_v102",
            {"question": "", "answer": "", "paragraph": "", "label": -2, "idx": idx},
        )


def test_multirc_loses_its_markup_everywhere():
    row = {
        "paragraph": "<b>Sent 1: </b>One.<br><B>Two</B>.</br>",
        "question": "<b>q</b>",
        "answer": "a<br>",
        "label": 0,
        "idx": {"paragraph": 1, "question": 2, "answer": 3},
    }
    (example,) = examples("super_glue_multirc_v102", row, "taskless")
    assert example["inputs"] == "question: q answer: a  paragraph: Sent 1: One. <B>Two</B>.</br>"
    assert (example["idx/paragraph"], example["idx/question"], example["idx/answer"]) == (1, 2, 3)


def test_record_has_an_example_for_each_answer_with_all_of_them():
    found = examples("super_glue_record_v102", record_row(answers=["Ann", "Bo"]))
    assert [example["targets"] for example in found] == ["Ann", "Bo"]
    assert all(example["answers"] == ["Ann", "Bo"] for example in found)
    found[0]["answers"].clear()  # the lists are their own
    assert found[1]["answers"] == ["Ann", "Bo"]


def test_record_joins_highlights_with_a_full_stop_where_there_is_none():
    passage = (
        'It ended.\n@highlight\nHe won\n@highlight\n"Yes"\n@highlight\nend\n\n@highlight\nlast'
    )
    (example,) = examples("super_glue_record_v102", record_row(passage=passage))
    assert example["inputs"].endswith('passage: It ended. He won. "Yes" end\n. last')


@pytest.mark.parametrize(
    ("label", "target"), [(0.3, "0.4"), (0.5, "0.4"), (3.3, "3.2"), (np.float32(2.7), "2.8")]
)
def test_similarities_are_rounded_half_to_even_in_32_bits(label, target):
    row = {"sentence1": "a", "sentence2": "b", "label": label, "idx": 0}
    assert examples("glue_stsb_v002", row)[0]["targets"] == target


def test_wsc_marks_the_pronoun():
    (example,) = examples("super_glue_wsc_v102_simple_eval", wsc_row())
    assert example["inputs"] == "wsc: Ann told Bo that *she* won."
    (example,) = examples("super_glue_wsc_v102_simple_eval", wsc_row("Ann  saw she", index=3))
    assert example["inputs"] == "wsc: Ann  saw *she* "  # single blanks separate


def test_wsc_trains_on_right_referents_alone():
    assert len(examples("super_glue_wsc_v102_simple_train", wsc_row(label=1))) == 1
    assert not examples("super_glue_wsc_v102_simple_train", wsc_row(label=0))
    assert len(examples("super_glue_wsc_v102_simple_eval", wsc_row(label=0))) == 1


def test_wsc_has_two_misnumbered_texts():
    text = (
        "The boy continued to whip the pony , and eventually the pony threw him over. "
        'John laughed out quite loud. "Good for him," he said. '
    )
    row = wsc_row(text, index=22, span2_text="him")
    inputs = examples("super_glue_wsc_v102_simple_eval", row)[0]["inputs"]
    assert inputs.endswith('loud. "Good for *him* ," he said.')
    text = (
        "When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the "
        "magic pebble in an iron safe . Some day they might want to use it , but really for now, "
        "what more could they wish for?"
    )
    row = wsc_row(text, index=28, span2_text="it")
    inputs = examples("super_glue_wsc_v102_simple_eval", row)[0]["inputs"]
    assert "want to use *it* , but" in inputs


@pytest.mark.parametrize("index", [0, 1, 6, -2])
def test_wsc_names_the_row_whose_index_is_not_the_pronouns(index):
    with pytest.raises(UserError, match=rf"row 9: span2_index {index} .*'she'"):
        examples("super_glue_wsc_v102_simple_eval", wsc_row(index=index, idx=9))


def test_marked_spans():
    (example,) = examples("super_glue_wsc_v102", wsc_row())
    assert example["inputs"] == "wsc text: * Ann * told Bo that # she # won."
    # The first span after the second, and an index that is not the span's.
    row = wsc_row("she told Ann (b.)", index=0, span1_index=2)
    assert (
        examples("super_glue_wsc_v102", row)[0]["inputs"] == "wsc text: # she # told * Ann * (b.)"
    )
    row = wsc_row(span1_index=1)
    assert "*" not in examples("super_glue_wsc_v102", row)[0]["inputs"]
    # A span is text, no pattern.
    row = wsc_row("a (b she", index=2, span1_text="(b", span1_index=1)
    assert examples("super_glue_wsc_v102", row)[0]["inputs"] == "wsc text: a * (b * # she #"


def test_dpr_marks_the_first_place_as_a_word():
    row = {
        "sentence": "It hit itself, it, it.",
        "pronoun": "it",
        "candidates": ["a", "b"],
        "label": 1,
    }
    assert examples("dpr_v001_simple", row)[0] == {
        "inputs": "wsc: It hit itself, *it*, it.",
        "targets": "b",
    }


def test_answers_are_spaced_and_all_kept():
    row = {
        "id": "7",
        "question": "Who's\r\n there\u00a0?",
        "context": "\u201cX\u201d \u2014 A_b\x0bc.",
        "answers": {"text": ["A_b", "X"]},
    }
    (example,) = examples("squad_v010_allanswers", row)
    assert example["inputs"] == (
        "question: Who ' s there\u00a0 ? context: \u201cX\u201d \u2014 A _ b\x0bc . "
    )
    assert example["answers"] == ["A _ b", "X"]
    assert example["targets"] == "A _ b"


def test_spacing_twice_changes_nothing():
    for text in (*ODD_TEXTS, "It's  5.", "--a--"):
        assert spaced(spaced(text)) == spaced(text)


def test_preprocessors_are_pure_and_have_an_identity():
    row = record_row(answers=["Ann", "Bo"])
    before = json.dumps(row)
    assert examples("super_glue_record_v102", row) == examples("super_glue_record_v102", row)
    assert json.dumps(row) == before
    identities = {
        code_digest(
            preprocess_in_form(
                task.preprocess, form, has_task_word=task.has_task_word, index=task.index
            )
        )
        for task in T5_TASKS.values()
        if task.benchmark == "super_glue"
        for form in ("ordinary", "taskless", "task_index")
    }
    assert len(identities) == 3 * (12 - 1)  # of the twelve, axg has the text of rte
    for task in T5_TASKS.values():  # other processes read the examples
        pickle.dumps(task)
