"""Decoder-only models so small that a test compiles in a second, and the same in plain numpy."""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig, RopeScaling
from prompt_tuning_jax.models.causal_lm.model import CausalLM
from prompt_tuning_jax.models.config import TokenIds

V, D, L = 31, 12, 2
_BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": V,
    "embed_dim": D,
    "num_heads": 6,
    "num_kv_heads": 3,
    "head_dim": 4,
    "mlp_dim": 10,
    "num_layers": L,
    "max_positions": 64,
    "query_scale": 0.5,
    "token_ids": TokenIds(pad=0, eos=2, start=-1),
}
_LAYER_NORM = {"norm": "layer", "mlp_activations": ("gelu",), "num_kv_heads": 6, **_BIASES}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_scaling": RopeScaling(
            kind="llama3", factor=4.0, high_freq_factor=2.0, original_max_positions=40
        )
    },
    "gemma": {
        "norm": "rms_plus_one",
        "post_norms": True,
        "embedding_scale": 3.5,
        "num_kv_heads": 1,
        "windows": (4, 0),
        "rope_local_theta": 100.0,
        "rope_scaling": RopeScaling(kind="linear", factor=2.0),
        "qk_norm": "head",
        "attention_softcap": 2.0,
        "logits_softcap": 3.0,
        "mlp_activations": ("gelu", "linear"),
        "tie_embeddings": True,
    },
    "gpt2": {"positions": "learned", "position_offset": 2, "tie_embeddings": True, **_LAYER_NORM},
    "bloom": {"positions": "alibi", "embedding_norm": True, "tie_embeddings": True, **_LAYER_NORM},
    "phi": {
        "parallel_residual": True,
        "shared_norm": True,
        "rotary_dim": 2,
        "logits_bias": True,
        **_LAYER_NORM,
    },
    "gpt_neox": {
        "parallel_residual": True,
        "rotary_dim": 2,
        **_LAYER_NORM,
        "mlp_activations": ("gelu_exact",),
    },
    "olmo": {"norm": "layer_without_weights", "qkv_clip": 1.2, "num_kv_heads": 6},
    "olmo2": {"pre_norms": False, "post_norms": True, "qk_norm": "all", "windows": (0, 5)},
}


def make_lm(family: str = "llama", *, seed: int = 0, **changes: Any) -> CausalLM:
    """Creates a model with numpy weights that make every part matter, norms and biases included.

    ``changes`` are fields of the configuration or options of the model.
    """
    cloned: CausalLM = nnx.clone(_drawn(family, seed, tuple(sorted(changes.items()))))
    return cloned


@functools.cache
def _drawn(family: str, seed: int, changes: tuple[tuple[str, Any], ...]) -> CausalLM:
    fields = {field.name for field in dataclasses.fields(CausalLMConfig)}
    changed = {name: value for name, value in changes if name in fields}
    options = {name: value for name, value in changes if name not in fields}
    config = CausalLMConfig(**{**_LLAMA, **FAMILIES[family], **changed})
    model: CausalLM = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0), **options))
    random = np.random.default_rng(seed)
    values = {}
    for name, shape in param_tree.split(model)[1].items():
        drawn = random.normal(size=shape.shape)
        if name.endswith("/scale"):
            drawn = 0.3 * drawn + (config.norm != "rms_plus_one" or name.startswith("embedding"))
        elif name.endswith("/bias"):
            drawn = 0.3 * drawn
        elif name.endswith("/kernel"):
            drawn = drawn * shape.shape[0] ** -0.5
        elif name.startswith("position"):
            drawn = 0.5 * drawn
        values[name] = jnp.asarray(drawn, shape.dtype)
    param_tree.fill(model, values)
    return model


def reference_logits(
    model: CausalLM, tokens_T: np.ndarray, prompt_PD: Any, *, with_prompt: bool = False
) -> np.ndarray:
    """Computes the logits ``[T, V]`` of one row behind a prompt, in float64, all at once.

    ``with_prompt`` returns those at the prompt's positions, too.
    """
    config = model.config
    params = {n: np.asarray(p, np.float64) for n, p in param_tree.split(model)[1].items()}
    embedded_TD = params["token_embedder/embedding"][tokens_T] * config.embedding_scale
    x = np.concatenate([np.asarray(prompt_PD, np.float64), embedded_TD])
    length = len(x)
    if config.positions == "learned":
        x = x + params["position_embedder/embedding"][config.position_offset :][:length]
    if config.embedding_norm:
        x = _layer_norm(x, params, "embedding_norm", config)
    for i in range(config.num_layers):
        x = _layer(x, params, i, config)
    x = _norm(x, params, "decoder/decoder_norm", config)[0 if with_prompt else len(prompt_PD) :]
    if config.tie_embeddings:
        logits = x @ params["token_embedder/embedding"].T
    else:
        logits = _linear(x, params, "decoder/logits_dense")
    return _capped(logits, config.logits_softcap)


def _layer(x: np.ndarray, params: dict[str, Any], i: int, config: CausalLMConfig) -> np.ndarray:
    at = f"decoder/layers_{i}"

    def norm(x: np.ndarray, name: str, used: bool) -> np.ndarray:
        return _norm(x, params, f"{at}/{name}_layer_norm", config) if used else x

    y = norm(x, "pre_self_attention", config.pre_norms)
    attended = _attention(y, params, i, config)
    attended = norm(attended, "post_self_attention", config.post_norms)
    if not config.shared_norm:
        y = x if config.parallel_residual else x + attended
        y = norm(y, "pre_mlp", config.pre_norms)
    acts = {
        "gelu": lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "gelu_exact": lambda z: 0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2))),
        "silu": lambda z: z / (1 + np.exp(-z)),
        "linear": lambda z: z,
    }
    if len(config.mlp_activations) == 1:
        hidden = acts[config.mlp_activations[0]](_linear(y, params, f"{at}/mlp/wi"))
    else:
        gate, up = (_linear(y, params, f"{at}/mlp/wi_{j}") for j in range(2))
        hidden = acts[config.mlp_activations[0]](gate) * up
    out = norm(_linear(hidden, params, f"{at}/mlp/wo"), "post_mlp", config.post_norms)
    return x + attended + out


def _attention(x: np.ndarray, params: dict[str, Any], i: int, config: CausalLMConfig) -> np.ndarray:
    at = f"decoder/layers_{i}/self_attention"
    heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
    q, k, v = (_linear(x, params, f"{at}/{name}") for name in ("query", "key", "value"))
    if config.qkv_clip:
        q, k, v = (np.clip(z, -config.qkv_clip, config.qkv_clip) for z in (q, k, v))
    if config.qk_norm == "all":
        q = _norm(q, params, f"{at}/query_norm", config)
        k = _norm(k, params, f"{at}/key_norm", config)
    q, k, v = (z.reshape(len(x), -1, width) for z in (q, k, v))
    if config.qk_norm == "head":
        q = _norm(q, params, f"{at}/query_norm", config)
        k = _norm(k, params, f"{at}/key_norm", config)
    if config.positions == "rope":
        local = bool(config.window(i)) and config.rope_local_theta is not None
        q, k = _rotated(q, config, local), _rotated(k, config, local)
    slopes = _slopes(heads)
    mixed = np.zeros_like(q)
    for query in range(len(x)):
        first = max(0, query + 1 - config.window(i)) if config.window(i) else 0
        for head in range(heads):
            group = head * groups // heads
            scores = k[first : query + 1, group] @ q[query, head] * config.query_scale
            scores = _capped(scores, config.attention_softcap)
            if config.positions == "alibi":
                scores = scores + slopes[head] * np.arange(first, query + 1)
            weights = np.exp(scores - scores.max())
            mixed[query, head] = weights / weights.sum() @ v[first : query + 1, group]
    return _linear(mixed.reshape(len(x), -1), params, f"{at}/out")


def _rotated(x: np.ndarray, config: CausalLMConfig, local: bool) -> np.ndarray:
    width = config.rotary_dim or config.head_dim
    theta = config.rope_local_theta if local else config.rope_theta
    out = x.copy()
    for j in range(width // 2):
        frequency = theta ** (-2 * j / width)
        scaling = None if local else config.rope_scaling
        if scaling and scaling.kind == "linear":
            frequency /= scaling.factor
        elif scaling:
            wavelength = 2 * math.pi / frequency
            longest = scaling.original_max_positions / scaling.low_freq_factor
            shortest = scaling.original_max_positions / scaling.high_freq_factor
            if wavelength > longest:
                frequency /= scaling.factor
            elif wavelength > shortest:
                turns = scaling.original_max_positions / wavelength
                kept = (turns - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - kept) * frequency / scaling.factor + kept * frequency
        angle = np.arange(len(x))[:, None] * frequency
        a, b = x[..., j], x[..., j + width // 2]
        out[..., j] = a * np.cos(angle) - b * np.sin(angle)
        out[..., j + width // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def _slopes(heads: int) -> list[float]:
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 / power * (n + 1)) for n in range(power)]
    return slopes + [2 ** (-4 / power * (2 * n + 1)) for n in range(heads - power)]


def _norm(x: np.ndarray, params: dict[str, Any], at: str, config: CausalLMConfig) -> np.ndarray:
    if config.norm.startswith("layer"):
        return _layer_norm(x, params, at, config)
    normed = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps)
    return normed * (params[f"{at}/scale"] + (config.norm == "rms_plus_one"))


def _layer_norm(
    x: np.ndarray, params: dict[str, Any], at: str, config: CausalLMConfig
) -> np.ndarray:
    normed = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(
        x.var(axis=-1, keepdims=True) + config.norm_eps
    )
    return normed * params.get(f"{at}/scale", 1.0) + params.get(f"{at}/bias", 0.0)


def _linear(x: np.ndarray, params: dict[str, Any], at: str) -> np.ndarray:
    return x @ params[f"{at}/kernel"] + params.get(f"{at}/bias", 0.0)


def _capped(x: np.ndarray, cap: float) -> np.ndarray:
    return cap * np.tanh(x / cap) if cap else x
