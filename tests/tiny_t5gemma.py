"""T5Gemmas so small that a test compiles in a second, and the same in plain numpy."""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig, RopeScaling
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.models.t5gemma.config import T5GemmaConfig
from prompt_tuning_jax.models.t5gemma.model import T5Gemma

V, D, EOI = 64, 16, 60
_STACK = CausalLMConfig(
    model_type="t5_gemma_module",
    vocab_size=V,
    embed_dim=D,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=20,
    num_layers=2,
    max_positions=64,
    mlp_activations=("gelu", "linear"),
    norm="rms_plus_one",
    post_norms=True,
    embedding_scale=4.0,
    windows=(3, 0),
    query_scale=0.4,
    attention_softcap=3.0,
    logits_softcap=5.0,
)
# A wide encoder and a narrow decoder, and T5Gemma 2 with its frequencies by kind of layer.
CONFIGS: dict[str, T5GemmaConfig] = {
    "t5gemma": T5GemmaConfig(
        model_type="t5gemma",
        encoder=_STACK,
        decoder=dataclasses.replace(
            _STACK,
            embed_dim=12,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            embedding_scale=12**0.5,
            tie_embeddings=True,
            qkv_bias=True,
            out_bias=True,
        ),
        token_ids=TokenIds(pad=0, eos=1, start=2, inputs_have_eos=False),
    ),
    "t5gemma2": T5GemmaConfig(
        model_type="t5gemma2",
        encoder=dataclasses.replace(
            _STACK,
            model_type="t5gemma2_text",
            windows=(5, 0),
            attention_softcap=0.0,
            qk_norm="head",
            rope_theta=1_000_000.0,
            rope_local_theta=100.0,
            rope_scaling=RopeScaling(kind="linear", factor=2.0),
        ),
        decoder=dataclasses.replace(
            _STACK,
            model_type="t5gemma2_decoder",
            attention_softcap=0.0,
            qk_norm="head",
            rope_local_theta=100.0,
            tie_embeddings=True,
        ),
        eoi=EOI,
        token_ids=TokenIds(pad=0, eos=1, start=2, inputs_have_eos=False, image=61),
    ),
}


def with_layers(config: T5GemmaConfig, *, encoder: tuple[int, ...]) -> T5GemmaConfig:
    """The configuration with encoder layers of these windows."""
    stack = dataclasses.replace(config.encoder, num_layers=len(encoder), windows=encoder)
    return dataclasses.replace(config, encoder=stack)


def one_layer(config: T5GemmaConfig) -> T5GemmaConfig:
    """The configuration with one layer in each stack, without caps on the logits.

    The encoder's layer has a window.
    """
    decoder = dataclasses.replace(config.decoder, num_layers=1, windows=(0,), logits_softcap=0.0)
    return dataclasses.replace(with_layers(config, encoder=(5,)), decoder=decoder)


def make_t5gemma(kind: str | T5GemmaConfig, *, seed: int = 0, vocabulary: Any = None) -> T5Gemma:
    """Weights from numpy (nothing to compile) that make every part matter, norms included."""
    config = CONFIGS[kind] if isinstance(kind, str) else kind
    cloned: T5Gemma = nnx.clone(_drawn(config, seed))
    cloned.vocabulary = vocabulary
    return cloned


@functools.cache
def _drawn(config: T5GemmaConfig, seed: int) -> T5Gemma:
    model: T5Gemma = nnx.eval_shape(lambda: T5Gemma(config, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(seed)
    values = {}
    for name, shape in param_tree.split(model)[1].items():
        drawn = random.normal(size=shape.shape)
        if name.endswith(("/scale", "/bias")):
            drawn = 0.3 * drawn
        elif name.endswith("/kernel"):
            drawn = drawn * shape.shape[0] ** -0.5
        values[name] = jnp.asarray(drawn, shape.dtype)
    param_tree.fill(model, values)
    return model


def reference_logits(
    model: T5Gemma, inputs_T: Any, targets_S: Any, prompt_PD: Any = None
) -> np.ndarray:
    """Computes the logits ``[S, V]`` of one row's targets behind a prompt, in float64."""
    config = model.config
    params = {n: np.asarray(p, np.float64) for n, p in param_tree.split(model)[1].items()}

    def embedded(tokens: Any, table: str, stack: CausalLMConfig) -> np.ndarray:
        x = params[f"{table}/embedding"][np.asarray(tokens)] * stack.embedding_scale
        if config.merged:
            x = np.where((np.asarray(tokens) == config.eoi)[:, None], params["eoi_embedding"], x)
        return x

    x = embedded(inputs_T, "token_embedder", config.encoder)
    if prompt_PD is not None:
        x = np.concatenate([np.asarray(prompt_PD, np.float64), x])
    for i in range(config.encoder.num_layers):
        x = _layer(x, None, params, f"encoder/layers_{i}", config, config.encoder, i)
    read = _norm(x, params["encoder/encoder_norm/scale"], config.encoder)
    x = embedded(
        [config.token_ids.start, *np.asarray(targets_S)[:-1]],
        "token_embedder" if config.merged else "decoder_embedder",
        config.decoder,
    )
    for i in range(config.decoder.num_layers):
        x = _layer(x, read, params, f"decoder/layers_{i}", config, config.decoder, i)
    x = _norm(x, params["decoder/decoder_norm/scale"], config.decoder)
    head = "token_embedder" if config.merged else "decoder_embedder"
    return _capped(x @ params[f"{head}/embedding"].T, config.decoder.logits_softcap)


def _layer(
    x: np.ndarray,
    read: np.ndarray | None,
    params: dict[str, Any],
    at: str,
    config: T5GemmaConfig,
    stack: CausalLMConfig,
    i: int,
) -> np.ndarray:
    def sublayer(x: np.ndarray, name: str, function: Any) -> np.ndarray:
        pre, post = (params[f"{at}/{side}_{name}_layer_norm/scale"] for side in ("pre", "post"))
        return x + _norm(function(_norm(x, pre, stack)), post, stack)

    w = stack.window(i)
    distance = np.arange(len(x))[:, None] - np.arange(len(x))[None]
    if read is not None:
        seen = (distance >= 0) & ((distance < w) | (not w))
    elif config.merged and w:
        # w positions in total, the query among them, one more behind it than ahead if w is odd.
        seen = (distance <= (w - 1) // 2) & (-distance <= w // 2)
    else:
        seen = (abs(distance) < w) | (not w)
    attention = functools.partial(_attention, params=params, stack=stack)
    own = f"{at}/self_attention"
    local = w > 0

    def self_attention(y: np.ndarray) -> np.ndarray:
        more = (
            [(read, np.ones((len(y), len(read)), bool))]
            if config.merged and read is not None
            else []
        )
        return attention(y, [(y, seen), *more], own, local=local)

    x = sublayer(x, "self_attention", self_attention)
    if read is not None and not config.merged:
        everywhere = np.ones((len(x), len(read)), bool)
        across = f"{at}/encoder_decoder_attention"
        x = sublayer(
            x, "cross_attention", lambda y: attention(y, [(read, everywhere)], across, rope=False)
        )

    def mlp(y: np.ndarray) -> np.ndarray:
        gate, up = (y @ params[f"{at}/mlp/wi_{j}/kernel"] for j in range(2))
        gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        return (gate * up) @ params[f"{at}/mlp/wo/kernel"]

    return sublayer(x, "mlp", mlp)


def _attention(
    x: np.ndarray,
    sources: list[tuple[np.ndarray, np.ndarray]],
    at: str,
    *,
    params: dict[str, Any],
    stack: CausalLMConfig,
    local: bool = False,
    rope: bool = True,
) -> np.ndarray:
    """Attends to several sources under one softmax; only the first has positions."""

    def project(y: np.ndarray, name: str) -> np.ndarray:
        y = y @ params[f"{at}/{name}/kernel"] + params.get(f"{at}/{name}/bias", 0.0)
        return y.reshape(len(y), -1, stack.head_dim)

    def normed(y: np.ndarray, name: str) -> np.ndarray:
        return _norm(y, params[f"{at}/{name}_norm/scale"], stack) if stack.qk_norm != "none" else y

    q = normed(project(x, "query"), "query")
    q = _rotated(q, stack, local) if rope else q
    keys, values = [], []
    for number, (source, _) in enumerate(sources):
        k = normed(project(source, "key"), "key")
        keys.append(_rotated(k, stack, local) if rope and not number else k)
        values.append(project(source, "value"))
    k, v = np.concatenate(keys), np.concatenate(values)
    seen = np.concatenate([each for _, each in sources], axis=1)
    mixed = np.zeros_like(q)
    for head in range(stack.num_heads):
        group = head * stack.num_kv_heads // stack.num_heads
        scores = _capped(q[:, head] @ k[:, group].T * stack.query_scale, stack.attention_softcap)
        weights = np.where(seen, np.exp(scores), 0.0)
        mixed[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, group]
    out = mixed.reshape(len(x), -1) @ params[f"{at}/out/kernel"]
    return out + params.get(f"{at}/out/bias", 0.0)


def _rotated(x: np.ndarray, stack: CausalLMConfig, local: bool) -> np.ndarray:
    width, by_type = stack.head_dim, stack.rope_local_theta is not None
    theta = stack.rope_local_theta if local and by_type else stack.rope_theta
    out = x.copy()
    for j in range(width // 2):
        frequency = theta ** (-2 * j / width)
        if stack.rope_scaling and not (local and by_type):
            frequency /= stack.rope_scaling.factor
        angle = np.arange(len(x))[:, None] * frequency
        a, b = x[..., j], x[..., j + width // 2]
        out[..., j] = a * np.cos(angle) - b * np.sin(angle)
        out[..., j + width // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def _norm(x: np.ndarray, scale: np.ndarray, stack: CausalLMConfig) -> np.ndarray:
    normed = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + stack.norm_eps)
    return normed * (1 + scale)


def _capped(x: np.ndarray, cap: float) -> np.ndarray:
    return cap * np.tanh(x / cap) if cap else x
