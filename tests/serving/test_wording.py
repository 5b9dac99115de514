"""The server puts a task's wording around texts, serves each task of a mixture, and says cuts."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.prompt_file import load_prompt
from prompt_tuning_jax.data.tasks.registry import get_task
from prompt_tuning_jax.data.tasks.task import TrainedTask
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.api import score
from prompt_tuning_jax.inference.prediction import predict
from prompt_tuning_jax.serving.loading import find_tasks, load_tasks
from tests.serving.browser import CHROMIUM, Browser
from tests.serving.live_server import live
from tests.serving.serving_app import ADMIN, ask, make_service, running, validator
from tests.serving.serving_micro import micro_model, write_prompt
from tests.tiny_run import LABELS

TWO = "one {first} two {second}"
MIXTURE = (
    TrainedTask(name="warm", labels=("red",), inputs_template="warm {x}"),
    TrainedTask(name="cold", labels=("blue", "green")),
)


def answered(folder: Path, *bodies: dict[str, Any], **options: Any) -> list[httpx.Response]:
    async def main() -> list[httpx.Response]:
        async with running(make_service(folder), **options) as client:
            return [await ask(client, **body) for body in bodies]

    return asyncio.run(main())


@pytest.mark.parametrize("mode", ["label", "generate", "score"])
def test_a_text_is_worded_unless_raw(tmp_path: Path, mode: str) -> None:
    write_prompt(tmp_path / "said.safetensors", inputs_template="ban {x} det")
    write_prompt(tmp_path / "pair.safetensors", seed=2, inputs_template=TWO)
    write_prompt(tmp_path / "word.safetensors", seed=3, task="word_valence")
    targets = {"targets": ["red", "red", "red"]} if mode == "score" else {}
    tasks = ["said", "pair", "word"]
    given: list[Any] = ["red", {"first": "bon", "second": "red", "id": 3}, "red"]
    worded = ["ban red det", "one bon two red", "valence: red"]
    by_text, raw, bare = answered(
        tmp_path,
        {"task": tasks, "inputs": given, "mode": mode, "options": targets},
        {"task": tasks, "inputs": worded, "mode": mode, "options": {"raw": True, **targets}},
        {"task": tasks, "inputs": ["red"] * 3, "mode": mode, "options": {"raw": True, **targets}},
    )
    assert by_text.status_code == 200, by_text.text
    assert by_text.json()["results"] == raw.json()["results"] != bare.json()["results"]


def test_labels_are_ranked_as_in_the_run_unless_the_request_says_otherwise(tmp_path: Path) -> None:
    labels = ("re", "green")  # of different lengths
    file = write_prompt(tmp_path / "mean.safetensors", labels=labels, normalize_length=True)
    write_prompt(tmp_path / "sum.safetensors", labels=labels)
    body: dict[str, Any] = {"task": ["mean", "sum"], "inputs": ["ban", "ban"]}
    both = [
        {**body, "options": {} if asked is None else {"normalize_length": asked}}
        for asked in (None, True, False)
    ]
    by_task, means, sums = (answer.json()["results"] for answer in answered(tmp_path, *both))
    assert by_task[0] == means[0] and by_task[1] == sums[1]
    assert means[0]["probabilities"] != pytest.approx(sums[0]["probabilities"], rel=1e-2)
    (found,) = predict(micro_model(), "ban", file)
    assert found.log_probs is not None
    share = np.exp([found.log_probs[label] for label in labels])
    expected = dict(zip(labels, share / share.sum(), strict=True))
    assert means[0]["probabilities"] == pytest.approx(expected, abs=1e-4)


def test_the_token_of_a_task_precedes_its_inputs_as_in_training(tmp_path: Path) -> None:
    task = "task_index_glue_cola_v002"
    file = write_prompt(tmp_path / "indexed.safetensors", task=task)
    (answer,) = answered(tmp_path, {"task": "indexed", "inputs": ["ban red"]})
    (served,) = answer.json()["results"]
    (found,) = predict(micro_model(), "ban red", file)
    words, index = micro_model().vocabulary, get_task(task).index
    assert index is not None and found.log_probs is not None
    ids = [words.size - 1 - index, *words.encode_input("ban red")]
    known = score(micro_model(), [ids] * len(LABELS), LABELS, load_prompt(file))
    assert found.log_probs == pytest.approx(dict(zip(LABELS, known, strict=True)), abs=1e-4)
    share = np.exp(known) / np.exp(known).sum()
    assert served["probabilities"] == pytest.approx(dict(zip(LABELS, share, strict=True)), abs=1e-4)
    plain = score(micro_model(), ["ban red"] * len(LABELS), LABELS, load_prompt(file))
    assert np.abs(plain - known).max() > 0.01


def test_what_cannot_be_worded_is_refused_by_its_columns(tmp_path: Path) -> None:
    write_prompt(tmp_path / "pair.safetensors", inputs_template=TWO)
    write_prompt(tmp_path / "plain.npy")
    labels = {"labels": ["red", "blue"]}
    wrong: list[tuple[str, Any, str]] = [
        ("pair", "a text", "first, second"),
        ("pair", {"first": "a"}, "no column 'second'"),
        ("plain", {"first": "a"}, "the input must be a text"),
        ("", {"first": "a"}, "the input must be a text"),
    ]
    bodies: list[Any] = [
        {"task": ["plain", task], "inputs": ["", one], "options": labels} for task, one, _ in wrong
    ]
    answers = answered(tmp_path, *bodies)
    for answer, (_, _, said) in zip(answers, wrong, strict=True):
        error = answer.json()["error"]
        assert (answer.status_code, error["field"]) == (422, "inputs[1]") and said in error[
            "message"
        ]


def test_a_template_cannot_make_an_input_that_is_too_long(tmp_path: Path) -> None:
    write_prompt(tmp_path / "huge.safetensors", inputs_template="{x}" * 3000)
    (answer,) = answered(tmp_path, {"task": "huge", "inputs": ["a" * 10_000]})
    assert (answer.status_code, answer.json()["error"]["field"]) == (413, "inputs[0]")


def test_the_list_of_tasks_says_the_wording(tmp_path: Path) -> None:
    write_prompt(tmp_path / "pair.safetensors", inputs_template=TWO)
    write_prompt(tmp_path / "plain.npy")
    write_prompt(tmp_path / "word.safetensors", task="word_valence")

    async def main() -> Any:
        async with running(make_service(tmp_path)) as client:
            described = (await client.get("/openapi.json")).text
            assert '"raw"' in described and '"inputs_template"' in described
            return (await client.get("/v1/tasks")).json()["tasks"]

    pair, plain, word = asyncio.run(main())
    assert (pair["inputs_template"], pair["columns"]) == (TWO, ["first", "second"])
    assert "inputs_template" not in plain and "columns" not in plain
    assert word["inputs_template"] == "valence: {text}" and "columns" not in word


def test_each_task_of_a_mixture_has_its_labels_and_wording(tmp_path: Path) -> None:
    about: Any = {"task": "both", "labels": LABELS, "mixture": MIXTURE}
    write_prompt(tmp_path / "run" / "seed_0.safetensors", **about)
    write_prompt(tmp_path / "run" / "seed_1.safetensors", seed=1, **about)
    tasks = {t.name: t for found in find_tasks(tmp_path) for t in load_tasks(found, validator())}
    assert {name: task.labels for name, task in tasks.items()} == {
        "run.warm": ("red",),
        "run.cold": ("blue", "green"),
    }
    assert tasks["run.warm"].wording.template == "warm {x}"
    assert [len(task.prompts) for task in tasks.values()] == [2, 2]
    # One prompt on the device serves both.
    warm, cold = ([one.number for one in task.prompts] for task in tasks.values())
    assert warm == cold


def test_a_mixtures_prompt_is_put_as_one_of_its_tasks(tmp_path: Path) -> None:
    about: Any = {"labels": LABELS, "mixture": MIXTURE}
    prompt = write_prompt(tmp_path / "apart" / "x.safetensors", **about).read_bytes()
    folder = tmp_path / "served"
    folder.mkdir()

    async def main() -> None:
        async with running(make_service(folder)) as client:

            async def put(name: str, **params: Any) -> httpx.Response:
                path = f"/v1/tasks/{name}"
                return await client.put(path, content=prompt, headers=ADMIN, params=params)

            unnamed = await put("mine")
            assert unnamed.status_code == 422 and "mine.warm" in unnamed.json()["error"]["message"]
            assert (await put("mine.cold")).json()["labels"] == ["blue", "green"]
            assert (await put("mine.warm")).json()["inputs_template"] == "warm {x}"
            assert (await put("mine", label=["red", "blue"])).json()["labels"] == ["red", "blue"]

    asyncio.run(main())
    again = make_service(folder).tasks
    assert [again.get(n).labels for n in ("mine.cold", "mine")] == [  # type: ignore[union-attr]
        ("blue", "green"),
        ("red", "blue"),
    ]
    assert again.get("mine.warm").wording.template == "warm {x}"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"labels": ("red", "blue")}, {"labels": ("red", "green")}, "labels red, blue and b on"),
        ({"labels": ("red",)}, {"labels": ("red", "green")}, "labels red and b on red, green"),
        ({"inputs_template": "a {x}"}, {"inputs_template": "b {x}"}, "template 'a {x}' and b with"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_members_that_cannot_vote_together_are_refused_in_any_order(
    tmp_path: Path, first: Any, second: Any, message: str, turned: bool
) -> None:
    if turned:
        first, second = second, first
    write_prompt(tmp_path / "voted" / "a.safetensors", **first)
    write_prompt(tmp_path / "voted" / "b.safetensors", seed=1, **second)
    (found,) = find_tasks(tmp_path)
    with pytest.raises(UserError, match=r"task voted: a was trained.*b (on|with)") as raised:
        load_tasks(found, validator())
    assert turned or message in str(raised.value)


def test_the_same_labels_in_another_order_are_one_set(tmp_path: Path) -> None:
    for number, labels in enumerate((("red", "blue"), ("blue", "red"), ())):
        write_prompt(tmp_path / "voted" / f"{number}.safetensors", seed=number, labels=labels)
    (found,) = find_tasks(tmp_path)
    (task,) = load_tasks(found, validator())
    assert task.labels == ("blue", "red")


def test_an_input_that_is_cut_is_said(tmp_path: Path) -> None:
    write_prompt(tmp_path / "one.safetensors")
    body: dict[str, Any] = {"task": "one", "inputs": ["red", "ban " * 40]}
    refused, cut = answered(tmp_path, body, {**body, "options": {"truncate": True}})
    assert refused.status_code == 422
    assert [result.get("truncated") for result in cut.json()["results"]] == [None, True]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium; on Debian: apt-get install chromium")
def test_the_page_shows_the_wording_and_a_field_for_each_column(tmp_path: Path) -> None:
    write_prompt(tmp_path / "tasks" / "pair.safetensors", inputs_template=TWO)
    write_prompt(tmp_path / "tasks" / "said.safetensors", seed=3, inputs_template="ban {x} det")
    expected, said, raw = answered(
        tmp_path / "tasks",
        {"task": "pair", "inputs": [{"first": "bon", "second": "red"}]},
        {"task": "said", "inputs": ["ban red det"], "options": {"raw": True}},
        {"task": "said", "inputs": ["red"], "options": {"raw": True}},
    )
    shown = "[...document.querySelectorAll('#table td')].map((c) => c.textContent).join(' ')"

    def shares(answer: httpx.Response) -> list[str]:
        (result,) = answer.json()["results"]
        return [f"{100 * share:.1f} %" for share in result["probabilities"].values()]

    service = make_service(tmp_path / "tasks")
    with live(service) as url, Browser(tmp_path / "profile") as browser:
        browser.open(url)
        browser.wait_for("document.querySelectorAll('#columns textarea').length === 2")
        assert TWO in browser.run("$('wording').textContent")
        assert browser.run("$('text_field').hidden") is True
        click = "document.querySelector('button').click()"
        fill = "const f = document.querySelectorAll('#columns textarea'); f[0].value = 'bon';"
        browser.run(f"{fill} f[1].value = 'red'; {click}")
        for share in shares(expected):
            browser.wait_for(f"{shown}.includes('{share}')")
        browser.run("$('task').value = 'said'; $('task').dispatchEvent(new Event('change'))")
        assert browser.run("[$('text_field').hidden, $('columns').hidden]") == [False, True]
        browser.run(f"$('text').value = 'red'; {click}")
        for share in shares(said):
            browser.wait_for(f"{shown}.includes('{share}')")
        browser.run(f"$('raw').click(); {click}")
        for share in shares(raw):
            browser.wait_for(f"{shown}.includes('{share}')")
        assert shares(raw) != shares(said)
        assert browser.run("$('wording').textContent") == ""
