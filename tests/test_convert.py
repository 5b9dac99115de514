"""``prompt-tuning convert``: every model and prompt in every format, there and back."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prompt_tuning_jax as pt
from prompt_tuning_jax.checkpoints import convert_model
from prompt_tuning_jax.checkpoints.hf.pretrained import open_hf, read_hf, write_hf
from prompt_tuning_jax.checkpoints.parameters import PROMPT
from prompt_tuning_jax.checkpoints.peft.adapter_file import read_peft, write_peft
from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    load_prompt_with_metadata,
    read_prompt,
    save_prompt,
)
from prompt_tuning_jax.checkpoints.t5x.reader import open_t5x, read_t5x
from prompt_tuning_jax.config.config_file import RUN_CONFIG
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.methods import PromptTuning
from prompt_tuning_jax.config.overrides import to_json
from prompt_tuning_jax.errors import UserError
from tests import convert_cases as cases
from tests.convert_cases import Program, hf_model, orbax_model, prompt, t5x_model, tree_bytes

METADATA = PromptMetadata(task="t", steps=3, metric="f1", score=0.5, labels=("a", "é"), seed=1)


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Program:
    return Program(capsys, tmp_path)


def require_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
def test_a_hugging_face_model_stays_of_its_kind(
    program: Program, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(cases.CONFIG, relpos_per_layer=kind == "umt5")
    write_hf(tmp_path / "one", config, cases.params(config), model_type=kind)
    program("convert", tmp_path / "one", tmp_path / "two", "--to", "hf")
    assert json.loads((tmp_path / "two/config.json").read_text())["model_type"] == kind
    # T5X keeps no name; an mT5's embeddings, or biases in each layer, give it away.
    note = program("convert", tmp_path / "one", tmp_path / "t5x", "--to", "t5x")
    assert ("converted back to hf it is t5" in note) == (kind == "mt5")
    monkeypatch.setattr(convert_model, "MT5_ROWS", cases.CONFIG.vocab_size)
    if kind != "t5":
        program("convert", tmp_path / "t5x", tmp_path / "three", "--to", "hf")
        assert json.loads((tmp_path / "three/config.json").read_text())["model_type"] == kind


@pytest.mark.parametrize("dtype", [np.float32, cases.BF16], ids=str)
def test_hf_to_t5x_and_back(program: Program, tmp_path: Path, dtype: Any) -> None:
    model = hf_model(tmp_path / "hf", dtype=dtype)
    done = program("convert", model, tmp_path / "t5x", "--to", "t5x", "--step", 12)
    checkpoint = tmp_path / "t5x" / "checkpoint_12"
    assert done.startswith(f"wrote a model as a T5X checkpoint of step 12: {checkpoint} (")
    assert "files)\n" in done and done.count("\n") == 1
    opened = open_t5x(checkpoint)
    assert (opened.step, opened.version, opened.layout) == (12, 3, "t5x")
    require_same(read_t5x(checkpoint), cases.params(dtype=dtype))
    program("convert", checkpoint, tmp_path / "back", "--to", "hf")
    assert tree_bytes(tmp_path / "back") == tree_bytes(model)  # the vocabulary, too
    pt.convert(checkpoint, tmp_path / "shards", to="hf", max_shard_bytes=15_000)
    require_same(read_hf(tmp_path / "shards")[1], cases.params(dtype=dtype))
    weights = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(weights) > 1 and all(file.stat().st_size < 20_000 for file in weights)


def test_all_sources_of_one_model_give_the_same_files(program: Program, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()  # an empty folder is free
    model = hf_model(tmp_path / "hf")
    words = ("--vocabulary", model / "spiece.model")
    sources = {"native": t5x_model(tmp_path / "native")}
    for ocdbt in (True, False):
        place = tmp_path / f"ocdbt {ocdbt}"
        sources[f"orbax {ocdbt}"] = orbax_model(place, cases.params(), use_ocdbt=ocdbt)
    for name, source in sources.items():
        out = tmp_path / "out" / name
        program("convert", source, out, "--to", "hf", *words)
        assert tree_bytes(out) == tree_bytes(model), name
    assert "no vocabulary" in program("convert", sources["native"], tmp_path / "n", "--to", "hf")


def test_t5x_stays_as_it_was(program: Program, tmp_path: Path) -> None:
    source = t5x_model(tmp_path / "old", with_prompt=True)
    program("convert", source, tmp_path / "new" / "checkpoint_9")
    assert tree_bytes(tmp_path / "new" / "checkpoint_9") == tree_bytes(source)
    # The step is the source's unless another is given, and a name must agree with it.
    program("convert", source, tmp_path / "later", "--to", "t5x", "--step", 11)
    assert open_t5x(tmp_path / "later" / "checkpoint_11").step == 11
    program("convert", source, tmp_path / "first", "--to", "t5x", "--step", 0)
    assert open_t5x(tmp_path / "first" / "checkpoint_0").step == 0
    message = program.refused("convert", source, tmp_path / "new" / "checkpoint_8")
    assert "step 8" in message and "--step 8" in message


def test_orbax_with_a_prompt(program: Program, tmp_path: Path) -> None:
    """Read as a prompt, as a model, and written natively with its optimizer's state."""
    for ocdbt in (True, False):
        place = tmp_path / str(ocdbt)
        source = orbax_model(place, {**cases.params(), PROMPT: prompt()}, use_ocdbt=ocdbt)
        stored = read_prompt(source)
        assert stored.source == "T5X checkpoint"
        np.testing.assert_array_equal(stored.prompt_PD, prompt())
        program("convert", source, place / "p.npy")
        assert np.load(place / "p.npy").tobytes() == prompt().tobytes()
        program("convert", source, place / "native", "--to", "t5x")
        written = open_t5x(place / "native" / "checkpoint_5")
        require_same(
            {name: array.whole() for name, array in written.params.items()},
            {**cases.params(), PROMPT: prompt()},
        )
        state = written.open_state()
        assert state["param_states/none"] is None
        slot = state["param_states/prompt/v"]
        assert slot is not None and slot.whole().tolist() == [1, 1, 1]
        assert "prompt in the source is left out" in program(
            "convert", source, place / "hf", "--to", "hf"
        )
        rows = program("inspect", source)
        assert "T5X on Orbax" in rows and f"[5, {cases.WIDTH}]" in rows


def test_t5x_fixtures_in_every_layout(program: Program, tmp_path: Path, shared: Path) -> None:
    """The same model as T5X wrote it in each of its layouts, and its prompt inside of Orbax's."""
    t5x = shared / "fixtures" / "t5x"
    for kind, step in (("prompted_tiny_t5x", 3), ("scan_t5x", 7)):
        native = t5x / kind / f"checkpoint_{step}"
        orbax = t5x / "orbax" / kind.split("_")[-2] / f"checkpoint_{step}"
        for number, source in enumerate((native, orbax)):
            out = tmp_path / kind / str(number)
            program("convert", source, out, "--to", "t5x", "--unscan")
            written = open_t5x(out / f"checkpoint_{step}")
            assert (written.step, written.layout, written.scanned) == (step, "t5x", False)
            require_same(read_t5x(out / f"checkpoint_{step}"), read_t5x(native))
            assert bool(written.state_names) == (kind != "scan_t5x")
    kept = tmp_path / "scanned"
    program("convert", t5x / "orbax" / "scan" / "checkpoint_7", kept, "--to", "t5x")
    assert open_t5x(kept / "checkpoint_7").scanned
    assert open_t5x(kept / "checkpoint_7").state_names
    # As T5X exported it, beside the checkpoints, with no suffix.
    (exported,) = t5x.rglob("encoder.prompt.prompt.prompt")
    for source in (t5x / "prompted_tiny_t5x" / "checkpoint_3", t5x / "orbax/tiny/checkpoint_3"):
        program("convert", source, tmp_path / "p", "--to", "npy", "--overwrite")
        assert (tmp_path / "p").read_bytes() == exported.read_bytes()


def test_a_prompt_put_into_a_checkpoint(program: Program, tmp_path: Path) -> None:
    model = hf_model(tmp_path / "hf")
    save_prompt(tmp_path / "p.npy", prompt())
    done = program("convert", model, tmp_path / "t5x", "--to=t5x", "--prompt", tmp_path / "p.npy")
    checkpoint = tmp_path / "t5x" / "checkpoint_0"
    assert f"with a prompt [5, {cases.WIDTH}]" in done
    require_same(read_t5x(checkpoint), {**cases.params(), PROMPT: prompt()})
    program("convert", checkpoint, tmp_path / "out.npy")
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "p.npy").read_bytes()
    # Another one in its place; the state of the old one would be wrong.
    trained = t5x_model(tmp_path / "trained", with_prompt=True)
    save_prompt(tmp_path / "q.npy", prompt(3, seed=4))
    options = ("--to", "t5x", "--prompt", tmp_path / "q.npy")
    assert "optimizer's state" in program("convert", trained, tmp_path / "new", *options)
    written = open_t5x(tmp_path / "new" / "checkpoint_9")
    assert written.params[PROMPT].whole().tobytes() == prompt(3, seed=4).tobytes()
    slot = written.open_state()[f"param_states/{PROMPT}/v"]
    assert slot is not None and slot.shape == (3, cases.WIDTH)


def test_a_prompt_of_another_model(program: Program, tmp_path: Path) -> None:
    model, other = hf_model(tmp_path / "hf"), hf_model(tmp_path / "o", dtype=cases.BF16)
    save_prompt(tmp_path / "bare.npy", prompt())
    p, q = tmp_path / "p.safetensors", tmp_path / "q.safetensors"
    program("convert", tmp_path / "bare.npy", p, "--model", model)
    known = load_prompt_with_metadata(p)[1]
    described = json.loads(program("inspect", model, "--json"))
    assert known.model_fingerprint == described["fingerprint"] and known.model_name == str(model)
    # Rounding makes no other model of it; other weights do.
    program("convert", p, q, "--model", other)
    assert load_prompt_with_metadata(q)[1].model_name == str(model)
    changed = dataclasses.replace(known, model_fingerprint="0" * 16)
    save_prompt(p, prompt(), metadata=changed)
    for words in (
        (p, tmp_path / "r.npy", "--model", model),
        (p, tmp_path / "r", "--to", "peft", "--model", model),
        (model, tmp_path / "r", "--to", "t5x", "--prompt", p),
    ):
        assert "was trained for another model" in program.refused("convert", *words)
        program("convert", *words, "--allow_other_model", "--overwrite")
    # It is then a prompt of this model, with all that a file says about its model.
    program("convert", p, q, "--model", model, "--allow_other_model", "--overwrite")
    moved = load_prompt_with_metadata(q)[1]
    assert (moved.model_fingerprint, moved.model_name) == (known.model_fingerprint, str(model))
    assert "0" * 16 in moved.origin
    save_prompt(tmp_path / "wide.npy", prompt(width=24))
    words = (tmp_path / "wide.npy", tmp_path / "w.safetensors", "--model", model)
    assert f"width 24, but the model has width {cases.WIDTH}" in program.refused("convert", *words)
    words = (model, tmp_path / "w", "--to", "t5x", "--prompt", tmp_path / "wide.npy")
    assert f"width 24, but the model has width {cases.WIDTH}" in program.refused("convert", *words)


@pytest.mark.parametrize("dtype", [np.float16, cases.BF16, np.float32, np.float64], ids=str)
def test_prompts_go_round_bit_for_bit(program: Program, tmp_path: Path, dtype: Any) -> None:
    """safetensors -> PEFT -> safetensors -> npy (which has no bfloat16) -> safetensors."""
    start, array = tmp_path / "a.safetensors", prompt(dtype=dtype)
    metadata = dataclasses.replace(METADATA, model_name="google/t5-base-lm-adapt")
    save_prompt(start, array, metadata=metadata, dtype=None)
    lost = program("convert", start, tmp_path / "peft", "--to", "peft")
    assert "does not hold the prompt's labels" in lost
    adapter = read_peft(tmp_path / "peft")
    assert adapter.base_model_name_or_path == "google/t5-base-lm-adapt"
    program("convert", tmp_path / "peft", tmp_path / "b.safetensors")
    done = program("convert", tmp_path / "b.safetensors", tmp_path / "c.npy")
    assert ("bfloat16 became float32" in done) == (dtype == cases.BF16)
    program("convert", tmp_path / "c.npy", tmp_path / "d.safetensors")
    for name in ("peft", "b.safetensors", "c.npy", "d.safetensors"):
        found = read_prompt(tmp_path / name).prompt_PD
        exact = np.float32 if dtype == cases.BF16 and name[0] in "cd" else dtype
        assert found.dtype == exact and found.tobytes() == array.astype(exact).tobytes(), name
    program("convert", start, tmp_path / "same.safetensors")
    assert (tmp_path / "same.safetensors").read_bytes() == start.read_bytes()


def test_dtypes(program: Program, tmp_path: Path) -> None:
    model = hf_model(tmp_path / "hf")
    rounded = {name: array.astype(cases.BF16) for name, array in cases.params().items()}
    for to in ("hf", "t5x"):
        out = tmp_path / "out" / to
        program("convert", model, out, "--to", to, "--dtype", "bfloat16")
        found = read_hf(out)[1] if to == "hf" else read_t5x(out / "checkpoint_0")
        require_same(found, rounded)
    config, _, _ = open_hf(tmp_path / "out" / "hf")
    assert config == cases.CONFIG
    save_prompt(tmp_path / "p.npy", prompt())
    program("convert", tmp_path / "p.npy", tmp_path / "p.safetensors", "--dtype", "bfloat16")
    assert read_prompt(tmp_path / "p.safetensors").prompt_PD.dtype == cases.BF16
    message = program.refused("convert", tmp_path / "p.npy", tmp_path / "q.npy", "--dtype=bfloat16")
    assert "no bfloat16" in message


def test_the_prompts_of_a_run(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    for seed in range(3):
        metadata = dataclasses.replace(METADATA, seed=seed)
        save_prompt(folder / f"seed_{seed}.safetensors", prompt(seed=seed), metadata=metadata)
        save_prompt(folder / f"seed_{seed}.npy", prompt(seed=seed))
    done = program("convert", folder, tmp_path / "npy", "--to", "npy")
    assert f"wrote 3 prompts [5, {cases.WIDTH}], each as an .npy file" in done
    assert tree_bytes(tmp_path / "npy") == {
        name: data for name, data in tree_bytes(folder).items() if name.endswith(".npy")
    }
    program("convert", folder, tmp_path / "peft", "--to", "peft", "--model", "org/t5")
    for seed in range(3):
        adapter = read_peft(tmp_path / "peft" / f"seed_{seed}")
        assert adapter.prompt_PD.tobytes() == prompt(seed=seed).tobytes()
        assert adapter.base_model_name_or_path == "org/t5"
    assert "several prompts" in program.refused("convert", folder, tmp_path / "x.npy")
    rows = program("inspect", folder)
    assert "3 prompts" in rows and "seed_2.safetensors" in rows and "f1 0.50 at step 3" in rows
    (folder / "seed_1.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    assert "damaged" in program.refused("convert", folder, tmp_path / "again", "--to", "npy")
    # One prompt is that one, in however many forms it is there.
    for seed in (1, 2):
        for suffix in ("npy", "safetensors"):
            (folder / f"seed_{seed}.{suffix}").unlink()
    assert "wrote a prompt [5, " in program("convert", folder, tmp_path / "x.npy")
    assert (tmp_path / "x.npy").read_bytes() == (folder / "seed_0.npy").read_bytes()
    assert "wrote a prompt [5, " in program("convert", folder, tmp_path / "one", "--to", "npy")


def test_peft_wants_a_model_and_takes_its_sizes(program: Program, tmp_path: Path) -> None:
    save_prompt(tmp_path / "p.npy", prompt())
    words = ("convert", tmp_path / "p.npy", tmp_path / "peft", "--to", "peft")
    assert "give --model" in program.refused(*words)
    model = hf_model(tmp_path / "hf")
    program(*words, "--model", model)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    sizes = {"num_layers": 1, "num_attention_heads": 2, "token_dim": cases.WIDTH}
    assert config | sizes == config and config["base_model_name_or_path"] == str(model)
    checkpoint = t5x_model(tmp_path / "t5x")
    assert "--to hf" in program.refused(*words, "--overwrite", "--model", checkpoint)
    program(*words, "--overwrite", "--model", "t5_1_1_lm100k_xl")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "google/t5-xl-lm-adapt"


def test_an_adapter_is_for_the_right_kind_of_model(
    program: Program, tmp_path: Path, shared: Path
) -> None:
    """Known from a published name, an opened model, or metadata that the conversion keeps."""

    def kind_of(*words: Any) -> tuple[str, str]:
        said = program("convert", *words, tmp_path / "peft", "--to", "peft", "--overwrite")
        config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        return config["task_type"], said

    bare = tmp_path / "p.npy"
    save_prompt(bare, prompt())
    assert kind_of("--model", "meta-llama/Llama-3.2-1B", bare)[0] == "CAUSAL_LM"
    assert "since nothing tells" not in kind_of("--model", "t5_1_1_lm100k_xl", bare)[1]
    kind, said = kind_of("--model", "org/unknown", bare)
    assert kind == "SEQ_2_SEQ_LM" and "for a decoder-only model, give its folder" in said
    # From PEFT to a file that knows its model, which was not in the adapter.
    families, file = shared / "fixtures/families", tmp_path / "g.safetensors"
    for adapter in ("prompt", "ptuning_mlp"):
        source = families / "peft/gemma2" / adapter
        program("convert", source, file, "--model", families / "gemma2", "--overwrite")
        known = load_prompt_with_metadata(file)[1]
        assert (known.model_type, known.embedding_scale) == ("gemma2", 32**0.5)
    kind, said = kind_of("--model", "org/unknown", file)
    assert kind == "CAUSAL_LM" and "4.57 multiplies prompts" in said
    save_prompt(bare, prompt(width=32))
    assert "multiplies" not in kind_of("--model", families / "gemma3_text", bare)[1]
    # PEFT does not read GGUF files.
    metadata = PromptMetadata(model_name="smollm2", model_type="llama")
    save_prompt(tmp_path / "s.safetensors", prompt(), metadata=metadata)
    kind, said = kind_of(tmp_path / "s.safetensors")
    assert kind == "CAUSAL_LM" and "load the adapter onto the folder that convert" in said


def test_where_a_prompt_is_and_what_it_sees(program: Program, tmp_path: Path) -> None:
    """PEFT's prompts are in front and see all; other formats do not say all of it."""
    model, out = hf_model(tmp_path / "hf"), tmp_path / "out"
    metadata = PromptMetadata(model_name=str(model), combine="before_eos")
    save_prompt(tmp_path / "p.safetensors", prompt(), metadata=metadata)
    one = tmp_path / "p.safetensors"
    said = program.refused("convert", one, out, "--to", "peft")
    assert said.startswith(str(one)) and "method.placement=before_eos" in said
    assert "method.placement=before_eos" in program("convert", one, tmp_path / "p.npy")
    assert "method.placement" not in program("convert", one, tmp_path / "q.safetensors")
    said = program("convert", model, out, "--to", "t5x", "--prompt", one)
    assert "does not say method.placement=before_eos" in said
    # What it sees, only its run knows.
    run = tmp_path / "run"
    method = PromptTuning(length=5, prompt_to_input=False)
    run.mkdir()
    (run / RUN_CONFIG).write_text(to_json(Experiment(method=method)))
    kept = run / "prompts" / "seed_0.safetensors"
    save_prompt(kept, prompt(), metadata=PromptMetadata(model_name=str(model)))
    assert "or a mask" in program.refused("convert", run, tmp_path / "peft", "--to", "peft")
    for words in ((kept, tmp_path / "r.npy"), (kept, tmp_path / "r.safetensors")):
        assert "does not hold method.prompt_to_input=False" in program("convert", *words)
    words = (model, tmp_path / "again", "--to", "t5x", "--prompt", kept)
    assert "does not say method.prompt_to_input=False" in program("convert", *words)


def test_a_published_t5gemma_scales_prompts_that_say_nothing(
    program: Program, tmp_path: Path
) -> None:
    save_prompt(tmp_path / "p.npy", prompt(width=2304))
    model = ("--model", "google/t5gemma-2b-2b-ul2")
    program("convert", tmp_path / "p.npy", tmp_path / "peft", "--to", "peft", *model)
    found = read_peft(tmp_path / "peft").prompt_PD
    np.testing.assert_allclose(found * 48, prompt(width=2304), rtol=1e-6)


def test_prompts_of_several_models_are_not_one_models(program: Program, tmp_path: Path) -> None:
    for name in ("a", "b"):
        metadata = dataclasses.replace(METADATA, model_name=f"org/{name}")
        save_prompt(tmp_path / "in" / f"{name}.safetensors", prompt(), metadata=metadata)
    words = ("convert", tmp_path / "in", tmp_path / "out", "--to", "peft")
    assert "different models, org/a, org/b" in program.refused(*words)
    program(*words, "--model", "org/a")


def test_an_adapter_names_its_model_from_anywhere(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder by its whole path; the bundled model, which PEFT cannot know, by name and note."""
    monkeypatch.chdir(tmp_path)
    hf_model(tmp_path / "hf")
    for name, width, wanted in (("hf", None, str(tmp_path / "hf")), ("tiny", 256, "tiny")):
        save_prompt(tmp_path / "p.npy", prompt(width=width or cases.WIDTH))
        words = ("convert", "p.npy", "peft", "--to", "peft", "--model", name, "--overwrite")
        assert ("load the adapter onto the folder" in program(*words)) == (name == "tiny")
        assert read_peft(tmp_path / "peft").base_model_name_or_path == wanted


def test_what_an_adapter_says_stays_but_for_its_second_copy(
    program: Program, tmp_path: Path
) -> None:
    source, twice = tmp_path / "a", np.concatenate([prompt(), prompt(seed=1)])
    write_peft(source, twice, base_model_name_or_path="org/t5", num_layers=7)
    path = source / "adapter_config.json"
    says = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "classify", "num_layers": 7}
    two = {"num_transformer_submodules": 2, "num_virtual_tokens": 5}
    path.write_text(json.dumps(json.loads(path.read_text()) | says | two))
    assert "5 more rows" in rows_of(program("inspect", source))["left out"]
    assert "the second 5 rows" in program("convert", source, tmp_path / "b", "--to", "peft")
    again = read_peft(tmp_path / "b")
    assert again.prompt_PD.tobytes() == prompt().tobytes() and again.left_out == 0
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert config | says == config and config["base_model_name_or_path"] == "org/t5"
    assert "left out" not in program("inspect", tmp_path / "b")


def rows_of(text: str) -> dict[str, str]:
    return dict(line.split("  ", 1) for line in text.splitlines())


def test_nothing_is_replaced_unasked(program: Program, tmp_path: Path) -> None:
    model = hf_model(tmp_path / "hf")
    save_prompt(tmp_path / "p.npy", prompt())
    save_prompt(tmp_path / "q.npy", prompt(seed=2))
    old = hf_model(tmp_path / "old", dtype=cases.BF16)
    for words in (
        (tmp_path / "p.npy", tmp_path / "q.npy"),
        (model, old, "--to", "hf"),
    ):
        assert "exists already" in program.refused("convert", *words)
        program("convert", *words, "--overwrite")
    assert tree_bytes(old) == tree_bytes(model)
    assert np.load(tmp_path / "q.npy").tobytes() == prompt().tobytes()
    other = tmp_path / "home"
    (other / "letters").mkdir(parents=True)
    message = program.refused("convert", model, other, "--to", "hf", "--overwrite")
    assert "more than a model" in message
    message = program.refused("convert", model, tmp_path, "--to", "hf", "--overwrite")
    assert "more than a model" in message
    message = program.refused("convert", tmp_path / "p.npy", old, "--to", "npy", "--overwrite")
    assert "is a folder" in message
    message = program.refused("convert", model, tmp_path / "p.npy", "--to", "hf", "--overwrite")
    assert "ends in .npy" in message
    # A model onto itself, in another type; and a model that holds its source is not replaced.
    program("convert", model, model, "--to", "hf", "--overwrite", "--dtype", "bfloat16")
    require_same(read_hf(model)[1], cases.params(dtype=cases.BF16))
    inner = hf_model(model / "inner")
    message = program.refused("convert", inner, model, "--to", "hf", "--overwrite")
    assert "more than a model" in message


@pytest.mark.parametrize("kind", ["hf", "peft", "t5x"])
@pytest.mark.parametrize("other", ["thesis.tex", "notes.json", "runs/log.txt"])
def test_a_folder_with_other_files_is_not_replaced(
    program: Program, tmp_path: Path, kind: str, other: str
) -> None:
    """A trainer's output folder holds more than the model."""
    source, target = tmp_path / "source", tmp_path / "checkpoint_7"
    if kind == "peft":
        save_prompt(source.with_suffix(".npy"), prompt())
        words = ("convert", source.with_suffix(".npy"), target, "--to", kind, "--model", "org/t5")
    else:
        words = ("convert", hf_model(source), target, "--to", kind)
    program(*words)
    program(*words, "--overwrite")
    (target / other).parent.mkdir(exist_ok=True)
    (target / other).write_text("mine")
    assert "more than a model" in program.refused(*words, "--overwrite")
    assert (target / other).read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("hf out", "does not tell a format: say --to"),
        ("p.npy out", "does not tell a format: say --to"),
        ("p.npy out --to hf", "prompts are written as"),
        ("p.npy out --to t5x", "convert the model with --prompt"),
        ("prompts out --to hf", "prompts are written as"),
        ("hf out.npy", "is a folder without a prompt"),
        ("tiny out.npy", "tiny is a model"),
        ("hf out.npy --to safetensors", "change one of them"),
        ("p.npy out.npy --step 3", "--step only goes with --to t5x"),
        ("hf out --to hf --prompt p.npy", "--prompt only goes with --to t5x"),
        ("hf out --to hf --step 3", "--step only goes with --to t5x"),
        ("hf out --to t5x --model x", "--model only goes with --to npy"),
        ("hf out --to t5x --step x", "whole number"),
        ("hf out --to hf --max_shard_size big", "is not a size"),
        ("hf out --to hf --max_shard_size 5", "'5' is less than 1MB"),
        ("p.npy out.npy --max_shard_size 5MB", "--max_shard_size only goes with --to hf"),
        ("nothing out --to hf", "nothing"),
        ("nothing.npy out.npy", "nothing.npy"),
        ("hf out --to t5x --prompt nothing.npy", "nothing.npy"),
        ("hf out --to hf --vocabulary nothing", "nothing"),
        ("hf out --to word", "word"),
        ("hf p.npy/out --to hf", "cannot write"),
        ("p.npy hf/config.json/out.npy", "cannot write"),
    ],
)
def test_what_cannot_be_asked(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    hf_model(tmp_path / "hf")
    save_prompt(tmp_path / "p.npy", prompt())
    save_prompt(tmp_path / "prompts" / "a.npy", prompt())
    assert part in program.refused("convert", *words.split())


def test_a_failure_in_the_middle_leaves_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found when most is written: with a new folder, and with an old one in its place."""
    source = t5x_model(tmp_path / "t5x")
    chunk = next((source / "target.token_embedder.embedding").glob("[0-9]*"))
    chunk.write_bytes(chunk.read_bytes()[:-900])
    old = hf_model(tmp_path / "old")
    for out in ((tmp_path / "a" / "b" / "new",), (old, "--overwrite")):
        message = program.refused("convert", source, *out, "--to", "hf", "--max_shard_size", "1MB")
        assert "damaged or incomplete for token_embedder/embedding" in message
        program.refused("convert", source, *out, "--to", "t5x", "--dtype", "bfloat16")
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    assert "cannot write" in program.refused("convert", hf_model(old), old / "x", "--to", "t5x")


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C of a process that is in the middle of writing, made slow here."""
    model = hf_model(tmp_path / "hf")
    before = tree_bytes(tmp_path)
    code = (
        "import signal, sys, time\n"
        # Where this runs in the background of a shell, interrupts are ignored from the start.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from prompt_tuning_jax.checkpoints import convert_model\n"
        "cast = convert_model._cast\n"
        "def slow(array, dtype):\n"
        "    read = array.read\n"
        "    def late(index):\n"
        "        print('reading', flush=True); time.sleep(0.3); return read(index)\n"
        "    return convert_model.dataclasses.replace(array, read=late)\n"
        "convert_model._cast = slow\n"
        "from prompt_tuning_jax.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["convert", str(model), str(tmp_path / "out" / "t5x"), "--to", "t5x"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for _ in range(3):
            assert process.stdout.readline() == b"reading\n"
        assert len(tree_bytes(tmp_path)) > len(before)  # it is on its way
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        process.stdout.read()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 130 and time.monotonic() - started < 20
    assert tree_bytes(tmp_path) == before


def test_from_python(tmp_path: Path) -> None:
    write_peft(tmp_path / "peft", prompt(), base_model_name_or_path="org/t5")
    done = pt.convert(tmp_path / "peft", tmp_path / "p.safetensors")
    assert (done.path, done.files) == (tmp_path / "p.safetensors", 1)
    assert done.bytes == (tmp_path / "p.safetensors").stat().st_size
    with pytest.raises(UserError, match="dtype is 'int8'"):
        pt.convert(tmp_path / "peft", tmp_path / "q.npy", dtype="int8")
    with pytest.raises(UserError, match="to is 'word'"):
        pt.convert(tmp_path / "peft", tmp_path / "q", to="word")
