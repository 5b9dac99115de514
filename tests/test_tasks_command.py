"""``prompt-tuning tasks`` and ``metrics`` from the command line to what is printed and written."""

import json
import random
import re
import subprocess
import sys

import pytest

from prompt_tuning_jax.cli import task_listing
from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.data.batching.tokenize import tokenize
from prompt_tuning_jax.data.tasks.registry import aliases, get_task, task_names
from prompt_tuning_jax.data.vocabularies.vocab import ByteVocabulary
from prompt_tuning_jax.inference.scoring import read_predictions

RTE = "super_glue_rte_v102"


@pytest.fixture
def data(shared):
    return str(shared / "superglue")


@pytest.fixture
def t5(shared):
    return str(shared / "fixtures" / "t5_vocab.model")


def run(capsys, *line):
    status = main([str(word) for word in line])
    return status, *capsys.readouterr()


def predict(folder, texts, *, end="\n"):
    path = folder / "predictions.jsonl"
    path.write_text("".join(json.dumps(text) + end for text in texts), encoding="utf-8")
    return path


def dumped(capsys, folder, *line):
    path = folder / "dumped.jsonl"
    status, out, err = run(capsys, "tasks", *line, "--dump", path)
    assert status == 0, err
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert f"wrote {len(lines):,} examples" in out
    return lines


def test_the_list_is_grouped(capsys):
    status, out, _ = run(capsys, "tasks")
    lines = out.splitlines()
    assert status == 0
    assert 40 < len(lines) < 90 and max(map(len, lines)) <= 130
    assert lines[0] == "SuperGLUE (also with taskless_ or task_index_)"
    shown = {line.split(" ")[0] for line in lines if line}
    assert {RTE, "glue_sst2_v002", "squad_to_mrqa", "xsum_v110", "word_valence"} <= shown
    assert not any(name.startswith(("taskless_", "task_index_")) for name in shown)
    assert "30 names that begin with spot_" in out and "44 names that begin with pr:" in out
    # Nothing is left out: what has no line is another form or version of what has one.
    for name in task_names():
        if name.startswith(("spot_", "pr:")):
            continue  # counted in a line for all of them
        own = name.removeprefix("taskless_").removeprefix("task_index_").replace("_v200", "_v002")
        assert own in shown, name


def test_lists_and_scores_come_without_jax(tmp_path):
    (tmp_path / "CB").mkdir()
    row = {"premise": "a", "hypothesis": "b", "label": "neutral", "idx": 0}
    (tmp_path / "CB/val.jsonl").write_text(json.dumps(row))
    (tmp_path / "p.txt").write_text("neutral\n")
    words = ["metrics", "super_glue_cb_v102", "--data_dir", str(tmp_path)]
    code = (
        "import sys\n"
        "from prompt_tuning_jax.cli.main import main\n"
        f"assert main({[*words, '--predictions', str(tmp_path / 'p.txt')]}) == 0\n"
        "assert main(['tasks', '--all']) == 0\n"
        "assert not {'jax', 'tensorflow', 'prompt_tuning_jax.training.build'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and '"accuracy": 100.0' in done.stdout, done.stderr


def test_every_name(capsys):
    status, out, _ = run(capsys, "tasks", "--all")
    assert status == 0
    assert {line.split(" ")[0] for line in out.splitlines()} == {*task_names(), *aliases()}


def test_sizes_where_the_data_are(capsys, shared, tmp_path):
    (tmp_path / "RTE").mkdir()
    (tmp_path / "CB").mkdir()
    source = shared / "superglue" / "RTE" / "val.jsonl"
    (tmp_path / "RTE" / "val.jsonl").write_bytes(source.read_bytes())
    (tmp_path / "CB" / "val.jsonl").write_text('{"premise": ')
    status, out, _ = run(capsys, "tasks", "--data_dir", tmp_path)
    assert status == 0
    lines = {line.split(" ")[0]: line for line in out.splitlines() if line}
    assert "validation 277: does the premise" in lines[RTE]
    assert "val.jsonl:1: invalid or truncated JSON" in lines["super_glue_cb_v102"]
    assert "no data: " in lines["super_glue_copa_v102"]


def test_examples_as_the_model_sees_them(capsys, data, t5, tasks_recorded):
    recorded = [line for line in tasks_recorded if line["split"] == "validation"]
    line = ("tasks", f"taskless_{RTE}", "--split", "validation", "--data_dir", data)
    status, out, _ = run(capsys, *line, "--vocabulary", t5, "--limit", "2")
    assert status == 0
    blocks = out.strip().split("\n\n")
    assert len(blocks) == 2
    wanted = recorded[0]["examples"][0]["taskless"]
    assert f"inputs: {wanted['inputs']}" in blocks[0]
    assert f"inputs_ids: {wanted['inputs_ids']}" in blocks[0]
    assert f"inputs_length: {len(wanted['inputs_ids'])}" in blocks[0]
    assert f"targets_ids: {wanted['targets_ids']}" in blocks[0]


def test_examples_without_labels_and_of_a_mixture(capsys, data):
    line = ("--data_dir", data, "--limit", 2)
    status, out, _ = run(capsys, "tasks", RTE, "--split", "test", *line)
    assert status == 0 and out.count("targets: (none: this split has no labels)") == 2
    assert "targets_ids" not in out and out.count("inputs_ids: ") == 2
    status, out, _ = run(capsys, "tasks", "super_glue_wsc_and_dev_v102_simple", *line)
    assert status == 0 and out.count("task: super_glue_wsc_v102_simple_train\n") == 2
    assert "targets_ids" in out


@pytest.fixture
def tasks_recorded(shared):
    with open(shared / "fixtures" / "tasks" / "rte.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_statistics(capsys):
    status, out, _ = run(capsys, "tasks", "word_valence", "--split", "test", "--statistics")
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert status == 0
    number = int(lines["examples of test"].replace(",", ""))
    counts = re.findall(r"(\w+) ([\d,]+) \(([\d.]+) %\)", lines["labels"])
    assert sum(int(count.replace(",", "")) for _, count, _ in counts) == number
    for _, count, share in counts:
        assert float(share) == pytest.approx(100 * int(count.replace(",", "")) / number, abs=0.05)
    assert re.fullmatch(r"\d+ to \d+, median \d+, 95 % up to \d+", lines["tokens of inputs"])
    assert run(capsys, "tasks", "--statistics")[2].startswith("error: --statistics needs the NAME")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_dump_is_what_was_recorded(capsys, tmp_path, data, t5, tasks_recorded, split):
    line = (RTE, "--split", split, "--data_dir", data, "--vocabulary", t5)
    found = dumped(capsys, tmp_path, *line)
    recorded = [line for line in tasks_recorded if line["split"] == split]
    assert found[: len(recorded)] == [row["examples"][0]["ordinary"] for row in recorded]
    assert list(found[0]) == ["inputs", "targets", "inputs_ids", "targets_ids"]


def test_dump_in_the_task_index_form(capsys, tmp_path, shared, data, t5):
    cases = json.loads((shared / "fixtures" / "tasks" / "cases.json").read_text(encoding="utf-8"))
    recorded = cases["task_index_examples"]
    texts = [case["inputs_pretokenized"] for case in recorded if "sst2" in case["task"]]
    lines = [f"{text.removeprefix('sentence: ')}\t1\n" for text in texts]
    glue = tmp_path / "glue" / "SST-2"
    glue.mkdir(parents=True)
    (glue / "dev.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    for case in recorded:
        folder = tmp_path if "sst2" in case["task"] else data
        line = (case["task"], "--split", "validation", "--data_dir", folder, "--vocabulary", t5)
        found = {row["inputs"]: row["inputs_ids"] for row in dumped(capsys, tmp_path, *line)}
        assert found[case["inputs_pretokenized"]] == case["inputs_ids"]


def test_dump_with_bytes_and_of_the_bundled_task(capsys, tmp_path, data):
    name = "task_index_super_glue_copa_v102"
    line = (name, "--split", "validation", "--data_dir", data, "--vocabulary", "bytes")
    first = dumped(capsys, tmp_path, *line)[0]
    ids = [384 - 3, *(byte + 3 for byte in first["inputs"].encode()), 1]
    assert first["inputs_ids"] == ids
    assert len(dumped(capsys, tmp_path, "word_valence", "--split", "test")) > 100


def test_dumped_ids_are_those_of_training(tmp_path, data, monkeypatch):
    words = ByteVocabulary()
    words.input_start = (2,)  # as in most decoder-only models
    monkeypatch.setattr(task_listing, "load_vocabulary", lambda path: words)
    name = "task_index_super_glue_copa_v102"
    fields = {"split": "validation", "data_dir": str(data)}
    task_listing.dump(name, str(tmp_path / "x.jsonl"), vocabulary="its own", **fields)
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    examples = tokenize(
        get_task(name),
        vocabulary=words,
        inputs_length=9,
        targets_length=9,
        use_cache=False,
        **fields,
    )
    assert [json.loads(line)["inputs_ids"] for line in lines] == [
        list(examples.inputs[i]) for i in range(len(examples))
    ]
    assert list(examples.inputs[0][:2]) == [2, words.size - 3]


def test_a_failed_dump_leaves_nothing(capsys, tmp_path, t5):
    folder = tmp_path / "RTE"
    folder.mkdir()
    good = {"premise": "a", "hypothesis": "b", "label": "entailment", "idx": 0}
    (folder / "train.jsonl").write_text(json.dumps(good) + '\n{"premise')
    line = ("tasks", RTE, "--data_dir", tmp_path, "--vocabulary", t5)
    status, _, err = run(capsys, *line, "--dump", tmp_path / "out.jsonl")
    assert (
        status == 2 and "train.jsonl:2: invalid or truncated JSON" in err and err.count("\n") == 1
    )
    assert [path.name for path in tmp_path.iterdir()] == ["RTE"]


def scored(capsys, folder, texts, name, *line):
    status, out, err = run(capsys, "metrics", name, "--predictions", predict(folder, texts), *line)
    assert status == 0, err
    return json.loads(out)


def test_metrics_of_the_targets_themselves_and_of_one_mistake(capsys, tmp_path, data):
    line = ("--split", "validation", "--data_dir", data)
    targets = [row["targets"] for row in dumped(capsys, tmp_path, RTE, *line)]
    assert scored(capsys, tmp_path, targets, RTE, *line) == {"accuracy": 100.0, "invalid": 0.0}
    wrong = ["Entailment", *targets[1:]]
    values = scored(capsys, tmp_path, wrong, f"{RTE}_examples", *line)
    assert values == {"accuracy": 100 * (276 / 277), "invalid": 100 / 277}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("super_glue_multirc_v102", {"f1", "exact_match"}),
        ("super_glue_record_v102", {"f1", "em"}),
        ("super_glue_wsc_v102_simple_eval", {"accuracy"}),
        ("super_glue_cb_v102", {"mean_3class_f1", "accuracy"}),
    ],
)
def test_metrics_of_each_kind(capsys, tmp_path, data, name, keys):
    line = ("--split", "validation", "--data_dir", data)
    rows = dumped(capsys, tmp_path, name, *line)
    rng = random.Random(0)
    texts = [rng.choice([row["targets"], "", "☃ else"]) for row in rows]
    values = scored(capsys, tmp_path, texts, name, *line)
    assert keys <= values.keys()
    assert all(0 <= value < 100 for value in values.values())


def test_predictions_in_each_of_their_forms(tmp_path):
    """What ``predict --output`` writes, with and without ``--json``, is read."""
    path = tmp_path / "p.txt"
    texts = ["entailment", "", " {a} b", "1"]
    forms = (
        texts,
        [json.dumps(text) for text in texts],
        [json.dumps({"input": "x", "prediction": text}) for text in texts],
    )
    for lines in forms:
        path.write_text("".join(f"{line}\n" for line in lines))
        assert read_predictions(path) == texts


def test_predictions_that_do_not_fit(capsys, tmp_path, data):
    def error(content, *more):
        path = tmp_path / "p.jsonl"
        path.write_bytes(content)
        line = ("metrics", RTE, "--data_dir", data, "--predictions", path, *more)
        status, out, err = run(capsys, *line)
        assert status == 2 and not out and err.count("\n") == 1
        return err

    count = error(b'\xef\xbb\xbf"entailment"\r\n"x"\r\n\r\n')
    assert "has 2 predictions" in count and "has 277 examples" in count
    assert "p.jsonl:2: 1 is not in double quotes" in error(b'"a"\n1\n')
    assert "all as bare text" in error(b'entailment\n"a"\n')
    assert "p.jsonl:1: invalid or truncated JSON" in error(b'"a\n')
    assert "p.jsonl:1: an object without a text" in error(b'{"text": "a"}\n')
    assert "p.jsonl:2: a blank line" in error(b'"a"\n\n"b"\n')
    assert "did you mean 'validation'" in error(b'"a"\n', "--split", "validaton")


def test_correlations_of_constants_are_null(capsys, tmp_path):
    (tmp_path / "STS-B").mkdir()
    table = "sentence1\tsentence2\tscore\na\tb\t1.0\nc\td\t3.0\n"
    (tmp_path / "STS-B" / "dev.tsv").write_text(table)
    values = scored(capsys, tmp_path, ["2.0", "2.0"], "glue_stsb_v002", "--data_dir", tmp_path)
    assert values == {"pearson_corrcoef": None, "spearman_corrcoef": None}


def submitted(capsys, folder, data, name, texts):
    """A test split, which has no labels: nothing but the file."""
    path = folder / "board.jsonl"
    line = ("--predictions", predict(folder, texts), "--leaderboard", path)
    status, out, err = run(capsys, "metrics", name, "--split", "test", "--data_dir", data, *line)
    assert (status, out) == (0, ""), err
    assert "has no labels" in err
    rows = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
    return rows, err


@pytest.mark.parametrize(
    ("task", "text", "label", "file"),
    [
        ("boolq", "True", "true", "BoolQ"),
        ("cb", "neutral", "neutral", "CB"),
        ("copa", "choice2", 1, "COPA"),
        ("rte", "not_entailment", "not_entailment", "RTE"),
        ("wic", "False", "false", "WiC"),
    ],
)
def test_leaderboard(capsys, tmp_path, data, task, text, label, file):
    name = f"taskless_super_glue_{task}_v102"
    number = len(dumped(capsys, tmp_path, name, "--split", "test", "--data_dir", data))
    texts = ["nonsense", *[text] * (number - 1)]
    rows, err = submitted(capsys, tmp_path, data, name, texts)
    assert [row["idx"] for row in rows] == list(range(number))
    assert {row["label"] for row in rows[1:]} == {label}
    assert f"wants it under the name {file}.jsonl" in err and "1 predictions are not labels" in err


def test_leaderboard_of_wsc_record_and_multirc(capsys, tmp_path, data):
    line = ("--split", "test", "--data_dir", data)
    name = "super_glue_wsc_v102_simple_eval"
    targets = [row["targets"] for row in dumped(capsys, tmp_path, name, *line)]
    rows, _ = submitted(capsys, tmp_path, data, name, ["☃", *targets[1:]])
    assert rows[0] == {"idx": 0, "label": "False"}
    assert {row["label"] for row in rows[1:]} == {"True"}

    name = "super_glue_record_v102"
    number = len(dumped(capsys, tmp_path, name, *line))
    rows, _ = submitted(capsys, tmp_path, data, name, [f"é {i}" for i in range(number)])
    assert [row["label"] for row in rows] == [f"é {i}" for i in range(number)]

    name = "super_glue_multirc_v102"
    number = len(dumped(capsys, tmp_path, name, *line))
    texts = [str(i % 3 == 0) for i in range(number)]
    rows, _ = submitted(capsys, tmp_path, data, name, texts)
    with open(f"{data}/MultiRC/test.jsonl", encoding="utf-8") as official:
        passages = [json.loads(line) for line in official]
    labels = iter(texts)
    for row, passage in zip(rows, passages, strict=True):
        questions = passage["passage"]["questions"]
        assert row["idx"] == passage["idx"] and set(row["passage"]) == {"questions"}
        for mine, theirs in zip(row["passage"]["questions"], questions, strict=True):
            assert mine["idx"] == theirs["idx"]
            wanted = [
                {"idx": a["idx"], "label": int(next(labels) == "True")} for a in theirs["answers"]
            ]
            assert mine["answers"] == wanted


def test_what_cannot_be_asked(capsys, tmp_path, data):
    path = tmp_path / "p"
    path.write_text('"a"\n')
    for line, message in [
        (["tasks", "--dump", "x"], "--dump needs the NAME"),
        (["tasks", "super_glue_rte", "--data_dir", data], "here are: super_glue_rte_v102"),
        (["tasks", "super_glue_rt_v102"], "did you mean 'super_glue_rte_v102'"),
        (
            ["tasks", "squad_to_mrqa", "--dump", tmp_path / "x"],
            "is a mixture; name one of its tasks",
        ),
        (["tasks", RTE, "--data_dir", tmp_path / "no"], "no such folder"),
        (["tasks", RTE, "--data_dir", data, "--vocabulary", "no.model"], "no such vocabulary"),
        (["metrics", RTE, "--data_dir", data, "--predictions", tmp_path / "no"], "cannot be read"),
    ]:
        status, out, err = run(capsys, *line)
        assert (status, out) == (2, "") and err.count("\n") == 1
        assert message in err
    line = ("word_valence", "--split", "test")
    texts = ["terrible" for _ in dumped(capsys, tmp_path, *line)]
    path = predict(tmp_path, texts)
    status, _, err = run(
        capsys, "metrics", *line, "--predictions", path, "--leaderboard", tmp_path / "b"
    )
    assert status == 2 and "not a task of SuperGLUE" in err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("word_valence --all", "--all lists all tasks"),
        ("--all --data_dir nowhere", "--data_dir lists the tasks whose data is there"),
        ("word_valence --statistics --limit 3", "--statistics reads all examples"),
        ("word_valence --dump d.jsonl --limit 3", "--dump reads all examples"),
        ("word_valence --dump d.jsonl --statistics", "give either --dump or --statistics"),
        ("word_valence --model tiny --vocabulary bytes", "both name a vocabulary"),
    ],
)
def test_options_that_would_do_nothing_are_refused(capsys, tmp_path, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "tasks", *line.split(" "))
    assert status == 2 and said in err and not out
    assert not list(tmp_path.iterdir())
