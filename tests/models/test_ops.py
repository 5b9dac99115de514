"""The operations of platforms other than CPU, against those of the CPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.models.ops import cpu, matmul
from tests.micro import normal


def mixed(x_BTD: Any, kernel_DF: Any, key_BUF: Any) -> Any:
    """A product with a kernel, one of two activations, and softmaxes of one and two parts."""
    dtype = x_BTD.dtype
    y_BTF = matmul.dot(x_BTD, kernel_DF, dtype=dtype)
    scores_BTU = matmul.einsum("BTF,BUF->BTU", y_BTF, key_BUF, dtype=dtype)
    first, second = matmul.joint_softmax((scores_BTU, 0.5 * scores_BTU))
    weights_BTU = matmul.softmax(scores_BTU) + first - second
    out_BTF = matmul.einsum("BTU,BUF->BTF", weights_BTU, key_BUF, dtype=dtype)
    assert out_BTF.dtype == scores_BTU.dtype == jnp.float32
    assert y_BTF.dtype == dtype
    return jnp.sum(matmul.inner(out_BTF, jnp.cos(out_BTF))), out_BTF


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_platforms_agree(dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((2, 4, 6), (6, 8), (2, 5, 8))
    inputs = [jnp.asarray(normal(*s, seed=i, scale=0.5), dtype) for i, s in enumerate(shapes)]
    results, texts = [], []
    for is_cpu in (True, False):
        for module in (matmul, cpu):
            monkeypatch.setattr(module, "for_cpu", lambda is_cpu=is_cpu: is_cpu)

        def run(*inputs: Any) -> Any:  # a new function, because JAX remembers what it traced
            return jax.grad(mixed, argnums=(0, 1, 2), has_aux=True)(*inputs)

        jitted = jax.jit(run)
        texts.append(str(jax.make_jaxpr(jitted)(*inputs)))
        results.append(jitted(*inputs))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(b, np.float32), np.asarray(a, np.float32), atol=tolerance
        ),
        *results,
    )
    assert "optimization_barrier" in texts[0]
    assert "optimization_barrier" not in texts[1]
