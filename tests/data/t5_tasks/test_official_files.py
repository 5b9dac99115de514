"""Official files become the rows that TensorFlow Datasets makes of them."""

import gzip
import json
import logging

import numpy as np
import pytest

from prompt_tuning_jax.data.batching.tokenize import tokenize
from prompt_tuning_jax.data.tasks.registry import get_task
from prompt_tuning_jax.data.tasks.t5_tasks.official_files import (
    has_official_files,
    layout,
    official_fingerprint,
    official_rows,
)
from prompt_tuning_jax.data.vocabularies.vocab import load_vocabulary
from prompt_tuning_jax.errors import UserError
from tests.data.t5_tasks.recorded_tasks import recorded, tfds_rows

FOLDERS = {
    "boolq": "BoolQ",
    "cb": "CB",
    "copa": "COPA",
    "multirc": "MultiRC",
    "record": "ReCoRD",
    "rte": "RTE",
    "wic": "WiC",
    "wsc": "WSC",
    "axb": "AX-b",
    "axg": "AX-g",
}
FILES = {"train": "train", "validation": "val", "test": "test"}
# Rows of the complete files (SOURCES.md), after what is flattened.
COUNTS = {
    "boolq": (64, 3270, 3245),
    "cb": (250, 56, 250),
    "copa": (400, 100, 500),
    "multirc": (27243, 4848, 9693),
    "record": (75, 11, 5),
    "rte": (2490, 277, 3000),
    "wic": (5428, 638, 1400),
    "wsc": (554, 104, 146),
}


def config_of(short):
    return "super_glue/wsc.fixed" if short == "wsc" else f"super_glue/{short}"


def write(folder, name, lines, *, end="\n", start=b""):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = start + "".join(f"{line}{end}" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def write_jsonl(folder, name, rows, **options):
    return write(folder, name, [json.dumps(row, ensure_ascii=False) for row in rows], **options)


def rows(dataset, split, folder):
    return list(official_rows(dataset, split, str(folder)))


@pytest.mark.parametrize("short", FOLDERS)
@pytest.mark.parametrize("style", ["plain", "windows", "gz"])
def test_recorded_rows(tasks_folder, tmp_path, short, style):
    """Every recorded official row, written as the release has it, is every recorded TFDS row."""
    options = {"end": "\r\n", "start": b"\xef\xbb\xbf"} if style == "windows" else {}
    lines = recorded(tasks_folder / f"{short}.jsonl")
    for split in {line["split"] for line in lines}:
        mine = [line for line in lines if line["split"] == split]
        file = FOLDERS[short] if short.startswith("ax") else FILES[split]
        ending = ".jsonl.gz" if style == "gz" else ".jsonl"
        name = f"{FOLDERS[short]}/{file}{ending}"
        write_jsonl(tmp_path, name, [line["raw"] for line in mine], **options)
        found = rows(config_of(short), split, tmp_path)
        assert found == [row for line in mine for row in tfds_rows(line)]
        by_key = {json.dumps(row["idx"], sort_keys=True): row for row in found}
        for line in mine:  # as recorded, and not as completed by the helper
            for row in line["tfds"]:
                assert by_key[json.dumps(row["idx"], sort_keys=True)] == row


@pytest.mark.parametrize("short", COUNTS)
def test_complete_files(shared, short):
    folder = shared / "superglue"
    counts = [len(rows(config_of(short), split, folder)) for split in FILES]
    assert tuple(counts) == COUNTS[short]
    test = rows(config_of(short), "test", folder)
    assert short == "record" or {row["label"] for row in test} == {-1}


def test_complete_diagnostics_and_folder_of_one_task(shared):
    folder = shared / "superglue"
    assert len(rows("super_glue/axb", "test", folder)) == 1104
    assert len(rows("super_glue/axg", "test", folder)) == 356
    assert rows("super_glue/rte", "validation", folder / "RTE") == rows(
        "super_glue/rte", "validation", folder
    )


def test_spans_of_wsc_are_mended(tmp_path):
    def row(idx, span, text="He met the Smiths. they left", index=4):
        target = {"span1_index": index, "span1_text": span, "span2_index": 4, "span2_text": "they"}
        return {"idx": idx, "text": text, "target": target, "label": True}

    spans = ["They", "they.", "they", "Kamenev and Zinoviev"]
    write_jsonl(tmp_path, "WSC/train.jsonl", [row(i, span) for i, span in enumerate(spans)])
    found = [r["span1_text"] for r in rows("super_glue/wsc.fixed", "train", tmp_path)]
    assert found == ["they", "they", "they", "Kamenev and Zinoviev"]
    assert [r["span1_text"] for r in rows("super_glue/wsc", "train", tmp_path)] == spans
    write_jsonl(tmp_path, "WSC/train.jsonl", [row(0, "nobody")])
    with pytest.raises(UserError, match=r"train\.jsonl:1: span1_text is 'nobody'"):
        rows("super_glue/wsc.fixed", "train", tmp_path)
    write_jsonl(tmp_path, "WSC/train.jsonl", [row(0, "nobody", index=9)])
    with pytest.raises(UserError, match="9 and the text has 6 words"):
        rows("super_glue/wsc.fixed", "train", tmp_path)


RTE = {"premise": "Ünder ☃", "hypothesis": "", "label": "entailment", "idx": 0}


def test_repeated_ids_blank_lines_and_unlabeled_rows(tmp_path):
    unlabeled = {key: value for key, value in RTE.items() if key != "label"}
    write(tmp_path, "RTE/train.jsonl", [json.dumps(RTE), "", json.dumps(RTE)])
    assert rows("super_glue/rte", "train", tmp_path) == [{**RTE, "label": 0}] * 2
    some = [unlabeled, {**RTE, "label": None}, {**RTE, "label": -1}, RTE]
    write_jsonl(tmp_path, "RTE/test.jsonl", some)
    assert [r["label"] for r in rows("super_glue/rte", "test", tmp_path)] == [-1, -1, -1, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps(RTE)[:-9], r"train\.jsonl:2: .*JSON"),
        ("[1]", r"train\.jsonl:2: an array where a JSON object"),
        (
            json.dumps({**RTE, "label": "maybe"}),
            r"train\.jsonl:2: the label is 'maybe'.*entailment",
        ),
        (json.dumps({**RTE, "label": 2}), r"train\.jsonl:2: the label is 2"),
        (json.dumps({**RTE, "label": ["entailment"]}), r"train\.jsonl:2: the label is \['entail"),
        (json.dumps({**RTE, "label": None}), r"train\.jsonl:2: no label"),
        (json.dumps({**RTE, "premise": 3}), r"train\.jsonl:2: the field 'premise' is 3.*a text"),
        (json.dumps({**RTE, "idx": True}), r"train\.jsonl:2: the field 'idx' is true"),
        ('{"premise": "a"}', r"train\.jsonl:2: no field 'hypothesis'; there are: premise"),
        ('{"premise": "\\ud800"}', r"train\.jsonl:2: .*half of a surrogate pair"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    write(tmp_path, "RTE/train.jsonl", [json.dumps(RTE), line])
    with pytest.raises(UserError, match=message) as error:
        rows("super_glue/rte", "train", tmp_path)
    assert "\n" not in str(error.value)


def test_files_that_are_damaged_or_not_utf8(tmp_path):
    path = write(tmp_path, "RTE/train.jsonl", [json.dumps(RTE, ensure_ascii=False)])
    path.write_bytes(path.read_bytes() + "ä".encode("latin1") + b"\n")
    with pytest.raises(UserError, match=r"train\.jsonl:2: byte 1 of the line is not UTF-8"):
        rows("super_glue/rte", "train", tmp_path)
    path.unlink()
    path = write_jsonl(tmp_path, "RTE/train.jsonl.gz", [RTE] * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cut off"):
        rows("super_glue/rte", "train", tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"looked for RTE/train\.jsonl or RTE/train_part\.jsonl"):
        rows("super_glue/rte", "train", tmp_path)
    with pytest.raises(UserError, match="did you mean 'super_glue/rte'"):
        rows("superglue/rte", "train", tmp_path)
    with pytest.raises(UserError, match="did you mean 'validation'"):
        rows("super_glue/rte", "validatoin", tmp_path)
    # A file of another task in the folder of one is not taken for it.
    write_jsonl(tmp_path, "CB/train.jsonl", [RTE])
    assert not has_official_files("super_glue/rte", "train", str(tmp_path / "CB"))


def test_parts_stand_in_and_say_so(tmp_path, caplog):
    write_jsonl(tmp_path, "SuperGLUE/rte/val_part.jsonl", [RTE])
    before = official_fingerprint("super_glue/rte", "validation", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert len(rows("super_glue/rte", "validation", tmp_path)) == 1
    assert "val_part.jsonl" in caplog.text and "not those of the official split" in caplog.text
    caplog.clear()
    write_jsonl(tmp_path, "SuperGLUE/rte/val.jsonl", [RTE, RTE])
    assert len(rows("super_glue/rte", "validation", tmp_path)) == 2
    assert not caplog.text
    assert official_fingerprint("super_glue/rte", "validation", str(tmp_path)) != before


def test_fingerprints_follow_the_file(tmp_path):
    write_jsonl(tmp_path, "RTE/train.jsonl", [RTE])
    first = official_fingerprint("super_glue/rte", "train", str(tmp_path))
    assert first == official_fingerprint("super_glue/rte", "train", str(tmp_path))
    write_jsonl(tmp_path, "RTE/train.jsonl", [{**RTE, "premise": "other"}])
    assert first != official_fingerprint("super_glue/rte", "train", str(tmp_path))


GLUE = {  # data set: (file, split, lines, rows)
    "glue/cola": (
        "CoLA/train.tsv",
        "train",
        ['gj04\t1\t\tOur "friends" won\'t.', "gj04\t0\t*\tThe more <b>"],
        [
            {"sentence": 'Our "friends" won\'t.', "label": 1, "idx": 0},
            {"sentence": "The more <b>", "label": 0, "idx": 1},
        ],
    ),
    "glue/sst2": (
        "SST-2/dev.tsv",
        "validation",
        ["sentence\tlabel", '"open quote \t1', "", "ünï ☃\t0"],
        [
            {"sentence": '"open quote ', "label": 1, "idx": 0},
            {"sentence": "ünï ☃", "label": 0, "idx": 1},
        ],
    ),
    "glue/qqp": (  # some of its rows are cut off, and are left out but counted
        "QQP/train.tsv",
        "train",
        [
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
            "1\t2\t3\tA?\tB?\t0",
            "1\t2\t3\tA?",
            "1\t2\t3\tA?\tB?\t",
            "1\t2\t3\tC?\tD?\t1",
        ],
        [
            {"question1": "A?", "question2": "B?", "label": 0, "idx": 0},
            {"question1": "C?", "question2": "D?", "label": 1, "idx": 3},
        ],
    ),
    "glue/stsb": (
        "STS-B/train.tsv",
        "train",
        [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            "0\tg\tf\t1\t2\ts\ts\ta\tb\t3.8",
        ],
        [{"sentence1": "a", "sentence2": "b", "label": float(np.float32(3.8)), "idx": 0}],
    ),
    "glue/mnli": (
        "MNLI/dev_matched.tsv",
        "validation_matched",
        ["index\tsentence1\tsentence2\tlabel1\tgold_label", "0\tp\th\tneutral\tcontradiction"],
        [{"premise": "p", "hypothesis": "h", "label": 2, "idx": 0}],
    ),
    "glue/mnli_mismatched": (
        "MNLI/test_mismatched.tsv",
        "test",
        ["index\tsentence1\tsentence2", "0\tp\th"],
        [{"premise": "p", "hypothesis": "h", "label": -1, "idx": 0}],
    ),
    "glue/qnli": (
        "QNLI/train.tsv",
        "train",
        ["index\tquestion\tsentence\tlabel", "7\tq\ts\tnot_entailment"],
        [{"question": "q", "sentence": "s", "label": 1, "idx": 0}],
    ),
    "glue/rte": (
        "RTE/test.tsv",
        "test",
        ["index\tsentence1\tsentence2", "0\ta\tb"],
        [{"sentence1": "a", "sentence2": "b", "label": -1, "idx": 0}],
    ),
    "glue/wnli": (
        "WNLI/train.tsv",
        "train",
        ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\t1"],
        [{"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}],
    ),
    "glue/ax": (
        "diagnostic/diagnostic.tsv",
        "test",
        ["index\tsentence1\tsentence2", "0\tp\th"],
        [{"premise": "p", "hypothesis": "h", "label": -1, "idx": 0}],
    ),
    "glue/mrpc": (
        "MRPC/test.tsv",
        "test",
        ["index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t1\t2\ta\tb"],
        [{"sentence1": "a", "sentence2": "b", "label": -1, "idx": 0}],
    ),
}


@pytest.mark.parametrize("dataset", GLUE)
@pytest.mark.parametrize("options", [{}, {"end": "\r\n", "start": b"\xef\xbb\xbf"}])
@pytest.mark.parametrize("parent", ["", "GLUE/"])
def test_glue_tables(tmp_path, dataset, options, parent):
    file, split, lines, expected = GLUE[dataset]
    write(tmp_path, parent + file, lines, **options)
    found = rows(dataset, split, tmp_path)
    assert found == expected
    assert [type(r["label"]) for r in found] == [type(r["label"]) for r in expected]


def test_cola_test_and_stsb_test_have_no_labels(tmp_path):
    write(tmp_path, "CoLA/test.tsv", ["index\tsentence", "0\tSome text"])
    write(tmp_path, "STS-B/test.tsv", ["index\tsentence1\tsentence2", "0\ta\tb"])
    cola = [{"sentence": "Some text", "label": -1, "idx": 0}]
    assert rows("glue/cola", "test", tmp_path) == cola
    assert rows("glue/stsb", "test", tmp_path)[0]["label"] == -1.0


MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"


def test_mrpc_of_microsoft_is_split_by_ids(tmp_path):
    lines = [MRPC, "1\t11\t12\ta\tb", '0\t21\t22\tc\t"d', "1\t31\t32\te\tf"]
    write(tmp_path, "MRPC/msr_paraphrase_train.txt", lines, start=b"\xef\xbb\xbf", end="\r\n")
    write(tmp_path, "MRPC/dev_ids.tsv", ["21\t22", "12\t11"])
    write(tmp_path, "MRPC/msr_paraphrase_test.txt", [MRPC, "1\t41\t42\tg\th"])
    write(tmp_path, "MRPC/train.tsv", [MRPC, "1\t1\t2\tnot\tread"])
    train = [
        {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0},
        {"sentence1": "e", "sentence2": "f", "label": 1, "idx": 2},
    ]
    assert rows("glue/mrpc", "train", tmp_path) == train
    dev = [{"sentence1": "c", "sentence2": '"d', "label": 0, "idx": 1}]
    assert rows("glue/mrpc", "validation", tmp_path) == dev
    test = [{"sentence1": "g", "sentence2": "h", "label": -1, "idx": 0}]
    assert rows("glue/mrpc", "test", tmp_path) == test
    (tmp_path / "MRPC/dev_ids.tsv").unlink()
    assert rows("glue/mrpc", "train", tmp_path)[0]["sentence1"] == "not"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["sentence\tlabel", "a\t1", "b\t2"], r"train\.tsv:3: the label is '2'.*positive"),
        (["sentence\tlabel", "a\tgood"], r"train\.tsv:2: the label is 'good'"),
        (["text\tlabel", "a\t1"], r"train\.tsv:1: no column 'sentence' in the header"),
    ],
)
def test_bad_tables(tmp_path, lines, message):
    write(tmp_path, "SST-2/train.tsv", lines)
    with pytest.raises(UserError, match=message):
        rows("glue/sst2", "train", tmp_path)


def squad_file(*articles):
    return json.dumps({"version": "1.1", "data": list(articles)})


def question(id_, text, *answers):
    listed = [{"text": a, "answer_start": n} for n, a in enumerate(answers)]
    return {"id": id_, "question": text, "answers": listed}


def test_squad_joins_questions_of_one_id(tmp_path):
    one = {"context": " c\n1 ", "qas": [question("x", "q?", "a", "b"), question("y", "p?", "c")]}
    two = {"context": "c2", "qas": [question("x", "other", "d")]}
    text = squad_file({"title": "T", "paragraphs": [one]}, {"paragraphs": [two]})
    write(tmp_path, "squad/dev-v1.1.json", [text])
    first, second = rows("squad/v1.1", "validation", tmp_path)
    assert first == {
        "id": "x",
        "title": "T",
        "context": " c\n1 ",
        "question": "q?",
        "answers": {"text": ["a", "b", "d"], "answer_start": [0, 1, 0]},
    }
    assert second["id"] == "y"
    bad = squad_file({"paragraphs": [{"context": "c", "qas": [{"id": "x"}]}]})
    write(tmp_path, "squad/dev-v1.1.json", [bad])
    with pytest.raises(UserError, match="article 0, paragraph 0: no field 'question'"):
        rows("squad/v1.1", "validation", tmp_path)
    write(tmp_path, "squad/dev-v1.1.json", [text[:-3]])
    with pytest.raises(UserError, match=r"dev-v1\.1\.json: .*JSON"):
        rows("squad/v1.1", "validation", tmp_path)


@pytest.mark.parametrize("place", ["mrqa/dev/", "dev/", "mrqa/", "MRQA/out_of_domain/"])
def test_mrqa(tmp_path, place):
    answers = ["a ", "b"]
    passage = {
        "context": " c ",
        "context_tokens": [["c", 1]],
        "qas": [{"qid": "1", "question": " q? ", "answers": answers, "detected_answers": []}],
    }
    lines = [{"header": {"dataset": "BioASQ", "split": "dev"}}, passage, passage]
    write_jsonl(tmp_path, f"{place}BioASQ.jsonl.gz", lines)
    row = {"subset": "BioASQ", "context": "c", "qid": "1", "question": "q?", "answers": answers}
    assert rows("mrqa/bio_asq", "test", tmp_path) == [row, row]
    write_jsonl(tmp_path, f"{place}BioASQ.jsonl.gz", lines[1:])
    with pytest.raises(UserError, match=r"BioASQ\.jsonl\.gz:1: no field 'header'"):
        rows("mrqa/bio_asq", "test", tmp_path)


def test_dpr(tmp_path):
    first = ["Bob asked Tom if he can.", "he", "Bob,Tom", "Tom", ""]
    write(tmp_path, "dpr/train.c.txt", [*first, *first])
    row = {"sentence": first[0], "pronoun": "he", "candidates": ["Bob", "Tom"], "label": 1}
    assert rows("definite_pronoun_resolution", "train", tmp_path) == [row, row]
    write(tmp_path, "dpr/train.c.txt", ["", *first, "", *first, ""])
    assert rows("definite_pronoun_resolution", "train", tmp_path) == [row, row]
    write(tmp_path, "dpr/train.c.txt", [*first, *first[:3]])
    with pytest.raises(UserError, match=r"train\.c\.txt:6: .* four lines"):
        rows("definite_pronoun_resolution", "train", tmp_path)
    write(tmp_path, "dpr/train.c.txt", [*first[:3], "Tim"])
    with pytest.raises(UserError, match="the answer is 'Tim': did you mean 'Tom'"):
        rows("definite_pronoun_resolution", "train", tmp_path)


def test_summaries(tmp_path):
    write_jsonl(tmp_path, "xsum/val.jsonl", [{"document": "d", "summary": "s", "id": "1"}])
    assert rows("xsum", "validation", tmp_path) == [{"document": "d", "summary": "s"}]
    write_jsonl(tmp_path, "cnn_dailymail/test.jsonl", [{"article": "a", "highlights": "h"}])
    found = rows("cnn_dailymail", "test", tmp_path)
    assert found == [{"article": "a", "highlights": "h", "id": ""}]
    write_jsonl(tmp_path, "xsum/val.jsonl", [{"document": "d"}])
    with pytest.raises(UserError, match=r"val\.jsonl:1: no field 'summary'"):
        rows("xsum", "validation", tmp_path)


def test_every_known_data_set_has_splits():
    assert len(layout()) > 30
    assert all(layout().values())


def test_reports_on_a_part_of_a_split_say_so(tmp_path, tiny_model_dir):
    vocabulary = load_vocabulary(str(tiny_model_dir / "spiece.model"))
    write_jsonl(tmp_path, "RTE/train.jsonl", [RTE])
    write_jsonl(tmp_path, "RTE/val_part.jsonl", [RTE])
    task = get_task("super_glue_rte_v102")

    def report(split):
        return tokenize(
            task,
            split,
            vocabulary,
            inputs_length=64,
            targets_length=8,
            data_dir=str(tmp_path),
            use_cache=False,
        ).report()

    assert report("validation").endswith(
        "; NOT the official split but the part of it in val_part.jsonl"
    )
    assert "NOT" not in report("train")
