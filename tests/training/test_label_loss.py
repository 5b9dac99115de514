"""Losses over labels and the distance to a text: by hand, and in a run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.config.experiment import Data, Experiment, Optimizer, Training
from prompt_tuning_jax.config.methods import CPT, WARP, LoRA, MultitaskPrompts, PromptTuning
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import PROMPT, Context, TunedModel, attach_method
from prompt_tuning_jax.models.output_head import LazyLogits
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.training.build import label_loss_of
from prompt_tuning_jax.training.label_loss import LabelLoss, margin_losses, task_label_sets
from prompt_tuning_jax.training.run import train
from prompt_tuning_jax.training.wayward import squared_distance, wayward_regularizer
from tests import tiny_run
from tests.micro import EOS, ONE_LAYER, D, Words, make_t5, token_rows
from tests.tiny_vit import MICRO

SOURCE = token_rows([5, 3, 4, 6], 7)
LABELS = ((5, EOS), (7, 9, EOS), (8, 4, 6, EOS))
# The second, the first, none of the labels, and the third.
TARGETS = np.asarray([[7, 9, 1, 0], [5, 1, 0, 0], [5, 5, 1, 0], [8, 4, 6, 1]], np.int32)
CLASSES, TASKS = np.asarray([1, 0, -1, 2]), np.asarray([0, 0, 1, 1], np.int32)
TASK_LABELS = ((True, True, False), (True, True, True))


@pytest.fixture(scope="module")
def tuned() -> TunedModel:
    method = PromptTuning(length=3, init="sampled_vocabulary", init_population=0)
    context = Context(vocabulary=Words())
    return attach_method(make_t5(ONE_LAYER), method, key=jax.random.key(0), context=context)


@pytest.fixture(scope="module")
def log_probs(tuned: TunedModel) -> np.ndarray:
    """``[B, C, S]`` of the labels' tokens, from the logits of each."""
    found = np.zeros((4, 3, 4))
    logits_of = jax.jit(lambda targets_BS: tuned(SOURCE, targets_BS))
    for number, label in enumerate(LABELS):
        label_BS = np.tile(np.asarray([*label, *[0] * (4 - len(label))], np.int32), (4, 1))
        log_probs_BSV = np.asarray(jax.nn.log_softmax(logits_of(label_BS)))
        for position, token in enumerate(label):
            found[:, number, position] = log_probs_BSV[:, position, token]
    return found


CASES: list[tuple[dict[str, Any], bool]] = [
    ({"kind": "labels"}, True),
    ({"kind": "labels", "normalize_length": True}, False),
    ({"kind": "perceptron", "margin": 0.2, "normalize_length": True}, False),
    ({"kind": "hinge", "margin": 0.5}, True),
]


@pytest.mark.parametrize(("fields", "several_tasks"), CASES)
def test_sums_by_hand(
    tuned: TunedModel, log_probs: np.ndarray, fields: dict[str, Any], several_tasks: bool
) -> None:
    loss = LabelLoss(labels=LABELS, task_labels=TASK_LABELS if several_tasks else (), **fields)
    weights = np.asarray([2.0, 1.0, 3.0, 0.5], np.float32)
    batch = {"inputs": SOURCE, "targets": TARGETS, "example_weights": weights}
    batch |= {"task_index": TASKS} if several_tasks else {}
    z_loss = 1e-2 if loss.kind == "labels" else 0.0
    sums = jax.jit(lambda: loss.sums(tuned, batch, key=None, remat="none", z_loss=z_loss))()
    scores = log_probs.sum(axis=2)
    if loss.normalize_length:
        scores = scores / np.asarray([len(label) for label in LABELS])
    expected = right = 0.0
    for row, own in enumerate(CLASSES):
        if own < 0:
            continue
        valid = [c for c in range(3) if not several_tasks or TASK_LABELS[TASKS[row]][c]]
        each = scores[row, valid]
        best = each.max()
        if loss.kind == "labels":
            log_z = np.log(np.sum(np.exp(each)))
            value = log_z - scores[row, own] + z_loss * log_z**2
        else:
            if loss.kind == "hinge":
                best = max(scores[row, c] for c in valid if c != own)
            value = max(0.0, loss.margin + best - scores[row, own])
        expected += weights[row] * value
        right += scores[row, own] == each.max()
    np.testing.assert_allclose(sums.loss, expected, rtol=2e-5)
    assert (float(sums.tokens), float(sums.examples), float(sums.correct)) == (3.5, 3.0, right)


def test_margins_of_the_original() -> None:
    """In the original the best label may be the target's: the margin changes no gradient."""
    scores = jnp.asarray([[1.0, 3.0, 2.0], [4.0, 1.0, 0.0]])
    classes = jnp.asarray([2, 0])
    for kind, margin, want in (
        ("perceptron", 0.0, [1.0, 0.0]),
        ("perceptron", 0.2, [1.2, 0.2]),
        ("hinge", 0.0, [1.0, 0.0]),
        ("hinge", 3.5, [4.5, 0.5]),
    ):
        got = margin_losses(scores, classes, kind=kind, margin=margin)  # type: ignore[arg-type]
        np.testing.assert_allclose(got, want, rtol=1e-6)

    def slope(kind: Any, margin: float) -> np.ndarray:
        def summed(scores: jax.Array) -> jax.Array:
            return margin_losses(scores, classes, kind=kind, margin=margin).sum()

        return np.asarray(jax.grad(summed)(scores))

    np.testing.assert_array_equal(slope("perceptron", 0.2), slope("perceptron", 0.0))
    assert not np.array_equal(slope("hinge", 3.5), slope("perceptron", 0.2))


def test_the_distance_to_a_text(tuned: TunedModel) -> None:
    words, text = Words(), "one two three"
    graphdef, params = param_tree.split(tuned)
    experiment = Experiment(
        method=PromptTuning(length=3),
        training=Training(wayward_text=text, wayward_weight=0.25),
    )
    regularizer = wayward_regularizer(experiment, graphdef, words)
    assert regularizer is not None
    rows = np.asarray(tuned.model.embedding_table()[jnp.asarray(words.encode(text))])
    prompt = np.asarray(params[PROMPT])
    trainable, frozen = {PROMPT: params[PROMPT]}, {n: p for n, p in params.items() if n != PROMPT}
    want = 0.25 * np.sum((prompt - rows) ** 2) / 3
    np.testing.assert_allclose(regularizer(trainable, frozen), want, rtol=1e-5)
    slope = jax.grad(regularizer)(trainable, frozen)[PROMPT]
    np.testing.assert_allclose(slope, 0.25 * 2 / 3 * (prompt - rows), rtol=1e-4, atol=1e-6)
    assert wayward_regularizer(Experiment(), graphdef, words) is None
    longer = dataclasses.replace(experiment, method=PromptTuning(length=4))
    with pytest.raises(UserError, match=r"has 3 tokens, and the prompt 4 .* method\.length=3"):
        wayward_regularizer(longer, graphdef, words)
    with pytest.raises(UserError, match=r"set model\.vocabulary"):
        wayward_regularizer(experiment, graphdef, None)
    with pytest.raises(UserError, match=r"training\.wayward_text: this model reads images"):
        wayward_regularizer(experiment, graphdef, ClassVocabulary(MICRO))
    # The figure of squared_l2_distance: the mean over positions of squared lengths.
    np.testing.assert_allclose(squared_distance(jnp.ones((4, D)), jnp.zeros((4, D))), D)


def test_a_run_over_labels_beside_a_text(tmp_path: Path) -> None:
    text = "blue green red blue green"
    changes: dict[str, Any] = {
        "method": PromptTuning(length=5, init="uniform"),
        "optimizer": Optimizer(name="sgd", learning_rate=0.05, weight_decay=0.0),
        "training.loss": "labels",
        "training.wayward_text": text,
        "training.wayward_weight": 20.0,
        "training.steps": 4,
    }
    result = train(tiny_run.experiment(tmp_path / "run", changes), quiet=True)
    assert result.finished
    model = load_model(str(tiny_run.model_folder()))
    words: Any = model.vocabulary
    rows_PD = np.asarray(model.embedding_table()[jnp.asarray(words.encode(text))])
    start_PD = attach_method(
        model,
        changes["method"],
        key=jax.random.fold_in(jax.random.key(0), 0x9E3779B9),
        context=Context(),
    ).method.prompt_PD.get_value()
    # Each step takes the prompt 2 / 5 of the way; the labels pull far less.
    before, after = np.asarray(start_PD) - rows_PD, result.best_tuned[PROMPT][0] - rows_PD
    np.testing.assert_allclose(after, 0.6**4 * before, atol=0.1)
    assert np.abs(after - 0.6**4 * before).max() > 1e-6
    losses = [each["loss"][0] for each in tiny_run.measurements(tmp_path / "run") if "loss" in each]
    assert 0.5 < losses[0] < 2 * np.log(3)


INVALID: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"margin": 1.0}, {}, r"training\.margin applies to .* not tokens"),
    ({"normalize_length": True}, {}, r"training\.normalize_length applies to losses over"),
    ({"loss": "hinge", "z_loss": 0.1}, {}, r"training\.z_loss applies to cross entropy"),
    ({"loss": "labels"}, {"method": WARP()}, "WARP has a loss of its own"),
    ({"loss": "labels"}, {"method": CPT()}, "CPT has a loss of its own"),
    ({"wayward_text": "a"}, {"method": LoRA()}, "the method is LoRA"),
    ({"wayward_weight": -1.0}, {}, r"training\.wayward_weight is -1\.0; must be at least 0"),
    (
        {"loss": "labels"},
        {"data": Data(objectives=("prefix_lm",), train="texts")},
        r"data\.objectives trains on text",
    ),
]


@pytest.mark.parametrize(("training", "others", "message"), INVALID)
def test_combinations_that_are_none(
    training: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        validate(Experiment(training=Training(**training), **others))


def test_labels_that_are_unknown() -> None:
    experiment = Experiment(training=Training(loss="labels"), method=MultitaskPrompts())
    with pytest.raises(UserError, match=r"a task that is trained on has none; set data\.labels"):
        label_loss_of(experiment, Words(), [("a", "b"), ()])
    with pytest.raises(UserError, match="this model has no vocabulary"):
        label_loss_of(experiment, None, [("a", "b")])
    assert task_label_sets([("a", "b"), ("b",)], ("a", "b")) == ((True, True), (False, True))
    assert task_label_sets([("a", "b"), ("b", "a")], ("a", "b")) == ()


def test_the_encoder_and_the_decoder_drop_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one key, layers of the same shape would drop the same values in both."""
    seen: dict[str, Any] = {}

    def spy(name: str) -> None:
        real = getattr(T5, name)

        def method(self: T5, *args: Any, key: Any = None, **options: Any) -> Any:
            seen[name] = key
            return real(self, *args, key=key, **options)

        monkeypatch.setattr(T5, name, method)

    spy("read")
    spy("write_hidden")
    method = PromptTuning(length=3, init="uniform")
    dropped = make_t5(ONE_LAYER, dropout_rate=0.5)
    attached = attach_method(dropped, method, key=jax.random.key(0), context=Context())
    batch = {"inputs": SOURCE, "targets": TARGETS}
    loss = LabelLoss(labels=LABELS, kind="labels")
    loss.sums(attached, batch, key=jax.random.key(1), remat="none", z_loss=0.0)
    read, write = (np.asarray(jax.random.key_data(seen[name])) for name in ("read", "write_hidden"))
    assert not np.array_equal(read, write)


def test_labels_of_large_vocabularies_are_scored_in_parts(tuned: TunedModel) -> None:
    batch = {"inputs": SOURCE, "targets": TARGETS}
    loss = LabelLoss(labels=LABELS, kind="labels")

    def value(tuned: TunedModel) -> Any:
        return loss.sums(tuned, batch, key=None, remat="none", z_loss=0.0).loss

    def largest(logits_mb: float) -> tuple[int, float]:
        graphdef, params = param_tree.split(tuned)

        def of(params: Any) -> Any:
            again: TunedModel = param_tree.merge(graphdef, params)
            again.model.logits_mb = logits_mb
            return value(again)

        sizes = [
            output.aval.size
            for equation in jax.make_jaxpr(of)(params).eqns
            for output in equation.outvars
            if output.aval.shape[-1:] == (tuned.model.config.vocab_size,)
        ]
        return max(sizes, default=0), float(of(params))

    (whole, plain), (_, bounded) = largest(64), largest(1e-4)
    assert whole
    np.testing.assert_allclose(bounded, plain, rtol=1e-5)


def test_members_that_train_at_once_share_the_bound_of_the_logits(
    tuned: TunedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = []
    real = LazyLogits.statistics

    def statistics(self: LazyLogits, targets: Any) -> Any:
        copies.append(self.copies)
        return real(self, targets)

    monkeypatch.setattr(LazyLogits, "statistics", statistics)
    batch = {"inputs": SOURCE, "targets": TARGETS}
    loss = LabelLoss(labels=LABELS, kind="labels")
    loss.sums(tuned, batch, key=None, remat="none", z_loss=0.0, copies=5)
    assert copies == [5 * len(LABELS)]
