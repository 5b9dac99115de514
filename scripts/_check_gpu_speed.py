"""Measurements of ``check_gpu``: the card, and steps, ranking and generation of models."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from _check_gpu_report import Report

from prompt_tuning_jax.config.experiment import Experiment, Model, Training
from prompt_tuning_jax.inference.ensemble import DecodeConfig, label_scores, write
from prompt_tuning_jax.inference.setup import Members, attach_members, build_model, partitioner_of
from prompt_tuning_jax.methods import PromptTuning
from prompt_tuning_jax.models.causal_lm.presets import PRESETS as CAUSAL_LM_PRESETS
from prompt_tuning_jax.models.t5.config import PRESETS as T5_PRESETS
from prompt_tuning_jax.training import build
from prompt_tuning_jax.training.flops import product_flops

SMALL_T5, SMALL_LM = "check_gpu_t5", "check_gpu_lm"
# T5's sizes with as many embeddings as the bundled vocabulary has pieces.
T5_SMALL, T5_BASE = "check_gpu_t5_small", "check_gpu_t5_base"
_LOSS_DIFFERENCE = 2e-2  # between a step with and without a loop over layers, in bfloat16


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shapes to measure, and about how many seconds each program runs."""

    batch: int
    lengths: tuple[int, ...]
    prompt: int = 100
    targets: int = 8
    labels: int = 2
    generated: int = 32
    seconds: float = 1.5


def sizes_of(report: Report) -> Sizes:
    """Returns the sizes of a rehearsal or of a measurement."""
    if report.options.small:
        return Sizes(batch=2, lengths=(16,), prompt=5, targets=3, generated=4, seconds=0.05)
    return Sizes(batch=report.options.batch_size, lengths=(128, 512))


def add_presets() -> None:
    """Makes models known by name: T5s for the bundled vocabulary, and what a rehearsal uses."""
    for name, size in ((T5_SMALL, "small"), (T5_BASE, "base")):
        T5_PRESETS[name] = replace(T5_PRESETS[size], vocab_size=6016)
    sizes: dict[str, Any] = {"vocab_size": 6016, "embed_dim": 32, "mlp_dim": 48, "head_dim": 16}
    T5_PRESETS[SMALL_T5] = replace(
        T5_PRESETS["small"], **sizes, num_heads=2, num_encoder_layers=1, num_decoder_layers=1
    )
    CAUSAL_LM_PRESETS[SMALL_LM] = replace(
        CAUSAL_LM_PRESETS["meta-llama/Llama-3.2-1B"],
        **sizes,
        num_heads=2,
        num_kv_heads=1,
        num_layers=2,
    )


def measure_card(report: Report) -> None:
    """Reports the machine, and the rate of a large matrix product."""
    device = jax.devices()[0]
    if device.platform != "gpu" and not report.options.small:
        raise RuntimeError(
            f"JAX sees no GPU, only {device.platform}; install the extra cuda, or rehearse with "
            "--small"
        )
    size, rates = (128 if report.options.small else 8192), {}
    for dtype in ("bfloat16", "float32"):
        with report.guarded(f"large product, {dtype}"):
            rates[dtype] = _matmul_rate(dtype, size)
            said = f"{rates[dtype] / 1e12:.4g} TFLOP/s ({size} x {size})"
            report.check(f"large product, {dtype}", rates[dtype] > 0, said)
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    report.row(
        "machine",
        device=device.device_kind,
        platform=device.platform,
        memory_gb=memory / 1e9,
        matmul=rates,
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
    )


def _matmul_rate(dtype: str, size: int) -> float:
    """Returns the best FLOP/s of products that follow each other."""
    times = 8
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), jnp.float32)
    left, right = left.astype(dtype), (right / size**0.5).astype(dtype)

    @jax.jit
    def products(left: Any, right: Any) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, x: x @ right, left)

    rounds = timed(lambda: products(left, right), seconds=0.5)
    return times * 2.0 * size**3 / min(rounds)


def timed(call: Callable[[], Any], *, seconds: float) -> list[float]:
    """Returns the seconds that a call takes in each of three rounds, which take ``seconds``.

    The calls of a round are dispatched together.
    """
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    number = int(seconds / 3 / max(time.perf_counter() - began, 1e-6))
    number = min(max(number, 1), 200)
    rounds = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(number - 1):
            call()
        jax.block_until_ready(call())
        rounds.append((time.perf_counter() - began) / number)
    return rounds


def measure_model(report: Report, name: str) -> None:
    """Measures a model: the default settings first, then those that take longer to compile."""
    sizes = sizes_of(report)
    losses: dict[tuple[str, int], float] = {}
    for scan in ("on", "off"):
        with report.guarded(f"{name}: weights"):
            experiment = _experiment(name, sizes, scan)
            members = attach_members(experiment, build_model(experiment), labels=())
            partitioner = partitioner_of(experiment)
            members = build.with_stacked_layers(experiment, members, partitioner)
            for length in sizes.lengths:
                if scan == "off":  # then no weights are stacked
                    _measure_inference(report, name, members, sizes, length)
                with report.guarded(f"{name}: train {length}, loop {scan}"):
                    found = _measure_step(report, name, experiment, members, sizes, length)
                    losses[scan, length] = found
            del members
    for length in sizes.lengths:
        if ("on", length) in losses and ("off", length) in losses:
            looped, plain = losses["on", length], losses["off", length]
            report.errors(
                f"{name}: loss at {length} with and without a loop",
                {"bfloat16": (abs(looped / plain - 1), _LOSS_DIFFERENCE)},
            )


def _experiment(name: str, sizes: Sizes, scan: Literal["on", "off"]) -> Experiment:
    return Experiment(
        model=Model(
            name_or_path=name,
            random_weights=True,
            dtype="bfloat16",
            param_dtype="bfloat16",
            dropout_rate=0.0,
        ),
        method=PromptTuning(length=sizes.prompt, init="uniform"),
        training=Training(batch_size=sizes.batch, scan_layers=scan),
    )


def _tokens(members: Members, *shape: int, seed: int = 0) -> np.ndarray:
    words = members.model().config.vocab_size
    return np.random.default_rng(seed).integers(3, words - 3, shape).astype(np.int32)


def _measure_step(
    report: Report,
    name: str,
    experiment: Experiment,
    members: Members,
    sizes: Sizes,
    length: int,
) -> float:
    """Measures a training step; returns the loss of the first one."""
    state, step, _ = build.build_step(experiment, members)
    batch = {
        "inputs": _tokens(members, 1, sizes.batch, length, seed=1),
        "targets": _tokens(members, 1, sizes.batch, sizes.targets, seed=2),
    }
    compiled, about = _compiled(step, state, members.frozen, batch)
    losses = []

    def call() -> Any:
        nonlocal state
        state, metrics = compiled(state, members.frozen, batch)
        losses.append(metrics.loss_E)
        return metrics.loss_E

    seconds = timed(call, seconds=sizes.seconds)
    first, last = float(losses[0][0]), float(losses[-1][0])
    scan = experiment.training.scan_layers
    report.row(
        "speed",
        model=name,
        program=f"train, loop {scan}",
        length=length,
        rows=sizes.batch,
        seconds=seconds,
        **about,
        **_memory(),
    )
    said = f"loss {first:.4f}, after {len(losses)} steps {last:.4f}"
    report.check(
        f"{name}: train {length}, loop {scan}", bool(np.isfinite([first, last]).all()), said
    )
    return first


def _measure_inference(
    report: Report, name: str, members: Members, sizes: Sizes, length: int
) -> None:
    inputs_BT = _tokens(members, sizes.batch, length, seed=1)
    arguments = (members.trainable, members.frozen, inputs_BT)
    common: dict[str, Any] = {"model": name, "length": length, "rows": sizes.batch}
    with report.guarded(f"{name}: rank {length}"):
        labels_CS = _tokens(members, sizes.labels, 4, seed=3)
        compiled, about = _compiled(
            label_scores, members.graphdef, *arguments, labels_CS, members.number
        )
        scores = compiled(*arguments, labels_CS)
        seconds = timed(lambda: compiled(*arguments, labels_CS), seconds=sizes.seconds)
        report.row("speed", program="rank", seconds=seconds, **common, **about, **_memory())
        passed = bool(jnp.isfinite(scores).all())
        report.check(f"{name}: rank {length}", passed, "finite scores" if passed else "NaN")
    with report.guarded(f"{name}: generate {length}"):
        key, config = jax.random.key(0), DecodeConfig(max_length=sizes.generated)
        compiled, about = _compiled(write, members.graphdef, config, *arguments, key)
        about["flops"] = 0.0  # how often the loop over tokens runs is not known to the counter
        ids_BS = np.asarray(compiled(*arguments, key)[0])[0]
        steps = _steps(ids_BS, members.model().token_ids.eos)
        seconds = timed(lambda: compiled(*arguments, key), seconds=sizes.seconds)
        report.row(
            "speed",
            program=f"generate {steps}",
            seconds=seconds,
            tokens=steps * sizes.batch,
            **common,
            **about,
            **_memory(),
        )
        words = members.model().config.vocab_size
        passed = bool(((ids_BS >= -1) & (ids_BS < words)).all())
        report.check(f"{name}: generate {length}", passed, f"{steps} tokens")


def _steps(ids_BS: np.ndarray, eos: int) -> int:
    """Returns how many tokens the longest row has, its end included."""
    ends_BS = ids_BS == eos
    lengths_B = np.where(ends_BS.any(1), ends_BS.argmax(1) + 1, ids_BS.shape[1])
    return int(lengths_B.max())


def _compiled(function: Any, *arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Compiles a jitted function; returns it and what is known of it."""
    began = time.perf_counter()
    traced = function.trace(*arguments)
    flops = product_flops(traced.jaxpr)
    lowered = traced.lower()
    middle = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    sizes = compiled.memory_analysis()
    used = 0.0
    if sizes is not None:
        used = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        used += sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
    about = {
        "flops": flops,
        "trace_seconds": middle - began,
        "compile_seconds": ended - middle,
        "program_gb": used / 1e9,
    }
    return compiled, about


def _memory() -> dict[str, float]:
    """Returns the peak memory of this process on the device, in GB; 0 where JAX does not know."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_gb": stats.get("peak_bytes_in_use", 0) / 1e9}
