"""A few hundred of the cases of ``scripts/fuzz_readers``, and that it sees what it looks for."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from prompt_tuning_jax.errors import UserError
from tests.script import SCRIPTS, load_script

CASES = 12  # of each of three dozen readers


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    module: ModuleType = load_script("fuzz_readers")
    return module


def run(*words: object, keep: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "fuzz_readers"), *map(str, words), "--keep", str(keep)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=400, check=False, env=environment
    )


def test_damaged_files_of_every_format(tmp_path: Path) -> None:
    done = run("--cases", CASES, "--seed", 11, keep=tmp_path)
    assert done.returncode == 0, done.stdout
    assert ", 0 failures" in done.stdout
    assert int(done.stdout.split("\n")[-2].split()[0]) > 300


def test_what_is_wrong_is_seen(fuzz: ModuleType, tmp_path: Path) -> None:
    def reader(read: object) -> object:
        return fuzz.Reader(make=lambda folder: None, read=read)

    def fail(folder: Path) -> None:
        raise UserError(f"{folder} is damaged")

    def two_lines(folder: Path) -> None:
        error = UserError("one")
        error.args = ("one\ntwo",)
        raise error

    def slow(folder: Path) -> int:
        return sum(range(10**6))

    assert fuzz.try_case(reader(fail), tmp_path) == ""
    assert fuzz.try_case(reader(lambda folder: 1), tmp_path) == ""
    assert "several lines" in fuzz.try_case(reader(two_lines), tmp_path)
    assert "ZeroDivisionError" in fuzz.try_case(reader(lambda folder: 1 // 0), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz, "SECONDS", 0)
        assert "CPU time" in fuzz.try_case(reader(slow), tmp_path)


# In a process of its own: the peak that this one has reached may be larger.
TOO_LARGE = """
import sys
from pathlib import Path

import numpy as np
from tests.script import load_script

fuzz = load_script("fuzz_readers")
read = lambda folder: int(np.ones(2**27, np.float32).sum())
print(fuzz.try_case(fuzz.Reader(make=lambda folder: None, read=read), Path(sys.argv[1])))
"""


def test_a_reader_that_needs_too_much_memory_is_seen(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TOO_LARGE, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=SCRIPTS.parent, timeout=60
    )
    assert re.fullmatch(r"needed \d+ MB; at most \d+ MB are allowed\n", done.stdout)


def test_the_same_seed_damages_alike(fuzz: ModuleType) -> None:
    data = b'{"a": [1, {"b": "text"}], "c": 2.5}' * 3

    def cases(seed: int) -> list[bytes]:
        return [fuzz.damaged(data, random.Random(f"{seed}/{n}")) for n in range(50)]

    assert cases(0) == cases(0)
    assert cases(0) != cases(1)
    assert sum(case == data for case in cases(0)) < 5
