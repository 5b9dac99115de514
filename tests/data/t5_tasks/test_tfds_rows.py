"""The same rows, strings and errors from a TFDS build as from the official files it is made of."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prompt_tuning_jax.data.tasks.registry import get_task
from prompt_tuning_jax.data.tasks.t5_tasks.official_files import layout, official_rows
from prompt_tuning_jax.data.tasks.t5_tasks.sources import (
    is_prepared,
    number_of_rows,
    tfds_fingerprint,
    tfds_rows,
    tfds_size,
)
from prompt_tuning_jax.data.tasks.t5_tasks.tables import T5_TASKS
from prompt_tuning_jax.errors import UserError
from tests.data.t5_tasks.tfds_build import build

SUPER_GLUE = {"rte": "RTE", "wsc.fixed": "WSC", "multirc": "MultiRC", "record": "ReCoRD"}
TASKS = (
    "super_glue_rte_v102",
    "taskless_super_glue_wsc_v102_simple_eval",
    "super_glue_multirc_v102",
    "super_glue_record_v102_examples",
    "glue_cola_v200",
    "glue_stsb_v002",  # of version 1.0.0, which is not there
    "squad_v010_allanswers",
    "mrqa_race_v100",
)


@pytest.fixture(scope="session")
def folders(shared, tmp_path_factory):
    """(official files, what TFDS makes of them)."""
    source = tmp_path_factory.mktemp("official")
    for name in SUPER_GLUE.values():
        (source / name).mkdir()
        for file in (shared / "superglue" / name).iterdir():
            lines = file.read_text(encoding="utf-8").splitlines()[:3]
            text = "".join(f"{line}\n" for line in lines)
            (source / name / file.name.replace("_part", "")).write_text(text, encoding="utf-8")
    for name, train, test in [
        ("CoLA", ['a\t1\t\tSome "words" ☃', "b\t0\t*\tThe more"], ["index\tsentence", "0\tx"]),
        (
            "STS-B",
            ["sentence1\tsentence2\tscore", "a\tb\t3.8", "short"],
            ["sentence1\tsentence2", "a\tb"],
        ),
    ]:
        (source / name).mkdir()
        for file, lines in (("train", train), ("dev", train), ("test", test)):
            text = "".join(f"{line}\n" for line in lines)
            (source / name / f"{file}.tsv").write_text(text, encoding="utf-8")
    answers = [{"text": "Ä.", "answer_start": 2}, {"text": "b", "answer_start": 0}]
    paragraph = {"context": " c, d\n", "qas": [{"id": "1", "question": "q?", "answers": answers}]}
    squad = {"data": [{"title": "T", "paragraphs": [paragraph]}]}
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (source / name).write_text(json.dumps(squad))
    span = {"text": " e", "char_spans": [[0, 1]], "token_spans": [[0, 0]]}
    question = {"qid": "7", "question": " who? ", "question_tokens": [["who", 0]]}
    passage = {
        "context": " e f ",
        "context_tokens": [["e", 1], ["f", 3]],
        "qas": [{**question, "answers": ["e ", "E"], "detected_answers": [span]}],
    }
    lines = [json.dumps({"header": {"dataset": "RACE", "split": "dev"}}), json.dumps(passage)]
    (source / "RACE.jsonl.gz").write_text("\n".join(lines))  # as extracted by TFDS
    data_dir = tmp_path_factory.mktemp("tfds")
    names = [f"super_glue/{config}" for config in SUPER_GLUE]
    build(source, data_dir, *names, "glue/cola", "glue/stsb", "squad/v1.1", "mrqa/race")
    (source / "RACE.jsonl.gz").rename(source / "RACE.jsonl")
    return str(source), str(data_dir)


def as_set(rows):
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_same_rows_and_same_strings(folders, name):
    official, prepared = folders
    task = get_task(name)
    dataset = T5_TASKS[task.name.replace("taskless_", "")].tfds.partition(":")[0]
    assert is_prepared(dataset, prepared) and not is_prepared(dataset, official)
    for split in layout()[dataset]:
        rows = list(official_rows(dataset, split, official))
        assert rows
        # TFDS has an order of its own.
        assert as_set(tfds_rows(dataset, split, prepared)) == as_set(rows)
        assert tfds_size(dataset, split, prepared) == len(rows)
    for split in task.splits:
        examples = list(task.load(split, official))
        assert as_set(task.load(split, prepared)) == as_set(examples)
        assert task.fingerprint(split, prepared) != task.fingerprint(split, official)
        base = T5_TASKS[task.name.replace("taskless_", "")]
        sizes = {number_of_rows(base, split, folder) for folder in folders}
        assert len(sizes) == 1 and None not in sizes


@pytest.mark.slow
def test_the_order_is_always_the_same(folders):
    first = list(tfds_rows("super_glue/multirc", "train", folders[1]))
    assert first == list(tfds_rows("super_glue/multirc", "train", folders[1]))


@pytest.mark.slow
def test_what_is_wrong_with_a_build(folders, tmp_path):
    copy = tmp_path / "tfds"
    shutil.copytree(Path(folders[1]) / "super_glue" / "rte", copy / "super_glue" / "rte")
    data_dir = str(copy)
    with pytest.raises(UserError, match=r"no split 'valid'.*did you mean 'validation'"):
        list(tfds_rows("super_glue/rte", "valid", data_dir))
    with pytest.raises(UserError, match="no prepared super_glue/cb; prepare it with `tfds build"):
        list(tfds_rows("super_glue/cb", "train", data_dir))
    before = tfds_fingerprint("super_glue/rte", "train", data_dir)
    (folder,) = (copy / "super_glue" / "rte").iterdir()
    record = next(folder.glob("*-train.*"))
    record.write_bytes(record.read_bytes()[:-30])
    assert tfds_fingerprint("super_glue/rte", "train", data_dir) != before
    with pytest.raises(UserError, match="files are missing or damaged") as error:
        list(tfds_rows("super_glue/rte", "train", data_dir))
    assert "\n" not in str(error.value)
    (folder / "features.json").write_text("{")
    with pytest.raises(UserError, match="tensorflow-datasets cannot open it"):
        list(tfds_rows("super_glue/rte", "test", data_dir))
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset_info\.json: invalid or truncated JSON"):
        tfds_size("super_glue/rte", "test", data_dir)


def prepared(folder, **sizes):
    folder.mkdir(parents=True)
    splits = [{"name": name, "shardLengths": [str(n), "1"]} for name, n in sizes.items()]
    (folder / "dataset_info.json").write_text(json.dumps({"splits": splits}))


def test_versions_and_sizes_without_tensorflow(tmp_path):
    for version, number in (("1.0.0", 1), ("2.0.0", 2), ("10.0.0", 3)):
        prepared(tmp_path / "glue" / "rte" / version, train=number)
    data_dir = str(tmp_path)
    assert tfds_size("glue/rte", "train", data_dir, version="1.0.0") == 2
    assert tfds_size("glue/rte", "train", data_dir, version="3.0.0") == 4
    assert tfds_size("glue/rte", "train", data_dir) == 4
    (tmp_path / "glue" / "rte" / "10.0.0" / "dataset_info.json").unlink()
    assert tfds_size("glue/rte", "train", data_dir) == 3
    prepared(tmp_path / "cnn_dailymail" / "plain_text" / "3.0.0", test=5)
    assert tfds_size("cnn_dailymail", "test", data_dir) == 6


def test_without_the_package(tmp_path):
    """In a process of its own, whose imports of it fail."""
    prepared(tmp_path / "super_glue" / "rte" / "1.0.2", train=1)
    code = (
        "import sys; sys.modules['tensorflow_datasets'] = None\n"
        "from prompt_tuning_jax.data.tasks.registry import get_task\n"
        "from prompt_tuning_jax.errors import UserError\n"
        "task = get_task('super_glue_rte_v102')\n"
        f"for folder in ({str(tmp_path)!r}, 'gs://bucket/data'):\n"
        "    try: list(task.load('train', folder))\n"
        "    except UserError as error: print(error)\n"
        "print(*{'tensorflow', 'seqio'} & sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *errors, loaded = done.stdout.split("\n")[:-1]
    assert len(errors) == 2
    assert all("pip install tensorflow tensorflow-datasets" in error for error in errors)
    assert loaded == ""
