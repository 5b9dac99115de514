"""Decoder-only models and T5Gemma over eight devices equal those on one."""

import subprocess
import sys
from pathlib import Path

from tests.devices import with_devices

CODE = """
import functools
import jax, numpy as np, jax.numpy as jnp
from prompt_tuning_jax import param_tree
from prompt_tuning_jax.distributed.sharding import Partitioner, activation_sharding, make_mesh
from tests.models.test_causal_lm import all_logits, loss_and_gradient, normal, tokens
from tests.tiny_lm import make_lm
from tests.tiny_t5gemma import CONFIGS, make_t5gemma, one_layer

assert len(jax.devices()) == 8
D, rows = 16, 8
inputs, targets = tokens((5, 1, 4, 2, 3, 5, 5, 2), 5), tokens((3, 2, 1, 3, 3, 3, 3, 3), 3, seed=1)
prompt = normal(6, D)

@functools.partial(jax.jit, static_argnums=(0, 2))
def run(graphdef, params, partitioner, *batch):
    with activation_sharding(partitioner):
        model = param_tree.merge(graphdef, params)
        (loss, _), gradient = loss_and_gradient(model, *batch)
        return loss, gradient, all_logits(model, *batch[1:], batch[0])[1:]

# Key and value heads that divide the mesh axis, and that neither divide it nor are divided by it.
for heads, kv_heads in ((8, 2), (6, 3)):
    sizes = dict(embed_dim=D, mlp_dim=24, vocab_size=32, num_layers=1)
    model = make_lm(num_heads=heads, num_kv_heads=kv_heads, **sizes)
    graphdef, params = param_tree.split(model)
    want = run(graphdef, params, None, prompt, inputs, targets)
    partitioner = Partitioner(mesh=make_mesh(data=1, fsdp=2, model=4))
    sharded = partitioner.shard(params, param_tree.logical_axes(model))
    kernel = sharded["decoder/layers_0/self_attention/key/kernel"]
    assert kernel.sharding.spec == jax.P("fsdp", "model"), kernel.sharding
    batch = partitioner.shard_batch({"i": inputs, "t": targets}, ("batch", "length"))
    got = run(graphdef, sharded, partitioner, prompt, batch["i"], batch["t"])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)
    print(heads, kv_heads, flush=True)

@functools.partial(jax.jit, static_argnums=(0, 2))
def gradient_of(graphdef, params, partitioner, prompt, inputs, targets):
    with activation_sharding(partitioner):
        model = param_tree.merge(graphdef, params)
        logits = lambda prompt: model.write(model.read(model.embed(inputs, prompt)), targets)
        return jax.value_and_grad(lambda prompt: (logits(prompt) ** 2).mean())(prompt)

model = make_t5gemma(one_layer(CONFIGS["t5gemma"]))
graphdef, params = param_tree.split(model)
inputs, targets = (np.where(x < 0, 0, x) for x in (inputs, targets))
want = gradient_of(graphdef, params, None, prompt, inputs, targets)
sharded = partitioner.shard(params, param_tree.logical_axes(model))
kernel = sharded["decoder/layers_0/encoder_decoder_attention/query/kernel"]
assert kernel.sharding.spec == jax.P("fsdp", "model"), kernel.sharding
batch = partitioner.shard_batch({"i": inputs, "t": targets}, ("batch", "length"))
got = gradient_of(graphdef, sharded, partitioner, prompt, batch["i"], batch["t"])
for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)
print("t5gemma", flush=True)
"""


def test_every_number_of_heads_is_sharded() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=Path(__file__).resolve().parents[2],
        env=with_devices(8),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Involuntary full rematerialization" not in done.stderr
    assert done.stdout.split("\n") == ["8 2", "6 3", "t5gemma", ""]
