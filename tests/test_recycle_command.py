"""``prompt-tuning similar`` and ``prompt-tuning recycle``, from the command line."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from prompt_tuning_jax.analysis.recycling import recycle
from prompt_tuning_jax.analysis.similarity import similarity
from prompt_tuning_jax.checkpoints.hf.pretrained import write_hf
from prompt_tuning_jax.checkpoints.inspect import open_source
from prompt_tuning_jax.checkpoints.parameters import EMBEDDING
from prompt_tuning_jax.checkpoints.peft.adapter_file import write_peft
from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    load_prompt_with_metadata,
    save_prompt,
)
from prompt_tuning_jax.methods import LoRA
from prompt_tuning_jax.methods.prompt_init import initial_prompt
from prompt_tuning_jax.training.resume import claim
from tests import convert_cases as cases
from tests import tiny_run
from tests.convert_cases import Program, prompt

TURN = np.linalg.qr(np.random.default_rng(1).normal(size=(24, 24)))[0][: cases.WIDTH]


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Program:
    return Program(capsys, tmp_path)


@functools.cache
def models() -> tuple[Path, Path]:
    """One, and a wider one whose embeddings are the first one's, turned."""
    source = cases.hf_model(tiny_run.scratch() / "source")
    wide = dataclasses.replace(cases.CONFIG, embed_dim=24)
    params = cases.params(wide)
    params[EMBEDDING] = (cases.params()[EMBEDDING] @ TURN).astype(np.float32)
    words = tiny_run.vocabulary_file()
    target = tiny_run.scratch() / "target"
    write_hf(target, wide, params, vocabulary_file=words, dtype="stored")
    return source, target


def fingerprint(program: Program, model: Path) -> str:
    return str(json.loads(program("inspect", model, "--json"))["fingerprint"])


def saved(path: Path, number: int = 0, *, length: int = 5, **known: object) -> Path:
    save_prompt(path, prompt(length, seed=number), metadata=PromptMetadata(**known))  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("by", ["linear", "mlp", "combination"])
def test_recycled_for_a_wider_model(program: Program, tmp_path: Path, by: str) -> None:
    source, target = models()
    known = {"task": "t", "score": 50.0, "metric": "accuracy", "labels": ("a", "b"), "seed": 3}
    own = fingerprint(program, source)
    path = saved(tmp_path / "p.safetensors", model_fingerprint=own, **known)
    options = ["--by", by, *(["--steps", 3] if by == "mlp" else [])]
    output = tmp_path / "new" / "q.safetensors"
    words = ["recycle", path, "--from", source, "--to", target, "--output", output, *options]
    said = program(*words)
    assert f"{by}, fitted on the embeddings of 89 pieces: relative error 0.000" in said
    assert ("of the combinations: 0.000" in said) == (by == "combination")
    assert f"wrote {output}" in said
    found, metadata = load_prompt_with_metadata(output)
    np.testing.assert_allclose(found, prompt() @ TURN, atol=1e-4)
    assert metadata.model_fingerprint == fingerprint(program, target)
    assert metadata.model_name == str(target) and metadata.labels == ("a", "b")
    assert metadata.origin == f"recycled ({by}, 89 pieces) from {source} {own}: {path}"
    assert (metadata.task, metadata.seed) == ("t", 3)
    assert metadata.score is None and metadata.metric == ""
    # It is there now, and stays unless told otherwise; the file is the same every time.
    assert "--overwrite" in program.refused(*words)
    before = output.read_bytes()
    done = json.loads(program(*words, "--overwrite", "--json"))
    assert done["paths"] == [str(output)] and done["pieces"] == 89 and done["error"] < 1e-6
    assert output.read_bytes() == before
    assert program("inspect", output).count("recycled (") == 1


def test_between_models_that_scale_their_embeddings_differently(
    tmp_path: Path, shared: Path
) -> None:
    """From a T5Gemma to a Llama: prompts are in the space of scaled embeddings, but not PEFT's."""
    source, target = (str(shared / "fixtures/families" / name) for name in ("t5gemma", "llama_mha"))
    scale, made = 32**0.5, prompt(3, width=32)
    tables = [open_source(name).params[EMBEDDING].whole()[3:] for name in (source, target)]
    wanted = made @ np.linalg.lstsq(scale * tables[0], tables[1], rcond=None)[0]
    file, adapter = tmp_path / "p.safetensors", tmp_path / "adapter"
    saved_as = PromptMetadata(model_type="t5gemma", embedding_scale=scale)
    save_prompt(file, made, metadata=saved_as)
    write_peft(adapter, made / np.float32(scale), base_model_name_or_path=source)
    for path in (file, adapter):
        output = tmp_path / f"{path.stem}_there.safetensors"
        recycle(path, source=source, target=target, output=output)
        found, metadata = load_prompt_with_metadata(output)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert (metadata.model_type, metadata.embedding_scale) == ("llama", None)


def test_several_at_once_and_other_forms(program: Program, tmp_path: Path) -> None:
    source, target = models()
    (tmp_path / "many").mkdir()
    for seed in range(3):
        saved(tmp_path / "many" / f"seed_{seed}.safetensors", seed)
    models_ = ["--from", source, "--to", target]
    program("recycle", tmp_path / "many", *models_, "--output", tmp_path / "out", "--pieces", 40)
    for seed in range(3):
        found, metadata = load_prompt_with_metadata(tmp_path / "out" / f"seed_{seed}.safetensors")
        np.testing.assert_allclose(found, prompt(seed=seed) @ TURN, atol=1e-4)
        assert "40 pieces" in metadata.origin
    one = tmp_path / "many" / "seed_1.safetensors"
    program("recycle", one, *models_, "--output", tmp_path / "p.npy")
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), prompt(seed=1) @ TURN, atol=1e-4)
    back = ["--from", target, "--to", source, "--output", tmp_path / "back.npy"]
    program("recycle", tmp_path / "p.npy", *back)
    np.testing.assert_allclose(np.load(tmp_path / "back.npy"), prompt(seed=1), atol=1e-4)


def test_what_recycle_refuses(program: Program, tmp_path: Path) -> None:
    source, target = models()
    path = saved(tmp_path / "p.safetensors")
    foreign = saved(tmp_path / "f.safetensors", model_fingerprint="0" * 16, model_name="other")
    save_prompt(tmp_path / "wide.npy", prompt(width=24))
    other, bare = tmp_path / "other", tmp_path / "bare"
    words = tiny_run.vocabulary_file(94)
    write_hf(other, cases.CONFIG, cases.params(), vocabulary_file=words, dtype="stored")
    config = dataclasses.replace(cases.CONFIG, vocab_size=192)
    write_hf(bare, config, cases.params(config), dtype="stored")
    out = ["--output", tmp_path / "q.safetensors"]
    here = ["--from", source, "--to", target, *out]
    assert "width 24" in program.refused("recycle", tmp_path / "wide.npy", *here)
    message = program.refused("recycle", foreign, *here)
    assert "trained for another model other" in message and "allow_other_model" in message
    # Of a folder with one prompt it is that one.
    (tmp_path / "one").mkdir()
    foreign.rename(tmp_path / "one" / "f.safetensors")
    program("recycle", tmp_path / "one", *here, "--allow_other_model", "--overwrite")
    (tmp_path / "q.safetensors").unlink()
    message = program.refused("recycle", path, "--from", source, "--to", other, *out)
    assert "different vocabularies (piece " in message
    message = program.refused("recycle", path, "--from", source, "--to", bare, *out)
    assert "208 embeddings" in message and "192" in message and "vocabulary to compare" in message
    assert "has 89 pieces" in program.refused("recycle", path, *here, "--pieces", 90)
    assert "too few" in program.refused("recycle", path, *here, "--pieces", 10)
    assert "--by mlp" in program.refused("recycle", path, *here, "--steps", 5)
    assert "--by combination" in program.refused("recycle", path, *here, "--terms", 5)
    folder = ["--from", source, "--to", target, "--output", tmp_path / "folder"]
    assert ".safetensors or .npy" in program.refused("recycle", path, *folder)
    assert "several prompts" in program.refused("recycle", _folder(tmp_path / "two"), *here)
    assert "neither a folder" in program.refused(
        "recycle", path, "--from", "x/y/z", "--to", target, *out
    )


def test_a_vocabulary_that_nobody_knows(program: Program, tmp_path: Path) -> None:
    source, _ = models()
    write_hf(tmp_path / "bare", cases.CONFIG, cases.params(), dtype="stored")
    path = saved(tmp_path / "p.safetensors")
    options = ["--from", source, "--to", tmp_path / "bare", "--output", tmp_path / "q.npy"]
    said = program("recycle", path, *options)
    assert "bare has no vocabulary: that it is the same one is taken for granted" in said
    np.testing.assert_allclose(np.load(tmp_path / "q.npy"), prompt(), atol=1e-5)


def _folder(folder: Path, number: int = 2) -> Path:
    folder.mkdir()
    for seed in range(number):
        saved(folder / f"seed_{seed}.safetensors", seed)
    return folder


def near(path: Path, noise: float, **known: object) -> Path:
    """The prompt of seed 0 with something else in it."""
    changed = prompt() + noise * prompt(seed=9)
    save_prompt(path, changed, metadata=PromptMetadata(**known))  # type: ignore[arg-type]
    return path


def test_similar_lists_nearest_first(program: Program, tmp_path: Path) -> None:
    path = saved(tmp_path / "new.safetensors", model_fingerprint="a" * 16, model_name="m")
    (tmp_path / "among").mkdir()
    for name, noise in (("far", 4.0), ("near", 0.1), ("middle", 1.0)):
        near(tmp_path / "among" / f"{name}.safetensors", noise, task=f"task {name}")
    among = ["--among", tmp_path / "among", path]
    lines = program("similar", path, *among).splitlines()
    order = ["near", "middle", "far"]
    assert [line.split()[-1] for line in lines] == order  # itself is not among them
    listed = json.loads(program("similar", path, *among, "--by", "tokens", "--json"))
    for each, name in zip(listed, order, strict=True):
        file = tmp_path / "among" / f"{name}.safetensors"
        assert (each["path"], each["task"]) == (str(file), f"task {name}")
        wanted = similarity(prompt(), load_prompt_with_metadata(file)[0], by="tokens")
        assert each["similarity"] == pytest.approx(wanted)
    assert len(program("similar", path, *among, "--top", 2).splitlines()) == 2
    # The nearest, and a mixture, to start a training from.
    start = tmp_path / "start.safetensors"
    assert str(start) in program("similar", path, *among, "--output", start)
    nearest = prompt() + 0.1 * prompt(seed=9)
    np.testing.assert_allclose(load_prompt_with_metadata(start)[0], nearest, atol=1e-6)
    assert "--overwrite" in program.refused("similar", path, *among, "--output", start)
    mixed = ["--output", start, "--overwrite", "--top", 2]
    assert "a mixture of the 2" in program("similar", path, *among, *mixed)
    found, metadata = load_prompt_with_metadata(start)
    a, b = (similarity(prompt(), p) for p in (nearest, prompt() + prompt(seed=9)))
    share = b / (a + b)
    np.testing.assert_allclose(
        found, prompt() + ((1 - share) * 0.1 + share) * prompt(seed=9), atol=1e-5
    )
    assert metadata.origin.startswith(f"mixture by similarity (mean): {1 - share:.3f} {tmp_path}")
    assert (metadata.model_fingerprint, metadata.model_name) == ("a" * 16, "m")
    started = initial_prompt(
        "file",
        key=None,  # type: ignore[arg-type]
        embedding_VD=np.zeros((2, cases.WIDTH), np.float32),  # type: ignore[arg-type]
        length=5,
        file_PD=load_prompt_with_metadata(start)[0],
    )
    np.testing.assert_array_equal(np.asarray(started), found)


def test_what_similar_refuses(program: Program, tmp_path: Path) -> None:
    path = saved(tmp_path / "p.safetensors")
    a = saved(tmp_path / "a.safetensors", 1, model_fingerprint="a" * 16, model_name="one")
    b = saved(tmp_path / "b.safetensors", 2, model_fingerprint="b" * 16, model_name="two")
    near(tmp_path / "same.safetensors", 1)
    longer = saved(tmp_path / "longer.safetensors", length=7)
    save_prompt(tmp_path / "wide.npy", prompt(width=24))
    save_prompt(tmp_path / "opposite.npy", -prompt())
    message = program.refused("similar", path, "--among", a, b)
    assert (
        "b.safetensors is for another model (two b" in message and "a.safetensors (one" in message
    )
    message = program.refused("similar", a, "--among", path, b)
    assert "recycle" in message
    assert "width 24" in program.refused("similar", path, "--among", tmp_path / "wide.npy")
    assert "no prompt besides" in program.refused("similar", path, "--among", path)
    out = ["--output", tmp_path / "o.safetensors"]
    same = tmp_path / "same.safetensors"
    message = program.refused("similar", path, "--among", same, longer, *out, "--top", 2)
    assert "one length" in message and "[7, 16]" in message
    message = program.refused("similar", path, "--among", tmp_path / "opposite.npy", *out)
    assert "opposite.npy, -1.000, is not above 0" in message
    of = tiny_run.experiment(tmp_path / "run", {"method": LoRA()})
    claim(tmp_path / "run", of)
    for words in ((tmp_path / "run", "--among", path), (path, "--among", tmp_path / "run")):
        message = program.refused("similar", *words)
        assert "is a run of LoRA: there is no prompt in it" in message
    two = _folder(tmp_path / "two")
    assert "name one of them: seed_0" in program.refused("similar", two, "--among", path)
    assert "cannot read" in program.refused("similar", path, "--among", tmp_path / "none")
