"""How near images come to their originals: signal to noise, and structural similarity."""

import numpy as np
from jaxtyping import Float, UInt8
from scipy.ndimage import gaussian_filter

from diffusion.errors import InputError

SIGMA, RADIUS = 1.5, 5
"""The window of the structural similarity: a Gaussian of 11 pixels."""

_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(a: UInt8[np.ndarray, "N H W C"], b: UInt8[np.ndarray, "N H W C"]) -> Float[np.ndarray, "N"]:
    """Returns the peak signal-to-noise ratio of each pair of images in dB; inf where they are the same.

    Raises:
      InputError: they are not uint8 of one shape.
    """
    _check(a, b)
    error = np.square(a.astype(np.float64) - b).reshape(len(a), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)


def ssim(a: UInt8[np.ndarray, "N H W C"], b: UInt8[np.ndarray, "N H W C"]) -> Float[np.ndarray, "N"]:
    """Returns the structural similarity of each pair of images, at most 1 (Wang et al. 2004, IEEE TIP 13(4), Eq. 13).

    Each channel is measured by itself in a Gaussian window of 11 pixels, and the mean is over channels and over the
    places whose window lies inside the image. In images of up to 10 pixels no window does; there it is over all places,
    with the image mirrored at its edges.

    Raises:
      InputError: as `psnr`.
    """
    _check(a, b)

    def local_mean(x):
        return gaussian_filter(x, (0, SIGMA, SIGMA, 0), radius=(0, RADIUS, RADIUS, 0))

    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    cov = local_mean(x * y) - mean_x * mean_y
    each = (2 * mean_x * mean_y + _C1) * (2 * cov + _C2) / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2))
    if min(a.shape[1:3]) > 2 * RADIUS:
        each = each[:, RADIUS:-RADIUS, RADIUS:-RADIUS]
    return each.reshape(len(a), -1).mean(axis=1)


def _check(a, b):
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.shape != b.shape or a.ndim != 4:
        raise InputError(f"images are {a.dtype} {a.shape} and {b.dtype} {b.shape}; give two uint8 [N, H, W, C] alike")
