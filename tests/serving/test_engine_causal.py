"""A decoder-only model's prompts are held as keys and values; rows compute what each does alone."""

import functools
import random

import numpy as np
import pytest
from flax import nnx

from prompt_tuning_jax.inference.api import generate, score
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig, Positions
from prompt_tuning_jax.models.causal_lm.model import CausalLM
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.shapes import Row, Shapes, Targets
from tests.micro import Words
from tests.serving.serving_micro import made_prompt

EOS, V = 1, 64
# Few: each is compiled.
SHAPES = Shapes(
    lengths=(16,),
    batch_sizes=(4,),
    prompt_lengths=(7,),
    targets=(Targets(number=4, length=2),),
    max_new_tokens=6,
    slots=4,
    long_slots=4,
)


@functools.cache
def model_and_engine(positions: Positions) -> tuple[CausalLM, Engine]:
    config = CausalLMConfig(
        model_type="llama",
        vocab_size=V,
        embed_dim=16,
        num_heads=4,
        num_kv_heads=2 if positions == "rope" else 4,
        head_dim=4,
        mlp_dim=32,
        num_layers=2 if positions == "rope" else 1,
        max_positions=40,
        positions=positions,
        windows=(5, 0) if positions == "rope" else (),
        query_scale=0.5,
        tie_embeddings=True,
        token_ids=TokenIds(pad=0, eos=EOS, start=-1),
    )
    model = CausalLM(config, rngs=nnx.Rngs(0), vocabulary=Words())
    engine = Engine(model, shapes=SHAPES, cache_rows=6)
    engine.compile()
    return model, engine


def drawn_rows(number: int, *, seed: int, limit: int = 0) -> list[Row]:
    """Ragged in everything: inputs, prompts, targets; every fourth row has no prompt."""
    draw = random.Random(seed)
    return [
        Row(
            ids=tuple(draw.choices(range(V), k=draw.randint(1, 16))),
            prompt=made_prompt((0, 2, 7, 2)[one % 4], seed=100 * seed + one) if one % 4 else None,
            targets=tuple((*draw.choices(range(2, V), k=n % 2), EOS) for n in range(one % 4 + 1)),
            limit=limit,
        )
        for one in range(number)
    ]


@pytest.mark.parametrize("positions", ["rope", "learned", "alibi"])
def test_a_mixed_batch_scores_and_writes_what_each_row_does_alone(positions: Positions) -> None:
    model, engine = model_and_engine(positions)
    rows = drawn_rows(4, seed=1, limit=6)
    scored = engine.score(rows, engine.program_for("score", rows, 4))
    program = engine.program_for("generate", rows, 4)
    slots = engine.slots_for(program)
    engine.prefill(rows, slots, program)
    for _ in range(6):
        seen = engine.decode(dict(zip(slots, rows, strict=True)))
    for slot, row, scores in zip(slots, rows, scored, strict=True):
        prompt = None if row.prompt is None else row.prompt.prompt_PD
        alone = [score(model, [row.ids], [target], prompt)[0] for target in row.targets]
        np.testing.assert_allclose(scores, alone, rtol=1e-5, atol=1e-5)
        written = generate(model, [row.ids], prompt, max_length=6)
        length = int(seen.position_M[slot])
        assert seen.ids_MS[slot, :length].tolist() == written.ids[0, :length].tolist()
        assert length == 6 or written.ids[0, length - 1] == EOS
        assert seen.score_M[slot] == pytest.approx(written.scores[0], rel=1e-5, abs=1e-5)


def test_a_prompt_that_is_held_is_not_computed_again() -> None:
    _, engine = model_and_engine("rope")
    rows = drawn_rows(4, seed=2)
    for _ in range(2):
        misses = engine.cache.misses
        engine.score(rows, engine.program_for("score", rows, 4))
    assert engine.cache.misses == misses
    assert engine.cache.hits >= 3
