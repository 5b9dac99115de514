"""One text gets one answer: by the command, from Python, from the server; and from data files."""

import asyncio
import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import prompt_tuning_jax as pt
from prompt_tuning_jax.checkpoints.prompt_file import load_prompt
from prompt_tuning_jax.cli.main import main
from prompt_tuning_jax.config.experiment import Data, Experiment, Model
from prompt_tuning_jax.data.tasks.row_files import RowFile
from prompt_tuning_jax.data.tasks.task import TrainedTask
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.ensemble import label_scores
from prompt_tuning_jax.inference.evaluation import EvalResult, evaluate, prediction_rows
from prompt_tuning_jax.inference.loading import prompt_list
from prompt_tuning_jax.inference.prediction import Prediction, predict
from prompt_tuning_jax.inference.prompt_sources import as_paths, as_texts
from prompt_tuning_jax.inference.results import predictions_text, records_text
from prompt_tuning_jax.methods import WARP
from prompt_tuning_jax.methods.prompt import with_prompt
from tests.serving.serving_app import ask, make_service, running
from tests.serving.serving_methods import write_method
from tests.serving.serving_micro import D, micro_model, write_prompt
from tests.tiny_run import LABELS, model_folder, write_rows

MODEL = ["--model", str(model_folder())]
BARE = Experiment(model=Model(name_or_path=str(model_folder())), data=Data(task=""))
TWO = "one {first} two {second}"
MIXTURE = (
    TrainedTask(name="warm", labels=("red", "blue"), inputs_template="warm {x}"),
    TrainedTask(name="cold", labels=("green", "blue"), inputs_template="cold {x}"),
)
ROWS: list[dict[str, Any]] = [
    {"id": i, "first": first, "second": "red"} for i, first in enumerate(("bon", "ban", "det"))
]


def by_command(
    capsys: pytest.CaptureFixture[str], prompt: Path, *arguments: object
) -> list[dict[str, Any]]:
    line = ["predict", "--prompt", prompt, *MODEL, "--json", *arguments]
    assert main([str(one) for one in line]) == 0, capsys.readouterr().err
    return [json.loads(one) for one in capsys.readouterr().out.splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *line: object) -> str:
    """The one line that a command ends with."""
    assert main([str(one) for one in line]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def by_server(folder: Path, given: list[Any], **options: Any) -> list[dict[str, Any]]:
    async def main() -> Any:
        async with running(make_service(folder)) as client:
            answer = await ask(client, task="mine", inputs=given, options=options)
            assert answer.status_code == 200, answer.text
            return answer.json()["results"]

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("about", "given", "worded"),
    [
        ({"task": "word_valence"}, ["bon", "valence: bon"], ["valence: bon", "valence: bon"]),
        ({"inputs_template": "say {x}"}, ["bon", "say bon"], ["say bon", "say say bon"]),
        ({"inputs_template": "say {x}"}, [{"x": "bon", "y": "7"}], ["say bon"]),
        ({"inputs_template": TWO}, [{"first": "bon", "second": "red"}], ["one bon two red"]),
        ({}, ["bon"], ["bon"]),
    ],
    ids=["task", "template", "object", "columns", "unknown"],
)
def test_one_text_gets_one_answer(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    about: dict[str, Any],
    given: list[Any],
    worded: list[str],
) -> None:
    model, prompt = micro_model(), tmp_path / "mine.safetensors"
    write_prompt(prompt, **about)
    expected = pt.score(
        model,
        [text for text in worded for _ in LABELS],
        [*LABELS] * len(worded),
        load_prompt(prompt),
    ).reshape(len(worded), len(LABELS))
    from_python = {
        "paths": predict(model, given, prompt),
        "attached": predict(pt.attach(model, prompt), given),
        "experiment": predict(BARE, inputs=given, prompts=[prompt]),
        "raw": predict(model, worded, [prompt], raw=True),
    }
    for name, found in from_python.items():
        assert [one.input for one in found] == worded, name
        for one, scores in zip(found, expected, strict=True):
            assert one.prediction == LABELS[int(scores.argmax())] and one.votes is None
            assert one.log_probs is not None and [*one.log_probs] == [*LABELS]
            np.testing.assert_allclose([*one.log_probs.values()], scores, atol=1e-4)
    if isinstance(given[0], str):
        answers = by_command(capsys, prompt, *given)
        assert [one["input"] for one in answers] == given
    else:
        rows = write_rows(tmp_path / "rows.jsonl", given)
        answers = by_command(capsys, prompt, "--input", rows)
        rows.unlink()
        assert [one["input"] for one in answers] == worded and answers[0]["row"] == given[0]
    scores_CN = [[*one["log_probs"].values()] for one in answers]
    np.testing.assert_allclose(scores_CN, expected, atol=1e-4)
    shares = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    answers = by_server(tmp_path, given)
    served = [[one["probabilities"][label] for label in LABELS] for one in answers]
    np.testing.assert_allclose(served, shares, atol=1e-3)


def test_raw_text_is_read_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command and the server, whatever wording the prompt was trained with."""
    prompt = write_prompt(tmp_path / "mine.safetensors", inputs_template="say {x}")
    model = micro_model()
    expected = pt.score(model, ["bon"] * len(LABELS), [*LABELS], load_prompt(prompt))
    (answer,) = by_command(capsys, prompt, "--raw", "bon")
    np.testing.assert_allclose([*answer["log_probs"].values()], expected, atol=1e-4)
    (answer,) = by_server(tmp_path, ["bon"], raw=True)
    served = [answer["probabilities"][label] for label in LABELS]
    np.testing.assert_allclose(served, np.exp(expected) / np.exp(expected).sum(), atol=1e-3)


def test_a_text_for_several_columns_is_refused_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = write_prompt(tmp_path / "mine.safetensors", inputs_template=TWO)
    for call in (
        lambda: predict(micro_model(), "a text", prompt),
        lambda: predict(pt.attach(micro_model(), prompt), ["a text"]),
    ):
        with pytest.raises(UserError, match=r"inputs\[0\].*first, second"):
            call()
    assert "first, second" in refused(capsys, "predict", "--prompt", prompt, *MODEL, "a text")


def test_a_template_of_the_config_is_that_of_all_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_prompt(tmp_path / "a.safetensors", inputs_template="say {x}")
    second = write_prompt(tmp_path / "b.safetensors", task="word_valence")
    both = ["--prompt", first, "--prompt", second, *MODEL]
    assert "'say {x}'" in refused(capsys, "predict", "bon", *both)
    given = ["--set", "data.inputs_template=all {text}", "--json"]
    assert main([str(one) for one in ("predict", "bon", *both, *given)]) == 0
    answer = json.loads(capsys.readouterr().out)
    (expected,) = predict(micro_model(), ["all bon"], [first, second], raw=True)
    assert answer["log_probs"] == pytest.approx(expected.log_probs, abs=1e-4)


@pytest.mark.parametrize("name", ["out.jsonl.gz", "out.parquet"])
def test_formats_that_are_not_written_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    prompt = write_prompt(tmp_path / "mine.safetensors")
    message = refused(capsys, "predict", "--prompt", prompt, "--output", tmp_path / name, "bon")
    assert "this format is not written; name a .jsonl" in message
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv"])
def test_a_data_file_is_read_as_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    """By the columns of the training, without targets, whatever other columns there are."""
    prompt = write_prompt(tmp_path / "mine.safetensors", inputs_template=TWO)
    file = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        write_rows(file, ROWS)
    elif ending == "json":
        file.write_text(json.dumps(ROWS))
    else:
        separator = "," if ending == "csv" else "\t"
        lines = [[*ROWS[0]], *([str(value) for value in row.values()] for row in ROWS)]
        file.write_text("".join(separator.join(line) + "\n" for line in lines))
    worded = [f"one {row['first']} two red" for row in ROWS]
    expected = predict(micro_model(), worded, prompt, raw=True)
    found = by_command(capsys, prompt, "--input", file)
    assert [one["input"] for one in found] == worded
    assert [one["prediction"] for one in found] == [one.prediction for one in expected]
    ids = [0, 1, 2] if ending in ("jsonl", "json") else ["0", "1", "2"]  # as they are written
    assert [one["row"]["id"] for one in found] == ids
    assert [one.prediction for one in predict(micro_model(), file, prompt)] == [
        one.prediction for one in expected
    ]
    table = tmp_path / "out.csv"
    line = ["predict", "--prompt", prompt, *MODEL, "--input", file, "--output", table]
    assert main([str(one) for one in line]) == 0
    with table.open(newline="") as lines_of:
        written = list(csv.DictReader(lines_of))
    assert [*written[0]] == ["id", "first", "second", "prediction", "log_prob"]
    assert [row["prediction"] for row in written] == [one.prediction for one in expected]
    capsys.readouterr()


def test_the_predictions_of_a_table_are_one_column() -> None:
    """Also if only some rows have a column of this name."""
    rows = [{"x": "bon"}, {"x": "ban", "prediction": "old", "log_prob": 1}, {"x": "det"}]
    found = [Prediction(prediction="red", log_probs={"red": -2.0}, votes=None, row=r) for r in rows]
    table = list(csv.DictReader(predictions_text([], found, "csv").splitlines()))
    assert [row["prediction_2"] for row in table] == ["red"] * 3
    assert [row["log_prob_2"] for row in table] == ["-2.0"] * 3
    assert [row["prediction"] for row in table] == ["", "old", ""]


def test_an_object_may_have_the_column_that_a_task_names(tmp_path: Path) -> None:
    """As for the server, which lists the task's template."""
    prompt = write_prompt(tmp_path / "mine.safetensors", task="word_valence")
    (found,) = predict(micro_model(), {"text": "bon"}, prompt)
    (plain,) = predict(micro_model(), "bon", prompt)
    assert (found.input, found.log_probs) == (plain.input, plain.log_probs)
    with pytest.raises(UserError, match="seed is 4294967296; it must be at most 4,294,967,295"):
        pt.generate(micro_model(), "bon", strategy="sample", seed=2**32)


@pytest.mark.parametrize("text", ["one\rtwo", "one\ntwo", "one\r\ntwo", 'a "b", c', " x "])
def test_cells_of_a_table_come_back(text: str, tmp_path: Path) -> None:
    rows = [{"inputs": text}, {"inputs": "next"}]
    found = [Prediction(prediction="red", log_probs={"red": -2.0}, votes=None, row=r) for r in rows]
    file = tmp_path / "out.csv"
    file.write_text(predictions_text([], found, "csv"), newline="")
    with file.open(newline="") as opened:
        assert [row["inputs"] for row in csv.DictReader(opened)] == [text, "next"]
    assert [row["inputs"] for _, row in RowFile(path=file).rows()] == [text, "next"]


def test_lines_of_text_stay_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = write_prompt(tmp_path / "mine.safetensors", inputs_template="say {x}")
    # As an editor on Windows saves it.
    (tmp_path / "in.txt").write_text('{"x": "bon"}\r\nban\r\n', "utf-8-sig", newline="")
    found = by_command(capsys, prompt, "--input", tmp_path / "in.txt")
    assert [one["input"] for one in found] == ['{"x": "bon"}', "ban"]


def test_columns_that_a_data_file_lacks_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("id,text\n1,bon\n")
    pair = write_prompt(tmp_path / "pair.safetensors", inputs_template=TWO)
    said = write_prompt(tmp_path / "said.safetensors", inputs_template="say {x}")
    plain = write_prompt(tmp_path / "plain.safetensors")
    asked = ("predict", *MODEL, "--input", file, "--prompt")
    for prompt, column in ((pair, "first"), (said, "x"), (plain, "inputs")):
        error = refused(capsys, *asked, prompt)
        assert f"{file}:2: no column '{column}'" in error and "id, text" in error
    for prompt, text in ((said, "say bon"), (plain, "bon")):
        set_column = ("--set", "data.inputs_column=text")
        (one,) = by_command(capsys, prompt, "--input", file, *set_column)
        assert one["input"] == text
    file.write_text("inputs\n")
    assert "holds no" in refused(capsys, *asked, plain)


def test_labels_of_the_user_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In each way to say them, over those that the prompt was trained on."""
    prompt = write_prompt(tmp_path / "mine.safetensors")
    own = ("blue", "ban")
    said = replace(BARE, data=replace(BARE.data, labels=own))
    for found in (
        predict(micro_model(), "bon", prompt, labels=own),
        predict(pt.attach(micro_model(), prompt), "bon", labels=own),
        predict(said, inputs="bon", prompts=prompt),
    ):
        assert found[0].log_probs is not None and {*found[0].log_probs} == {*own}
    (one,) = by_command(capsys, prompt, "--set", "data.labels=blue,ban", "bon")
    assert {*one["log_probs"]} == {*own}
    (alone,) = predict(micro_model(), "bon", prompt, labels="ban")
    assert alone.prediction == "ban"
    for labels, message in (((" ",), "no tokens"), (("a", "a"), "twice"), ((3,), "a int: 3")):
        with pytest.raises(UserError, match=message):
            predict(micro_model(), "bon", prompt, labels=labels)  # type: ignore[arg-type]
    warp = write_method(tmp_path / "warp.safetensors", WARP(length=2))
    with pytest.raises(UserError, match="'ban' is not one that this method was trained"):
        predict(micro_model(), "bon", warp, labels=own)


def test_without_labels_text_is_written(tmp_path: Path) -> None:
    prompt = write_prompt(tmp_path / "mine.npy")
    array = load_prompt(prompt)
    written = pt.generate(micro_model(), ["bon", "ban"], array, max_length=5)
    assert written.texts is not None
    for prompts in (prompt, array, [array], jnp.asarray(array)):
        found = predict(micro_model(), ["bon", "ban"], prompts, max_length=5)  # type: ignore[arg-type]
        assert [one.prediction for one in found] == written.texts
    with pytest.raises(UserError, match="no labels are known to rank"):
        predict(micro_model(), "bon", prompt, strategy="rank")
    with pytest.raises(UserError, match="choose rank, greedy or beam"):
        predict(micro_model(), "bon", prompt, strategy="sample")  # type: ignore[arg-type]
    (one,) = predict(micro_model(), "bon", prompt, task="word_valence", labels=LABELS)
    assert one.input == "valence: bon" and one.prediction in LABELS


@pytest.mark.parametrize("turned", [False, True])
def test_prompts_of_other_labels_do_not_vote_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], turned: bool
) -> None:
    """In any order; and where the sets are the same, their order decides nothing."""
    prompts = [
        write_prompt(tmp_path / f"{number}.safetensors", seed=number, labels=labels)
        for number, labels in enumerate((LABELS, LABELS[::-1], LABELS[:2]))
    ]
    dev = write_rows(tmp_path / "dev.jsonl", [{"inputs": "bon", "targets": "red"}] * 2)
    own = replace(BARE, data=Data(task="", eval=str(dev)))
    different = [prompts[0], prompts[2]][:: -1 if turned else 1]
    for call in (
        lambda: predict(micro_model(), "bon", different),
        lambda: predict(BARE, inputs="bon", prompts=different),
        lambda: evaluate(own, prompts=different),
    ):
        with pytest.raises(UserError, match=r"was trained on the labels .* and .* on "):
            call()
    both = [argument for prompt in different for argument in ("--prompt", str(prompt))]
    assert "trained on the labels" in refused(capsys, "predict", *MODEL, *both, "bon")
    (found,) = predict(micro_model(), "bon", different, labels=LABELS)
    assert found.votes is not None and sum(found.votes.values()) == 2
    assert evaluate(own, prompts=different, labels=LABELS).ensemble is not None
    same = prompts[:2][:: -1 if turned else 1]
    (one,) = predict(micro_model(), "bon", same)
    (other,) = predict(micro_model(), "bon", same[::-1])
    assert (one.prediction, one.log_probs) == (other.prediction, other.log_probs)
    worded = write_prompt(tmp_path / "worded.safetensors", inputs_template="say {x}")
    asked = write_prompt(tmp_path / "asked.safetensors", inputs_template="ask {x}")
    with pytest.raises(UserError, match=r"template .*one text cannot have both"):
        predict(micro_model(), "bon", [worded, asked])
    assert len(predict(micro_model(), "bon", [worded, asked], raw=True)[0].by_prompt) == 2


def test_the_task_of_a_mixture_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own labels alone are ranked, and its wording is used."""
    prompt = write_prompt(tmp_path / "mine.safetensors", task="both", mixture=MIXTURE)
    model = micro_model()
    for call in (
        lambda: predict(model, "bon", prompt),
        lambda: predict(pt.attach(model, prompt), "bon"),
    ):
        with pytest.raises(UserError, match=r"2 tasks: say with --task .*: warm, cold"):
            call()
    for found in (
        predict(model, "bon", prompt, task="cold"),
        predict(pt.attach(model, prompt, task="cold"), "bon"),
        predict(replace(BARE, data=Data(task="cold")), inputs="bon", prompts=prompt),
    ):
        (one,) = found
        assert one.input == "cold bon" and one.log_probs is not None
        assert {*one.log_probs} == {"green", "blue"}
    for option in (("--task", "warm"), ("--set", "data.task=warm")):
        (answer,) = by_command(capsys, prompt, *option, "bon")
        assert {*answer["log_probs"]} == {"red", "blue"}
    assert "'colt'; did you mean 'cold'" in refused(
        capsys, "predict", *MODEL, "--prompt", prompt, "--task", "colt", "bon"
    )
    (one,) = predict(model, "bon", prompt, raw=True, labels=("red", "green"))
    assert one.input == "bon"
    dev = write_rows(tmp_path / "dev.jsonl", [{"inputs": "bon", "targets": "red"}])
    with pytest.raises(UserError, match=r"2 tasks.*data.labels"):
        evaluate(replace(BARE, data=Data(task="", eval=str(dev))), prompts=prompt)


def test_labels_never_come_from_the_evaluation_file(tmp_path: Path) -> None:
    """A file of one class does not say that there is one alone."""
    prompt = write_prompt(tmp_path / "mine.safetensors", seed=4)
    array = load_prompt(prompt)
    np.save(tmp_path / "mine.npy", array)
    (ranked,) = predict(micro_model(), "bon", prompt)
    other = next(label for label in LABELS if label != ranked.prediction)
    dev = write_rows(tmp_path / "dev.jsonl", [{"inputs": "bon", "targets": other}] * 3)
    own = replace(BARE, data=Data(task="", eval=str(dev), train=str(tmp_path / "gone.jsonl")))
    assert evaluate(own, prompts=prompt).per_prompt[0]["accuracy"] == 0
    for bare in (tmp_path / "mine.npy", array):
        with pytest.raises(UserError, match=r"the set of labels is unknown.*data.labels"):
            evaluate(own, prompts=bare)
        assert evaluate(own, prompts=bare, labels=LABELS).per_prompt[0]["accuracy"] == 0
    named = replace(own, data=replace(own.data, labels=LABELS))
    assert evaluate(named, prompts=array).per_prompt[0]["accuracy"] == 0


def test_a_prompt_of_text_stays_one_without_its_training_file(tmp_path: Path) -> None:
    """Whatever targets the evaluation file repeats."""
    prompt = write_prompt(tmp_path / "mine.safetensors", labels=(), metric="accuracy", task="x")
    gone = Data(task="", train=str(tmp_path / "gone.jsonl"))
    (written,) = predict(micro_model(), "bon", load_prompt(prompt), max_length=5)
    (found,) = predict(micro_model(), "bon", prompt, max_length=5)
    assert found.prediction == written.prediction and found.prediction not in LABELS
    dev = write_rows(tmp_path / "dev.jsonl", [{"inputs": "bon", "targets": "blue"}] * 3)
    data = replace(gone, eval=str(dev), targets_length=5)
    result = evaluate(replace(BARE, data=data), prompts=prompt)
    (predictions,) = result.predictions.values()
    assert predictions.texts_EN == [[written.prediction] * 3]


def test_an_evaluation_says_where_the_wording_is_another(tmp_path: Path) -> None:
    prompt = write_prompt(tmp_path / "mine.safetensors", inputs_template="say {x}")
    dev = write_rows(tmp_path / "dev.jsonl", [{"inputs": "bon", "targets": "red"}])
    own = replace(BARE, data=Data(task="", eval=str(dev)))
    notes = [line for line in evaluate(own, prompts=prompt).reports if "note:" in line]
    assert len(notes) == 1 and "'say {x}'" in notes[0]
    worded = replace(own, data=replace(own.data, inputs_template="say {inputs}"))
    assert not [line for line in evaluate(worded, prompts=prompt).reports if "note:" in line]


def test_inputs_that_are_cut_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = write_prompt(tmp_path / "mine.safetensors")
    long = "ban " * 30
    found = predict(micro_model(), ["bon", long], prompt, inputs_length=16)
    assert [one.truncated for one in found] == [False, True]
    ids = [*micro_model().vocabulary.encode(long)][:16]
    same = predict(micro_model(), micro_model().vocabulary.decode(ids), prompt, inputs_length=99)
    assert same[0].truncated is False
    line = ["predict", "--prompt", str(prompt), *MODEL, "--set", "data.inputs_length=16", "--json"]
    assert main([*line, "bon", long]) == 0
    captured = capsys.readouterr()
    assert "note: 1 of 2 inputs was cut to 16 tokens" in captured.err
    assert [json.loads(one).get("truncated") for one in captured.out.splitlines()] == [None, True]


def test_a_table_with_tabs_keeps_the_blanks_of_texts() -> None:
    text = records_text([{"a": "x\ty  z ", "b": "1\r\n2"}], "tsv")
    assert text == "a\tb\nx y  z \t1 2\n"


@pytest.mark.parametrize("name", ["batch_size", "inputs_length", "max_length"])
@pytest.mark.parametrize("value", ["8", 8.5, True, -1])
def test_numbers_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{name} is {value!r}; it must be"):
        predict(micro_model(), "ban", **{name: value})


def test_one_program_serves_many_numbers_of_inputs(tmp_path: Path) -> None:
    prompt = write_prompt(tmp_path / "mine.safetensors", 6)
    before = label_scores._cache_size()
    for number in (5, 6):
        for words in (1, 2, 3):
            found = predict(micro_model(), ["bon " * words] * number, prompt)
            assert len(found) == number
    assert label_scores._cache_size() == before + 1
    many = predict(micro_model(), ["bon " * n for n in range(1, 24)], prompt, batch_size=4)
    for n in (1, 4, 9, 23):
        (alone,) = predict(micro_model(), "bon " * n, prompt)
        assert many[n - 1].log_probs == pytest.approx(alone.log_probs, abs=1e-4)


def test_a_row_for_each_example_that_was_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        write_prompt(tmp_path / "voted" / f"seed_{seed}.safetensors", seed=seed)
    rows = [
        {"inputs": f"{word} bon", "targets": label, "id": f"{word}, {label}"}
        for word in ("ban", "det", "gis")
        for label in LABELS
    ]
    dev = write_rows(tmp_path / "dev.jsonl", rows)
    config = tmp_path / "config.py"
    config.write_text(
        "from prompt_tuning_jax.config.experiment import Data, Experiment\n"
        f"get_config = lambda: Experiment(data=Data(task='', eval={str(dev)!r}))\n"
    )
    line = ["eval", str(config), *MODEL, "--prompt", str(tmp_path / "voted"), "--predictions"]
    assert main([*line, str(tmp_path / "out.jsonl")]) == 0
    assert "wrote 9 predictions to" in capsys.readouterr().err
    own = replace(BARE, data=Data(task="", eval=str(dev)))
    result = evaluate(own, prompts=tmp_path / "voted")
    written = [json.loads(one) for one in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == json.loads(json.dumps(list(prediction_rows(result))))
    assert [(one["input"], one["target"], one["row"]) for one in written] == [
        (row["inputs"], row["targets"], {"id": row["id"]}) for row in rows
    ]
    for one in written:
        assert one["correct"] == (one["prediction"] == one["target"])
        assert sum(one["votes"].values()) == 3 and one["votes"][one["prediction"]] >= 1
        assert {*one["log_probs"]} == {*LABELS}
        mean = [np.mean([each["log_probs"][c] for each in one["prompts"]]) for c in LABELS]
        np.testing.assert_allclose([one["log_probs"][c] for c in LABELS], mean, rtol=1e-6)
    share = np.mean([one["correct"] for one in written])
    assert result.ensemble is not None and result.ensemble["accuracy"] == pytest.approx(100 * share)
    for member, own_scores in enumerate(result.per_prompt):
        hits = [one["prompts"][member]["prediction"] == one["target"] for one in written]
        assert own_scores["accuracy"] == pytest.approx(100 * np.mean(hits))
    assert main([*line, str(tmp_path / "out.csv")]) == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["prediction"] for row in table] == [one["prediction"] for one in written]
    assert [row["id"] for row in table] == [row["id"] for row in rows]
    assert [row["seed_1.safetensors"] for row in table] == [
        one["prompts"][1]["prediction"] for one in written
    ]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    capsys.readouterr()


def test_rows_of_several_tasks_name_theirs(tmp_path: Path) -> None:
    prompt = write_prompt(tmp_path / "mine.safetensors")
    files = [
        write_rows(tmp_path / f"{name}.jsonl", [{"inputs": name, "targets": "red"}])
        for name in ("a", "b")
    ]
    results = [
        evaluate(replace(BARE, data=Data(task="", eval=str(file))), prompts=prompt)
        for file in files
    ]
    joined: dict[str, Any] = {}
    for name in ("examples", "predictions"):
        joined[name] = {k: v for result in results for k, v in getattr(result, name).items()}
    whole: EvalResult = replace(results[0], **joined)
    assert [(row["task"], row["input"]) for row in prediction_rows(whole)] == [
        ("file:a.jsonl", "a"),
        ("file:b.jsonl", "b"),
    ]


def test_one_prompt_is_a_list_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is given; and what is no prompt is said in one line."""
    prompt = write_prompt(tmp_path / "mine.safetensors")
    array = load_prompt(prompt)
    dev = write_rows(tmp_path / "dev.jsonl", [{"inputs": "bon", "targets": "red"}])
    own = replace(BARE, data=Data(task="", eval=str(dev), labels=LABELS))
    expected = evaluate(own, prompts=[prompt]).per_prompt
    for prompts in (str(prompt), prompt, array, jnp.asarray(array), (one for one in [prompt])):
        assert evaluate(own, prompts=prompts).per_prompt == expected  # type: ignore[arg-type]
    assert len(evaluate(own, prompts=np.stack([array, array])).names) == 2
    assert evaluate(own).names == evaluate(own, prompts=None).names == ("no prompt",)  # type: ignore[arg-type]
    assert prompt_list("name") == ["name"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prompt_list("~/mine.safetensors") == [str(prompt)]
    pt.attach(micro_model(), "~/mine.safetensors")
    for wrong, message in (
        (3, "not int"),
        ({"a": 1}, "not dict"),
        ([None], r"prompts\[0\] is a NoneType"),
        ([""], r"prompts\[0\] is an empty path"),
        ([["a"]], r"prompts\[0\] is a list"),
    ):
        with pytest.raises(UserError, match=message):
            prompt_list(wrong)
    with pytest.raises(UserError, match="shape"):
        evaluate(own, prompts=np.zeros((2, D + 1)))


def test_one_text_or_path_is_a_list_of_one() -> None:
    assert as_texts("red", "labels") == as_texts(["red"], "labels") == ("red",)
    assert as_paths("a", "among") == ["a"] and as_paths(Path("a"), "among") == [Path("a")]
    wrong: list[tuple[Any, Any]] = [(as_texts, 3), (as_texts, [3]), (as_texts, b"a")]
    wrong += [(as_texts, ["a", "a"]), (as_paths, 3), (as_paths, [3]), (as_paths, {"a": 1})]
    for function, values in wrong:
        with pytest.raises(UserError, match=r"^things "):
            function(values, "things")


@pytest.mark.parametrize(
    "changes",
    [{"data": Data(labels="positive")}, {"data": Data(task="", eval="x", metrics="f1")}],  # type: ignore[arg-type]
)
def test_one_text_in_a_config_is_not_walked_through(changes: dict[str, Any]) -> None:
    for call in (
        lambda: evaluate(replace(BARE, **changes)),
        lambda: predict(replace(BARE, **changes), "bon"),
    ):
        with pytest.raises(UserError, match=r"data\.\w+: expected a list of texts"):
            call()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "no inputs"),
        ([3], r"inputs\[0\] must be a text or an object, not 3"),
        (["a", None], r"inputs\[1\] must be .* not None"),
        (3, "not int"),
        (Path("nothing.jsonl"), "nothing.jsonl"),
        ({"x": "a"}, "no column 'inputs'"),
    ],
)
def test_inputs_that_are_none_are_refused(tmp_path: Path, inputs: Any, message: str) -> None:
    prompt = write_prompt(tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match=message) as raised:
        predict(micro_model(), inputs, prompt)
    assert "\n" not in str(raised.value)


def test_what_is_attached_has_no_further_prompts(tmp_path: Path) -> None:
    prompt = write_prompt(tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match="leave out prompts"):
        predict(pt.attach(micro_model(), prompt), "bon", prompt)
    with pytest.raises(UserError, match="load_model"):
        predict("tiny", "bon")  # type: ignore[arg-type]
    by_hand = with_prompt(micro_model(), jnp.ones((3, D)))
    (one,) = predict(by_hand, "bon", labels=LABELS)
    assert one.log_probs is not None and math.isfinite(sum(one.log_probs.values()))
