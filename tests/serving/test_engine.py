"""Rows of any mix compute what each computes alone."""

import functools
import random
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.methods import PLACEMENTS
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.decoding import LogitsProcessors
from prompt_tuning_jax.inference.ensemble import DecodeConfig, label_scores, write
from prompt_tuning_jax.methods import PROMPT, Context, NoTuning, PromptTuning, attach_method
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.shapes import (
    DecodeProgram,
    Program,
    Row,
    Shapes,
    Targets,
    targets_of,
)
from tests.serving.serving_micro import SHAPES, made_prompt, micro_engine, micro_model

V = 90
# Rows side by side, each with its own.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 1, "min_length": 5},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 0.5},
]


def drawn_rows(number: int, *, seed: int = 0, limit: int = 0) -> list[Row]:
    """Ragged in everything: inputs, prompts and their placement, targets; some are bare."""
    draw = random.Random(seed)
    rows = []
    for one in range(number):
        length = draw.randint(1, 16)
        ids = (*draw.choices(range(3, V), k=length - 1), 1)
        prompt = None
        if one % 4:  # few lengths, since each is compiled once more for a row alone
            prompt = made_prompt(
                (0, 2, 7, 3)[one % 4], seed=100 * seed + one, placement=one % 4 - 1
            )
        targets = [
            (*draw.choices(range(3, V), k=draw.randint(0, 1)), 1) for _ in range(one % 4 + 1)
        ]
        rows.append(Row(ids=ids, prompt=prompt, targets=tuple(targets), limit=limit))
    return rows


@functools.cache
def _structure(placement: str | None) -> tuple[object, dict, dict]:  # type: ignore[type-arg]
    model = micro_model()
    if placement is None:
        attached = attach_method(model, NoTuning(), key=jax.random.key(0), context=Context())
    else:
        method = PromptTuning(placement=placement)  # type: ignore[arg-type]
        attached = with_prompt(model, np.zeros((1, 16), np.float32), method)
    graphdef, params = param_tree.split(attached)
    return graphdef, *param_tree.partition(params, {name: name == PROMPT for name in params})


def alone(row: Row) -> tuple[object, dict, dict, np.ndarray]:  # type: ignore[type-arg]
    placement = None if row.prompt is None else PLACEMENTS[row.prompt.placement]
    graphdef, trainable, frozen = _structure(placement)
    if row.prompt is not None:
        trainable = {PROMPT: row.prompt.prompt_PD[None]}
    tokens_1T = np.zeros((1, 16), np.int32)
    tokens_1T[0, : len(row.ids)] = row.ids
    return graphdef, trainable, frozen, tokens_1T


def score_alone(row: Row) -> list[float]:
    labels_CS = np.zeros((4, 2), np.int32)
    labels_CS[:, 0] = 1
    for label_S, ids in zip(labels_CS, row.targets, strict=False):
        label_S[: len(ids)] = ids
    graphdef, trainable, frozen, tokens_BT = alone(row)
    found = label_scores(graphdef, trainable, frozen, tokens_BT, labels_CS, 1)  # type: ignore[arg-type]
    scores: list[float] = np.asarray(found)[0, 0].tolist()
    return scores[: len(row.targets)]


def write_alone(row: Row) -> tuple[list[int], float]:
    graphdef, trainable, frozen, tokens_BT = alone(row)
    writing = DecodeConfig(max_length=6)
    processors = LogitsProcessors(
        min_length=jnp.int32(row.min_length),
        repetition_penalty=jnp.float32(row.repetition_penalty),
        no_repeat_ngram_size=jnp.int32(row.no_repeat_ngram_size),
    )
    key = jax.random.key(0)
    ids, scores = write(  # type: ignore[call-overload]
        graphdef, writing, trainable, frozen, tokens_BT, key, None, None, processors
    )
    return [int(i) for i in np.asarray(ids)[0, 0]], float(np.asarray(scores)[0, 0])


def test_a_mixed_batch_scores_what_each_row_scores_alone() -> None:
    engine = micro_engine()
    rows = drawn_rows(8, seed=1)
    for batch in (rows[:4], rows[4:7], rows[7:]):
        program = engine.program_for("score", batch, 4)
        for row, scores in zip(batch, engine.score(batch, program), strict=True):
            np.testing.assert_allclose(scores, score_alone(row), rtol=1e-5, atol=1e-5)


def test_rows_are_independent_of_their_neighbors_and_shapes() -> None:
    engine = micro_engine()
    row, *others = drawn_rows(4, seed=2)
    row = Row(ids=row.ids[:6], prompt=made_prompt(2), targets=row.targets)
    found = [
        engine.score(
            batch,
            Program(
                kind="score",
                length=length,
                rows=rows,
                prompt_length=prompt_length,
                targets=Targets(number=4, length=2),
            ),
        )[0]
        for batch, length, rows, prompt_length in (
            ([row], 8, 1, 3),
            ([row], 16, 4, 7),
            ([row, *others], 16, 4, 7),
        )
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5, atol=1e-5)


def test_rows_that_enter_while_others_are_written_write_what_they_write_alone() -> None:
    engine = micro_engine()
    rows = [
        Row(
            ids=row.ids,
            prompt=row.prompt,
            limit=6 if number % 3 else 1 + number % 5,
            **OPTIONS[number % len(OPTIONS)],
        )
        for number, row in enumerate(sorted(drawn_rows(11, seed=3), key=lambda row: len(row.ids)))
    ]
    written: dict[int, tuple[list[int], float]] = {}
    waiting, slots, widths = list(range(len(rows))), dict[int, int](), set[int]()
    for _ in range(30):
        if waiting:  # three that are next to each other, in slots of their width
            program = engine.program_for("generate", [rows[number] for number in waiting[:3]], 4)
            free = [slot for slot in engine.slots_for(program) if slot not in slots]
            now, waiting = waiting[: min(len(free), 3)], waiting[min(len(free), 3) :]
            engine.prefill([rows[number] for number in now], free[: len(now)], program)
            widths |= {program.length} if now else set()
            slots.update(zip(free, now, strict=False))
        if not slots:
            break
        seen = engine.decode({slot: rows[number] for slot, number in slots.items()})
        for slot, number in list(slots.items()):
            if seen.done_M[slot]:
                length = int(seen.position_M[slot])
                ids = seen.ids_MS[slot][:length].tolist()
                written[number] = ids, float(seen.score_M[slot])
                del slots[slot]
    assert len(written) == len(rows) and widths == {8, 16}
    for number, row in enumerate(rows):
        ids, score = write_alone(row)
        own_ids, own_score = written[number]
        assert own_ids + [0] * (row.limit - len(own_ids)) == ids[: row.limit]
        if row.limit == 6:
            assert own_score == pytest.approx(score, rel=1e-5, abs=1e-5)


def test_slots_of_two_widths_write_what_those_of_one_width_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A long row beside short ones; the positions that each step attends to are fewer."""
    engine = micro_engine()
    rows = [Row(ids=(*range(3, 3 + n), 1), prompt=made_prompt(2), limit=6) for n in (2, 5, 7, 14)]
    usable, positions = engine._usable_decode, list[int]()

    def counted(program: DecodeProgram) -> DecodeProgram:
        found = usable(program)
        positions.append(found.slots * found.width)
        return found

    monkeypatch.setattr(engine, "_usable_decode", counted)

    def written(length: int) -> list[tuple[list[int], float]]:
        """In slots that are at least this long, and how many positions a step has."""
        engine.reset()
        positions.clear()
        decoding: dict[int, Row] = {}
        for row in rows:
            program = engine.program_for("generate", [row], 1)
            program = replace(program, length=max(length, program.length))
            slot = next(slot for slot in engine.slots_for(program) if slot not in decoding)
            engine.prefill([row], [slot], program)
            decoding[slot] = row
        first = engine.decode(decoding)
        seen = engine.decode(decoding)
        assert (first.position_M[[*decoding]] == 4).all() and seen.done_M.all()
        return [(seen.ids_MS[slot].tolist(), float(seen.score_M[slot])) for slot in decoding]

    one = written(16)
    assert positions == [4 * 19] * 2
    two = written(8)
    assert positions == [4 * 11, 19] * 2
    for (ids, score), (expected_ids, expected) in zip(two, one, strict=True):
        assert ids == expected_ids
        assert score == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_slot_that_is_given_up_is_free_at_once() -> None:
    engine = micro_engine()
    engine.reset()
    rows = [Row(ids=(5, 1), limit=6), Row(ids=(6, 1), limit=6)]
    engine.prefill(rows, [0, 2], engine.program_for("generate", rows, 4))
    seen = engine.decode({2: rows[1]})
    assert seen.position_M[0] == 0 and seen.position_M[2] > 0
    engine.prefill(rows[:1], [0], engine.program_for("generate", rows[:1], 1))
    seen = engine.decode({0: rows[0], 2: rows[1]})
    assert 0 < seen.position_M[0] < seen.position_M[2]


def test_nothing_is_compiled_after_the_start() -> None:
    jax.clear_caches()  # what earlier tests have compiled proves nothing
    engine = Engine(micro_model(), shapes=SHAPES, cache_rows=6)
    engine.compile()
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    try:
        for seed in range(3):
            rows = drawn_rows(4, seed=10 + seed)
            engine.score(rows, engine.program_for("score", rows, 4))
            engine.nearest_words(made_prompt(seed + 1))
        assert not compiled
    finally:
        jax.monitoring.clear_event_listeners()


def test_more_prompts_than_the_device_holds() -> None:
    engine = micro_engine()
    engine.reset()
    prompts = [made_prompt(3, seed=seed) for seed in range(9)]
    rows = [Row(ids=(7, 8, 1), prompt=prompt, targets=((9, 1),)) for prompt in prompts]
    program = engine.program_for("score", rows[:4], 4)
    expected = [score_alone(row)[0] for row in rows]
    hits, misses = engine.cache.hits, engine.cache.misses
    for turn in ((0, 1, 2, 3), (0, 1, 2, 3), (4, 5, 0, 6), (8, 7, 6, 0), (1, 1, 1, 8)):
        found = engine.score([rows[i] for i in turn], program)
        np.testing.assert_allclose(
            [scores[0] for scores in found], [expected[i] for i in turn], rtol=1e-5, atol=1e-5
        )
    # 0, 6 and 8 are still there: they were used last; of the third and fifth turn 1 is gone.
    assert (engine.cache.hits - hits, engine.cache.misses - misses) == (8, 10)


def test_the_batch_size_is_the_one_that_answers_most() -> None:
    engine = micro_engine()
    rows = drawn_rows(2, seed=4)
    program = engine.program_for("score", rows, 4)
    for seconds, expected in (((1.0, 1.5), 4), ((1.0, 3.0), 1)):
        measured = dict(engine.seconds)
        for size, value in zip((1, 4), seconds, strict=True):
            key = next(p for p in measured if p == _sized(program, size))
            engine.seconds[key] = value
        assert engine.rows_at_once(program, 2) == expected
        engine.seconds = measured


def _sized(program: Program, rows: int) -> Program:
    return Program(**{**vars(program), "rows": rows})


def test_shapes_for_labels_and_prompts() -> None:
    assert targets_of([], longest=64) == (
        Targets(number=2, length=2),
        Targets(number=1, length=64),
    )
    labels = [[[1] * 3] * 6, [[1] * 70] * 3]
    assert targets_of(labels, longest=64)[0] == Targets(number=8, length=4)
    with pytest.raises(UserError, match="lengths is 8,4"):
        Shapes(lengths=(8, 4))


def test_a_model_without_words_is_refused() -> None:
    from tests.micro import make_t5

    with pytest.raises(UserError, match="vocabulary"):
        Engine(make_t5(), shapes=SHAPES, cache_rows=6)
