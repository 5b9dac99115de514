"""What runs, adapters and files of methods are served as, and what of them is refused."""

import dataclasses
from pathlib import Path

import httpx
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.checkpoints.peft.weights import write_peft_weights
from prompt_tuning_jax.checkpoints.tuned_checkpoint import open_tuned, save_tuned
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import IA3, WARP, FullTuning, MultitaskPrompts
from prompt_tuning_jax.serving.service import Service
from prompt_tuning_jax.serving.tasks import ServedMethod, ServedPrompt
from tests.serving.serving_app import ADMIN
from tests.serving.serving_methods import (
    LORA,
    opened,
    opened_specs,
    stored,
    with_service,
    write_json,
    write_method,
)
from tests.serving.serving_micro import micro_model, write_prompt
from tests.tiny_run import LABELS


def test_tasks_of_methods_are_removed_and_replaced_by_prompts(tmp_path: Path) -> None:
    """Nothing is computed: what is asked for is of the folder alone."""
    folder = tmp_path / "tasks"
    lora = write_method(folder / "lora.safetensors", LORA)
    write_method(folder / "voted" / "a.safetensors", LORA)
    write_method(folder / "gone.safetensors", LORA)
    plain = write_prompt(tmp_path / "plain.safetensors").read_bytes()

    async def change(client: httpx.AsyncClient, service: Service) -> None:
        async def put(path: str, content: bytes) -> httpx.Response:
            return await client.put(f"/v1/tasks/{path}", content=content, headers=ADMIN)

        for path, content, said in (
            ("new", lora.read_bytes(), "the upload holds the trained arrays"),
            ("voted?prompt=b", plain, "'voted' is lora, and only plain prompts"),
        ):
            answer = await put(path, content)
            assert answer.status_code == 422 and said in answer.json()["error"]["message"]
        assert (await put("lora", plain)).status_code == 200
        assert (await client.delete("/v1/tasks/gone", headers=ADMIN)).status_code == 204

    service = opened(folder, allow_changes=True)
    service.engine.compile_first = lambda report: None  # type: ignore[method-assign]
    with_service(service, change)
    again = opened(folder, allow_changes=True).tasks
    assert again.names() == ["lora", "voted"]
    assert [again.get(name).method for name in again.names()] == ["prompt_tuning", "lora"]  # type: ignore[union-attr]


def test_runs_adapters_and_mixtures(tmp_path: Path) -> None:
    """Each is a task, and what comes down to a plain prompt is one."""
    run = tmp_path / "run"
    write_method(run / "tuned" / "seed_0.safetensors", LORA)
    write_method(run / "tuned" / "seed_1.safetensors", LORA, seed=1)
    write_json(run, LORA)
    (task,) = opened(run).tasks.everything().values()
    assert (task.name, task.labels) == ("colors", LABELS)
    assert [one.name for one in task.prompts] == ["seed_0", "seed_1"]
    folder = tmp_path / "all"
    folder.mkdir()
    run.rename(folder / "run")
    kept = stored(LORA, seed=3)
    write_peft_weights(
        folder / "adapter",
        LORA,
        kept.trainable,
        config=micro_model().config,
        base_model_name_or_path="micro",
    )
    mixture = stored(MultitaskPrompts(length=3), tasks=("first", "second"))
    save_tuned(folder / "mixture.safetensors", mixture)
    limited = stored(MultitaskPrompts(length=2, prompt_to_prompt="causal", combine="sum"))
    save_tuned(folder / "limited.safetensors", limited)
    in_decoder = stored(MultitaskPrompts(length=2, decoder_length=1, combine="sum"))
    save_tuned(folder / "in_decoder.safetensors", in_decoder)
    whole = stored(FullTuning(), seed=4)
    arrays = {name: array[None] for name, array in whole.trainable.items()}
    train_state.save(
        folder / "whole" / train_state.BEST, 1, {"trainable": arrays}, {"fingerprint": "other"}
    )
    write_json(folder / "whole", FullTuning())
    service = opened(folder)
    tasks = service.tasks.everything()
    assert {name: task.method for name, task in tasks.items()} == {
        "adapter": "lora",
        "in_decoder": "prompt_tuning",
        "limited": "prompt_tuning",
        "mixture.first": "prompt_tuning",
        "mixture.second": "prompt_tuning",
        "run": "lora",
        "whole": "full",
    }
    # The adapter's is the run's own.
    assert len(opened_specs(service)) == 4
    # A prompt that limits attention is not one of those that share batches.
    assert isinstance(tasks["limited"].prompts[0], ServedMethod)
    (behind,) = tasks["in_decoder"].prompts
    assert isinstance(behind, ServedMethod)
    assert behind.trainable["method/decoder_prompt_PD"].shape[0] == 1
    for number, name in enumerate(("mixture.first", "mixture.second")):
        (prompt,) = tasks[name].prompts
        assert isinstance(prompt, ServedPrompt)
        arrays = mixture.trainable
        cols, rows = arrays["method/cols_NPR"][number], arrays["method/rows_NRD"][number]
        expected = arrays["method/shared_PD"] * (cols @ rows)
        np.testing.assert_allclose(prompt.prompt_PD, expected, rtol=1e-5)
    (all_weights,) = tasks["whole"].prompts
    assert isinstance(all_weights, ServedMethod)
    assert all_weights.trainable.keys() == {f"model/{name}" for name in service.engine._params}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("other", "was trained for another model"),
        ("damaged", "damaged"),
        ("unknown", "method"),
        ("shapes", "shapes do not match"),
        ("labels", "wrong.safetensors: method=warp scores labels"),
        ("same", "another task 'mixture.first'"),
    ],
)
def test_what_does_not_fit_is_said_with_its_file(tmp_path: Path, wrong: str, message: str) -> None:
    file = write_method(tmp_path / "wrong.safetensors", IA3())
    kept = open_tuned(file)
    if wrong == "other":
        write_method(file, IA3(), model_fingerprint="f" * 16)
    elif wrong == "damaged":
        file.write_bytes(file.read_bytes()[:-8])
    elif wrong == "unknown":
        save_tuned(file, dataclasses.replace(kept, method='{"class": "Nothing"}'))
    elif wrong == "shapes":
        cut = {name: array[:-1] for name, array in kept.trainable.items()}
        save_tuned(file, dataclasses.replace(kept, trainable=cut))
    elif wrong == "labels":
        warp = stored(WARP(length=2))
        metadata = dataclasses.replace(warp.metadata, labels=())
        save_tuned(file, dataclasses.replace(warp, metadata=metadata))
    else:
        file.unlink()
        mixture = stored(MultitaskPrompts(length=3), tasks=("first", "second"))
        save_tuned(tmp_path / "mixture.safetensors", mixture)
        write_prompt(tmp_path / "mixture.first.npy")
    with pytest.raises(UserError, match=message) as raised:
        opened(tmp_path)
    assert len(str(raised.value).splitlines()) == 1
    assert "safetensors" in str(raised.value) or wrong == "same"
