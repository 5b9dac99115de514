"""The frozen model of a launch: checkpoint, dtypes, loss and decoding."""

import re
from typing import Any

from prompt_tuning_jax.config.gin_syntax import Reference
from prompt_tuning_jax.config.paths import T5X_MODELS
from prompt_tuning_jax.config.t5x.launch import Value
from prompt_tuning_jax.config.t5x.translation import Translation, number, text
from prompt_tuning_jax.errors import UserError

FLAXFORMER = "flaxformer.components."
ATTENTION = "dense_attention.MultiHeadDotProductAttention"
_ENCODER_DECODER = "t5x.models.EncoderDecoderModel"
_WAYWARD_MODULE = "prompt_tuning.extended.train.wayward."
_WAYWARD = "WaywardPromptEncoderDecoderModel"
# The models of the original with a loss over labels, and what it is called here.
_LABEL_LOSSES = {
    "CrossEntropyEncoderDecoderModel": "labels",
    "PerceptronLossEncoderDecoderModel": "perceptron",
}
_LOSS_MODELS = (_WAYWARD, *_LABEL_LOSSES)
_NORMALIZERS = {"NUM_REAL_TARGET_TOKENS": "tokens"}
_STEP = re.compile(r".*checkpoint_(\d+)/*", re.DOTALL)
_VOCABULARY = Reference((), "seqio.SentencePieceVocabulary", True)
_T5_VOCABULARY = "cc_all.32000.100extra"
# Where the dropout of flaxformer's network is bound.
_DROPOUT = (
    (Reference(("dropout_factory",), "flax.linen.Dropout", True), "rate"),
    (Reference((), f"{FLAXFORMER}attention.{ATTENTION}", True), "dropout_rate"),
    (Reference((), f"{FLAXFORMER}dense.MlpBlock", True), "intermediate_dropout_rate"),
)
# Width, heads and layers of T5 1.1, by the name of its size here.
_SIZES = {
    (512, 6, 8): "small",
    (768, 12, 12): "base",
    (1024, 16, 24): "large",
    (2048, 32, 24): "xl",
    (4096, 64, 24): "xxl",
}
# Parameters whose checkpoint has no value: a launch maps their names to None.
_ADDED = re.compile(r".*(prompt|ia3_scaling).*", re.DOTALL)


def translate_checkpoint(
    t: Translation, restore: Reference | None, *, step: int | None, is_launch: bool
) -> int:
    """Translates what is restored; returns the step from which the launch counts."""
    path = t.get(restore, "path", "model.name_or_path")
    address = _address(path)
    if path is None:
        if is_launch:
            t.set("model.name_or_path", "", default="no checkpoint is given")
    elif not address:
        _random_weights(t, path)
    else:
        _restored(t, path, address)
    t.expect(
        restore,
        *("mode", "specific", "latest"),
        same="a folder stands for its last checkpoint",
        lost="one checkpoint is read, the last of a folder",
    )
    for name in ("strict", "fallback_to_scratch"):
        t.same_here(t.get(restore, name), "what a method adds is not read from the checkpoint")
    if assignments := t.get(restore, "assignment_map"):
        pairs = assignments.value or ()
        pairs = pairs if isinstance(pairs, list | tuple) else [pairs]
        if all(map(_is_added, pairs)):
            t.same_here(assignments, "what a method adds is not read from the checkpoint")
        else:
            t.lost(assignments, "parameters are read by T5X's names")
    if (dtype := t.get(restore, "dtype")) and dtype.value in ("float32", "bfloat16"):
        t.set("model.param_dtype", dtype.value, dtype)
    elif dtype and dtype.value is not None:
        t.lost(dtype, "weights are float32 or bfloat16")
    return _step_of(t, path, address, step)


def translate_model(t: Translation, model: Value | None) -> Reference | None:
    """Translates the loss and the decoding; returns the reference to the network."""
    if model is None:  # a file of decoding options alone
        if t.launch.binds(_ENCODER_DECODER):
            _decoding(t, Reference((), _ENCODER_DECODER, True))
        return None
    reference = model.value if isinstance(model.value, Reference) else None
    kind = reference.name.rpartition(".")[2] if reference else ""
    if reference is None or (reference.name != _ENCODER_DECODER and kind not in _LOSS_MODELS):
        t.lost(model, "models of T5X are read as encoder-decoders only")
        return None
    _loss(t, reference, kind)
    _vocabulary(t, reference)
    if kind in _LABEL_LOSSES:
        _label_loss(t, model, reference, _LABEL_LOSSES[kind])
    else:
        _decoding(t, reference)
    if kind == _WAYWARD:
        _wayward(t, reference)
    return t.launch.reference(reference, "module")


def translate_dropout(t: Translation, config: Reference | None, dtype: Value | None) -> None:
    """Translates the network's dropout and its dtype; T5X's own networks have a ``config``."""
    places = _DROPOUT if config is None else ((config, "dropout_rate"),)
    rates = [t.get(reference, parameter) for reference, parameter in places]
    # Files without a network define the macro for others.
    rates = [rate for rate in rates if rate] or [t.launch.macro("DROPOUT_RATE")]
    given = [rate for rate in rates if rate and not rate.is_missing]
    if given:
        t.set("model.dropout_rate", float(number(given[0])), given[0])
    for other in given[1:]:
        if other.value != given[0].value:
            t.lost(other, f"one rate is used everywhere, {given[0]}")
    if dtype and dtype.value in ("float32", "bfloat16"):
        t.set("model.dtype", dtype.value, dtype)
    elif dtype:
        t.lost(dtype, "the computation is in float32 or bfloat16")


def _is_added(pair: Any) -> bool:
    """Returns whether an entry of an assignment map leaves out what a method adds to the model."""
    return bool(
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and pair[1] is None
        and _ADDED.fullmatch(str(pair[0]))
    )


def _address(path: Value | None) -> str:
    """Returns the checkpoint's path; empty for none."""
    if path is None or path.value in (None, [], (), ""):
        return ""
    if isinstance(path.value, list | tuple) and len(path.value) == 1:
        return str(path.value[0])
    return text(path)


def _restored(t: Translation, path: Value, address: str) -> None:
    named = {where.rstrip("/"): name for name, where in T5X_MODELS.items()}
    t.set("model.name_or_path", named.get(address.rstrip("/"), address), path)
    vocabulary = t.get(_VOCABULARY, "sentencepiece_model_file")
    byte_level = t.launch.refers_to("seqio.ByteVocabulary")
    if byte_level:
        t.set("model.vocabulary", "bytes", default="seqio.ByteVocabulary")
    elif vocabulary and address.rstrip("/") in named and _T5_VOCABULARY in text(vocabulary):
        t.same_here(vocabulary, "the model's vocabulary")
    elif vocabulary and "://" in text(vocabulary):
        remark = "the vocabulary must be a file on this machine; copy it, and set model.vocabulary"
        t.set("model.vocabulary", text(vocabulary).rpartition("/")[2], vocabulary, remark=remark)
    elif vocabulary:
        t.set("model.vocabulary", text(vocabulary), vocabulary)


def _random_weights(t: Translation, path: Value) -> None:
    t.set("model.random_weights", True, path)
    dims = [t.launch.macro(name) for name in ("EMBED_DIM", "NUM_HEADS", "NUM_ENCODER_LAYERS")]
    config = Reference((), "t5x.examples.t5.network.T5Config", True)
    given = [t.get(config, name) for name in ("emb_dim", "num_heads", "num_encoder_layers")]
    sizes = tuple(v.value if v else None for v in (given if all(given) else dims))
    name = next((name for size, name in _SIZES.items() if size == sizes), None)
    if name is None:
        t.set(
            *("model.name_or_path", "", path),
            remark=f"no size here has width, heads and layers {sizes}; name one",
        )
    else:
        t.set("model.name_or_path", name, path)


def _step_of(t: Translation, path: Value | None, address: str, step: int | None) -> int:
    if step is not None:
        return step
    if not address:
        return 0
    if match := _STEP.fullmatch(address):
        return int(match[1])
    t.lost(path, "its name does not tell its step, and steps count from it; give --restored_step")
    return 0


def _label_loss(t: Translation, source: Value, model: Reference, loss: str) -> None:
    """A loss over labels, and their ranking, which replaces decoding there."""
    t.set("training.loss", loss, source)
    t.set("evaluation.strategy", "rank", default="labels are ranked there")
    normalize = t.get(model, "length_normalize")
    if normalize and normalize.value:
        t.set("training.normalize_length", True, normalize)
        t.set("evaluation.normalize_length", True, normalize)
    if hinge := t.get(model, "hinge"):
        t.set(
            *("training.margin", float(number(hinge)), hinge),
            remark="a constant in that loss, as there; training.loss=hinge has a margin that "
            "changes gradients",
        )


def _wayward(t: Translation, model: Reference) -> None:
    """The distance of the prompt to the embeddings of a text."""
    initializer = t.launch.reference(model, "discrete_prompt")
    embedded = t.launch.reference(initializer, "init")
    words = t.get(embedded, "text")
    if words is None:
        t.lost(t.get(model, "discrete_prompt"), "training.wayward_text is a text")
        return
    t.set("training.wayward_text", text(words), words)
    if gamma := t.get(model, "gamma"):
        t.set("training.wayward_weight", float(number(gamma)), gamma)
    distance = t.get(model, "distance")
    if distance and isinstance(distance.value, Reference):
        if distance.value.name.endswith(".squared_l2_distance"):
            t.same_here(distance, "the squared distance, averaged over positions")
        else:
            t.lost(distance, "the distance is squared, and averaged over positions")
    # The prompt's length is the number of tokens of the same text.
    tokens = t.launch.reference(Reference((), f"{_WAYWARD_MODULE}length", True), "x")
    encoded = t.get(tokens, "s")
    if encoded and encoded.value == words.value:
        t.same_here(encoded, "the text of training.wayward_text")
        t.same_here(t.get(Reference((), f"{_WAYWARD_MODULE}length", True), "x"), "its tokens")
        t.same_here(t.get(tokens, "vocab"), "the model's vocabulary")
        t.expect(
            tokens, "format_values", None, same="the text as it is", lost="no values are put in"
        )
    same = "the embeddings of the text, for each position of the prompt"
    for name in ("rng", "shape"):
        t.same_here(t.get(initializer, name), same)
    t.expect(
        *(model, "prompt_path", "encoder/prompt/prompt/prompt"),
        same="the prompt in the encoder's input",
        lost="the prompt in the encoder's input is meant",
    )


def _loss(t: Translation, model: Reference, kind: str) -> None:
    if z_loss := t.get(model, "z_loss"):
        if kind == "PerceptronLossEncoderDecoderModel":
            t.same_here(z_loss, "without effect in the perceptron loss, there as well")
        else:
            t.set("training.z_loss", float(number(z_loss)), z_loss)
    t.expect(
        *(model, "label_smoothing", 0, None),
        same="no label smoothing",
        lost="there is no label smoothing",
    )
    factor = t.get(model, "loss_normalizing_factor")
    if factor is None or factor.value is None:
        t.set("training.loss_normalization", "sum", factor, default="T5X's default")
    elif isinstance(factor.value, str) and factor.value in _NORMALIZERS:
        t.set("training.loss_normalization", _NORMALIZERS[factor.value], factor)
    elif isinstance(factor.value, str):
        t.set(
            *("training.loss_normalization", "tokens", factor),
            remark="the loss is a sum, or a mean over the target tokens of the batch",
        )
    else:
        t.set(
            *("training.loss_normalization", "sum", factor),
            remark="the loss is not divided by a constant, which changes no update of Adafactor "
            "and of Adam",
        )


def _vocabulary(t: Translation, model: Reference) -> None:
    vocabularies = [t.get(model, f"{side}_vocabulary") for side in ("input", "output")]
    given = [v for v in vocabularies if v]
    for value in given:
        if value.value == given[0].value:
            t.same_here(value, "the model's vocabulary")
        else:
            t.lost(value, "inputs and targets have one vocabulary")


def _decoding(t: Translation, model: Reference) -> None:
    beams = t.get(Reference((), f"{_ENCODER_DECODER}.predict_batch_with_aux", True), "num_decodes")
    decode = t.get(model, "decode_fn")
    name = decode.value.name if decode and isinstance(decode.value, Reference) else ""
    if decode and name != "t5x.decoding.beam_search":
        t.set(
            *("evaluation.strategy", "greedy", decode),
            remark="evaluation is greedy or by beam search; the Python API and the server sample",
        )
        return
    width = number(beams, whole=True) if beams else 1
    if width == 1:
        t.set("evaluation.strategy", "greedy", beams, default="T5X's beam search with one beam")
    else:
        t.set("evaluation.strategy", "beam", decode or beams)
        t.set("evaluation.num_beams", width, beams)
    t.expect(
        Reference((), "t5x.decoding.beam_search", True),
        *("alpha", 0.6),
        same="beam search",
        lost="beams are scored with alpha 0.6",
    )


def step_difference(total: Value, restored: int) -> int:
    """Returns the steps that a launch trains; UserError if it would train none."""
    steps = int(number(total, whole=True)) - restored
    if steps <= 0:
        raise UserError(
            f"{total.where}: {total.name} is {total.value}, but the checkpoint is of step "
            f"{restored}, from which it counts; give a larger number"
        )
    return steps
