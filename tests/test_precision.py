"""Products of bfloat16 operands: close to float32, forward and backward, summed in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.models.ops import matmul
from tests.micro import normal

BF16, F32 = jnp.bfloat16, jnp.float32
EINSUMS = {
    "BTHK,BUHK->BHTU": ((2, 5, 3, 8), (2, 7, 3, 8)),
    "BHTU,BUHK->BTHK": ((2, 3, 5, 7), (2, 7, 3, 8)),
}


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def value_and_gradients(function, *operands):
    """The value, and derivatives whose cotangent is computed, as in training, and no constant."""
    shape = jax.eval_shape(function, *operands).shape
    weight = normal(*shape, seed=9)

    def weighted(*operands):
        value = function(*operands).astype(F32)
        return jnp.sum(jnp.sin(value) * weight), value

    gradients, value = jax.jit(jax.grad(weighted, tuple(range(len(operands))), has_aux=True))(
        *operands
    )
    return value, *gradients


@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 40)], ids=["matrix", "batch"])
@pytest.mark.parametrize("kernel_dtype", [F32, BF16], ids=["f32 weights", "bf16 weights"])
def test_dot_and_its_derivatives_are_close_to_float32(shape, kernel_dtype):
    x, kernel = jnp.asarray(normal(*shape)), jnp.asarray(normal(40, 24, seed=1), kernel_dtype)
    low = value_and_gradients(lambda x, k: matmul.dot(x, k, dtype=BF16, out_dtype=F32), x, kernel)
    exact = value_and_gradients(lambda x, k: x @ k.astype(F32), x, kernel)
    assert [part.dtype for part in low[1:]] == [x.dtype, kernel.dtype]
    for got, want in zip(low, exact, strict=True):
        assert 0 < relative(got, want) < 0.03


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum_and_its_derivatives_are_close_to_float32(equation):
    left, right = (jnp.asarray(normal(*s, seed=i)) for i, s in enumerate(EINSUMS[equation]))
    low = value_and_gradients(lambda x, y: matmul.einsum(equation, x, y, dtype=BF16), left, right)
    exact = value_and_gradients(lambda x, y: jnp.einsum(equation, x, y), left, right)
    for got, want in zip(low, exact, strict=True):
        assert 0 < relative(got, want) < 0.03


@pytest.mark.parametrize("equation", ["dot", *EINSUMS])
def test_many_members_at_once_equal_each_alone_with_derivatives(equation):
    """As training E prompts does it: all operands, or the left one alone, have a member axis."""
    shapes = ((2, 5, 16), (16, 24)) if equation == "dot" else EINSUMS[equation]

    def product(x, y):
        if equation == "dot":
            return matmul.dot(x, y, dtype=BF16, out_dtype=F32)
        return matmul.einsum(equation, x, y, dtype=BF16)

    for axes in [(0, 0), (0, None)]:
        operands = [
            jnp.asarray(normal(*(s if axis is None else (3, *s)), seed=i))
            for i, (s, axis) in enumerate(zip(shapes, axes, strict=True))
        ]
        low = value_and_gradients(jax.vmap(product, in_axes=axes), *operands)
        exact = value_and_gradients(
            lambda x, y, axes=axes: jax.vmap(
                (lambda a, b: a @ b)
                if equation == "dot"
                else lambda a, b: jnp.einsum(equation, a, b),
                in_axes=axes,
            )(x, y),
            *operands,
        )
        for got, want in zip(low, exact, strict=True):
            assert 0 < relative(got, want) < 0.03


def test_sums_are_float32():
    """4,097 ones: a bfloat16 sum stops growing at 256, and 4,097 has no bfloat16."""
    ones = jnp.ones((2, 4097))
    np.testing.assert_array_equal(
        matmul.dot(ones, ones.T, dtype=BF16, out_dtype=F32), np.full((2, 2), 4097.0)
    )
    tall = jnp.ones((1, 4097, 1, 1))
    scores = matmul.einsum(
        "BTHK,BUHK->BHTU", jnp.ones((1, 2, 1, 4097)), jnp.ones((1, 2, 1, 4097)), dtype=BF16
    )
    np.testing.assert_array_equal(scores, np.full((1, 1, 2, 2), 4097.0))
    mixed = matmul.einsum("BHTU,BUHK->BTHK", jnp.ones((1, 1, 2, 4097)), tall, dtype=BF16)
    np.testing.assert_array_equal(mixed, np.full((1, 2, 1, 1), 4097.0))


def test_derivatives_are_summed_in_float32():
    """A weight's gradient is a sum over 4,096 rows; bfloat16 there counts in steps of 32."""
    x = jnp.ones((4096, 4))
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(matmul.dot(x, k, dtype=BF16, out_dtype=F32))))(
        jnp.ones((4, 3))
    )
    np.testing.assert_array_equal(gradient, np.full((4, 3), 4096.0))
    wide = jnp.ones((3, 4096))
    gradient = jax.jit(jax.grad(lambda y: jnp.sum(matmul.dot(y, wide, dtype=BF16, out_dtype=F32))))(
        jnp.ones((2, 3))
    )
    np.testing.assert_array_equal(gradient, np.full((2, 3), 4096.0))


def test_result_dtypes():
    x, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))
    assert matmul.dot(x, kernel, dtype=BF16).dtype == BF16
    assert matmul.dot(x, kernel, dtype=BF16, out_dtype=F32).dtype == F32
    assert matmul.dot(x.astype(BF16), kernel.astype(BF16), dtype=F32).dtype == F32
    assert matmul.dot(x, kernel, dtype=F32, out_dtype=BF16).dtype == BF16
    for dtype in (F32, BF16):
        assert (
            matmul.einsum(
                "BTHK,BUHK->BHTU", jnp.ones((1, 2, 1, 3)), jnp.ones((1, 2, 1, 3)), dtype=dtype
            ).dtype
            == F32
        )


def test_float32_is_the_plain_product():
    x, kernel = jnp.asarray(normal(2, 3, 40)), jnp.asarray(normal(40, 24, seed=1))
    np.testing.assert_array_equal(matmul.dot(x, kernel, dtype=F32), x @ kernel)
    left, right = (jnp.asarray(normal(*s)) for s in EINSUMS["BTHK,BUHK->BHTU"])
    np.testing.assert_array_equal(
        matmul.einsum("BTHK,BUHK->BHTU", left, right, dtype=F32),
        jnp.einsum("BTHK,BUHK->BHTU", left, right),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_softmax_and_its_gradient_are_those_of_jax(dtype):
    x = jax.random.normal(jax.random.key(0), (3, 5, 7), dtype) * 4
    weight = jax.random.normal(jax.random.key(1), (3, 5, 7))

    def loss(function, x):
        return jnp.sum(function(x) * weight)

    ours, reference = (
        jax.value_and_grad(loss, argnums=1)(function, x)
        for function in (
            matmul.softmax,
            lambda x: jax.nn.softmax(x.astype(jnp.float32), axis=-1),
        )
    )
    np.testing.assert_allclose(ours[0], reference[0], rtol=1e-6)
    assert ours[1].dtype == x.dtype
    np.testing.assert_allclose(
        np.float32(ours[1]), np.float32(reference[1]), atol=1e-6 if dtype == "float32" else 1e-2
    )
