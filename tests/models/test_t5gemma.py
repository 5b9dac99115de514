"""T5Gemma and T5Gemma 2 against plain numpy, and which tokens see a prompt."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.parameters import parameter_shapes
from prompt_tuning_jax.config.experiment import Data, Experiment
from prompt_tuning_jax.config.experiment import Model as ModelFields
from prompt_tuning_jax.config.methods import DeepPrompts, LoRA, PrefixTuning, PromptTuning
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.api import generate
from prompt_tuning_jax.methods import Context, attach_method
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.causal_lm.config import Window
from prompt_tuning_jax.models.injections import Injections, KeyValues, LayerPrompt
from prompt_tuning_jax.models.quantization import quantize_modules
from prompt_tuning_jax.models.registry import preset
from prompt_tuning_jax.models.t5gemma.presets import PRESETS, SIZES
from prompt_tuning_jax.training.run import reach_warning
from tests.method_cases import CASES, LABELS, ONE_OF_EACH
from tests.micro import Words, make_batch, normal
from tests.tiny_t5gemma import (
    CONFIGS,
    EOI,
    D,
    make_t5gemma,
    one_layer,
    reference_logits,
    with_layers,
)

P = 3
INPUTS = np.asarray([[5, 9, 33, 7, 21, 50, 8, EOI, 4], [14, 3, 40, 0, 0, 0, 0, 0, 0]], np.int32)
TARGETS = np.asarray([[11, 40, 7, 22, 1], [6, 1, 0, 0, 0]], np.int32)
# The numbers of the hub's files: those of the encoder, the decoder, and their tables.
PUBLISHED = {
    "s-s": 312_517_632,
    "b-b": 591_490_560,
    "l-l": 1_241_761_792,
    "ml-ml": 2_200_345_344,
    "xl-xl": 3_766_980_608,
    "2b-2b": 5_596_853_760,
    "9b-2b": 12_292_375_296,
    "9b-9b": 20_333_401_088,
    # Without the encoder of images: 370 M, 1.7 B and 7 B by their announcement.
    "2-270m-270m": 368_424_832,
    "2-1b-1b": 1_697_783_168,
    "2-4b-4b": 7_089_112_576,
}


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: Any, params: Any, prompt: Any, inputs: Any, targets: Any) -> jax.Array:
    model: Model = param_tree.merge(graphdef, params)
    logits: jax.Array = model.write(model.read(model.embed(inputs, prompt)), targets)
    return logits


def logits_of(model: Model, prompt: Any = None) -> np.ndarray:
    return np.asarray(_logits(*param_tree.split(model), prompt, INPUTS, TARGETS))


@functools.partial(jax.jit, static_argnums=0)
def _encoded(graphdef: Any, params: Any, prompt: Any, injections: Injections) -> jax.Array:
    model: Model = param_tree.merge(graphdef, params)
    return model.read(model.embed(LONG, prompt), injections=injections).hidden_BUD


LONG = np.arange(3, 27, dtype=np.int32)[None]


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_numpy(kind: str) -> None:
    model, prompts = make_t5gemma(kind), jnp.asarray(normal(2, P, D, seed=2, scale=3.0))
    got = logits_of(model, prompts)
    for row in range(2):
        inputs, targets = (x[row][x[row] != 0] for x in (INPUTS, TARGETS))
        want = reference_logits(model, inputs, targets, prompts[row])
        np.testing.assert_allclose(got[row, : len(targets)], want, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_gradient_of_a_prompt_is_that_of_numpy(kind: str) -> None:
    model, prompt, along = make_t5gemma(kind), normal(P, D, seed=3), normal(P, D, seed=4)
    (inputs, targets), graphdef_params = (INPUTS[0], TARGETS[0]), param_tree.split(model)

    def loss(prompt: Any) -> jax.Array:
        logits_BSV = _logits(*graphdef_params, prompt, INPUTS, TARGETS)
        return jnp.sum(jax.nn.log_softmax(logits_BSV)[0, jnp.arange(5), targets])

    def by_hand(prompt: np.ndarray) -> float:
        logits = reference_logits(model, inputs, targets, prompt)
        chosen = logits[np.arange(5), targets] - np.log(np.exp(logits).sum(axis=1))
        return float(chosen.sum())

    got = float(jnp.sum(jax.grad(loss)(jnp.asarray(prompt)) * along))
    step = 1e-5 * along.astype(np.float64)
    want = (by_hand(prompt + step) - by_hand(prompt - step)) / 2e-5
    assert got == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_windows_of_the_encoder() -> None:
    windows = with_layers(CONFIGS["t5gemma"], encoder=(4, 0, 1)).encoder_windows()
    assert windows == (Window(back=4, ahead=3), Window(back=0, ahead=None), Window(back=1, ahead=0))
    centered = with_layers(CONFIGS["t5gemma2"], encoder=(4, 5, 1)).encoder_windows()
    assert centered == (Window(back=2, ahead=2), Window(back=3, ahead=2), Window(back=1, ahead=0))


def far_tokens(
    windows: tuple[int, ...], prompt: Any = None, injections: Injections | None = None
) -> np.ndarray:
    """The encoder's output at the 24 tokens behind a prompt."""
    model = make_t5gemma(with_layers(CONFIGS["t5gemma2"], encoder=windows))
    hidden = _encoded(*param_tree.split(model), prompt, injections or Injections())
    return np.asarray(hidden)[0, -LONG.shape[1] :]


def prefixes(layers: int, *, seed: int) -> Injections:
    stack = CONFIGS["t5gemma2"].encoder
    drawn = jnp.asarray(normal(layers, 2, 1, P, stack.num_kv_heads, stack.head_dim, seed=seed))
    return Injections(
        prefixes={"encoder": tuple(KeyValues(key_BPGK=k, value_BPGK=v) for k, v in drawn)}
    )


def test_the_warning_of_windows_is_right() -> None:
    """Far tokens do not see a prompt in local layers, and see prefixes in all of them."""
    first, second = (jnp.asarray(normal(P, D, seed=seed, scale=4.0)) for seed in (5, 6))
    # A window of 5 sees 3 positions back, the query's own included: 2 tokens see the prompt in the
    # first layer, and 2 more with each further layer.
    moved = np.abs(far_tokens((5, 5), first) - far_tokens((5, 5), second)).max(axis=1)
    assert (moved[:4] > 1e-4).all() and (moved[4:] == 0).all()
    with_prefixes = [far_tokens((5, 5), injections=prefixes(2, seed=seed)) for seed in (7, 8)]
    assert (np.abs(with_prefixes[0] - with_prefixes[1]).max(axis=1) > 1e-3).all()
    # With one global layer in three they see it there; a prompt of that layer's own is seen, too.
    mixed = (5, 0, 5)
    plain = [far_tokens(mixed, prompt) for prompt in (first, second)]
    by_prompt = np.abs(plain[0] - plain[1])[8:]
    assert (by_prompt.max(axis=1) > 1e-4).all()

    def deep(vectors: Any) -> np.ndarray:
        layers = (None, LayerPrompt(vectors_BPD=vectors[None]), None)
        return far_tokens(mixed, first, Injections(layer_prompts=layers))

    by_deep = np.abs(deep(first) - deep(second))[8:]
    assert (by_deep.max(axis=1) > 1e-4).all()


@pytest.mark.parametrize("before", [False, True])
def test_prefixes_before_the_sequence_obey_windows(before: bool) -> None:
    given = [prefixes(2, seed=seed).prefixes["encoder"] for seed in (7, 8)]
    outputs = [
        far_tokens(
            (5, 5),
            injections=Injections(
                prefixes={"encoder": tuple(dataclasses.replace(kv, before=before) for kv in layers)}
            ),
        )
        for layers in given
    ]
    moved = np.abs(outputs[0] - outputs[1]).max(axis=1)
    assert ((moved > 1e-5) == (np.arange(24) < (4 if before else 24))).all()


def test_training_says_where_windows_hide_the_prompt() -> None:
    config = preset("google/t5gemma-2-270m-270m")

    def said(method: Any, inputs_length: int, of: Any = config) -> list[str]:
        experiment = Experiment(
            method=method, data=Data(inputs_length=inputs_length), model=ModelFields()
        )
        return list(reach_warning(experiment, of))

    (line,) = said(PromptTuning(length=20), 512)
    assert line.startswith(
        "warning: 15 of the encoder's 18 layers see 256 positions back, and inputs have up to 512 "
        "tokens: those behind the first 255 see the prompt in the other 3 alone; "
    )
    assert "method=deep_prompts" in line and "method=prefix_tuning" in line
    assert "deep_prompts" not in said(DeepPrompts(length=20), 512)[0]
    assert len(said(PromptTuning(length=20), 256)) == 1
    assert not said(PromptTuning(length=20), 255)
    assert not said(PrefixTuning(length=20), 512)
    assert not said(LoRA(), 512)
    assert not said(PromptTuning(length=20), 512, preset("google/t5gemma-2b-2b-ul2"))


def test_prompts_of_words_are_in_the_scaled_space() -> None:
    for kind, config in CONFIGS.items():
        model = make_t5gemma(kind)
        ids = np.asarray([7, EOI, 3])
        np.testing.assert_allclose(
            model.embedding_table()[ids], model.embed_tokens(ids), rtol=1e-6, err_msg=kind
        )
        rows = model.token_embedder.table()[np.asarray([7])] * config.embedding_scale
        np.testing.assert_allclose(model.embedding_table()[7:8], rows, rtol=1e-6)
    eoi = make_t5gemma("t5gemma2").eoi_embedding.get_value()
    np.testing.assert_array_equal(make_t5gemma("t5gemma2").embed_tokens(np.asarray([EOI]))[0], eoi)


@pytest.mark.parametrize(
    ("kind", "names"),
    [("t5gemma2", ONE_OF_EACH), ("t5gemma", ("lora", "prefix_tuning", "adapters_houlsby"))],
)
def test_every_method_attaches_to_both_stacks(kind: str, names: tuple[str, ...]) -> None:
    """Traced, not compiled: which arrays train, and that there is a gradient of each."""
    config = one_layer(CONFIGS[kind])
    model = make_t5gemma(config, vocabulary=Words(config.token_ids))
    batch = {name: rows[0] for name, rows in make_batch(1).items()}
    lora: set[str] = set()
    for name in names:
        case = CASES[name]
        context = Context(labels=LABELS, vocabulary=model.vocabulary, num_tasks=2)
        attached = attach_method(model, case.method, key=jax.random.key(0), context=context)
        graphdef, params = param_tree.split(attached)
        trained = {key: p for key, p in params.items() if case.method.trains(key)}
        assert trained, name

        def loss(trained: Any, graphdef: Any = graphdef, params: Any = params) -> jax.Array:
            merged = param_tree.merge(graphdef, {**params, **trained})
            tasks = np.zeros(len(batch["inputs"]), np.int32)
            sums = merged.token_sums(batch["inputs"], batch["targets"], task_B=tasks)
            loss: jax.Array = sums.loss
            return loss

        assert jax.eval_shape(jax.grad(loss), trained).keys() == trained.keys()
        if name == "lora":
            lora = {key.split("/adapter")[0].removeprefix("model/") for key in trained}
    attentions = {
        "encoder/layers_0/self_attention": True,
        "decoder/layers_0/self_attention": True,
        "decoder/layers_0/encoder_decoder_attention": kind == "t5gemma",
    }
    for path, there in attentions.items():
        assert (f"{path}/query" in lora) == there


def test_int8_weights_change_little() -> None:
    model = make_t5gemma("t5gemma")
    want = logits_of(model)
    quantize_modules(model, "int8")
    assert "decoder_embedder/embedding_scale" in param_tree.split(model)[1]
    assert 1e-6 < np.abs(logits_of(model) - want)[TARGETS != 0].max() < 0.5


@pytest.mark.parametrize("size", PUBLISHED)
def test_presets_have_the_published_numbers_of_parameters(size: str) -> None:
    assert sum(map(math.prod, parameter_shapes(SIZES[size]).values())) == PUBLISHED[size]


def test_every_size_is_counted_and_has_its_names() -> None:
    assert PUBLISHED.keys() == SIZES.keys()
    assert preset("google/t5gemma-9b-2b-ul2-it") is SIZES["9b-2b"]
    assert len(PRESETS) == 8 * 4 + 3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_listed_parameters_are_the_models(kind: str, tied: bool) -> None:
    decoder = dataclasses.replace(CONFIGS[kind].decoder, tie_embeddings=tied)
    config = dataclasses.replace(CONFIGS[kind], decoder=decoder)
    shapes = {n: p.shape for n, p in param_tree.split(make_t5gemma(config))[1].items()}
    assert parameter_shapes(config) == shapes


def test_images_are_refused() -> None:
    model = make_t5gemma("t5gemma2", vocabulary=Words(CONFIGS["t5gemma2"].token_ids))
    with pytest.raises(UserError, match="61 stands for an image: images are not supported"):
        generate(model, [[5, 61, 4]], max_length=2)
    with pytest.raises(UserError, match="stands for an image: images are not supported"):
        model.vocabulary.encode_inputs(["words ;"])  # the second word has the id 61
