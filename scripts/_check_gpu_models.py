"""Checks of ``check_gpu``: whole models on the device against the same models on the CPU.

Each model is a few layers with random weights.  The CPU computes in float32 with the same weights.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _check_gpu_ops import PRECISIONS, THREADS, Precision, relative_error
from _check_gpu_report import Report
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.ensemble import DecodeConfig, label_scores, write
from prompt_tuning_jax.methods import PROMPT, Context, PromptTuning, attach_method
from prompt_tuning_jax.models.base import model_class
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.ops.attention_choice import PLAIN, Choice, Usage, choose_attention
from prompt_tuning_jax.models.quantization import Quantization, quantize_modules
from prompt_tuning_jax.models.registry import preset

# The largest relative errors of a loss's derivative, a few layers deep.
_MOST = {"bfloat16": 8e-2, "float32": 1e-4, "float32 by default": 1e-2}
_ROWS, _LENGTH, _TARGETS, _PROMPT = 3, 21, 6, 9
_WORDS = 512


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A prompt for a model: its structure, its prompt with a leading axis, and the weights."""

    graphdef: Any
    trainable: Mapping[str, jax.Array]
    frozen: Mapping[str, jax.Array]


def configs(*, small: bool) -> dict[str, ModelConfig]:
    """Returns the architectures to check by name, each as small as its structure allows."""
    sizes: dict[str, Any] = {"vocab_size": _WORDS, "embed_dim": 64, "mlp_dim": 96, "head_dim": 16}
    layers = 2 if small else 3
    depths = {"num_encoder_layers": layers, "num_decoder_layers": layers}
    t5 = replace(preset("small"), **sizes, **depths, num_heads=4)
    heads = {"num_heads": 4, "num_kv_heads": 2}
    if small:
        return {"T5": t5}
    llama = replace(preset("meta-llama/Llama-3.2-1B"), **sizes, **heads, num_layers=3)
    gemma = preset("google/gemma-2-2b")
    return {
        "T5": t5,
        "T5 1.0": replace(t5, mlp_activations=("relu",), tie_embeddings=True),
        "Llama": llama,
        "Gemma 2": replace(gemma, **sizes, **heads, num_layers=4, windows=(8, 0, 8, 0)),
        "GPT-2": replace(
            preset("openai-community/gpt2"), **sizes, num_heads=4, num_kv_heads=4, num_layers=3
        ),
    }


def run(report: Report) -> None:
    """Makes all checks of models."""
    small = report.options.small

    def check(name: str, config: ModelConfig) -> None:
        with report.guarded(name):
            _check_family(report, name, config)

    def check_quantized(kind: Quantization) -> None:
        config, name = configs(small=True)["T5"], f"T5, {kind} weights"
        with report.guarded(name):
            expected = _on_cpu(config, kind)
            found = {}
            for precision in PRECISIONS[:2]:
                members = _members(config, precision, kind)
                found[precision.name] = _error(_derivative(members, precision), expected)
            _report_errors(report, name, found)

    # Most of a check is compiling, which threads do side by side.
    with ThreadPoolExecutor(1 if small else THREADS) as threads:
        made = [threads.submit(check, *item) for item in configs(small=small).items()]
        kinds: tuple[Quantization, ...] = () if small else ("int8", "int4")
        made += [threads.submit(check_quantized, kind) for kind in kinds]
        for each in made:
            each.result()


def _check_family(report: Report, name: str, config: ModelConfig) -> None:
    """Compares the loss's derivative, with and without a loop over layers; ranking; generation."""
    small = report.options.small
    expected = _on_cpu(config)
    found = {}
    for precision in PRECISIONS[:2] if small else PRECISIONS:
        members = _members(config, precision)
        found[precision.name] = _error(_derivative(members, precision), expected)
    _report_errors(report, f"{name}: loss and derivative", found)

    bfloat16, highest = PRECISIONS[:2]
    looped = _derivative(_members(config, bfloat16), bfloat16, scan=True)
    _report_errors(report, f"{name}: layers as a loop", {bfloat16.name: _error(looped, expected)})

    narrow = _members(config, bfloat16)
    attention = _kernel_of(param_tree.merge(narrow.graphdef, _one(narrow)).model)
    if attention.implementation != "xla":
        found = {
            bfloat16.name: _error(_derivative(narrow, bfloat16, attention=attention), expected)
        }
        _report_errors(report, f"{name}: attention as {attention.implementation}", found)

    members, on_cpu = _members(config, highest), _members(config, highest, device=_cpu())
    with highest.applied():
        scores, written = _scores(members), _written(members)
        with _cpu_as_default():
            exact_scores, exact_written = _scores(on_cpu), _written(on_cpu)
    report.errors(f"{name}: ranking", {"float32": (relative_error(scores, exact_scores), 1e-4)})
    same = float(np.mean(written == exact_written))
    report.check(f"{name}: greedy decoding", same > 0.97, f"{100 * same:.0f} % of the CPU's tokens")


def _kernel_of(model: Any) -> Choice:
    """Returns the kernel for the model's attention on this device, or plain attention."""
    device = jax.devices()[0]
    capability = float(getattr(device, "compute_capability", 0) or 0)
    usage = Usage(
        platform=device.platform,
        queries=_LENGTH,
        keys=_LENGTH + _PROMPT,
        compute_capability=capability,
    )
    try:
        return choose_attention("fused", model.attention_traits, usage)
    except UserError:
        return PLAIN


def _report_errors(report: Report, name: str, found: Mapping[str, float]) -> None:
    report.errors(name, {mode: (error, _MOST[mode]) for mode, error in found.items()})


def _error(found: Any, expected: Any) -> float:
    """Returns the larger error of the loss and of its derivative."""
    return max(map(relative_error, found, expected))


def _on_cpu(config: ModelConfig, kind: Quantization = "none") -> Any:
    highest = PRECISIONS[1]
    with _cpu_as_default():
        return _derivative(_members(config, highest, kind, device=_cpu()), highest)


def _cpu() -> jax.Device:
    return jax.devices("cpu")[0]


def _cpu_as_default() -> Any:
    """Returns a context in which the CPU computes; nothing is compiled again if it does anyway."""
    return nullcontext() if jax.default_backend() == "cpu" else jax.default_device(_cpu())


def _members(
    config: ModelConfig,
    precision: Precision,
    kind: Quantization = "none",
    *,
    device: jax.Device | None = None,
) -> _Member:
    """Returns a model with the same weights whatever the precision: those of bfloat16."""
    dtype = jnp.dtype(precision.dtype)
    with _cpu_as_default():
        model = nnx.eval_shape(
            lambda: model_class(config)(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
        )
        param_tree.fill(model, _weights(model, dtype))
        quantize_modules(model, kind)
        method = PromptTuning(length=_PROMPT, init="uniform")
        tuned = attach_method(model, method, key=jax.random.key(0), context=Context())
        graphdef, params = param_tree.split(tuned)
    params = jax.device_put(params, device or jax.devices()[0])
    trainable = {PROMPT: params.pop(PROMPT)[None]}
    return _Member(graphdef=graphdef, trainable=trainable, frozen=params)


def _weights(model: Any, dtype: Any) -> dict[str, jax.Array]:
    """Draws weights with which every part of the model matters, from NumPy."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in param_tree.split(model)[1].items():
        drawn = rng.normal(size=shape.shape)
        if name.endswith("kernel"):
            drawn *= shape.shape[0] ** -0.5
            # T5's queries are not scaled by the width of a head.
            drawn *= 0.25 if name.endswith("query/kernel") else 1.0
        elif not name.endswith("embedding"):
            drawn = 0.1 * drawn + name.endswith("scale")
        weights[name] = jnp.asarray(drawn, jnp.bfloat16).astype(dtype)
    return weights


def _tokens(rows: int, length: int, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, _WORDS, (rows, length)).astype(np.int32)


def _inputs(members: _Member) -> np.ndarray:
    """Returns rows of which one is shorter than the others."""
    fill = param_tree.merge(members.graphdef, _one(members)).model.token_ids.fill
    tokens_BT = _tokens(_ROWS, _LENGTH, seed=1)
    tokens_BT[0, _LENGTH // 2 :] = fill
    return tokens_BT


def _one(members: _Member) -> dict[str, jax.Array]:
    return {**members.frozen, **{name: array[0] for name, array in members.trainable.items()}}


def _derivative(
    members: _Member, precision: Precision, *, scan: bool = False, attention: Choice = PLAIN
) -> Any:
    """Returns the mean loss, and its derivative with respect to the prompt."""
    with precision.applied():
        return _loss_and_derivative(
            members.graphdef,
            scan,
            attention,
            {name: array[0] for name, array in members.trainable.items()},
            members.frozen,
            _inputs(members),
            _tokens(_ROWS, _TARGETS, seed=2),
        )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _loss_and_derivative(
    graphdef: Any,
    scan: bool,
    attention: Choice,
    trainable: Any,
    frozen: Any,
    inputs_BT: Any,
    targets_BS: Any,
) -> Any:
    def loss(trainable: Any) -> Any:
        tuned = param_tree.merge(graphdef, {**frozen, **trainable})
        tuned.model.scan_layers, tuned.model.attention = scan, attention
        sums = tuned.token_sums(inputs_BT, targets_BS, training=True)
        return sums.loss / sums.tokens

    value, derivative = jax.value_and_grad(loss)(trainable)
    return value, derivative[PROMPT]


def _scores(members: _Member) -> np.ndarray:
    labels_CS = _tokens(3, 2, seed=3)
    return np.asarray(
        label_scores(
            members.graphdef, members.trainable, members.frozen, _inputs(members), labels_CS, 1
        )
    )


def _written(members: _Member) -> np.ndarray:
    config = DecodeConfig(max_length=8)
    arguments = (members.trainable, members.frozen, _inputs(members), jax.random.key(0))
    return np.asarray(write(members.graphdef, config, *arguments)[0])
