"""Demonstrations in the input: who is drawn, how many fit, and what the cache keeps apart."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest

from prompt_tuning_jax.config.overrides import method_to_json
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.data.batching.tokenize import tokenize
from prompt_tuning_jax.data.tasks.demonstrations import NUMBER, demonstrated, draw, report
from prompt_tuning_jax.data.tasks.task import Source, Task
from prompt_tuning_jax.data.vocabularies.vocab import ByteVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import PromptDesign
from prompt_tuning_jax.models.config import TokenIds
from tests import tiny_run

LABELS = ("no", "yes")
BYTES = ByteVocabulary()
# Three of four are "no".
TRAIN = [{"inputs": f"text {n:02}", "targets": LABELS[n % 4 == 0], "id": n} for n in range(40)]
EVAL = [{"inputs": "x" * n, "targets": "yes"} for n in (1, 30, 60, 200)] + [dict(TRAIN[0])]


def task(*, index: int | None = None) -> Task:
    rows: dict[str, list[dict[str, Any]]] = {"train": TRAIN, "validation": EVAL}
    return Task(
        name="numbers",
        source=Source(
            splits=tuple(rows),
            rows=lambda split, data_dir: rows[split],
            fingerprint=lambda split, data_dir: "1",
        ),
        labels=LABELS,
        index=index,
    )


def with_design(
    method: PromptDesign, *, seed: int = 0, length: int = 100, of: Task | None = None
) -> Task:
    drawn = draw(
        TRAIN,
        labels=LABELS,
        shots=method.shots,
        balanced=method.balance == "balanced",
        seed=seed,
    )
    return demonstrated(
        of or task(),
        drawn,
        compose=method.compose,
        identity=method_to_json(method),
        vocabulary=BYTES,
        inputs_length=length,
    )


def test_a_draw_is_of_its_seed_and_of_the_training_examples() -> None:
    def drawn(seed: int) -> Any:
        return draw(TRAIN, labels=LABELS, shots=6, balanced=True, seed=seed)

    assert drawn(1) == drawn(1)
    assert len({tuple(each["inputs"] for each in drawn(seed)) for seed in range(10)}) == 10
    answers = {row["inputs"]: row["targets"] for row in TRAIN}
    for each in drawn(3):
        assert each == {"inputs": each["inputs"], "targets": answers[each["inputs"]]}


@pytest.mark.parametrize("seed", range(5))
def test_a_balanced_draw_has_each_label_as_often_and_so_have_its_first_ones(seed: int) -> None:
    drawn = draw(TRAIN, labels=LABELS, shots=12, balanced=True, seed=seed)
    for number in range(1, 13):
        counts = Counter(each["targets"] for each in drawn[:number])
        assert max(counts["no"], counts["yes"]) - min(counts["no"], counts["yes"]) <= 1
    first_of_round = {each["targets"] for each in drawn[::2]}
    assert first_of_round == set(LABELS)  # no label always comes last


def test_as_drawn_has_the_shares_of_the_data_and_runs_out_with_it() -> None:
    drawn = draw(TRAIN, labels=LABELS, shots=100, balanced=False, seed=0)
    assert Counter(each["targets"] for each in drawn) == {"no": 30, "yes": 10}
    # A label that runs out is left out, and the others go on.
    balanced = draw(TRAIN, labels=LABELS, shots=25, balanced=True, seed=0)
    assert Counter(each["targets"] for each in balanced) == {"no": 15, "yes": 10}
    assert len({each["inputs"] for each in balanced}) == 25


def test_examples_of_the_same_input_are_drawn_once() -> None:
    drawn = draw([*TRAIN, *TRAIN], labels=LABELS, shots=100, balanced=False, seed=0)
    assert len(drawn) == len({each["inputs"] for each in drawn}) == len(TRAIN)


def test_as_many_as_fit_and_the_input_is_whole() -> None:
    method = PromptDesign(shots=8, instruction="Answer.", separator="|", query="Q: {inputs}")
    of = with_design(method, length=100)
    drawn = draw(TRAIN, labels=LABELS, shots=8, balanced=True, seed=0)
    found = list(of.load("validation"))
    numbers = [example[NUMBER] for example in found]
    assert numbers[0] > numbers[1] > numbers[2] > numbers[3] == 0
    for example, given in zip(found[:4], EVAL, strict=False):
        number = example[NUMBER]
        assert example["inputs"] == method.compose(drawn[:number], given["inputs"])
        assert example["inputs"].endswith(f"|Q: {given['inputs']}")
        assert example["inputs"].startswith("Answer.|")
        if number:
            assert len(BYTES.encode(example["inputs"])) + 1 <= 100
        assert len(BYTES.encode(method.compose(drawn[: number + 1], given["inputs"]))) + 1 > 100


def test_the_end_of_sequence_and_the_tasks_token_count() -> None:
    method = PromptDesign(shots=4, separator=" ", demonstration="{inputs} {targets}")
    (first, *_) = with_design(method, length=1000).load("validation")
    assert first[NUMBER] == 4
    needed = len(BYTES.encode(first["inputs"])) + 1
    for of, length, number in (
        (task(), needed, 4),
        (task(), needed - 1, 3),
        (task(index=0), needed, 3),
        (task(index=0), needed + 1, 4),
    ):
        (example, *_) = with_design(method, length=length, of=of).load("validation")
        assert example[NUMBER] == number


def test_an_example_does_not_see_its_own_answer() -> None:
    of = with_design(PromptDesign(shots=40, balance="as_drawn"), length=10_000)
    *_, own = of.load("validation")
    assert own["inputs"].count(TRAIN[0]["inputs"]) == 1
    assert own[NUMBER] == 39 and own["id"] == 0


def test_the_cache_keeps_draws_wordings_and_lengths_apart(tmp_path: Any) -> None:
    method = PromptDesign(shots=4)
    kinds = (
        (method, 0, 100),
        (method, 1, 100),
        (method, 0, 60),
        (PromptDesign(shots=4, separator=" "), 0, 100),
        (PromptDesign(shots=0), 0, 100),
    )

    def ids(method: PromptDesign, seed: int, length: int) -> tuple[int, ...]:
        of = with_design(method, seed=seed, length=length)
        examples = tokenize(
            of, "validation", BYTES, inputs_length=length, targets_length=8, cache_dir=tmp_path
        )
        return tuple(np.asarray(examples.inputs.flat).tolist())

    first = [ids(*kind) for kind in kinds]
    assert len(set(first)) == len(kinds) == len(list(tmp_path.iterdir()))
    assert [ids(*kind) for kind in kinds] == first
    assert len(list(tmp_path.iterdir())) == len(kinds)


def test_the_report_says_how_many_fit() -> None:
    def reported(method: PromptDesign, length: int) -> str:
        of = with_design(method, length=length)
        examples = tokenize(
            of, "validation", BYTES, inputs_length=length, targets_length=8, use_cache=False
        )
        return report(examples, shots=method.shots, seed=7)

    method = PromptDesign(shots=4, balance="as_drawn")
    assert reported(method, 1000).endswith("of seed 7: 4 in every input")
    assert "0 at least; all in 60.0 % of the inputs" in reported(method, 100)
    assert reported(method, 5).endswith("0 in every input (4 asked for)")


@pytest.mark.parametrize(
    "change",
    [
        {"shots": -1},
        {"query": "no column"},
        {"query": "{inputs} {targets}"},
        {"demonstration": "{inputs}"},
        {"demonstration": "{inputs} {targets"},
    ],
)
def test_a_design_that_makes_no_sense_names_its_field(change: dict[str, Any]) -> None:
    of = tiny_run.experiment("", {"method": PromptDesign(**change)})
    with pytest.raises(UserError, match=f"method.{next(iter(change))}") as error:
        validate(of)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("query", ["{inputs}", "Q: {inputs}\nA:"])
def test_the_end_of_the_query_is_never_cut(query: str) -> None:
    """A decoder-only model continues its input, which has no end of sequence."""
    of = dataclasses.replace(task(), inputs_ending="?")
    words = ByteVocabulary(token_ids=TokenIds(inputs_have_eos=False))
    examples = tokenize(
        with_design(PromptDesign(shots=0, query=query), length=20, of=of),
        "validation",
        words,
        inputs_length=20,
        targets_length=8,
        use_cache=False,
    )
    kept = len("?" + query.partition("{inputs}")[2])
    assert examples.inputs.kept_at_end == kept
    cut = words.decode(examples.inputs.padded(np.array([3]), 20)[0])
    assert len(cut) == 20 and cut.endswith(examples.texts[3]["inputs"][-kept:])
