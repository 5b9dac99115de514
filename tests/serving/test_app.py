"""The paths, asked as a client asks."""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.api import generate, score
from prompt_tuning_jax.serving.middleware import checked_origin, checked_token
from prompt_tuning_jax.serving.schema import Limits
from prompt_tuning_jax.serving.service import Service
from tests.serving.serving_app import ADMIN, ask, make_service, running, task_folder
from tests.serving.serving_micro import D, micro_model, write_prompt
from tests.tiny_run import LABELS

Test = Callable[[httpx.AsyncClient, Service], Coroutine[Any, Any, None]]


def with_server(folder: Path, test: Test, **options: Any) -> None:
    async def run() -> None:
        limits = options.pop("limits", None)
        service = make_service(
            folder, limits=limits, allow_changes=options.pop("allow_changes", True)
        )
        async with asyncio.timeout(60), running(service, **options) as client:
            await test(client, service)

    asyncio.run(run())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return task_folder(tmp_path / "tasks")


def prompts_of(service: Service, task: str) -> list[np.ndarray]:
    found = service.tasks.get(task)
    assert found is not None
    return [prompt.prompt_PD for prompt in found.prompts]


def alone(text: str, prompt: np.ndarray | None) -> dict[str, float]:
    scores = score(micro_model(), [text] * len(LABELS), LABELS, prompt)
    return dict(zip(LABELS, map(float, scores), strict=True))


def test_labels_of_several_tasks_in_one_request(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        inputs = ["ban red", "ban red", "kolo green mita"]
        answer = await ask(client, task=["color", "voted", "color"], inputs=inputs)
        assert answer.status_code == 200
        first, voted, last = answer.json()["results"]
        for one, text in ((first, inputs[0]), (last, inputs[2])):
            known = alone(text, prompts_of(service, "color")[0])
            share = np.exp([known[label] for label in LABELS])
            expected = dict(zip(LABELS, share / share.sum(), strict=True))
            assert one["probabilities"] == pytest.approx(expected, abs=1e-4)
            assert one["prediction"] == max(known, key=known.__getitem__)
            assert "votes" not in one
        each = [alone(inputs[1], prompt) for prompt in prompts_of(service, "voted")]
        said = [max(known, key=known.__getitem__) for known in each]
        assert [one["prediction"] for one in voted["prompts"]] == said
        assert voted["votes"] == {label: said.count(label) for label in {*said}}
        assert voted["agreement"] == pytest.approx(said.count(voted["prediction"]) / 3)
        assert sum(voted["probabilities"].values()) == pytest.approx(1)
        one = await ask(client, task="voted/seed_1", inputs=[inputs[1]])
        (result,) = one.json()["results"]
        assert result["task"] == "voted/seed_1"
        assert [one["prompt"] for one in result["prompts"]] == ["seed_1"]
        shares = voted["prompts"][1]["probabilities"]
        assert result["probabilities"] == pytest.approx(shares, abs=1e-4)
        # One length: four of the five rows went together.
        assert service.engine.batches[0] == ("score", 4)  # type: ignore[attr-defined]

    with_server(folder, test)


def test_scores_and_the_bare_model(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        options = {"targets": ["green", "red"]}
        body = {"task": ["plain", ""], "inputs": ["ban", "ban"], "mode": "score"}
        answer = await ask(client, **body, options=options)
        plain, bare = answer.json()["results"]
        prompt = prompts_of(service, "plain")[0]
        assert plain["log_prob"] == pytest.approx(alone("ban", prompt)["green"], abs=1e-4)
        assert bare["log_prob"] == pytest.approx(alone("ban", None)["red"], abs=1e-4)
        normalized = await ask(client, **body, options={**options, "normalize_length": True})
        words = service.engine.vocabulary
        for one, mean, text in zip(
            (plain, bare), normalized.json()["results"], options["targets"], strict=True
        ):
            tokens = len(words.encode(text)) + 1
            assert mean["log_prob"] == pytest.approx(one["log_prob"] / tokens, abs=1e-5)

    with_server(folder, test)


def test_labels_of_the_request_in_as_many_rows_as_they_need(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        labels = ["red", "green", "blue", "ban", "kolo", "mita"]
        answer = await ask(client, task="plain", inputs=["dota"], options={"labels": labels})
        found = answer.json()["results"][0]["probabilities"]
        assert list(found) == labels
        known = score(micro_model(), ["dota"] * 6, labels, prompts_of(service, "plain")[0])
        share = np.exp(known - known.max())
        np.testing.assert_allclose(list(found.values()), share / share.sum(), atol=1e-4)

    with_server(folder, test)


def test_text_at_once_and_as_it_is_written(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        body = {"task": "voted", "inputs": ["ban red", "kolo"], "mode": "generate"}
        answer = await ask(client, **body)
        results = answer.json()["results"]
        for one, text in zip(results, body["inputs"], strict=True):
            for own, prompt in zip(one["prompts"], prompts_of(service, "voted"), strict=True):
                alone = generate(micro_model(), [text], prompt, max_length=6)
                assert alone.texts is not None
                assert own["prediction"] == alone.texts[0]
                assert own["log_prob"] == pytest.approx(float(alone.scores[0]), abs=1e-4)
        asked = {"repetition_penalty": 4.0, "no_repeat_ngram_size": 1, "min_length": 5}
        answer = await ask(client, **body, options=asked)
        own = answer.json()["results"][0]["prompts"][0]
        prompt = prompts_of(service, "voted")[0]
        made = generate(micro_model(), [body["inputs"][0]], prompt, max_length=6, **asked)
        assert made.texts is not None and own["prediction"] == made.texts[0]
        streamed = await ask(client, **body, options={"stream": True})
        assert streamed.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line]
        assert events[-1]["results"] == results
        written: dict[tuple[int, str], str] = {}
        for event in events[:-1]:
            key = event["index"], event["prompt"]
            written[key] = written.get(key, "") + event["text"]
        for index, one in enumerate(results):
            for own in one["prompts"]:
                assert own["prediction"].startswith(written.get((index, own["prompt"]), ""))
        assert written

    with_server(folder, test)


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"task": "nope"}, 404, "task"),
        ({"task": ["color", "../color"], "inputs": ["a", "b"]}, 404, "task[1]"),
        ({"task": "voted/seed_7"}, 404, "task"),
        ({"task": ["color"], "inputs": ["a", "b"]}, 422, "task"),
        ({"inputs": []}, 422, "inputs"),
        ({"inputs": ["a", 1]}, 422, "inputs[1]"),
        ({"inputs": ["ban " * 20]}, 422, "inputs[0]"),
        ({"inputs": ["a"] * 21}, 413, "inputs"),
        ({"task": "voted", "inputs": ["a"] * 14}, 413, "inputs"),
        ({"task": "plain"}, 422, "options.labels"),
        ({"mode": "rank"}, 422, "mode"),
        ({"mode": "score"}, 422, "options.targets"),
        ({"mode": "score", "options": {"targets": ["ban " * 9]}}, 422, "options.targets[0]"),
        ({"mode": "generate", "options": {"max_length": 7}}, 422, "options.max_length"),
        ({"options": {"stream": True}}, 422, "options.stream"),
        ({"options": {"max_length": 3}}, 422, "options.max_length"),
        ({"options": {"min_length": 3}}, 422, "options.min_length"),
        ({"mode": "generate", "options": {"min_length": 7}}, 422, "options.min_length"),
        ({"options": {"repetition_penalty": 2.0}}, 422, "options.repetition_penalty"),
        (
            {"mode": "generate", "options": {"repetition_penalty": 0}},
            422,
            "options.repetition_penalty",
        ),
        ({"options": {"no_repeat_ngram_size": 2}}, 422, "options.no_repeat_ngram_size"),
        (
            {"mode": "generate", "options": {"normalize_length": True}},
            422,
            "options.normalize_length",
        ),
        ({"options": {"labels": ["red", "red"]}}, 422, "options.labels"),
        ({"options": {"lables": ["red"]}}, 422, "options.lables"),
        ({"options": {"deadline_ms": 0}}, 422, "options.deadline_ms"),
    ],
)
def test_what_is_refused_names_its_field(
    folder: Path, body: dict[str, Any], status: int, field: str
) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        answer = await ask(client, **{"task": "color", "inputs": ["ban"], **body})
        assert (answer.status_code, answer.json()["error"]["field"]) == (status, field)
        assert len(answer.json()["error"]["message"].splitlines()) == 1
        near = (await ask(client, task="colors", inputs=["ban"])).json()["error"]["message"]
        assert "there is no task 'colors'; did you mean 'color'?" in near

    with_server(folder, test, limits=Limits(inputs=20, waiting_rows=40))


def test_inputs_are_cut_where_that_is_asked_for(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        options = {"truncate": True}
        answer = await ask(client, task="color", inputs=["ban " * 50], options=options)
        assert answer.status_code == 200

    with_server(folder, test)


def test_a_body_that_is_too_large_or_no_json(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        async def many() -> Any:
            for _ in range(20):
                yield b" " * 1000

        sent: list[dict[str, Any]] = [{"content": b" " * 9000}, {"content": many()}]
        for content in sent:
            answer = await client.post("/v1/predict", **content)
            assert answer.status_code == 413
            assert answer.json()["error"]["field"] == "body"
        typed = {"content-type": "application/json; charset=utf-8"}
        form = {"content-type": "application/x-www-form-urlencoded"}
        for headers, said in (
            (typed, "the body: invalid or truncated JSON"),
            (form, "application/json"),
        ):
            answer = await client.post("/v1/predict", content=b"{", headers=headers)
            error = answer.json()["error"]
            assert (answer.status_code, error["field"]) == (422, "body")
            assert said in error["message"]

    with_server(folder, test, limits=Limits(body_bytes=8000))


def test_tokens(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        body = {"task": "color", "inputs": ["ban"]}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = await client.post("/v1/predict", json=body, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert (await client.get("/v1/tasks", headers=headers)).status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert (await client.post("/v1/predict", json=body, headers=right)).status_code == 200
        assert (await client.delete("/v1/tasks/color", headers=right)).status_code == 401
        assert (await client.get("/healthz")).status_code == 200

    with_server(folder, test, token="secret")


def test_without_an_admin_token_nothing_changes(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        for method in ("PUT", "DELETE"):
            answer = await client.request(method, "/v1/tasks/color", headers=ADMIN, content=b"x")
            assert answer.status_code in (404, 405)
        assert service.tasks.get("color") is not None

    with_server(folder, test, admin_token="", allow_changes=False)


def test_tasks_come_go_and_survive_a_restart(folder: Path, tmp_path: Path) -> None:
    upload = write_prompt(tmp_path / "new.safetensors", 4, seed=40).read_bytes()
    bare = write_prompt(tmp_path / "new.npy", 6, seed=41).read_bytes()
    expected: dict[str, Any] = {}

    async def change(client: httpx.AsyncClient, service: Service) -> None:
        for name, content, query in (
            ("fresh", upload, ""),
            ("color", bare, "?label=red&label=green"),  # replaces
            ("voted", upload, "?prompt=seed_9"),  # a fourth
            ("voted", bare, "?prompt=seed_1"),  # another in its place
        ):
            answer = await client.put(f"/v1/tasks/{name}{query}", content=content, headers=ADMIN)
            assert answer.status_code == 200, answer.text
        assert (await client.delete("/v1/tasks/plain", headers=ADMIN)).status_code == 204
        assert (await client.delete("/v1/tasks/plain", headers=ADMIN)).status_code == 404
        listed = (await client.get("/v1/tasks")).json()
        assert [task["name"] for task in listed["tasks"]] == ["color", "fresh", "voted"]
        voted = listed["tasks"][2]
        assert [(p["name"], p["length"]) for p in voted["prompts"]] == [
            ("seed_0", 3),
            ("seed_1", 6),
            ("seed_2", 5),
            ("seed_9", 4),
        ]
        for task in ("color", "fresh", "voted"):
            expected[task] = (await ask(client, task=task, inputs=["ban"])).json()["results"]
        assert list(expected["color"][0]["probabilities"]) == ["red", "green"]

    async def look(client: httpx.AsyncClient, service: Service) -> None:
        assert service.tasks.names() == ["color", "fresh", "voted"]
        for task, results in expected.items():
            found = (await ask(client, task=task, inputs=["ban"])).json()["results"]
            assert found[0]["prediction"] == results[0]["prediction"]
            assert found[0]["probabilities"] == pytest.approx(results[0]["probabilities"], abs=1e-5)

    with_server(folder, change)
    with_server(folder, look)
    assert (folder / "plain.npy").is_file()  # the user's own
    kept = sorted(path.name for path in (folder / ".served").iterdir() if path.name != ".lock")
    assert len(kept) == 1 + 1 + 1 + 4, kept  # no file that nobody names


def test_prompts_of_other_labels_do_not_join_a_task_unnoticed(folder: Path, tmp_path: Path) -> None:
    other = write_prompt(tmp_path / "other.safetensors", 4, labels=LABELS[:2]).read_bytes()
    bare = write_prompt(tmp_path / "bare.npy", 4).read_bytes()

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        async def put(path: str, content: bytes) -> httpx.Response:
            return await client.put(f"/v1/tasks/{path}", content=content, headers=ADMIN)

        refused = await put("voted?prompt=seed_9", other)
        assert refused.status_code == 422
        assert "the upload on blue, green; give" in refused.json()["error"]["message"]
        assert len(prompts_of(service, "voted")) == 3
        said = await put("voted?prompt=seed_9&label=blue&label=green", other)
        assert said.json()["labels"] == ["blue", "green"]
        # The labels of a task's only prompt are those of the task.
        for content in (other, bare):
            replaced = await put("color?prompt=color", content)
            assert replaced.json()["labels"] == ["blue", "green"]
            assert len(replaced.json()["prompts"]) == 1

    with_server(folder, test)


@pytest.mark.parametrize(
    ("name", "query", "content", "field"),
    [
        ("..", "", b"", None),
        ("%2e%2e%2fout", "", b"", None),
        (".hidden", "", b"", "name"),
        ("fine", "?prompt=../x", b"", "prompt"),
        ("fine", "", b"", "body"),
        ("fine", "", b"\x80\x04pickle", "body"),
        ("fine", "", b"PK\x03\x04", "body"),
        ("fine", "", "narrow", "body"),
        ("fine", "", "long", "body"),
        ("fine", "", "other", "body"),
        ("fine", "?label=red&label=red", "right", "label"),
    ],
)
def test_wrong_uploads_change_nothing(
    folder: Path, tmp_path: Path, name: str, query: str, content: Any, field: str | None
) -> None:
    if content in ("long", "other", "right"):
        other = {"model_fingerprint": "f" * 16} if content == "other" else {}
        length = 8 if content == "long" else 3
        content = write_prompt(tmp_path / "p.safetensors", length, **other).read_bytes()
    elif content == "narrow":
        np.save(tmp_path / "p.npy", np.ones((3, D - 1), np.float32))
        content = (tmp_path / "p.npy").read_bytes()

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        before = service.tasks.names()
        answer = await client.put(f"/v1/tasks/{name}{query}", content=content, headers=ADMIN)
        if field is None:
            assert answer.status_code in (404, 405)
        else:
            assert answer.status_code == 422
            assert answer.json()["error"]["field"] == field
            assert str(tmp_path) not in answer.text
            assert "unfinished" not in answer.text
            if content == b"PK\x03\x04":
                assert "zip archive" in answer.text
        assert service.tasks.names() == before

    with_server(folder, test)
    assert not (tmp_path / "out").exists()
    served = folder / ".served"
    assert not served.is_dir() or [path.name for path in served.iterdir()] == [".lock"]


def test_a_worker_error_fails_its_request_alone(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        bad = micro_model().vocabulary.encode("green")[0]
        service.engine.poison = bad  # type: ignore[attr-defined]
        texts = ["ban red", "ban green", "kolo blue"]
        answers = await asyncio.gather(
            *(ask(client, task="voted", inputs=[text]) for text in texts),
            *(ask(client, task="voted", inputs=[text], mode="generate") for text in texts),
        )
        assert [answer.status_code for answer in answers] == [200, 500, 200] * 2
        assert (await client.get("/healthz")).status_code == 200
        # At least one for either mode: a request's rows may have been in several batches.
        counted = (await client.get("/metrics")).text.split("worker_failures_total ")[-1]
        assert float(counted.split()[0]) >= 2

    with_server(folder, test)


def test_a_stream_that_fails_before_its_first_piece_has_a_status(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        options: dict[str, Any] = {"stream": True, "deadline_ms": 1}
        body = {"task": "color", "inputs": ["ban"], "mode": "generate"}
        late = await ask(client, **body, options=options)
        assert (late.status_code, late.json()["error"]["field"]) == (504, "options.deadline_ms")
        service.engine.poison = micro_model().vocabulary.encode("ban")[0]  # type: ignore[attr-defined]
        failed = await ask(client, **body, options={"stream": True})
        assert failed.status_code == 500 and "failed" in failed.json()["error"]["message"]
        assert service.scheduler.waiting == 0

    with_server(folder, test, limits=Limits(wait_seconds=0.2))


def test_an_error_that_nobody_expected_has_the_form_of_the_others(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        def fail(*_: Any) -> Any:
            raise ZeroDivisionError

        service.nearest_words = fail  # type: ignore[method-assign]
        answer = await client.get("/v1/tasks/color/words")
        assert answer.status_code == 500 and "log" in answer.json()["error"]["message"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        counted = (await client.get("/metrics")).text
        assert 'path="/v1/tasks/{name}/words",status="500"' in counted

    with_server(folder, test)


def test_without_a_scheduler_the_server_is_not_ready(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        assert service.scheduler._task is not None
        service.scheduler._task.cancel()
        await asyncio.sleep(0)
        for path in ("/readyz", "/healthz"):
            assert (await client.get(path)).status_code in (500, 503)
        answer = await ask(client, task="color", inputs=["ban"])
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")

    with_server(folder, test)


def test_a_program_that_fails_when_it_is_measured_is_left_out(folder: Path) -> None:
    engine = make_service(folder).engine._engine  # type: ignore[attr-defined]
    engine.compile()
    measured, rough = dict(engine.seconds), set(engine._rough)
    engine.seconds.clear()
    seconds_of, bad = engine._seconds_of, next(engine._unmeasured())
    try:
        engine._seconds_of = lambda program: 1 / 0 if program == bad else 1.0
        with pytest.raises(ZeroDivisionError):
            engine.measure()
        while engine.measure():
            pass
        assert {*engine.programs()} - {*engine.seconds} == {bad}
    finally:
        engine._seconds_of = seconds_of
        engine._unusable.clear()
        engine.seconds, engine._rough = measured, rough


def test_a_full_queue_says_when_to_come_again(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        answers = await asyncio.gather(
            *(ask(client, task="color", inputs=["ban"] * 5) for _ in range(6))
        )
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused and len(refused) < 6
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert service.scheduler.waiting == 0
        # What would never fit is not asked to come again.
        answer = await ask(client, task="voted", inputs=["ban"] * 5)
        assert (answer.status_code, answer.json()["error"]["field"]) == (413, "inputs")

    with_server(folder, test, limits=Limits(waiting_rows=12))


def test_deadlines_and_readiness(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        options = {"deadline_ms": 1}
        answer = await ask(client, task="color", inputs=["ban"], options=options)
        assert answer.status_code == 504
        assert service.scheduler.waiting == 0
        assert (await client.get("/readyz")).json()["status"] == "ready"
        service.state = "draining"
        assert (await client.get("/readyz")).status_code == 503
        answer = await ask(client, task="color", inputs=["ban"])
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")

    with_server(folder, test, limits=Limits(wait_seconds=0.2))


def test_the_list_in_pages_and_the_words(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        first = (await client.get("/v1/tasks?limit=2")).json()
        rest = (await client.get(f"/v1/tasks?limit=2&after={first['next']}")).json()
        names = [task["name"] for task in first["tasks"] + rest["tasks"]]
        assert (names, first["total"]) == (["color", "plain", "voted"], 3)
        assert "next" not in rest
        # The task that ended a page may be gone when the next one is asked for.
        later = (await client.get("/v1/tasks?after=collar")).json()
        assert [task["name"] for task in later["tasks"]] == ["color", "plain", "voted"]
        later = (await client.get("/v1/tasks?after=dark")).json()
        assert [task["name"] for task in later["tasks"]] == ["plain", "voted"]
        answer = (await client.get("/v1/tasks/plain/words")).json()
        (prompt,) = answer["prompts"]
        assert len(prompt["positions"]) == 7
        table = np.asarray(micro_model().token_embedder.table()[np.arange(208)])
        own = prompts_of(service, "plain")[0][2]
        cosines = table @ own / np.linalg.norm(table, axis=1) / np.linalg.norm(own)
        found = [word["cosine"] for word in prompt["positions"][2]]
        np.testing.assert_allclose(found, np.sort(cosines)[::-1][:5], atol=1e-3)
        assert (await client.get("/v1/tasks/nope/words")).status_code == 404

    with_server(folder, test)


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css", "/healthz", "/v1/tasks/", "/nope"])
def test_every_answer_says_what_a_browser_may_do_with_it(folder: Path, path: str) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        answer = await client.get(path)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        policy = answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy and "unsafe-inline" not in policy
        if path == "/":  # nothing that this policy would block
            assert not re.search(r"<style|<script(?! src=)|\son\w+=|\sstyle=", answer.text)
            assert answer.headers["content-type"].startswith("text/html")

    with_server(folder, test)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper"),
        (b'{"inputs": ["a"], "options": {"max_length": ' + b"1" * 5000 + b"}}", "5000 digits"),
        (b'{"inputs": ["a"], "options": {"deadline_ms": 1e999}}', "too large"),
        (b'{"inputs": ["a"], "options": {"deadline_ms": NaN}}', "NaN"),
        (b'{"task": "\\ud800", "inputs": ["a"]}', "half of a surrogate pair"),
        (b'{"inputs": ["\\udc00"]}', "half of a surrogate pair"),
        (b'{"inputs": ["a"], "options": {"labels": ["a", "\\ud800"]}}', "half of a surrogate pair"),
        (b'{"inputs": ["\xff"]}', "UTF-8"),
        (b'{"inputs": ["a"]', "truncated"),
        (b"[1]", "not a JSON object"),
        (b"", "required"),
    ],
)
def test_bodies_that_a_reader_of_json_may_choke_on(folder: Path, body: bytes, said: str) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        headers = {"content-type": "application/json"}
        answer = await client.post("/v1/predict", content=body, headers=headers)
        error = answer.json()["error"]
        assert (answer.status_code, error["field"]) == (422, "body")
        assert said in error["message"] and len(error["message"].splitlines()) == 1

    with_server(folder, test)


@pytest.mark.parametrize(("labels", "inputs", "fit"), [(250, 1, 160), (9, 20, 8)])
def test_too_many_labels_are_refused_as_labels(
    folder: Path, labels: int, inputs: int, fit: int
) -> None:
    """Four labels are one row here, and 40 rows may wait."""
    vocabulary = micro_model().vocabulary
    words = list(dict.fromkeys(vocabulary.decode([i]) for i in range(3, 200)))
    one_token = [word for word in words if word and len(vocabulary.encode(word)) == 1]
    assert len(one_token) >= 16
    pairs = [f"{a} {b}" for a in one_token[:16] for b in one_token[:16]]
    texts = (pairs if labels > 16 else one_token)[:labels]

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        options = {"labels": texts}
        answer = await ask(client, task="plain", inputs=["ban"] * inputs, options=options)
        error = answer.json()["error"]
        assert (answer.status_code, error["field"]) == (413, "options.labels")
        at_once = 4 if labels <= 16 else 1
        assert f"{labels} labels" in error["message"] and "rows" not in error["message"]
        most = 40 // inputs * at_once
        assert f"at most {most} labels" in error["message"]
        options = {"labels": texts[:most]}
        answer = await ask(client, task="plain", inputs=["ban"] * inputs, options=options)
        assert answer.status_code == 200, answer.text

    with_server(folder, test, limits=Limits(inputs=20, waiting_rows=40))


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/healthz", "GET, HEAD"),
        ("/v1/predict", "POST"),
        ("/v1/tasks", "GET, HEAD"),
        ("/v1/tasks/color", "DELETE, PUT"),
        ("/v1/tasks/color/words", "GET, HEAD"),
        ("/", "GET, HEAD"),
        ("/openapi.json", "GET, HEAD"),
    ],
)
def test_what_a_path_takes_and_head(folder: Path, path: str, allowed: str) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        answer = await client.request("PATCH", path, headers=ADMIN)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        head = await client.head(path)
        if "GET" in allowed:
            get = await client.get(path)
            assert (head.status_code, head.content) == (200, b"")
            for name in ("content-type", "content-length"):
                if path != "/metrics":  # which counts the requests themselves
                    assert head.headers[name] == get.headers[name]
        else:
            assert (head.status_code, head.headers["allow"]) == (405, allowed)

    with_server(folder, test)


def test_tokens_of_any_letters(folder: Path) -> None:
    for token in ("clé", "ключ-🔑", "\udcff\udce9"):  # the last is how bytes of no UTF-8 come

        async def test(client: httpx.AsyncClient, service: Service, token: str = token) -> None:
            async def status(value: bytes) -> int:
                headers = [(b"authorization", b"Bearer " + value)]
                return (await client.get("/v1/tasks", headers=headers)).status_code

            as_utf8 = token.encode("utf-8", "surrogateescape")
            assert await status(as_utf8) == 200
            assert await status(b" " + as_utf8 + b" ") == 200
            assert await status(as_utf8[:-1]) == 401
            assert await status(token.encode("ascii", "replace")) == 401
            if token == "clé":
                assert await status(token.encode("latin-1")) == 200

        with_server(folder, test, token=token)


@pytest.mark.parametrize(
    ("token", "said"), [("  ", "blank"), ("a\nb", "control"), ("a\x7fb", "control")]
)
def test_tokens_that_no_header_can_hold(token: str, said: str) -> None:
    with pytest.raises(UserError, match=f"NAME .*{said}") as raised:
        checked_token(token, of="NAME")
    assert token.strip() not in str(raised.value) or not token.strip()
    assert checked_token(" a b\n", of="NAME") == "a b"
    assert checked_token("", of="NAME") == ""


def test_openapi_says_which_token_each_path_asks_for(folder: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        described = (await client.get("/openapi.json")).json()
        schemes = described["components"]["securitySchemes"]
        assert {one["scheme"] for one in schemes.values()} == {"bearer"}
        asked = {
            (method, path): "".join(*operation.get("security", [""]))
            for path, methods in described["paths"].items()
            for method, operation in methods.items()
        }
        assert asked == {
            ("get", "/healthz"): "",
            ("get", "/readyz"): "",
            ("get", "/metrics"): "",
            ("post", "/v1/predict"): "token",
            ("get", "/v1/tasks"): "token",
            ("get", "/v1/tasks/{name}/words"): "token",
            ("put", "/v1/tasks/{name}"): "admin",
            ("delete", "/v1/tasks/{name}"): "admin",
        }

    async def open_to_all(client: httpx.AsyncClient, service: Service) -> None:
        described = (await client.get("/openapi.json")).json()
        assert "security" not in described["paths"]["/v1/predict"]["post"]

    with_server(folder, test, token="secret")
    with_server(folder, open_to_all)


def test_pages_of_other_origins_may_ask_where_that_is_allowed(folder: Path) -> None:
    origin = "https://there.example"
    asking = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }

    async def closed(client: httpx.AsyncClient, service: Service) -> None:
        answer = await client.options("/v1/predict", headers=asking)
        assert answer.status_code == 405
        answer = await client.get("/healthz", headers={"Origin": origin})
        assert "access-control-allow-origin" not in answer.headers

    async def opened(client: httpx.AsyncClient, service: Service) -> None:
        answer = await client.options("/v1/predict", headers=asking)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "POST" in answer.headers["access-control-allow-methods"]
        # A refusal too, so that the page can read why.
        for path in ("/healthz", "/v1/tasks"):
            answer = await client.get(path, headers={"Origin": origin})
            assert answer.headers["access-control-allow-origin"] == origin
        other = await client.get("/healthz", headers={"Origin": "https://else.example"})
        assert "access-control-allow-origin" not in other.headers

    with_server(folder, closed, token="secret")
    with_server(folder, opened, token="secret", cors_origins=[origin])


@pytest.mark.parametrize("origin", ["example.org", "https://a.b/path", "https://A.b", "https://"])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(UserError, match="--cors_origins"):
        checked_origin(origin, of="--cors_origins")
    for fine in ("*", "https://a.b", "http://localhost:3000", "http://[::1]:80"):
        assert checked_origin(fine, of="") == fine


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("word_valence", "word_valence"),
        ("google/t5-v1_1-small", "google/t5-v1_1-small"),
        ("data/qc/train.jsonl", "data/qc/train.jsonl"),
        ("/home/someone/data/train.jsonl", "train.jsonl"),
        ("/home/someone/model/", "model"),
        ("C:\\Users\\someone\\train.csv", "train.csv"),
        ("gs://bucket/of/someone/model", "model"),
        ("~/models/small", "small"),
        ("../../someone/train.jsonl", "train.jsonl"),
        ("", ""),
    ],
)
def test_the_list_of_tasks_shows_no_place_on_the_machine(
    folder: Path, name: str, shown: str
) -> None:
    write_prompt(folder / "placed.safetensors", task=name)

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        service.model_name = name
        answer = await client.get("/v1/tasks")
        (device_put,) = [task for task in answer.json()["tasks"] if task["name"] == "placed"]
        assert device_put["prompts"][0].get("trained_on", "") == shown
        assert answer.json()["model"] == shown
        if shown != name:
            assert "someone" not in answer.text

    with_server(folder, test)
