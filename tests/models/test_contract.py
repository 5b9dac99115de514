"""What every family of models keeps to, and that nothing above the models needs to know which."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.distributed.sharding import RULES
from prompt_tuning_jax.inference.api import generate, score
from prompt_tuning_jax.inference.ensemble import score_labels
from prompt_tuning_jax.methods import (
    IA3,
    WARP,
    Context,
    DeepPrompts,
    DePT,
    FullTuning,
    LoRA,
    MethodConfig,
    MultitaskPrompts,
    PrefixTuning,
    PromptTuning,
    PTuning,
    attach_method,
)
from prompt_tuning_jax.models.base import Model, model_class
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.models.causal_lm.model import CausalLM
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.models.injections import Injections, KeyValues
from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.shapes import Row, Shapes, Targets
from tests.micro import ONE_LAYER, Trainer, Words, make_batch, make_t5, normal, token_rows
from tests.serving.serving_micro import made_prompt
from tests.tiny_t5gemma import CONFIGS, make_t5gemma, one_layer
from tests.toy_family import Toy, ToyConfig

SOURCE, TARGET = token_rows([5, 3, 7], 7), token_rows([4, 6, 2], 6, seed=1)
FAMILIES = ("t5", "causal", "t5gemma", "t5gemma2", "toy")
V, D, P = 64, 16, 3
# Ids that are no one else's: padding is a word's, and there are two ends.
TOY_IDS = TokenIds(pad=7, eos=1, start=5, more_eos=(9,))


@functools.cache
def made(family: str) -> Model:
    if family == "t5":
        return make_t5(ONE_LAYER, vocabulary=Words())
    sizes = {"vocab_size": V, "embed_dim": D, "num_heads": 2, "head_dim": 8, "mlp_dim": 32}
    if family == "causal":
        ids = TokenIds(pad=0, eos=1, start=-1)
        config = CausalLMConfig(
            **sizes,
            token_ids=ids,
            model_type="llama",
            num_layers=1,
            num_kv_heads=1,
            max_positions=64,
            query_scale=8**-0.5,
        )
        return CausalLM(config, rngs=nnx.Rngs(0), vocabulary=Words(ids))
    if family in CONFIGS:
        config = one_layer(CONFIGS[family])
        return make_t5gemma(config, vocabulary=Words(config.token_ids))
    return Toy(ToyConfig(**sizes, token_ids=TOY_IDS), rngs=nnx.Rngs(0), vocabulary=Words(TOY_IDS))


def tokens(model: Model, rows: Any) -> np.ndarray:
    """Rows as this model has them: those of the tests are padded with 0."""
    return np.where(np.asarray(rows) == 0, model.token_ids.fill, rows).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _write(graphdef: Any, params: Any, source: Any, target: Any, prompt: Any) -> jax.Array:
    model: Model = param_tree.merge(graphdef, params)
    logits: jax.Array = model.write(model.read(model.embed(source, prompt)), target)
    return logits


def written(model: Model, source: Any, target: Any, prompt: Any = None) -> np.ndarray:
    return np.asarray(_write(*param_tree.split(model), source, target, prompt))


@pytest.mark.parametrize("family", FAMILIES)
def test_its_config_describes_it(family: str) -> None:
    model = made(family)
    assert model_class(model.config) is type(model)
    stack = model.stacks[model.reading_stack]
    assert model.config.num_reading_layers == stack.num_layers
    params, axes = param_tree.split(model)[1], param_tree.logical_axes(model)
    for name, own in axes.items():
        assert len(own) == params[name].ndim and all(axis in RULES for axis in own), name
    assert model.embedding_table().shape == (V, D)
    assert repr(model).startswith(type(model).__name__)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_logit_depends_on_all_earlier_targets_and_no_later_one(family: str) -> None:
    model = made(family)
    source, target = tokens(model, SOURCE), tokens(model, token_rows([6] * 3, 6, seed=1))
    want = written(model, source, target)
    assert want.shape == (3, 6, V) and want.dtype == np.float32
    for position in range(6):
        changed = target.copy()
        changed[:, position] = 3 + (target[:, position] == 3)
        moved = np.abs(written(model, source, changed) - want).max(axis=(0, 2))
        np.testing.assert_array_equal(moved > 1e-5, np.arange(6) > position)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [None, (P, D), (3, P, D)], ids=["bare", "one prompt", "each"])
def test_step_by_step_it_writes_as_it_does_at_once(family: str, shape: Any) -> None:
    model = made(family)
    source, target = tokens(model, SOURCE), token_rows([6] * 3, 6, seed=1)
    prompt = None if shape is None else jnp.asarray(normal(*shape))

    @jax.jit
    def steps() -> jax.Array:
        # Caches longer than what is written: their empty end must stay hidden.
        context, caches = model.start_decoding(model.read(model.embed(source, prompt)), 9)
        before = jnp.pad(target[:, :-1], ((0, 0), (1, 0)), constant_values=model.token_ids.start)

        def step(caches: Any, at: Any) -> Any:
            logits_BV, caches = model.decode_step(at[1], at[0], caches, context)
            return caches, logits_BV

        return jax.lax.scan(step, caches, (jnp.arange(6), before.T))[1].swapaxes(0, 1)

    np.testing.assert_allclose(steps(), written(model, source, target, prompt), atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_depends_on_its_own_tokens_and_prompt_alone(family: str) -> None:
    model = made(family)
    source, target = tokens(model, SOURCE), tokens(model, TARGET)
    prompts = jnp.asarray(normal(3, P, D))
    want = written(model, source, target, prompts)
    longer = np.pad(source, ((0, 0), (0, 4)), constant_values=model.token_ids.fill)
    real = TARGET != 0
    np.testing.assert_allclose(written(model, longer, target, prompts)[real], want[real], atol=1e-5)
    for row in range(3):
        thrice = (np.repeat(rows[row : row + 1], 3, axis=0) for rows in (source, target, prompts))
        np.testing.assert_allclose(
            written(model, *thrice)[:, real[row]], want[[row] * 3][:, real[row]], atol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_word_embeddings_is_those_words(family: str) -> None:
    model = made(family)
    words = np.asarray([17, 40, 5], np.int32)
    in_front = np.concatenate([np.broadcast_to(words, (3, P)), SOURCE], axis=1)
    target = tokens(model, TARGET)
    prompt = model.embed_tokens(words)
    np.testing.assert_allclose(
        written(model, tokens(model, SOURCE), target, prompt),
        written(model, tokens(model, in_front), target),
        atol=2e-5,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_output_vectors_are_the_head(family: str) -> None:
    model = made(family)
    some = np.asarray([3, 60, 0])
    vectors = model.output_vectors(some)
    hidden = jnp.asarray(normal(2, vectors.shape[1]))
    np.testing.assert_allclose(hidden @ vectors.T, model.logits(hidden)[:, some], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stack_takes_the_keys_and_values_of_a_text(family: str) -> None:
    model = made(family)
    computed = jax.jit(model.keys_values_of)(jnp.asarray([3, 4, 5]))
    assert computed.keys() == model.stacks.keys()
    source, target = tokens(model, SOURCE), tokens(model, TARGET)
    bare = written(model, source, target)
    for name, stack in model.stacks.items():
        size = (stack.num_layers, 3, stack.num_kv_heads, stack.head_dim)
        assert [x.shape for x in computed[name]] == [size, size]
        own = zip(*computed[name], strict=True)
        prefix = tuple(KeyValues(key_BPGK=key[None], value_BPGK=value[None]) for key, value in own)
        injections = Injections(prefixes={name: prefix})
        moved = jax.jit(lambda i: model.run(source, target, injections=i))(injections) - bare
        assert np.abs(moved[TARGET != 0]).max(axis=-1).min() > 1e-4, name


# The toy, in everything that is built on models.
LABELS = ("ab", "cd ef", "gh")
METHODS: dict[str, MethodConfig] = {
    "prompt_tuning": PromptTuning(length=P, init="uniform"),
    "before_eos": PromptTuning(length=P, placement="before_eos", prompt_to_input=False),
    "lora": LoRA(rank=2, alpha=8, targets=("query|value|out",)),
    "ia3": IA3(outputs=("key|value",), inputs=("out",)),
    "multitask_prompts": MultitaskPrompts(length=P, rank=2, init="uniform"),
    "p_tuning": PTuning(length=2, hidden=4, template="{prompt} ab {input} {prompt:1}"),
    "dept": DePT(length=P, rank=2, max_length=4, alpha=2.0, init="uniform"),
    "deep_prompts": DeepPrompts(length=P, init="uniform"),
    "prefix_tuning": PrefixTuning(length=P, init="words"),
    "prefix_tuning_mlp": PrefixTuning(length=P, hidden=4),
    "warp": WARP(length=2),
    "full": FullTuning(),
}


def toy_batch(method: MethodConfig) -> dict[str, np.ndarray]:
    batch = make_batch(1, 8)
    if method.scores_labels:
        rows = [[*Words().encode(label), 1] for label in LABELS]
        rows = [[*row, *[0] * (4 - len(row))] for row in rows]
        batch["targets"] = np.asarray([[rows[i % 3] for i in range(8)]], np.int32)
    batch = {name: tokens(made("toy"), array) for name, array in batch.items()}
    if isinstance(method, MultitaskPrompts):
        batch["task_index"] = np.asarray([[0, 1] * 4], np.int32)
    return batch


@pytest.mark.parametrize("name", METHODS)
def test_the_toy_is_tuned_by_every_method(name: str) -> None:
    method, model = METHODS[name], made("toy")
    context = Context(labels=LABELS, vocabulary=model.vocabulary, num_tasks=2)
    optimizer = Optimizer(name="adamw", learning_rate=0.05, weight_decay=0.0)
    trainer = Trainer(method, optimizer, model=model, context=context, dropout=False)
    before = {path: np.asarray(array) for path, array in trainer.frozen.items()}
    losses = [float(m.loss_E[0]) for m in trainer.run([toy_batch(method)] * 12)]
    assert losses[-1] < losses[0] - 0.05
    for path, array in trainer.frozen.items():
        np.testing.assert_array_equal(array, before[path])
    if name == "lora":
        assert param_tree.count(trainer.state.trainable) == 3 * 2 * (D + D)


@pytest.mark.parametrize(
    "name", ["dept", "lora", "multitask_prompts", "p_tuning", "prefix_tuning_mlp"]
)
def test_the_toys_methods_are_kept_and_write(name: str) -> None:
    method, model = METHODS[name], made("toy")
    context = Context(labels=LABELS, vocabulary=model.vocabulary)
    attached = attach_method(model, method, key=jax.random.key(0), context=context)
    params = param_tree.split(attached)[1]
    param_tree.fill(
        attached,
        {n: p + 0.1 * normal(*p.shape) if method.trains(n) else p for n, p in params.items()},
    )
    kept = attached.for_inference()
    source, target = tokens(model, SOURCE), tokens(model, TARGET)
    want = jax.jit(lambda: attached(source, target))()
    np.testing.assert_allclose(jax.jit(lambda: kept(source, target))(), want, atol=1e-5)
    # What it writes is the most probable token behind what it wrote before.
    rows = [row[row >= 0].tolist() for row in source]
    first = generate(kept, rows, max_length=4, min_length=4).ids
    logits_BSV = np.array(jax.jit(lambda ids: kept(source, ids))(first))
    logits_BSV[:, :3, list(model.token_ids.all_eos)] = -np.inf
    np.testing.assert_array_equal(logits_BSV.argmax(axis=-1), first)


def test_the_toys_labels_are_ranked() -> None:
    model, prompt = made("toy"), normal(P, D, seed=3)
    attached = attach_method(
        model, METHODS["prompt_tuning"], key=jax.random.key(0), context=Context()
    )
    attached.method.prompt_PD.set_value(jnp.asarray(prompt))
    source = tokens(model, SOURCE)
    labels = [[*Words().encode(label), 1] for label in LABELS]
    labels_CS = tokens(model, [[*label, *[0] * (4 - len(label))] for label in labels])
    got = jax.jit(lambda: score_labels(attached, source, labels_CS))()
    rows = [row[row >= 0].tolist() for row in source]
    for c, label in enumerate(LABELS):
        logits = written(model, source, np.repeat(labels_CS[c][None], 3, axis=0), prompt)
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        want = sum(log_probs[:, s, token] for s, token in enumerate(labels[c]))
        np.testing.assert_allclose(got[:, c], want, atol=1e-4)
        np.testing.assert_allclose(score(model, rows, [label] * 3, prompt), want, atol=1e-4)


def test_the_toy_writes_greedily_in_beams_and_by_chance() -> None:
    model, prompt, length = made("toy"), normal(P, D, seed=4), 5
    ids = model.token_ids
    source = tokens(model, SOURCE)
    rows = [row[row >= 0].tolist() for row in source]
    want = np.full((3, length), ids.fill, np.int32)
    for s in range(length):
        want[:, s] = np.argmax(written(model, source, want, prompt)[:, s], axis=-1)
    ends = np.isin(want, ids.all_eos)
    want = np.where(np.cumsum(ends, axis=1) - ends > 0, ids.pad, want)
    greedy = generate(model, rows, prompt, max_length=length)
    np.testing.assert_array_equal(greedy.ids, want)
    assert greedy.texts == [model.vocabulary.decode(row) for row in want.tolist()]
    sampled = generate(model, rows, prompt, "sample", max_length=length, top_k=1)
    np.testing.assert_array_equal(sampled.ids, want)
    drawn = [
        generate(model, rows, prompt, "sample", max_length=length, temperature=5.0, seed=seed).ids
        for seed in (0, 0, 1)
    ]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()
    beams = generate(
        model, rows, prompt, "beam",
        max_length=length, num_beams=3, length_penalty=0.0, beam_rule="hf",
    )  # fmt: skip
    assert (beams.scores[:, 0] >= greedy.scores - 1e-4).all()
    for k in range(3):
        own = beams.ids[:, k]
        ends = np.isin(own, ids.all_eos)
        real = np.cumsum(ends, axis=1) - ends == 0
        logits = written(model, source, np.where(real, own, ids.fill), prompt)
        at = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), own[..., None], axis=-1)
        np.testing.assert_allclose(beams.scores[:, k], at[..., 0].sum(1, where=real), atol=1e-4)


def test_the_toy_is_served() -> None:
    """Rows side by side score and write what each does alone."""
    model = made("toy")
    shapes = Shapes(
        lengths=(8,),
        batch_sizes=(4,),
        prompt_lengths=(4,),
        targets=(Targets(number=2, length=3),),
        max_new_tokens=5,
        slots=4,
    )
    engine = Engine(model, shapes=shapes, cache_rows=4)
    engine.compile()
    inputs = [row[row != 0].tolist() for row in [*SOURCE, token_rows([4], 4, seed=8)[0]]]
    inputs[1][0] = model.token_ids.pad  # a word of the text has this id
    prompts = [None, *(made_prompt(length, seed=length) for length in (1, 3, 4))]
    labels = [(*Words().encode(label), 1) for label in LABELS]
    rows = [
        Row(ids=tuple(ids), prompt=prompt, targets=tuple(labels[: 1 + n % 2]), limit=5)
        for n, (ids, prompt) in enumerate(zip(inputs, prompts, strict=True))
    ]
    scored = engine.score(rows, engine.program_for("score", rows, 4))
    engine.prefill(rows, range(4), engine.program_for("generate", rows, 4))
    for _ in range(5):
        seen = engine.decode(dict(enumerate(rows)))
    for slot, (row, scores) in enumerate(zip(rows, scored, strict=True)):
        prompt_PD = None if row.prompt is None else row.prompt.prompt_PD
        alone = [score(model, [row.ids], [target], prompt_PD)[0] for target in row.targets]
        np.testing.assert_allclose(scores, alone, rtol=1e-5, atol=1e-5)
        own = generate(model, [row.ids], prompt_PD, max_length=5)
        length = int(seen.position_M[slot])
        assert seen.ids_MS[slot, :length].tolist() == own.ids[0, :length].tolist()
        assert length == 5 or own.ids[0, length - 1] in model.token_ids.all_eos
        assert seen.score_M[slot] == pytest.approx(own.scores[0], rel=1e-5, abs=1e-5)
