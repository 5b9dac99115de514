"""Every kind of file that people's programs write gives the same rows, or one line."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prompt_tuning_jax.data.tasks.files import file_task
from prompt_tuning_jax.data.tasks.row_files import RowFile, read_rows
from prompt_tuning_jax.errors import UserError

ROWS = [
    {"inputs": "good, really", "targets": "yes"},
    {"inputs": "a; b", "targets": "no"},
    {"inputs": "naïve ☃", "targets": "yes"},
]
CSV = 'inputs,targets\n"good, really",yes\na; b,no\nnaïve ☃,yes\n'
TSV = CSV.replace('"good, really",', "good, really\t").replace(",yes", "\tyes")
TSV = TSV.replace("b,no", "b\tno").replace("inputs,", "inputs\t")
SEMICOLONS = 'inputs;targets\ngood, really;yes\n"a; b";no\nnaïve ☃;yes\n'
BLANKS = 'inputs, targets\n"good, really", "yes"\n"a; b", "no"\nnaïve ☃, "yes"\n'
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(path, **options):
    return [row for _, row in read_rows(path, **options)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", CSV),
        ("a.tsv", TSV),
        ("a.csv", TSV),  # a tab where a comma is meant
        ("a.csv", SEMICOLONS),
        ("a.csv", SEMICOLONS.replace("a; b", "a| b").replace(";", "|").replace("a| b", "a; b")),
        ("a.tsv", CSV),
        ("a.csv", BLANKS),
        ("a.tsv", TSV.replace("inputs\ttargets", '"inputs"\t"targets"').replace("a; b", '"a; b"')),
        ("a.jsonl", JSONL),
        ("a.ndjson", JSONL),
        ("a.json", JSONL),
        ("a.jsonl", "".join(json.dumps(row, indent=2) + "\n" for row in ROWS)),
        ("a.json", "".join(json.dumps(row, indent=2) + "\n" for row in ROWS)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=1)),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_one_content_in_every_form(tmp_path, name, text, newline, encoding):
    content = text.replace("\n", newline).encode(encoding)
    assert rows_of(write(tmp_path, name, content)) == ROWS
    assert rows_of(write(tmp_path, f"{name}.gz", gzip.compress(content))) == ROWS


def test_arrow_with_damaged_offsets_is_refused(tmp_path):
    """Arrow reads what they point to, wherever that is."""
    offsets = pa.array([0, 3, 1 << 30, 9], pa.int32()).buffers()[1]
    texts = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"good, so!"))
    batch = pa.RecordBatch.from_arrays([texts, texts], ["inputs", "targets"])
    path = tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(UserError, match=r"a\.arrow: cannot be read"):
        rows_of(path)


def test_a_home_in_the_path_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a.jsonl", JSONL)
    task = file_task(train="~/a.jsonl", eval="~/a.jsonl")
    assert len(list(task.load("train"))) == len(ROWS)


def test_parquet_and_arrow(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert rows_of(tmp_path / "a.parquet") == ROWS
    for number, new in enumerate((pa.ipc.new_stream, pa.ipc.new_file)):
        path = tmp_path / f"{number}.arrow"
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
        assert rows_of(path) == ROWS
    located = [where for where, _ in read_rows(tmp_path / "a.parquet")]
    assert located[2].endswith("a.parquet, row 3")


def test_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([["a"], ["b"], ["c"]], names=["inputs", "targets", "inputs"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: 2 columns are named 'inputs'"):
        rows_of(tmp_path / "a.parquet")


def test_values_of_parquet_become_what_json_would_hold(tmp_path):
    table = pa.table(
        {
            "i": pa.array([7], pa.int8()),
            "f": pa.array([0.1], pa.float32()),
            "d": pa.array([1.0], pa.float64()),
            "n": pa.array([float("nan")], pa.float64()),
            "b": [True],
            "none": pa.array([None], pa.string()),
            "list": [[1, 2]],
            "object": [{"k": 3}],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [
        {
            "i": "7",
            "f": "0.1",
            "d": "1.0",
            "n": None,
            "b": True,
            "none": None,
            "list": ["1", "2"],
            "object": {"k": "3"},
        }
    ]


def saved_to_disk(folder, rows, *, files=1, **state):
    """What ``datasets``' Dataset.save_to_disk writes, class labels included."""
    features = {
        "inputs": {"dtype": "string", "_type": "Value"},
        "targets": {"names": ["no", "yes"], "_type": "ClassLabel"},
    }
    schema = pa.schema(
        [("inputs", pa.string()), ("targets", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    folder.mkdir(parents=True)
    numbers = [{**row, "targets": ["no", "yes"].index(row["targets"])} for row in rows]
    names = [f"data-{i:05}-of-{files:05}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        table = pa.Table.from_pylist(numbers[i::files], schema=schema)
        with pa.ipc.new_stream(str(folder / name), schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], **state}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def test_folders_of_datasets(tmp_path):
    one = saved_to_disk(tmp_path / "one", ROWS)
    assert rows_of(one) == ROWS
    both = tmp_path / "both"
    saved_to_disk(both / "train", ROWS, files=2)
    saved_to_disk(both / "validation", ROWS[:1])
    (both / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    task = file_task(train=str(both), eval=str(both))
    assert sorted(e["inputs"] for e in task.load("train")) == sorted(r["inputs"] for r in ROWS)
    assert [e["targets"] for e in task.load("validation")] == ["yes"]
    assert task.labels == ("no", "yes")
    assert task.fingerprint("train") != task.fingerprint("validation")
    with pytest.raises(UserError, match="no split 'test'; there are: train, validation"):
        rows_of(both, split="test")


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"_data_files": [{"filename": "../a.arrow"}]}, "not the name of a file in this folder"),
        ({"_data_files": [{"filename": "/etc/passwd"}]}, "not the name of a file in this folder"),
        ({"_data_files": []}, "damaged"),
        ({"_data_files": [{"filename": "none.arrow"}]}, "no such file"),
        ({"_indices_data_files": [{"filename": "i"}]}, "flatten_indices"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path, state, match):
    folder = saved_to_disk(tmp_path / "one", ROWS, **state)
    with pytest.raises(UserError, match=match):
        rows_of(folder)
    with pytest.raises(UserError, match="a folder without state"):
        (tmp_path / "plain").mkdir()
        rows_of(tmp_path / "plain")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"no such kind of file" * 50])
def test_damaged_binary_files(tmp_path, name, content):
    with pytest.raises(UserError, match=rf"{name}: cannot be read") as caught:
        rows_of(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_every_place_where_a_parquet_file_may_be_cut(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    for end in range(0, len(content), 37):
        with pytest.raises(UserError, match="cannot be read"):
            rows_of(write(tmp_path, "cut.parquet", content[:end]))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", CSV.encode("utf-16-le"), "UTF-16LE without a byte order mark.*iconv"),
        ("a.tsv", CSV.encode("utf-16-be"), "UTF-16BE without a byte order mark.*iconv"),
        ("a.csv", CSV.encode("utf-16")[:-1], "not valid utf-16"),
        ("a.csv", b"PK\x03\x04" + bytes(100), "zip archive.*save it as CSV UTF-8"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "name it so that it ends in .gz"),
        ("a.json", "[1, 2]", "record 1: a number where an object"),
        ("a.json", '["a"]', "record 1: a string where an object"),
        ("a.jsonl", "[1]", "a.jsonl:1: an array where an object"),
        ("a.json", '[{"a": 1}', "a.json: .*JSON"),
        ("a.json", '{\n"a": 1\n}\n{\n"a": \n', r"a.json:4: .*JSON"),
        ("a.jsonl", json.dumps(ROWS, indent=1), "use .json for an array of objects"),
        ("a.csv", 'inputs,targets\n"a" ,"b"\n', "a.csv:2: "),
        ("a.csv", 'inputs,targets\na, "b"\n"c" d, "e"\n', "a.csv:"),
        ("a.csv", ",,\na,b,c\n", "the header names no column"),
    ],
)
def test_what_a_file_is_is_said(tmp_path, name, content, match):
    with pytest.raises(UserError, match=match) as caught:
        rows_of(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_a_quote_behind_a_blank_far_down_counts(tmp_path):
    plain = "inputs,targets\n" + "a, yes\n" * 3000
    read = rows_of(write(tmp_path, "a.csv", plain + 'b, "no, never"\n'))
    assert read[-1] == {"inputs": "b", "targets": "no, never"}
    # Without such a quote blanks are part of a field.
    assert rows_of(write(tmp_path, "b.csv", plain))[0]["targets"] == " yes"
    # Quotes within quotes are text, whatever stands before them.
    text = 'inputs,targets\n"he said, ""no""",yes\n'
    assert rows_of(write(tmp_path, "c.csv", text))[0]["inputs"] == 'he said, "no"'


def test_quotes_behind_blanks_that_cannot_be_meant_are_text(tmp_path):
    text = 'inputs,targets\n "so" he said,yes\nb,no\n'
    assert rows_of(write(tmp_path, "a.csv", text))[0]["inputs"] == ' "so" he said'


@pytest.mark.parametrize("limit", [10, 10**9])
@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_long_fields_whatever_others_set_as_the_limit(tmp_path, name, separator, limit):
    long = "word " * 60_000
    path = write(tmp_path, name, f"inputs{separator}targets\n{long}{separator}yes\n" * 1)
    before = csv.field_size_limit(limit)
    try:
        assert rows_of(path) == [{"inputs": long, "targets": "yes"}]
        assert csv.field_size_limit() == limit  # and theirs is as it was
    finally:
        csv.field_size_limit(before)


def test_columns_without_a_name_are_left_out(tmp_path):
    path = write(tmp_path, "a.csv", "v1,v2,,,\nham,hello,,,\nspam,win\nham,so, and,on,\n")
    assert [*rows_of(path)[0]] == ["v1", "v2"]
    assert rows_of(path)[1] == {"v1": "spam", "v2": "win"}
    assert any("1 row with text" in note for note in RowFile(path=path).notes())
    numbered = write(tmp_path, "b.csv", ",v1,v2\n0,a,b\n1,c,d\n")  # as pandas writes
    assert rows_of(numbered)[0] == {"v1": "a", "v2": "b"}
    assert not [*RowFile(path=numbered).notes()]


def test_tables_without_a_header(tmp_path):
    text = CSV.removeprefix("inputs,targets\n")
    path = write(tmp_path, "a.csv", text)
    assert rows_of(path, columns=("inputs", "targets")) == ROWS
    assert rows_of(path, header=False)[0] == {"0": "good, really", "1": "yes"}
    numbers = write(tmp_path, "n.csv", "7,8\n0,1\n")
    assert rows_of(numbers, header=False) == [{"0": "7", "1": "8"}, {"0": "0", "1": "1"}]
    with pytest.raises(UserError, match=r"remove data\.columns"):
        rows_of(write(tmp_path, "b.csv", CSV), columns=("inputs", "targets"))
    with pytest.raises(UserError, match=r"2 fields where data\.columns names 3"):
        rows_of(path, columns=("a", "b", "c"))


def test_a_separator_may_be_given(tmp_path):
    path = write(tmp_path, "a.csv", "inputs:targets\na, b:yes\n")
    assert rows_of(path, separator=":") == [{"inputs": "a, b", "targets": "yes"}]
    tabs = write(tmp_path, "b.csv", "inputs\ttargets\na, b\tyes\n")
    for separator in ("\t", "\\t", "tab"):
        assert rows_of(tabs, separator=separator) == [{"inputs": "a, b", "targets": "yes"}]
    assert any("';'" in n for n in RowFile(path=write(tmp_path, "c.csv", SEMICOLONS)).notes())


@pytest.mark.parametrize(
    ("name", "line", "separator"),
    [("a.csv", "a; b; c|yes\n", "|"), ("b.csv", "a; b\n", ";"), ("c.tsv", "a; b,yes\n", ",")],
)
def test_the_note_on_the_separator_is_of_the_one_that_is_used(tmp_path, name, line, separator):
    file = RowFile(path=write(tmp_path, name, line * 2), columns=("inputs", "targets"))
    assert [tuple(row.values()) for _, row in file.rows()] == [
        tuple(line[:-1].split(separator))
    ] * 2
    assert [note for note in file.notes() if repr(separator) in note]


def test_a_name_may_hold_another_separator(tmp_path):
    path = write(tmp_path, "a.csv", "text; as typed\nhello\n")
    assert rows_of(path) == [{"text; as typed": "hello"}]


def test_the_fingerprint_changes_with_how_a_file_is_read(tmp_path):
    path = write(tmp_path, "a.csv", CSV)
    kinds = ({}, {"header": False}, {"columns": ("a", "b")}, {"separator": ";"})
    assert len({RowFile(path=path, **kind).fingerprint() for kind in kinds}) == len(kinds)
