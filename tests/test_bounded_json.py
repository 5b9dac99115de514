"""What Python's reader trips over is refused in one line; all that is written is JSON."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.untrusted_input import json_text, read_json, read_json_file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested deeper"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested deeper"),
        ("[" * 65 + "]" * 65, "nested deeper"),
        ("7" * 5000, "5000 digits"),
        ("-" + "7" * 400, "digits"),
        ("1." + "7" * 5000, "digits"),
        ("1e400", "1e400 is too large"),
        ("-1e400", "too large"),
        ("NaN", "NaN is not JSON"),
        ('{"a": [-Infinity]}', "-Infinity is not JSON"),
        (r'"\ud800"', "half of a surrogate pair"),
        (r'{"\uDFff": 1}', "half of a surrogate pair"),
        (r'[["\ude00\ud83d"]]', "half of a surrogate pair"),
        ('"\udc80"', "half of a surrogate pair"),
        (b'"\xff"', "byte 2 (0xff) is not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        ('{"a": 1', "truncated"),
        ('{"a": 1}\n{"b": 2}', "line 2"),
        ("", "invalid or truncated JSON"),
        ("{'a': 1}", "invalid or truncated JSON"),
        ("[]" + " " * 1000, "at most 1000"),
        ("[" + "{}," * 2**21 + "{}]", "arrays and objects"),
    ],
)
def test_what_cannot_be_read_is_one_line(text: str | bytes, words: str) -> None:
    limit = 1000 if words == "at most 1000" else 2**26
    start = time.process_time()
    with pytest.raises(UserError) as raised:
        read_json(text, of="config.json: labels", max_bytes=limit)
    assert time.process_time() - start < 1
    message = str(raised.value)
    assert message.startswith("config.json: labels: ")
    assert words in message
    assert len(message.splitlines()) == 1
    assert len(message) < 200


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, -2.5, true, null, "é"]}', {"a": [1, -2.5, True, None, "é"]}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (r'"\ud83d\ude00 \u00e9"', "😀 é"),
        (r'"\\ud800"', r"\ud800"),
        ("[" * 64 + "]" * 64, json.loads("[" * 64 + "]" * 64)),
        ("[" + "[]," * 100 + "[]]", [[]] * 101),
        ("7" * 300, int("7" * 300)),
        ("1e308", 1e308),
    ],
)
def test_what_is_json_is_read(text: str | bytes, value: object) -> None:
    assert read_json(text, of="x") == value


def test_numbers_stay_as_written_where_asked() -> None:
    row = '{"a": 1.50, "b": NaN, "c": ' + "9" * 5000 + "}"
    expected = {"a": "1.50", "b": None, "c": "9" * 5000}
    assert read_json(row, of="x", parse_numbers_as_text=True) == expected


def test_of_a_file_no_more_than_the_bound_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"d_model": 8}')
    assert read_json_file(path) == {"d_model": 8}
    with path.open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"config\.json: too large.* \d+ bytes"):
        read_json_file(path)
    with pytest.raises(UserError, match=r"absent\.json: No such file"):
        read_json_file(tmp_path / "absent.json")
    with pytest.raises(UserError, match="a folder: Is a directory"):
        read_json_file(tmp_path, of="a folder")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"score": math.nan, "all": [1.5, math.inf, (-math.inf,)]}, None),
        ([np.float32("nan"), np.float64("inf"), np.float32(0.5), np.int64(3)], None),
        ({"name": "naïve 😀"}, '{"name": "naïve 😀"}'),
        (["a\udc80b"], r'["a\udc80b"]'),
        ({"b": True, "a": None}, '{"b": true, "a": null}'),
    ],
)
def test_what_is_written_is_json(value: object, text: str | None) -> None:
    written = json_text(value)
    assert text in (None, written)
    written.encode()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads(written, parse_constant=refuse)


def test_nan_is_written_as_null() -> None:
    value = {"score": math.nan, "all": [1.5, math.inf, (-math.inf,)], "n": np.int64(3)}
    assert json_text(value, sort_keys=True) == '{"all": [1.5, null, [null]], "n": 3, "score": null}'
    assert json_text({"a": 1}, indent=2) == '{\n  "a": 1\n}'
    with pytest.raises(TypeError):
        json_text({"a": object()})


def test_a_message_is_one_printable_line_of_some_length() -> None:
    error = UserError(f"a.json: field {'x' * 10_000}\x1b[31m\nis wrong; set it")
    message = str(error)
    assert len(message) < 2100
    assert message.startswith("a.json: field xx")
    assert message.endswith(r"\x1b[31m\nis wrong; set it")


def test_numbers_as_written_are_written_as_numbers() -> None:
    text = '{"id": 3, "x": -1.5, "big": 1e400, "name": "3"}'
    value = read_json(text, of="f", parse_numbers_as_text=True)
    assert json.loads(json_text(value)) == {"id": 3, "x": -1.5, "big": None, "name": "3"}
