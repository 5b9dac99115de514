import gzip
import json
from collections import Counter

import pytest

from prompt_tuning_jax.data.tasks.files import MAX_LABELS, are_labels, check_file_columns, file_task
from prompt_tuning_jax.errors import UserError

ROWS = [
    {"inputs": "good, really", "targets": "yes"},
    {"inputs": 'a "quoted" word', "targets": "no"},
    {"inputs": "naïve ☃", "targets": "yes"},
]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'inputs,targets\n"good, really",yes\n"a ""quoted"" word",no\nnaïve ☃,yes\n'
TSV = 'inputs\ttargets\ngood, really\tyes\na "quoted" word\tno\nnaïve ☃\tyes\n'
TEXTS = {".jsonl": JSONL, ".csv": CSV, ".tsv": TSV}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def load(path, **fields):
    return list(file_task(train=path, **fields).load("train"))


def fails(path, match, **fields):
    with pytest.raises(UserError, match=match) as caught:
        load(path, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", TEXTS)
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("zipped", [False, True])
def test_every_format_gives_the_same_examples(write, ending, bom, newline, zipped):
    content = (bom + TEXTS[ending].replace("\n", newline)).encode()
    path = write("a" + ending + ".gz" * zipped, gzip.compress(content) if zipped else content)
    assert load(path) == ROWS
    assert load(write("b" + ending, content.rstrip())) == ROWS  # no newline at the end


def test_quotes_in_tab_separated_files_are_text(write):
    path = write("a.tsv", 'inputs\ttargets\n"To be" or not\tyes\n"unclosed\tno\n')
    assert [row["inputs"] for row in load(path)] == ['"To be" or not', '"unclosed']


def test_values_become_text(write):
    row = (
        '{"inputs": 1.50, "targets": true, "n": null, "big": 1234567890123456789012, "x": Infinity}'
    )
    assert load(write("a.jsonl", row)) == [
        {
            "inputs": "1.50",
            "targets": "True",
            "n": "",
            "big": "1234567890123456789012",
            "x": "Infinity",
        }
    ]
    for name, row in (
        ("b.jsonl", '{"inputs": "a", "targets": NaN}'),
        ("b.json", '[{"inputs": "a", "targets": NaN}]'),
        ("c.jsonl", '{"inputs": "a",\n "targets": NaN}'),
    ):
        fails(write(name, row), "the target is empty")  # pandas writes missing values so


def test_columns_may_be_named_or_put_into_templates(write):
    path = write("a.csv", "premise,the hypothesis,label\nA man.,He sits.,1\n")
    assert load(path, inputs_column="premise", targets_column="label")[0]["inputs"] == "A man."
    [example] = load(
        path,
        inputs_template="{{nli}} hypothesis: {the hypothesis} premise: {premise}",
        targets_template="class {label}",
    )
    assert example["inputs"] == "{nli} hypothesis: He sits. premise: A man."
    assert example["targets"] == "class 1"
    assert example["label"] == "1"  # what the row held stays with it


def test_a_template_reaches_nothing_but_columns(write):
    path = write("a.csv", "inputs,targets\na,b\n")
    for template in ("{inputs.__class__}", "{inputs[0]}", "{0}", "{inputs!r}", "{inputs:>9}"):
        fails(path, "no column '.*': .*here are: inputs, targets", inputs_template=template)
    # Braces in a value are text.
    assert load(write("b.csv", "inputs,targets\n{targets},b\n"))[0]["inputs"] == "{targets}"


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{premise", "the brace at character 1 .* has no partner"),
        ("premise}", "the brace at character 8 .* has no partner"),
        ("{}", "empty braces"),
        ("no columns", "'no columns' names no column"),
    ],
)
def test_malformed_templates(write, template, match):
    fails(write("a.jsonl", JSONL), f"data.inputs_template: {match}", inputs_template=template)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", '{"input": "a", "targets": "b"}', r"a\.jsonl:1: no column 'inputs': did you"),
        ("a.csv", "text,targets\na,b\n", r"a\.csv:1: no column 'inputs': there are: text, targets"),
        ("a.jsonl", JSONL + "{oops\n", r"a\.jsonl:4: invalid or truncated JSON"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: .*nested deeper"),
        ("a.jsonl", '[{"inputs": 1}]', r"a\.jsonl:1: an array where an object"),
        ("a.jsonl", '{"inputs": ["a"], "targets": "b"}', r":1: column 'inputs' is a list"),
        ("a.jsonl", '{"inputs": "\\ud800", "targets": "b"}', ":1: a .* escape is half"),
        ("a.jsonl", '{"inputs": "a", "targets": null}', ":1: the target is empty"),
        ("a.jsonl", '\n{"inputs": "a", "targets": " "}', ":2: the target is empty"),
        ("a.csv", "inputs,targets\na,b\nc\n", r"a\.csv:3: 1 fields where the header has 2"),
        ("a.tsv", "inputs\ttargets\na\tb\tc\n", r"a\.tsv:2: 3 fields where the header has 2"),
        ("a.csv", 'inputs,targets\n"a,b\n', r"a\.csv:2: unexpected end of data"),
        ("a.csv", "inputs,inputs\na,b\n", r"a\.csv:1: the header names 'inputs' more than once"),
        ("a.csv", "", "no examples"),
        ("a.csv", "inputs,targets\n", "no examples"),
        ("a.jsonl", "\n\n", "no examples"),
        ("a.txt", "a", r"unknown format.*\.jsonl, \.csv, \.tsv"),
        ("a", "a", "unknown format"),
        ("a.jsonl.gz", "not gzip", r"a\.jsonl\.gz: cannot be read"),
        ("a.csv.gz", gzip.compress(CSV.encode() * 9, mtime=0)[:-20], "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(write, name, content, match):
    fails(write(name, content), match)


def test_bytes_that_are_not_utf8_are_located(write):
    path = write("a.csv", CSV.encode() + "café,yes\n".encode("latin-1"))
    fails(path, r"a\.csv:5: byte 4 of the line \(0xe9\) is not UTF-8; convert .*iconv -f latin1")


def test_missing_files_and_folders(tmp_path):
    fails(str(tmp_path / "none.csv"), r"none\.csv: no such file")
    (tmp_path / "folder.csv").mkdir()
    fails(str(tmp_path / "folder.csv"), r"folder\.csv: cannot be read")
    with pytest.raises(UserError, match=r"set data\.train or data\.eval"):
        file_task()


def test_labels_are_the_training_files_distinct_targets(write):
    evaluation = write("eval.csv", "inputs,targets\na,perhaps\n")
    task = file_task(train=write("a.jsonl", JSONL), eval=evaluation)
    assert task.labels == ("no", "yes")
    assert task.splits == ("train", "validation")
    assert [e["targets"] for e in task.load("validation")] == ["perhaps"]
    assert [metric.name for metric in task.metrics] == ["accuracy"]
    assert file_task(eval=evaluation).labels == ()  # a file of one class need not have them all


def test_many_distinct_targets_are_free_text(write):
    def labels(number):
        rows = "".join(f"a,t{i}\n" for i in range(number)) * 2
        return file_task(train=write("a.csv", "inputs,targets\n" + rows)).labels

    assert len(labels(MAX_LABELS)) == MAX_LABELS
    assert labels(MAX_LABELS + 1) == ()


def test_given_labels_keep_their_order_and_bind_the_targets(write):
    path = write("a.jsonl", JSONL)
    assert file_task(train=path, labels=("yes", "no")).labels == ("yes", "no")
    fails(path, "a.jsonl:2: the target 'no' is not one of the labels", labels=("yes", "nope"))


def test_blanks_around_a_target_are_not_part_of_it(write):
    assert load(write("a.csv", "inputs,targets\na, yes \n"))[0]["targets"] == "yes"


def test_metrics_are_named(write):
    path = write("a.jsonl", JSONL)
    task = file_task(train=path, metrics=("f1_binary", "accuracy"))
    assert task.score(ROWS, ["yes", "yes", "yes"])["f1_binary"] == pytest.approx(80)
    with pytest.raises(UserError, match="unknown metric"):
        file_task(train=path, metrics=("f2",))


def test_the_fingerprint_is_of_the_content_and_of_the_templates(write):
    def fingerprint(path, **fields):
        return file_task(train=path, **fields).fingerprint("train")

    path = write("a.jsonl", JSONL)
    first = fingerprint(path)
    assert fingerprint(path) == first
    assert fingerprint(path, inputs_template="x {inputs}") != first
    assert fingerprint(path, inputs_column="targets") != first
    write("a.jsonl", JSONL.replace("good", "fine"))
    assert fingerprint(path) != first
    write("a.jsonl", JSONL)
    assert fingerprint(path) == first


def test_real_data_given_as_files(shared, write):
    """Question classification, converted as a user would."""
    lines = (shared / "text_tasks/qc/train.txt").read_text("latin-1").splitlines()
    rows = [line.split(" ", 1) for line in lines]
    content = "".join(
        json.dumps({"question": text, "class": label.split(":")[0]}) + "\n" for label, text in rows
    )
    task = file_task(
        train=write("qc.jsonl", content),
        inputs_template="question: {question}",
        targets_column="class",
    )
    assert len(task.labels) == 6
    assert len(list(task.load("train"))) == 5452


def counts(*targets):
    return Counter(targets)


ANSWERS = [f"answer {i}" for i in range(30)]


@pytest.mark.parametrize(
    ("train", "evaluation", "expected"),
    [
        (counts(*ANSWERS), None, False),  # all differ
        (counts(*ANSWERS), counts(*ANSWERS[:20]), False),  # also where they are evaluated on
        (counts(*ANSWERS), counts("other", "texts"), False),
        (counts(*ANSWERS[:20], *ANSWERS[:5]), None, False),  # most are there once
        (counts(*"abcdef"), counts(*"aabbccddeeff"), True),  # one example of each class
        (counts(*"ab"), None, True),  # a few rows say nothing
        (counts(*"ab"), counts(*"ab"), True),
        (counts(*"abcd"), counts(*ANSWERS), False),
        (counts("He went home at night.", "She stayed there all day."), None, False),
        (counts(*("yes",) * 20, *("no",) * 10), counts("Yes", "No", "Yes", "No", "Yes"), True),
        (counts(*"aaab"), counts("a"), True),
        (counts(*[f"{'word ' * 9}{i}" for i in range(12)] * 3), None, False),  # long ones
        (counts(*[str(i) for i in range(MAX_LABELS)] * 2), None, True),
        (counts(*[str(i) for i in range(MAX_LABELS + 1)] * 9), None, False),
    ],
)
def test_labels_and_text_are_told_apart_by_how_often_targets_repeat(train, evaluation, expected):
    assert are_labels(train, evaluation) is expected


def test_what_targets_are_is_said_and_can_be_set(write):
    path = write("a.csv", "inputs,targets\n" + "".join(f"{i},answer {i}\n" for i in range(30)))
    task = file_task(train=path)
    assert task.labels == ()
    assert any("30 distinct in 30 rows" in note and "data.targets" in note for note in task.notes)
    assert len(file_task(train=path, targets="labels").labels) == 30
    repeated = write("b.csv", "inputs,targets\n" + "a,yes\nb,no\n" * 9)
    assert file_task(train=repeated).labels == ("no", "yes")
    assert file_task(train=repeated, targets="text").labels == ()


def test_empty_targets_where_nothing_is_an_answer(write):
    path = write("a.csv", "inputs,targets\na,x\nb,\nc,x\n")
    fails(path, "allow_empty_targets")
    task = file_task(train=path, allow_empty_targets=True)
    assert [e["targets"] for e in task.load("train")] == ["x", "", "x"] and task.labels == ()
    with pytest.raises(UserError, match="a label needs a name"):
        file_task(train=path, allow_empty_targets=True, targets="labels")


def test_nested_columns_are_no_trouble_where_nothing_uses_them(write):
    row = '{"inputs": "a", "targets": "b", "idx": {"p": 1}, "list": [1, null, "x"]}'
    [example] = load(write("a.jsonl", row))
    assert example["idx"] == {"p": "1"} and example["list"] == ["1", None, "x"]
    fails(write("b.jsonl", row), "column 'list' is a list", inputs_template="{inputs} {list}")


def test_all_files_are_looked_for_before_any_is_read(write, tmp_path):
    fields = dict(
        train_split="train",
        eval_split="validation",
        inputs_column="inputs",
        targets_column="targets",
        inputs_template="",
        targets_template="",
        header=True,
        columns=(),
        separator="",
    )
    damaged, good = write("a.jsonl", "{oops"), write("b.jsonl", JSONL)
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        check_file_columns(train=damaged, eval=str(tmp_path / "none.jsonl"), **fields)
    other = write("c.csv", "text,targets\na,b\n")
    with pytest.raises(UserError, match=r"c\.csv:1: no column 'inputs'"):
        check_file_columns(train=good, eval=other, **fields)
    check_file_columns(train=good, eval=good, **fields)


def test_a_table_without_a_header_is_told_how_to_name_its_columns(write):
    path = write("a.csv", "negative,vile\npositive,good\n")
    fails(path, r"if the first line is an example, set data\.columns=.*=targets,inputs")
    assert load(path, columns=("targets", "inputs"))[0]["inputs"] == "vile"


def test_how_tables_are_read_is_for_tables(write):
    fails(write("a.jsonl", JSONL), r"data\.header, data\.columns and data\.separator", header=False)
