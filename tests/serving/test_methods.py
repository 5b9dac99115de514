"""Methods that are no plain prompts answer as they are predicted with, whoever shares a batch."""

import asyncio
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.config.experiment import Evaluation, Experiment
from prompt_tuning_jax.config.overrides import to_json
from prompt_tuning_jax.config.serving import Serving
from prompt_tuning_jax.inference import ensemble
from prompt_tuning_jax.inference.api import token_ids
from prompt_tuning_jax.inference.loading import load_prompts
from prompt_tuning_jax.inference.prediction import predict
from prompt_tuning_jax.methods import (
    WARP,
    ADePT,
    Context,
    DeepPrompts,
    DePT,
    LoRA,
    MethodConfig,
    PatternTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    attach_method,
    method_name,
)
from prompt_tuning_jax.serving import prompt_cache
from prompt_tuning_jax.serving.decode_state import DecodeOutput
from prompt_tuning_jax.serving.loading import methods_of
from prompt_tuning_jax.serving.schema import Options, PredictRequest
from prompt_tuning_jax.serving.service import Service
from prompt_tuning_jax.serving.shapes import Program, Row
from prompt_tuning_jax.serving.tasks import AdapterSpecs, ServedMethod
from tests import tiny_run
from tests.micro import make_t5
from tests.serving.serving_app import ask
from tests.serving.serving_methods import LORA, opened, opened_specs, with_service, write_method
from tests.serving.serving_micro import micro_model, write_prompt
from tests.tiny_lm import make_lm
from tests.tiny_run import LABELS

# One of each structure: slots of the encoder's input and layers, of attention, around maps, in
# place of the model's own arrays, labels of its own.
METHODS: dict[str, MethodConfig] = {
    "p_tuning": PTuning(length=2, encoder="none", template="{prompt} {input:2} {prompt} {input}"),
    "dept": DePT(length=2, rank=2, max_length=6),
    "adept": ADePT(length=2, hidden=3),
    "deep_prompts": DeepPrompts(length=3),
    "prefix_tuning": PrefixTuning(length=3),
    "lora": LORA,
    "lora_of_more": LoRA(
        rank=1,
        ranks=("encoder/.*=2",),
        dora=True,
        embeddings=("encoder/.*",),
        copies=("decoder/.*",),
        parameters=(".*_norm/scale",),
    ),
    "pattern": PatternTuning(),
    "warp": WARP(length=2),
    "in_decoder": PromptTuning(length=2, decoder_length=1, init="uniform"),
}
LORAS = [f"lora_{seed}" for seed in range(9)]
INPUTS = ["ban red", "kolo green", "mita"]


def experiment(strategy: Any = "rank") -> Experiment:
    base = tiny_run.experiment("")
    return dataclasses.replace(base, evaluation=Evaluation(strategy=strategy))


@functools.cache
def folder_of_all() -> Path:
    folder = tiny_run.scratch() / "all_methods"
    for name, method in METHODS.items():
        write_method(folder / f"{name}.safetensors", method)
    for seed, name in enumerate(LORAS):
        write_method(folder / f"{name}.safetensors", LORA, seed=seed)
    write_prompt(folder / "plain.safetensors", seed=3)
    blind = dataclasses.replace(tiny_run.experiment(""), method=PromptTuning(input_to_prompt=False))
    write_prompt(folder / "blind" / "prompts" / "seed_0.safetensors", seed=3)
    (folder / "blind" / "experiment.json").write_text(to_json(blind))
    for seed in range(2):
        write_method(folder / "voted" / f"seed_{seed}.safetensors", LORA, seed=20 + seed)
    write_prompt(folder / "voted" / "seed_2.safetensors", seed=4)
    return folder


@functools.cache
def label_scores(file: Path) -> np.ndarray:
    """``[B, C]`` of the inputs and labels, as ``eval`` and ``predict`` rank them."""
    model = micro_model()
    (members,) = load_prompts(experiment(), model, [str(file)]).groups
    tokens_BT, labels_CS = token_ids(model, INPUTS), token_ids(model, LABELS)
    scores = ensemble.label_scores(
        members.graphdef, members.trainable, members.frozen, tokens_BT, labels_CS, 1
    )
    return np.asarray(scores)[0]


async def scores_of(client: httpx.AsyncClient, task: str) -> np.ndarray:
    """The same, asked of the server one by one."""
    answer = await ask(
        client,
        task=task,
        inputs=[text for text in INPUTS for _ in LABELS],
        mode="score",
        options={"targets": [label for _ in INPUTS for label in LABELS]},
    )
    assert answer.status_code == 200, answer.text
    found = [one["log_prob"] for one in answer.json()["results"]]
    return np.reshape(found, (len(INPUTS), len(LABELS)))


def test_every_method_ranks_as_it_is_predicted_with() -> None:
    folder = folder_of_all()
    service = opened(folder)
    alone = opened_specs(service)
    # Ten LoRAs and those that vote share theirs; prompts that limit attention are no plain ones.
    assert len(alone) == len(METHODS) + 1
    # Beside the methods: the bare model, the copying of prompts, nearest words.
    assert service.engine.compiler.progress.all == len(alone) + 3
    compiled = []

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, seconds, **_: compiled.append(event) if "compile" in event else None
        )
        try:
            names = (*METHODS, *LORAS, "plain", "blind")
            found = {name: await scores_of(client, name) for name in names}
            # All in one request, where each row has a method of its own.
            tasks = [*METHODS, "plain", *LORAS[:3], "voted"]
            mixed = (await ask(client, task=tasks, inputs=INPUTS[:1] * len(tasks))).json()
        finally:
            jax.monitoring.clear_event_listeners()
        assert not compiled
        for name in (*METHODS, *LORAS[:3]):
            expected = label_scores(folder / f"{name}.safetensors")
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
        seed = folder / "blind" / "prompts" / "seed_0.safetensors"
        np.testing.assert_allclose(found["blind"], label_scores(seed), rtol=1e-5, atol=1e-5)
        assert np.abs(found["blind"] - found["plain"]).max() > 1e-3  # the same vectors
        for result in mixed["results"]:
            place = folder / result["task"]
            files = (
                [place / f"seed_{seed}.safetensors" for seed in range(3)]
                if result["task"] == "voted"
                else [place.with_suffix(".safetensors")]
            )
            said = []
            for file, one in zip(files, result["prompts"], strict=True):
                scores_C = label_scores(file)[0]
                share_C = np.exp(scores_C) / np.exp(scores_C).sum()
                shares = [one["probabilities"][label] for label in LABELS]
                np.testing.assert_allclose(shares, share_C, atol=1e-5)
                said.append(LABELS[int(scores_C.argmax())])
                assert one["prediction"] == said[-1]
            if len(files) > 1:
                assert result["votes"] == {label: said.count(label) for label in {*said}}
        other = {"mode": "score", "options": {"targets": [""]}}
        warp = await ask(client, task="warp", inputs=["ban"], **other)
        assert (warp.status_code, warp.json()["error"]["field"]) == (422, "options.targets[0]")
        assert "blue, green, red" in warp.json()["error"]["message"]
        listed = (await client.get("/v1/tasks")).json()["tasks"]
        kinds = {task["name"]: task["method"] for task in listed}
        assert all(kinds[name] == method_name(method) for name, method in METHODS.items())
        assert (kinds["plain"], kinds["voted"]) == ("prompt_tuning", "lora, prompt_tuning")
        words = await client.get("/v1/tasks/lora/words")
        assert words.status_code == 422 and "no prompt" in words.json()["error"]["message"]
        (some,) = (await client.get("/v1/tasks/voted/words")).json()["prompts"]
        assert some["prompt"] == "seed_2"

    with_service(service, test)


@pytest.mark.parametrize("together", [True, False])
def test_rows_of_one_structure_share_a_batch_where_their_arrays_are_small(
    monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """And answer as alone; the device has room for four of the twelve."""
    if not together:
        monkeypatch.setattr(prompt_cache, "MAX_GATHERED_BYTES", 0)
    folder = folder_of_all()
    service = opened(folder)
    batches: list[list[str]] = []
    score = service.engine.score

    def watched(rows: Sequence[Row], program: Program) -> list[list[float]]:
        batches.append([row.prompt.name for row in rows if row.prompt is not None])
        return score(rows, program)

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        monkeypatch.setattr(service.engine, "score", watched)
        body = {"task": LORAS[:8], "inputs": ["ban red", "mita red"] * 4}
        results = (await ask(client, **body)).json()["results"]
        for name, result in zip(LORAS[:8:2], results[::2], strict=True):
            scores_C = label_scores(folder / f"{name}.safetensors")[0]
            share_C = np.exp(scores_C) / np.exp(scores_C).sum()
            shares = [result["probabilities"][label] for label in LABELS]
            np.testing.assert_allclose(shares, share_C, atol=1e-5)
        assert sorted(name for batch in batches for name in batch) == LORAS[:8]
        most = max(len({*batch}) for batch in batches)
        assert (most > 1) == together

    with_service(service, test)


def caches_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, gathered: bool
) -> tuple[prompt_cache.Cache, list[ServedMethod]]:
    """The cache of two LoRAs, of which the device holds one after the other."""
    if not gathered:
        monkeypatch.setattr(prompt_cache, "MAX_GATHERED_BYTES", 0)
    for seed in range(2):
        write_method(tmp_path / f"lora_{seed}.safetensors", LORA, seed=seed)
    service = opened(tmp_path)
    methods = methods_of(service.tasks.everything().values())
    return service.engine._caches[methods[0].adapter_spec], methods


@pytest.mark.parametrize("gathered", [True, False])
def test_tasks_of_a_mixture_share_the_arrays_of_their_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gathered: bool
) -> None:
    cache, (method, _) = caches_of(tmp_path, monkeypatch, gathered=gathered)
    other_task = dataclasses.replace(method, metadata=PromptMetadata(task="other"))
    arrays, rows = cache.take([method, other_task])
    assert rows[0] == rows[1]
    for name, array in method.trainable.items():
        held = arrays[name][rows[0]] if gathered else arrays[name]
        np.testing.assert_array_equal(held, array)


@pytest.mark.parametrize("gathered", [True, False])
def test_after_a_failed_copy_no_method_has_the_arrays_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gathered: bool
) -> None:
    cache, methods = caches_of(tmp_path, monkeypatch, gathered=gathered)
    put, failures = prompt_cache.device_put, [MemoryError("no room")]

    def failing(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return put(*arguments)

    monkeypatch.setattr(prompt_cache, "device_put", failing)
    with pytest.raises(MemoryError):
        cache.take(methods[:1])
    for method in methods:
        arrays, rows = cache.take([method])
        for name, array in method.trainable.items():
            held = arrays[name][rows[0]] if gathered else arrays[name]
            np.testing.assert_array_equal(held, array)


def test_text_is_generated_as_it_is_predicted(tmp_path: Path) -> None:
    write_method(tmp_path / "lora.safetensors", LORA)
    write_method(tmp_path / "other.safetensors", LORA, seed=5)
    write_method(tmp_path / "prefix.safetensors", PrefixTuning(length=3), seed=1)
    write_method(tmp_path / "p_tuning.safetensors", METHODS["p_tuning"], seed=2)
    write_method(tmp_path / "warp.safetensors", WARP(length=2))
    write_method(tmp_path / "in_decoder.safetensors", METHODS["in_decoder"])
    write_prompt(tmp_path / "plain.safetensors", seed=3)
    serving = Serving(
        lengths=(8,), batch_sizes=(4,), modes=("generate",), max_new_tokens=4, slots=4
    )

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        names = ["lora", "prefix", "plain", "lora", "other", "p_tuning"]
        body = {"task": names, "inputs": [*INPUTS, *["ban red"] * 3], "mode": "generate"}
        results = (await ask(client, **body)).json()["results"]
        for name, text, result in zip(names, body["inputs"], results, strict=True):
            (known,) = predict(
                experiment("greedy"),
                prompts=[str(tmp_path / f"{name}.safetensors")],
                inputs=[text],
            )
            (own,) = result["prompts"]
            assert own["prediction"] == known.prediction
            assert known.log_probs is not None
            assert own["log_prob"] == pytest.approx(known.log_probs[known.prediction], abs=1e-5)
        one = {**body, "task": "lora", "inputs": ["ban red"]}
        streamed = await ask(client, **one, options={"stream": True})
        events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line]
        assert events[-1]["results"] == results[3:4]
        assert [event["text"] for event in events[:-1]] == [results[3]["prediction"]]
        short = (await ask(client, **one, options={"max_length": 2})).json()["results"][0]
        assert short["prompts"][0]["tokens"] == 2
        assert results[3]["prediction"].startswith(short["prediction"])
        assert short["prompts"][0]["log_prob"] > results[3]["prompts"][0]["log_prob"]
        warp = await ask(client, **{**body, "task": "warp"})
        assert (warp.status_code, warp.json()["error"]["field"]) == (422, "mode")
        assert "generates no text" in warp.json()["error"]["message"]
        # Slots have no room for the decoder's prompt, without which the text would be another.
        in_decoder = await ask(client, **{**body, "task": "in_decoder"})
        assert (in_decoder.status_code, in_decoder.json()["error"]["field"]) == (422, "mode")
        assert "a prompt in the decoder" in in_decoder.json()["error"]["message"]

    with_service(opened(tmp_path, serving), test)


@pytest.mark.parametrize("gathered", [True, False])
def test_methods_stream_beside_a_prompt_in_one_running_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gathered: bool
) -> None:
    """Each text comes in pieces and is what it is alone; a client that leaves frees its slot.

    Where arrays cannot be gathered by row and the device holds one method, two take turns.
    """
    if not gathered:
        monkeypatch.setattr(prompt_cache, "MAX_GATHERED_BYTES", 0)
        monkeypatch.setattr(prompt_cache, "_MAX_SPEC_BYTES", 0)
    names = ["lora", "other", "prefix", "plain"]
    write_method(tmp_path / "lora.safetensors", LORA)
    write_method(tmp_path / "other.safetensors", LORA, seed=5)
    write_method(tmp_path / "prefix.safetensors", PrefixTuning(length=3), seed=1)
    write_prompt(tmp_path / "plain.safetensors", seed=3)
    serving = Serving(
        lengths=(8,), batch_sizes=(1,), modes=("generate",), max_new_tokens=24, slots=4
    )
    together: list[set[str]] = []

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        decode = service.engine.decode

        def watched(rows: Mapping[int, Row]) -> DecodeOutput:
            together.append({row.prompt.name for row in rows.values() if row.prompt is not None})
            return decode(rows)

        monkeypatch.setattr(service.engine, "decode", watched)

        async def read(task: str, *, leave: bool = False) -> tuple[list[str], Any]:
            options = Options(stream=True, min_length=24)
            request = PredictRequest(
                task=task, inputs=["ban red"], mode="generate", options=options
            )
            pieces: list[str] = []
            events = service.stream(request)
            async for event in events:
                if "results" in event:
                    return pieces, event["results"][0]["prompts"][0]
                pieces.append(event["text"])
                if leave:
                    await events.aclose()  # type: ignore[attr-defined]
                    break
            return pieces, None

        alone = [await read(name) for name in names]
        assert all(len({*names}) == 1 for names in together)
        together.clear()
        leaving = read("plain", leave=True)
        *texts, (some, nothing) = await asyncio.gather(*map(read, names), leaving)
        for (pieces, result), (_, expected) in zip(texts, alone, strict=True):
            assert len(pieces) > 3 and result["tokens"] == 24
            assert "".join(pieces) == result["prediction"] == expected["prediction"]
            assert result["log_prob"] == pytest.approx(expected["log_prob"], rel=1e-5)
        assert (len(some), nothing) == (1, None)
        assert {"lora", "prefix", "plain"} in [names - {"other"} for names in together]
        assert any({"lora", "other"} <= names for names in together) == gathered

    with_service(opened(tmp_path, serving), test)


@pytest.mark.parametrize(
    ("model", "method", "positions"),
    [
        (make_t5, PromptTuning(length=3, init="uniform"), 3),
        (make_t5, PrefixTuning(length=3), 0),
        (make_lm, PromptTuning(length=3, init="uniform"), 3),
        (make_lm, PrefixTuning(length=3), 3),
    ],
)
def test_the_positions_of_a_method_are_those_that_a_decoder_attends_to(
    model: Callable[[], Any], method: Any, positions: int
) -> None:
    """An encoder's prefixes are not in what it hands to the decoder."""
    attached = attach_method(model(), method, key=jax.random.key(0), context=Context())
    assert AdapterSpecs().of(attached, {}).prompt_positions == positions
