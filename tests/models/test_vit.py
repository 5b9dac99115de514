"""What a vision transformer does beside its recorded numbers, and what its methods train."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.experiment import Optimizer
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import (
    CPT,
    IA3,
    WARP,
    Adapters,
    ADePT,
    Context,
    DeepPrompts,
    DePT,
    FullTuning,
    LoRA,
    MethodConfig,
    MultitaskPrompts,
    PatternTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    ResidualPrompt,
    SuperPosPrompt,
    attach_method,
)
from prompt_tuning_jax.models.quantization import quantize_modules
from prompt_tuning_jax.models.vit.config import ImageProcessing
from tests.micro import Trainer
from tests.tiny_vit import LABELS, MICRO, make_vit, pixels

D, F, L, C = MICRO.embed_dim, MICRO.mlp_dim, MICRO.num_layers, 2
HEAD = D * C + C  # of two new classes
NEW = Context(labels=("cat", "dog"))
NORMS, BIASES = (2 * L + 1) * D, (L * (4 * D + F + D + 2 * D)) + 2 * D
METHODS: dict[str, tuple[MethodConfig, int]] = {
    "shallow": (PromptTuning(length=3, init="xavier_uniform", dropout=0.3), 3 * D),
    "deep": (DeepPrompts(length=3, init="uniform", dropout=0.3), L * 3 * D),
    "prefix": (PrefixTuning(length=3, init="uniform"), L * 2 * 3 * D),
    "probe": (PatternTuning(patterns=("classifier/.*",)), 0),
    "biases": (PatternTuning(patterns=(".*/bias",)), BIASES),
    "lora": (LoRA(rank=2, alpha=4), L * 2 * 2 * (D + D)),
    "ia3": (IA3(), L * (2 * D + F)),
    "adapters": (Adapters(width=2), L * 2 * (2 * 2 * D + 2 + D)),
}


def attach(method: MethodConfig, **kwargs: Any) -> Any:
    return attach_method(make_vit(**kwargs), method, key=jax.random.key(0), context=NEW)


def logits(attached: Any, images: Any) -> np.ndarray:
    graphdef, params = param_tree.split(attached)
    run = jax.jit(lambda p, x: param_tree.merge(graphdef, p)(x, jnp.zeros((len(x), 1), jnp.int32)))
    return np.asarray(run(params, images))[:, 0]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_its_arrays_and_a_new_classifier(name: str) -> None:
    method, own = METHODS[name]
    params = param_tree.split(attach(method))[1]
    trained = {path: array for path, array in params.items() if method.trains(path)}
    assert param_tree.count(trained) == own + HEAD
    assert trained["model/classifier/kernel"].shape == (D, C)


def test_training_lowers_the_loss_and_keeps_the_frozen_weights() -> None:
    method, images = METHODS["deep"][0], pixels(8)
    targets = (images[:, :1] > 127).astype(np.int32)
    batch = {"inputs": images[None], "targets": targets[None]}
    trainer = Trainer(
        method,
        Optimizer(name="sgd", learning_rate=0.3, momentum=0.9, weight_decay=0.0),
        model=make_vit(),
        context=NEW,
        dropout=method.uses_rng(),
    )
    before = {path: np.asarray(array) for path, array in trainer.frozen.items()}
    losses = [float(metrics.loss_E[0]) for metrics in trainer.run([batch] * 20)]
    assert losses[-1] < 0.97 * losses[0]
    for path, array in trainer.frozen.items():
        np.testing.assert_array_equal(array, before[path])


def test_a_row_depends_on_its_own_image_alone() -> None:
    attached = attach(METHODS["deep"][0])
    images = pixels(3)
    want = logits(attached, images)
    other = np.concatenate([images[:1], pixels(2, seed=9)])
    np.testing.assert_allclose(logits(attached, other)[0], want[0], atol=1e-5)
    assert np.abs(logits(attached, other)[1:] - want[1:]).max() > 1e-3


def test_pixels_are_rescaled_and_normalised_as_the_config_says() -> None:
    processing = ImageProcessing(rescale=0.01, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    model = make_vit(replace(MICRO, processing=processing))
    images = pixels(2).reshape(2, 8, 8, 3)
    normal = (images * 0.01 - np.asarray(processing.mean)) / np.asarray(processing.std)
    for given in (images, images.reshape(2, -1)):
        np.testing.assert_allclose(
            model.embed(given).embeddings_BUD,
            model.embed(normal.astype(np.float32)).embeddings_BUD,
            atol=1e-5,
        )
    with pytest.raises(UserError, match=r"an image of this model is \[8, 8, 3\].* got \[7, 8, 3\]"):
        model.embed(images[:, 1:])


def test_the_same_labels_keep_the_classifier_and_others_make_a_new_one() -> None:
    model = make_vit()
    kept = model.for_labels(LABELS, key=jax.random.key(1))
    want = model.classifier.kernel.get_value()
    np.testing.assert_array_equal(kept.classifier.kernel.get_value(), want)
    swapped = model.for_labels(LABELS[::-1], key=jax.random.key(1))
    assert np.abs(swapped.classifier.kernel.get_value() - want).min() > 1e-6
    assert swapped.config.labels == LABELS[::-1] and model.config.labels == LABELS


def test_dropout_of_a_prompt_differs_between_rows_and_ends_with_training() -> None:
    attached = attach(METHODS["shallow"][0])
    images = pixels(2)

    def prompts(key: Any) -> np.ndarray:
        return np.asarray(attached.injections(images, key=key).model_input.prompt_BPD)

    dropped = prompts(jax.random.key(0))
    assert dropped.shape == (2, 3, D)
    zeros = (dropped == 0).mean()
    assert 0.1 < zeros < 0.5 and (dropped[0] != dropped[1]).any()
    assert prompts(None).shape == (1, 3, D) and (prompts(None) != 0).all()
    assert not attached.for_inference().method.config.uses_rng()


def test_a_classifier_beside_quantised_weights_trains_as_floats() -> None:
    model = make_vit()
    quantize_modules(model, "int8")
    method = METHODS["shallow"][0]
    attached = attach_method(model, method, key=jax.random.key(0), context=Context(labels=LABELS))
    params = param_tree.split(attached)[1]
    assert params["model/classifier/kernel"].dtype == np.float32
    kernel = make_vit().classifier.kernel.get_value()
    np.testing.assert_allclose(params["model/classifier/kernel"], kernel, atol=0.01)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (PromptTuning(), "method.init=class_labels takes words"),
        (PromptTuning(init="uniform", placement="before_eos"), "method.placement is before_eos"),
        (PromptTuning(init="uniform", prompt_to_prompt="causal"), "prompt_to_prompt is causal"),
        (DeepPrompts(), "method.init=sampled_vocabulary takes words"),
        (PrefixTuning(), "method.init=words takes words"),
        (WARP(), "method=warp works with words"),
        (CPT(), "method=cpt works with words"),
        (PTuning(), "method=p_tuning works with words"),
        (DePT(), "method=dept works with words"),
        (ADePT(), "method=adept works with words"),
        (ResidualPrompt(), "method=residual_prompt works with words"),
        (SuperPosPrompt(), "method=superpos_prompt works with words"),
        (MultitaskPrompts(), "method=multitask_prompts works with words"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, MethodConfig) else "",
)
def test_what_is_about_words_is_refused(method: MethodConfig, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        attach(method)
    assert "\n" not in str(error.value)


def test_what_a_model_of_images_does_not_have_is_an_error_of_one_line() -> None:
    model = make_vit()
    for lacking in (
        lambda: model.embed_tokens(np.zeros(1, np.int32)),
        model.embedding_table,
        lambda: model.keys_values_of(jnp.zeros(1, jnp.int32)),
        lambda: model.start_decoding(None, 1),
    ):
        with pytest.raises(UserError, match="this model reads images"):
            lacking()
    headless = make_vit(replace(MICRO, labels=(), vocab_size=0))
    with pytest.raises(UserError, match="no classifier"):
        headless.logits(jnp.zeros((1, D)))
    with pytest.raises(UserError, match=r"set data\.labels"):
        attach_method(headless, FullTuning(), key=jax.random.key(0), context=Context())
