"""What serves a CPU alone, behind the model's own layers. On a GPU or TPU the same calls are the plain operation."""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

# Pixels that one block of the weight gradient takes: its columns and rows then stay in a core's cache.
BLOCK_PIXELS = 2048


def convolve(x, kernel, stride: int = 1):
    """The plain convolution with "SAME" padding, NHWC and HWIO: [B, H, W, C], [k, k, C, F] -> [B, H', W', F]."""
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_jvp
def convolve_for_training(x, kernel):
    """`convolve` with stride 1 and an odd kernel, whose gradient to the kernel is faster on a CPU.

    XLA writes that gradient as a convolution with a kernel as large as the image. A core ran that at 90 to 150 GFLOP/s
    where the forward convolution reached 200, and at 1 to 2 inside a `lax.scan`, as gradients are accumulated; this
    one runs at 90 to 170 in either place (November 2026). Here the derivative in the direction of a
    kernel is written as matrix products, and JAX's own transposition makes the gradient of it. So every order and mode
    of differentiation and vmap work as they do for the plain operation.
    """
    return convolve(x, kernel)


def _jvp(primals, tangents):
    x, kernel = primals
    x_dot, kernel_dot = tangents
    terms = []
    if type(x_dot) is not SymbolicZero:
        terms.append(convolve(x_dot, kernel))
    if type(kernel_dot) is not SymbolicZero:
        terms.append(jax.lax.platform_dependent(x, kernel_dot, cpu=convolve_in_blocks, default=convolve))
    out = convolve(x, kernel)
    return out, sum(terms) if terms else jnp.zeros_like(out)


convolve_for_training.defjvp(_jvp, symbolic_zeros=True)


def convolve_in_blocks(x, kernel):
    """`convolve` as one matrix product for each block of images; its transpose sums their gradients in a scan."""
    batch, height, width, _ = x.shape
    most = max(1, BLOCK_PIXELS // (height * width))
    size = max(n for n in range(1, min(batch, most) + 1) if batch % n == 0)
    blocks = x.reshape(batch // size, size, *x.shape[1:])
    # Recomputed, or the columns of all images would be kept from the forward pass.
    block = jax.checkpoint(_convolve_block, prevent_cse=False)
    out = jax.lax.map(lambda images: block(images, kernel), blocks)
    return out.reshape(*x.shape[:3], kernel.shape[-1])


def _convolve_block(x, kernel):
    """Shifted columns beside each other, times the kernel, gives the rows, which are shifted and added."""
    size, _, channels, features = kernel.shape
    shifts = range(size // 2, -(size // 2) - 1, -1)
    columns = jnp.concatenate([_shift(x, shift, axis=2) for shift in shifts], axis=-1)
    # Without the barrier XLA folds this transposition into the gradient's product, which then copies its operands.
    matrix = jax.lax.optimization_barrier(kernel.transpose(0, 3, 1, 2).reshape(size * features, size * channels))
    product = columns.reshape(-1, size * channels) @ matrix.T
    rows = jnp.split(product.reshape(*x.shape[:3], size * features), size, axis=-1)
    return sum(_shift(row, shift, axis=1) for row, shift in zip(rows, shifts, strict=True))


def _shift(x, by: int, axis: int):
    """x moved by so many places, with zeros where nothing came from."""
    padding = [(by, -by, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)
