"""The server of a model that reads images: forms with files, ensembles, and what it refuses."""

import asyncio
import base64
import io
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.checkpoints.tuned_checkpoint import TunedCheckpoint, save_tuned
from prompt_tuning_jax.config.experiment import Experiment, Model
from prompt_tuning_jax.config.overrides import method_to_json
from prompt_tuning_jax.config.serving import Serving
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.prediction import predict
from prompt_tuning_jax.methods import Context, PromptTuning, attach_method
from prompt_tuning_jax.serving.image_form import form_parts
from prompt_tuning_jax.serving.launch import open_service
from prompt_tuning_jax.serving.schema import RefusedError
from tests.serving.browser import CHROMIUM, Browser
from tests.serving.live_server import live
from tests.serving.serving_app import running
from tests.tiny_vit import colored, make_vit, write_vit

SERVING = Serving(batch_sizes=(2,), max_inputs=3)
TYPE = "multipart/form-data; boundary=XX"


def png(label: str, seed: int = 0) -> bytes:
    content = io.BytesIO()
    Image.fromarray(colored(label, seed)).save(content, "PNG")
    return content.getvalue()


def write_tuned(path: Path, labels: tuple[str, ...], *, seed: int) -> None:
    method = PromptTuning(length=2, init="xavier_uniform")
    context = Context(labels=labels)
    attached = attach_method(make_vit(), method, key=jax.random.key(seed), context=context)
    params = param_tree.split(attached)[1]
    stored = TunedCheckpoint(
        trainable={n: np.asarray(p) for n, p in params.items() if method.trains(n)},
        method=method_to_json(method),
        metadata=PromptMetadata(labels=labels),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tuned(path, stored)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two tasks: two prompts that vote, with classes of their own, and one."""
    root = tmp_path_factory.mktemp("served")
    write_vit(root / "model")
    write_tuned(root / "tasks" / "warm" / "seed_0.safetensors", ("no", "yes"), seed=0)
    write_tuned(root / "tasks" / "warm" / "seed_1.safetensors", ("no", "yes"), seed=1)
    colors = ("red", "green", "blue", "gray")
    write_tuned(root / "tasks" / "color.safetensors", colors, seed=2)
    return root


def experiment(folder: Path) -> Experiment:
    return Experiment(model=Model(name_or_path=str(folder / "model")))


async def post(client: Any, images: list[bytes], **fields: str) -> Any:
    files = [("image", (f"{n}.png", content)) for n, content in enumerate(images)]
    return await client.post("/v1/predict/images", files=files, data=fields)


def test_images_are_answered_as_predict_answers_them(folder: Path) -> None:
    asyncio.run(answered(folder))


async def answered(folder: Path) -> None:
    service = open_service(experiment(folder), str(folder / "tasks"), serving=SERVING)
    async with running(service, admin_token="") as client:
        listed = (await client.get("/v1/tasks")).json()
        assert listed["reads_images"] and [t["name"] for t in listed["tasks"]] == ["color", "warm"]
        given = [colored("red", 0), colored("blue", 1)]
        for task, prompts in (("warm", "warm"), ("color", "color.safetensors"), ("", "")):
            answer = await post(client, [png("red", 0), png("blue", 1)], task=task)
            assert answer.status_code == 200, answer.text
            places = [folder / "tasks" / prompts] if prompts else []
            if prompts == "warm":
                places = sorted(places[0].iterdir())
            want = predict(make_vit(), given, [str(p) for p in places])
            for result, expected in zip(answer.json()["results"], want, strict=True):
                assert result["prediction"] == expected.prediction
                assert result.get("votes") == expected.votes
                if not expected.votes:
                    probs = np.exp([*expected.log_probs.values()])
                    np.testing.assert_allclose(
                        [*result["probabilities"].values()], probs, atol=1e-4
                    )
        one = (await post(client, [png("red")], task="warm/seed_1")).json()["results"][0]
        assert "votes" not in one and [*one["probabilities"]] == ["no", "yes"]

        async def refused(answer: Any, status: int, says: str) -> None:
            assert answer.status_code == status, answer.text
            assert says in answer.json()["error"]["message"]

        await refused(await post(client, [b"GIF89a"]), 422, "0.png: this is neither a PNG")
        await refused(await post(client, [png("red")], task="cold"), 404, "no task 'cold'")
        await refused(
            await post(client, [png("red")], mode="generate"), 422, "unknown field 'mode'"
        )
        await refused(await post(client, [png("red")] * 4), 413, "4 images; at most 3")
        body = {"inputs": ["lovely"]}
        answer = await client.post("/v1/predict", json=body)
        await refused(answer, 422, "this model reads images")
        answer = await client.post("/v1/predict/images", json=body)
        await refused(answer, 422, "send multipart/form-data")
        answer = await client.get("/v1/tasks/color/words")
        await refused(answer, 422, "no prompt to show words of")


def test_a_prompt_alone_is_refused_because_it_has_no_classifier(
    folder: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "prompt.npy", np.zeros((2, 16), np.float32))
    with pytest.raises(UserError, match="a prompt without the classifier"):
        open_service(experiment(folder), str(tmp_path), serving=SERVING)
    with pytest.raises(UserError, match="answers in mode label alone"):
        open_service(
            experiment(folder), str(folder / "tasks"), serving=Serving(modes=("generate",))
        )


def test_members_with_classes_in_another_order_do_not_vote(folder: Path, tmp_path: Path) -> None:
    """Their classifiers say the same number for different labels."""
    for seed, labels in enumerate((("no", "yes"), ("yes", "no"))):
        write_tuned(tmp_path / "voted" / f"seed_{seed}.safetensors", labels, seed=seed)
    with pytest.raises(UserError, match="task voted: seed_0 has the classes no, yes and seed_1"):
        open_service(experiment(folder), str(tmp_path), serving=SERVING)


def body(*parts: bytes, end: bytes = b"--XX--\r\n") -> bytes:
    return b"".join(b"--XX\r\n" + part + b"\r\n" for part in parts) + end


NAMED = b'Content-Disposition: form-data; name="image"; filename="a \\"b\\".png"\r\n'


def test_files_of_a_form_are_whole_whatever_bytes_they_have() -> None:
    for content in (b"", b"\r\n--X\r\n\r\n", bytes(range(256)), b"x--XX--", b"\r\n"):
        field = b"content-disposition: form-data; name=task\r\n\r\nwarm"
        image, task = form_parts(
            body(NAMED + b"Content-Type: image/png\r\n\r\n" + content, field), TYPE, most=2
        )
        assert image.content == content and (image.name, image.filename) == ("image", 'a "b".png')
        assert (task.name, task.content, task.filename) == ("task", b"warm", "")


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b"", TYPE, "does not end with its boundary"),
        (body(NAMED + b"\r\nx", end=b""), TYPE, "does not end with its boundary"),
        (body(b"no headers"), TYPE, "has no headers"),
        (body(b"Content-Type: image/png\r\n\r\nx"), TYPE, "has no name"),
        (body(b"X: " + b"y" * 9000 + b"\r\n\r\nx"), TYPE, "has no headers"),
        (body(*[NAMED + b"\r\nx"] * 4), TYPE, "more than 2 parts"),
        (body(), "multipart/form-data", "send multipart/form-data"),
        (body(), "application/json", "send multipart/form-data"),
        (body(), f"multipart/form-data; boundary={'x' * 80}", "the boundary has 80 characters"),
    ],
)
def test_other_bodies_are_refused(content: bytes, kind: str, says: str) -> None:
    with pytest.raises(RefusedError) as error:
        form_parts(content, kind, most=2)
    assert says in error.value.message


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium; on Debian: apt-get install chromium")
def test_the_page_takes_images(folder: Path, tmp_path: Path) -> None:
    """A person chooses a file, sees it, and is told the classes; a text file is refused."""
    service = open_service(experiment(folder), str(folder / "tasks"), serving=SERVING)
    with live(service) as url, Browser(tmp_path / "profile") as browser:
        browser.open(url)
        browser.wait_for("!document.getElementById('image_field').hidden")
        browser.wait_for("document.querySelectorAll('#tasks option').length === 2")
        browser.run("$('task').value = 'warm'; $('task').dispatchEvent(new Event('change'))")
        give = (
            "const bytes = Uint8Array.from(atob('{data}'), (c) => c.charCodeAt(0));"
            "const held = new DataTransfer();"
            "held.items.add(new File([bytes], '{name}', {{ type: '{type}' }}));"
            "$('images').files = held.files; $('images').dispatchEvent(new Event('change'))"
        )
        data = base64.b64encode(png("red")).decode()
        browser.run(f"{{ {give.format(data=data, name='red.txt', type='text/plain')} }}")
        assert "neither PNG nor JPEG" in browser.run("$('error').textContent")
        browser.run(f"{{ {give.format(data=data, name='red.png', type='image/png')} }}")
        assert browser.run("$('error').textContent") == ""
        assert browser.run("document.querySelectorAll('#previews img').length") == 1
        browser.run("document.querySelector('button').click()")
        browser.wait_for("$('answer').textContent !== ''")
        rows = browser.run(
            "[...document.querySelectorAll('#table tr')].map((r) => "
            "[...r.cells].map((c) => c.textContent))"
        )
        assert rows[0] == ["prompt", "no", "yes"]
        assert [row[0] for row in rows[1:]] == ["ensemble", "seed_0", "seed_1"]
        if "PAGE_PICTURE" in os.environ:
            browser.save_picture(Path(os.environ["PAGE_PICTURE"]))
        assert not browser.said
