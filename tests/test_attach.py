"""What was tuned, put back on its model from Python."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import prompt_tuning_jax as pt
from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints import train_state
from prompt_tuning_jax.checkpoints.tuned_checkpoint import save_tuned
from prompt_tuning_jax.config.experiment import Data, Evaluation, Experiment, Model, Training
from prompt_tuning_jax.config.overrides import to_json
from prompt_tuning_jax.methods import (
    IA3,
    WARP,
    FullTuning,
    LoRA,
    MethodConfig,
    MultitaskPrompts,
    PrefixTuning,
    PTuning,
)
from prompt_tuning_jax.methods.multitask import SHARED, TASK
from prompt_tuning_jax.methods.prompt import with_prompt
from tests.serving.serving_methods import moved, stored, write_json, write_method
from tests.serving.serving_micro import micro_model, write_prompt
from tests.tiny_run import LABELS, model_folder

TEXTS = ["what color is it red", "blue or green"]
PREFIX = PrefixTuning(length=2, hidden=4)


@pytest.mark.parametrize("method", [LoRA(rank=2), IA3(), PREFIX, PTuning(length=2), WARP(length=2)])
def test_a_file_does_what_was_trained(tmp_path: Path, method: MethodConfig) -> None:
    """The file is of the folded method; the expected is of the one that trains."""
    trained = moved(method)
    attached = pt.attach(micro_model(), write_method(tmp_path / "one.safetensors", method))
    targets = list(LABELS[:2])
    expected = pt.score(trained, TEXTS, targets)
    np.testing.assert_allclose(pt.score(attached, TEXTS, targets), expected, rtol=1e-5)
    assert not np.allclose(expected, pt.score(micro_model(), TEXTS, targets), rtol=1e-3)
    if isinstance(method, LoRA | PrefixTuning):  # each call is two more programs
        written = pt.generate(attached, TEXTS, max_length=4)
        np.testing.assert_array_equal(written.ids, pt.generate(trained, TEXTS, max_length=4).ids)
    elif not method.scores_labels:
        hidden = pt.encode(attached, TEXTS)
        np.testing.assert_allclose(hidden, pt.encode(trained, TEXTS), rtol=1e-4, atol=1e-5)


def test_an_attached_prompt_predicts_with_the_settings_of_its_run(tmp_path: Path) -> None:
    labels = ("red", "det bon ban")  # of different lengths
    write_prompt(tmp_path / "prompts" / "seed_0.safetensors", labels=labels)
    run = Experiment(
        model=Model(name_or_path=str(model_folder())),
        data=Data(task="word_valence", inputs_length=6),
        evaluation=Evaluation(normalize_length=True),
        training=Training(seeds=(0,)),
    )
    (tmp_path / "experiment.json").write_text(to_json(run))
    file = tmp_path / "prompts" / "seed_0.safetensors"
    expected = pt.predict(micro_model(), TEXTS, tmp_path)
    assert any(one.truncated for one in expected)
    for path in (tmp_path, file):
        found = pt.predict(pt.attach(micro_model(), path), TEXTS)
        for one, same in zip(found, expected, strict=True):
            assert one.truncated == same.truncated
            assert one.log_probs == pytest.approx(same.log_probs, rel=1e-4)


def test_class_vectors_score_their_labels_alone(tmp_path: Path) -> None:
    file = write_method(tmp_path / "warp.safetensors", WARP(length=2))
    attached = pt.attach(micro_model(), file)
    scores = pt.score(attached, [TEXTS[0]] * len(LABELS), list(LABELS))
    assert np.exp(scores).sum() == pytest.approx(1, rel=1e-5)
    assert pt.score(attached, TEXTS[:1], ["something else"])[0] < -1e9


def test_members_by_their_names(tmp_path: Path) -> None:
    """Of a folder of files, and of a run that tuned all weights and keeps no files."""
    model = micro_model()
    files = [write_prompt(tmp_path / "mine" / f"seed_{n}.safetensors", seed=n) for n in (0, 1)]
    arrays = [pt.load_prompt(file) for file in files]
    second = pt.attach(model, tmp_path / "mine", member="seed_1")
    expected = pt.score(model, TEXTS, TEXTS, arrays[1])
    np.testing.assert_allclose(pt.score(second, TEXTS, TEXTS), expected, rtol=1e-6)
    whole = [stored(FullTuning(), seed=seed).trainable for seed in (3, 4)]
    trainable = {name: np.stack([one[name] for one in whole]) for name in whole[0]}
    run = tmp_path / "whole"
    train_state.save(run / train_state.BEST, 1, {"trainable": trainable}, {"fingerprint": "any"})
    write_json(run, FullTuning(), seeds=(3, 4), learning_rates=(0.5, 0.25))
    params = param_tree.split(pt.attach(model, run, member="seed_4_lr_0.25"))[1]
    assert all(np.array_equal(params[name], whole[1][name]) for name in whole[1])
    for path, holds in (
        (tmp_path / "mine", "seed_0, seed_1"),
        (run, "seed_3_lr_0.5, seed_4_lr_0.25"),
    ):
        with pytest.raises(pt.UserError, match=f"holds 2 members, and say which.*{holds}"):
            pt.attach(model, path)
        with pytest.raises(pt.UserError, match=f"no 'seed_9' in it; .*{holds}"):
            pt.attach(model, path, member="seed_9")


def test_a_task_of_a_mixture_is_a_plain_prompt(tmp_path: Path) -> None:
    model, file = micro_model(), tmp_path / "mixture.safetensors"
    kept = stored(MultitaskPrompts(length=3, combine="sum"), tasks=("first", "second"))
    save_tuned(file, kept)
    prompt_PD = kept.trainable[SHARED] + kept.trainable[TASK][1]
    attached = pt.attach(model, file, task="second")
    expected = pt.score(model, TEXTS, TEXTS, prompt_PD)
    np.testing.assert_allclose(pt.score(attached, TEXTS, TEXTS), expected, rtol=1e-6)
    for task, said in (("", "say which"), ("secnd", "did you mean 'second'")):
        with pytest.raises(pt.UserError, match=f"trained on 2 tasks.*{said}"):
            pt.attach(model, file, task=task)
    plain = write_prompt(tmp_path / "plain.safetensors")
    with pytest.raises(pt.UserError, match="not trained on several tasks"):
        pt.attach(model, plain, task="second")


def test_a_prompt_has_no_place_where_something_is_attached(tmp_path: Path) -> None:
    attached = with_prompt(micro_model(), jnp.ones((3, 16)))
    calls: Sequence[object] = (
        lambda prompt: pt.generate(attached, TEXTS, prompt),
        lambda prompt: pt.score(attached, TEXTS, TEXTS, prompt),
        lambda prompt: pt.encode(attached, TEXTS, prompt),
    )
    for call in calls:
        with pytest.raises(pt.UserError, match="leave out prompt"):
            call(np.ones((3, 16)))  # type: ignore[operator]


def test_the_model_stays_bare(tmp_path: Path) -> None:
    model = micro_model()
    before = jax.tree.map(np.asarray, param_tree.split(model)[1])
    expected = pt.score(model, TEXTS, TEXTS)
    file = write_method(tmp_path / "lora.safetensors", LoRA(rank=2))
    attached = pt.attach(model, file)
    shared = param_tree.split(attached)[1]
    assert all(
        shared[f"model/{name}"] is array for name, array in param_tree.split(model)[1].items()
    )
    np.testing.assert_array_equal(pt.score(model, TEXTS, TEXTS), expected)
    after = param_tree.split(model)[1]
    assert before.keys() == after.keys()


def test_the_model_of_a_tuned_one_is_a_model(tmp_path: Path) -> None:
    """Its parameters know their axes, so that something else can be attached to it."""
    model = micro_model()
    prompt = pt.attach(model, write_prompt(tmp_path / "p.safetensors"))
    assert param_tree.logical_axes(prompt.model) == param_tree.logical_axes(model)
    file = write_method(tmp_path / "lora.safetensors", LoRA(rank=2))
    again = pt.attach(prompt.model, file)
    np.testing.assert_array_equal(
        pt.score(again, TEXTS, TEXTS), pt.score(pt.attach(model, file), TEXTS, TEXTS)
    )


def test_what_cannot_be_attached_is_said_in_one_line(tmp_path: Path) -> None:
    model, file = micro_model(), write_prompt(tmp_path / "mine.safetensors")
    attached = pt.attach(model, file)
    wrong: dict[str, tuple[Any, Any]] = {
        "did you mean '.*mine.safetensors'": (model, tmp_path / "mine.safetensor"),
        "got ndarray; an array is the prompt of generate": (model, np.ones((3, 16))),
        "got an empty path": (model, ""),
        "is a model: open it with load_model": (model, model_folder()),
        "give the bare model": (attached, file),
        "load_model\\('tiny'\\) opens one": ("tiny", file),
    }
    for message, (what, path) in wrong.items():
        with pytest.raises(pt.UserError, match=message) as raised:
            pt.attach(what, path)
        assert len(str(raised.value)) < 300


def test_what_cannot_be_written_is_said_in_one_line() -> None:
    model, any_of = micro_model(), cast(Any, pt)
    wrong: dict[str, Callable[[], object]] = {
        "there are no inputs": lambda: pt.generate(model, []),
        "max_length is 0": lambda: pt.generate(model, TEXTS, max_length=0),
        "num_beams is 0": lambda: pt.generate(model, TEXTS, strategy="beam", num_beams=0),
        "inputs.1. is 'None'": lambda: any_of.generate(model, ["a", None]),
        "load_model": lambda: any_of.score("tiny", TEXTS, TEXTS),
    }
    for message, call in wrong.items():
        with pytest.raises(pt.UserError, match=message):
            call()


def test_a_folder_names_the_prompt_in_it_whatever_it_is_called(tmp_path: Path) -> None:
    write_prompt(tmp_path / "a.npy")
    (tmp_path / "a.npy").rename(tmp_path / "encoder.prompt.prompt.prompt")
    (tmp_path / "notes.txt").write_text("of the export")
    with pytest.raises(pt.UserError, match=r"prompts in it: encoder\.prompt\.prompt\.prompt$"):
        pt.attach(micro_model(), tmp_path)
    with pytest.raises(pt.UserError, match=r"did you mean .*encoder\.prompt\.prompt\.prompt"):
        pt.load_prompt(tmp_path)
    (tmp_path / "encoder.prompt.prompt.prompt").rename(tmp_path / "another")
    with pytest.raises(pt.UserError, match=r"did you mean .*/another\?"):
        pt.load_prompt(tmp_path)
