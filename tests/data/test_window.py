"""Windows: prompt, input and target share a decoder-only model's positions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.config.methods import NoTuning, PrefixTuning, PromptTuning
from prompt_tuning_jax.data.batching import task_data
from prompt_tuning_jax.data.batching.example_cache import make_ragged
from prompt_tuning_jax.data.batching.window import fit_window, inputs_limit
from prompt_tuning_jax.data.vocabularies.vocab import ByteVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import TokenIds

CAUSAL = ByteVocabulary(token_ids=TokenIds(pad=0, eos=1, start=-1))
SMALL = st.integers(1, 40)


@given(window=SMALL, inputs=SMALL, targets=SMALL, prompt=st.integers(0, 40))
def test_inputs_are_as_long_as_the_window_allows(
    window: int, inputs: int, targets: int, prompt: int
) -> None:
    sizes = {"inputs_length": inputs, "targets_length": targets, "prompt_positions": prompt}
    assert inputs_limit(None, **sizes, advice="") == inputs
    if window <= prompt + targets:
        with pytest.raises(UserError, match=f"window has {window} positions: {prompt} of"):
            inputs_limit(window, **sizes, advice="")
        return
    limit = inputs_limit(window, **sizes, advice="")
    assert 1 <= limit <= inputs
    assert prompt + limit + targets <= window
    assert limit == inputs or prompt + limit + targets == window


def test_prompts_and_prefixes_take_positions() -> None:
    data = Data(inputs_length=90, targets_length=10)
    prompt = Experiment(method=PromptTuning(length=20), data=data)
    for method, length in (
        (prompt.method, 70),
        (PrefixTuning(length=30), 60),
        (NoTuning(), 90),
    ):
        fitted = fit_window(replace(prompt, method=method), 100)
        assert fitted.data == replace(data, inputs_length=length)
    assert fit_window(prompt, 100, prompt_positions=50).data.inputs_length == 40
    assert fit_window(prompt, None) is prompt
    assert fit_window(prompt, 120) is prompt
    with pytest.raises(UserError, match=r"20 of the prompt and 10 of the target .*method\.length"):
        fit_window(prompt, 30)


def file_of(folder: Path, *inputs: str) -> str:
    rows = [f'{{"inputs": "{text}", "targets": "{"yes" if i % 2 else "no"}"}}\n'
            for i, text in enumerate(inputs)]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(rows))
    return str(folder / "rows.jsonl")


def build(
    path: str, method: PromptTuning | NoTuning, *, template: str = "", **more: int
) -> task_data.TaskData:
    data = Data(
        task="", train=path, eval=path, inputs_length=64, targets_length=8, buckets="none",
        labels=("yes", "no"), cache=False, inputs_template=template,
    )  # fmt: skip
    experiment = Experiment(method=method, data=data)
    experiment = replace(experiment, training=replace(experiment.training, batch_size=2))
    return task_data.build_data(experiment, CAUSAL, **more)


def test_inputs_are_cut_and_targets_are_not(tmp_path: Path) -> None:
    path = file_of(tmp_path, "x" * 50, "short", "y" * 60, "z")
    built = build(path, PromptTuning(length=4), window=32)
    assert built.train is not None
    batch = built.train[0]
    inputs, targets = list(batch.values())[:2]
    assert inputs.shape[-1] == 32 - 4 - 8
    (examples,) = built.evaluation.values()
    assert examples.inputs_length == 20 and examples.num_inputs_cut == 2
    assert "cut to 20 tokens" in "\n".join(built.reports)
    # A decoder-only model continues the input: the text is cut, and nothing follows it.
    padded = examples.inputs.padded(np.arange(4), 20, padding=-1)
    assert padded[0].tolist() == CAUSAL.encode("x" * 20)
    assert padded[1].tolist() == [*CAUSAL.encode("short"), *[-1] * 15]
    assert [ids.tolist() for ids in map(examples.targets.__getitem__, (0, 1))] == [
        [*CAUSAL.encode("no"), 1],
        [*CAUSAL.encode("yes"), 1],
    ]
    assert set(np.unique(targets)) >= {-1, 1}
    with pytest.raises(UserError, match="leave none for an input"):
        build(path, PromptTuning(length=4), window=12)
    with pytest.raises(UserError, match="9 of the prompt"):
        build(path, NoTuning(), window=17, prompt_positions=9)


def test_the_end_of_a_template_is_not_cut(tmp_path: Path) -> None:
    path = file_of(tmp_path, "x" * 50, "short")
    built = build(path, PromptTuning(length=4), template="text: {inputs} ok? ", window=32)
    (examples,) = built.evaluation.values()
    padded = examples.inputs.padded(np.arange(2), 20, padding=-1)
    assert CAUSAL.decode(padded[0]) == "text: xxxxxxxxx ok? "
    assert CAUSAL.decode(padded[1][:16]) == "text: short ok? "[:16]


def test_an_input_without_tokens_needs_a_prompt(tmp_path: Path) -> None:
    path = file_of(tmp_path, "text", "", "text", "")
    assert build(path, PromptTuning(length=4)).train is not None
    with pytest.raises(UserError, match=r"2 of 4 inputs are empty \(the first is number 2\)"):
        build(path, NoTuning())


@given(
    rows=st.lists(st.lists(st.integers(1, 99), max_size=9), min_size=1, max_size=6),
    length=st.integers(1, 9),
    kept=st.integers(0, 3),
)
def test_truncation_keeps_ends(rows: list[list[int]], length: int, kept: int) -> None:
    kept = min(kept, length)
    ragged = make_ragged(rows, kept_at_end=kept)
    padded = ragged.padded(np.arange(len(rows)), length, padding=-1)
    for row, found in zip(rows, padded.tolist(), strict=True):
        cut = row if len(row) <= length else row[: length - kept] + row[len(row) - kept :]
        assert found == cut + [-1] * (length - len(cut))
