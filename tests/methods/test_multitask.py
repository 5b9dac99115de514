"""Multitask prompts: each row gets its task's prompt, from batch to prediction, and they go on."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.prompt_file import save_prompt
from prompt_tuning_jax.checkpoints.run_folder import read_best
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.evaluation import evaluate
from prompt_tuning_jax.inference.prediction import predict
from prompt_tuning_jax.inference.setup import read_init_arrays
from prompt_tuning_jax.methods import (
    Context,
    MultitaskPrompts,
    PromptTuning,
    TunedModel,
    attach_method,
)
from prompt_tuning_jax.methods.multitask import (
    BIAS,
    COLS,
    KERNEL,
    PER_TASK,
    ROWS,
    SHARED,
    SHARED_FEATURES,
    TASK,
    TASK_FEATURES,
    combined,
    target_start,
)
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.training.run import train
from tests import tiny_run
from tests.micro import ONE_LAYER, D, Words, call, make_t5, shifted, token_rows

SOURCE = token_rows([5, 3, 4], 7)
TARGET = token_rows([4, 6, 2], 6, seed=1)
TASKS = np.asarray([2, 0, 2], np.int32)
METHODS = {
    "low_rank": (MultitaskPrompts(length=3, rank=2, init_population=0), 3 * D + 4 * 2 * (3 + D)),
    "sum": (MultitaskPrompts(length=3, combine="sum", init_population=0), 3 * D + 4 * 3 * D),
    "concatenation": (
        MultitaskPrompts(length=3, combine="concatenation", task_length=2, init_population=0),
        3 * D + 4 * 2 * D,
    ),
    "features": (
        MultitaskPrompts(length=3, combine="features", init_population=0),
        3 * D // 2 + 4 * 3 * D // 2,
    ),
    "projection": (
        MultitaskPrompts(length=3, combine="projection", init_population=0),
        3 * D + 4 * (D + 1) * D,
    ),
}


def attach(method: MultitaskPrompts, *, tasks: int = 4) -> TunedModel:
    context = Context(vocabulary=Words(), num_tasks=tasks)
    return attach_method(make_t5(ONE_LAYER), method, key=jax.random.key(0), context=context)


@pytest.mark.parametrize("combine", list(METHODS))
def test_each_row_has_its_tasks_prompt(combine: Any) -> None:
    method, count = METHODS[combine]
    attached = attach(method)
    graphdef, params = param_tree.split(attached)
    assert param_tree.count(param_tree.select(params, method.trains)) == count
    arrays = attached.method.arrays()
    prompts = np.stack([combined(combine, arrays, task) for task in TASKS])
    assert prompts.shape[1] == method.prompt_positions()
    assert np.abs(prompts[0] - prompts[1]).max() > 1e-3
    shared_PD = arrays.get(SHARED, arrays.get(SHARED_FEATURES))
    # Tasks start apart from each other, near the shared prompt.
    np.testing.assert_allclose(prompts[0, :3, : shared_PD.shape[1]], shared_PD, atol=0.5)
    run = jax.jit(lambda p, tasks: param_tree.merge(graphdef, p)(SOURCE, TARGET, task_B=tasks))
    want = call(make_t5(ONE_LAYER), SOURCE, shifted(TARGET), prompts)
    np.testing.assert_allclose(run(params, TASKS), want, atol=1e-5)
    with pytest.raises(UserError, match="prompts for 4 tasks, and the task of"):
        attached(SOURCE, TARGET)


def test_features_and_projections_combine_as_in_the_original() -> None:
    """The figures of extended/multitask_prompts_test.py: counting arrays, one kernel per task."""
    shared_PS = np.arange(5 * 20, dtype=np.float32).reshape(5, 20)
    task_NPA = np.arange(10 * 5 * 7, dtype=np.float32).reshape(10, 5, 7)
    kernel_NDS = np.arange(20 * 7, dtype=np.float32).reshape(7, 20) + np.arange(10)[:, None, None]
    bias_ND = np.arange(7, dtype=np.float32) + np.arange(10)[:, None]
    features = {SHARED_FEATURES: shared_PS, TASK_FEATURES: task_NPA}
    projection = {SHARED_FEATURES: shared_PS, KERNEL: kernel_NDS, BIAS: bias_ND}
    for task in range(10):
        prompt_PD = combined("features", features, task)
        np.testing.assert_array_equal(prompt_PD[:, :20], shared_PS)
        np.testing.assert_array_equal(prompt_PD[:, 20:], task_NPA[task])
        for position, vector_D in enumerate(combined("projection", projection, task)):
            want_D = [sum(shared_PS[position] * row) for row in kernel_NDS[task]] + bias_ND[task]
            np.testing.assert_allclose(vector_D, want_D, rtol=1e-6)
    own = MultitaskPrompts(length=3, combine="projection", init="uniform", tasks_init="uniform")
    drawn = attach(own).method.arrays()
    for path in (SHARED_FEATURES, KERNEL, BIAS):
        assert -0.5 <= drawn[path].min() < -0.3
        assert 0.3 < drawn[path].max() < 0.5
    method = MultitaskPrompts(combine="features", shared_features=D)
    with pytest.raises(UserError, match=f"shared_features is {D}, .* width {D} is {D - 1}"):
        attach(method)


def test_tasks_prompts_attend_as_plain_prompts_do() -> None:
    fields: dict[str, Any] = {"prompt_to_prompt": "causal", "placement": "before_eos"}
    attached = attach(dataclasses.replace(METHODS["sum"][0], **fields))
    prompt_PD = combined("sum", attached.method.arrays(), 2)
    model, tasks = make_t5(ONE_LAYER), np.asarray([2, 2, 2], np.int32)
    inputs = [
        each.injections(SOURCE, task_B=tasks).model_input
        for each in (attached, with_prompt(model, prompt_PD, PromptTuning(**fields)))
    ]
    assert inputs[0] is not None and inputs[1] is not None
    for field in ("embeddings_BUD", "mask_BU", "attention_mask_BUU"):
        got, want = (np.asarray(getattr(each, field)) for each in inputs)
        np.testing.assert_array_equal(got, want)
    assert not np.asarray(inputs[0].attention_mask_BUU).all()


def test_only_the_tasks_of_a_batch_learn_from_it() -> None:
    attached = attach(METHODS["low_rank"][0])
    graphdef, params = param_tree.split(attached)
    trainable = param_tree.select(params, lambda name: name.startswith("method/"))

    def loss(own: Any) -> jax.Array:
        merged = param_tree.merge(graphdef, {**params, **own})
        return merged.token_sums(SOURCE, TARGET, task_B=TASKS).loss

    gradients = jax.jit(jax.grad(loss))(trainable)
    for name in (COLS, ROWS):
        moved = [bool(np.abs(each).max() > 0) for each in gradients[name]]
        assert moved == [True, False, True, False]


@pytest.mark.parametrize("task", [-1, 1])
def test_new_tasks_start_from_the_sources(task: int) -> None:
    for combine, (method, _) in METHODS.items():
        arrays = attach(method).method.arrays()
        start = target_start(arrays, tasks=2, task=task)
        shared = SHARED if SHARED in arrays else SHARED_FEATURES
        np.testing.assert_array_equal(start[shared], arrays[shared])
        for name in PER_TASK:
            if name in arrays:
                want = np.mean(arrays[name], axis=0) if task < 0 else arrays[name][task]
                np.testing.assert_allclose(start[name], np.stack([want, want]), atol=1e-6)
        if task >= 0:
            of_new, of_old = combined(combine, start, 1), combined(combine, arrays, task)
            np.testing.assert_array_equal(of_new, of_old)
    with pytest.raises(UserError, match="source has 4 tasks"):
        target_start(arrays, tasks=1, task=4)
    with pytest.raises(UserError, match="4 tasks, counted from 0"):
        combined("low_rank", arrays, 4)


MODULE = """
import dataclasses
from prompt_tuning_jax.data.tasks.files import file_task
from prompt_tuning_jax.data.tasks.registry import (register,)
from prompt_tuning_jax.data.tasks.task import (Mixture,)

def named(name, train, eval):
    return dataclasses.replace(file_task(train=train, eval=eval), name=name)

colors = named("colors_of_{name}", {train!r}, {eval!r})
last = named("last_words_of_{name}", {swapped!r}, {swapped_eval!r})
for task in (colors, last):
    register(task, replace=True)
register(Mixture(name="mixed_{name}", tasks=(colors, last), rates=(1.0, 1.0)), replace=True)
"""


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of a user's own with a mixture of two tasks that want different answers."""
    turn = dict(zip(tiny_run.LABELS, (*tiny_run.LABELS[1:], tiny_run.LABELS[0]), strict=True))
    files = {}
    for key, seed, number in (("swapped", 1, 48), ("swapped_eval", 2, 24)):
        rows = [
            {**row, "targets": turn[row["targets"]]} for row in tiny_run.rows(number, seed=seed)
        ]
        files[key] = str(tiny_run.write_rows(tmp_path / f"{key}.jsonl", rows))
    files |= {"train": str(tiny_run.train_file()), "eval": str(tiny_run.eval_file())}
    name = f"tasks_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE.format(name=name, **files))
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_a_run_over_a_mixture_and_what_comes_of_it(mixture: str, tmp_path: Path) -> None:
    changes = {
        "method": MultitaskPrompts(length=3, combine="sum", init_population=0),
        "data.module": mixture,
        "data.task": f"mixed_{mixture}",
        "data.train": "",
        "data.eval": "",
        "training.seeds": (0, 1),
        "training.steps": 4,
    }
    experiment = tiny_run.experiment(tmp_path / "multi", changes)
    done = train(experiment, quiet=True)
    assert done.finished
    # Evaluated from the folder: the score of the best step, and each task by its own prompt.
    found = evaluate(experiment, prompts=[str(tmp_path / "multi")])
    names = (f"colors_of_{mixture}", f"last_words_of_{mixture}")
    for own, best in zip(found.per_prompt, done.best, strict=True):
        assert best is not None
        assert own == pytest.approx(dict(best.metrics))
    trainable = read_best(tmp_path / "multi")
    assert trainable[TASK].shape == (2, 2, 3, 16)
    arrays = {name: array[1] for name, array in trainable.items()}
    for number, name in enumerate(names):
        prompt_PD = np.asarray(combined("sum", arrays, number))
        file = tmp_path / f"{number}.safetensors"
        save_prompt(file, prompt_PD)
        one = tiny_run.experiment(tmp_path, changes | {"data.task": name})
        alone = evaluate(one, prompts=[str(file)])
        assert alone.per_prompt[0]["accuracy"] == found.per_prompt[1][f"{name}/accuracy"]
        texts = [example["inputs"] for example in tiny_run.rows(6, seed=2)]
        by_run = predict(one, prompts=[str(tmp_path / "multi")], inputs=texts)
        by_file = predict(one, prompts=[str(file)], inputs=texts)
        assert all(
            alone.prediction in (both.votes or {})
            for alone, both in zip(by_file, by_run, strict=True)
        )

    # A single target prompt, and a run of one task, from the sources.
    target = tiny_run.experiment(
        tmp_path / "target",
        {
            "method": PromptTuning(
                length=3, init="file", init_path=str(tmp_path / "1.safetensors")
            ),
            "training.steps": 1,
        },
    )
    assert train(target, quiet=True).finished
    second = MultitaskPrompts(
        length=3,
        combine="sum",
        init="source",
        init_path=str(tmp_path / "multi"),
        source_task=1,
        source_member=1,
    )
    changes = {"method": second, "training.steps": 1, "optimizer.learning_rate": 0.0}
    started = train(tiny_run.experiment(tmp_path / "second", changes), quiet=True)
    np.testing.assert_allclose(started.best_tuned[SHARED][0], arrays[SHARED], rtol=1e-4)
    np.testing.assert_allclose(started.best_tuned[TASK][0], arrays[TASK][1:], rtol=1e-4)

    # What does not fit is said.
    model = make_t5(ONE_LAYER)  # of the same width
    for wrong, message in (
        ({"length": 4}, r"shared_PD is \[3, 16\] in .*multi, and \[4, 16\] here"),
        ({"combine": "low_rank"}, "cols_NPR is missing"),
        ({"source_member": 2}, "has 2 members, counted from 0"),
        ({"init_path": str(tmp_path)}, "no best checkpoint"),
        ({"init_path": ""}, "method.init=source needs method.init_path"),
    ):
        method = dataclasses.replace(second, **wrong)
        with pytest.raises(UserError, match=message):
            context = Context(init_arrays=read_init_arrays(method))
            attach_method(model, method, key=jax.random.key(0), context=context)
    with pytest.raises(UserError, match="the task of these inputs is unknown"):
        evaluate(
            tiny_run.experiment(
                tmp_path,
                {"data.train": "", "data.labels": tiny_run.LABELS, "training.steps": 1},
            ),
            prompts=[str(tmp_path / "multi")],
        )
