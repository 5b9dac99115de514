"""What was recorded from the original: strings, ids, metric values and edge cases."""

import json

import pytest

from prompt_tuning_jax.data.vocabularies.vocab import Vocabulary


@pytest.fixture(scope="session")
def tasks_folder(shared):
    return shared / "fixtures" / "tasks"


@pytest.fixture(scope="session")
def t5_vocabulary(shared):
    return Vocabulary(shared / "fixtures" / "t5_vocab.model")


@pytest.fixture(scope="session")
def cases(tasks_folder):
    return json.loads((tasks_folder / "cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def results(tasks_folder):
    return json.loads((tasks_folder / "metrics.json").read_text(encoding="utf-8"))["results"]


@pytest.fixture(scope="session")
def registry(tasks_folder):
    return json.loads((tasks_folder / "registry.json").read_text(encoding="utf-8"))
