"""Runs the Inception network of FID, KID and the Inception Score: TensorFlow's of 2015-12-05, not torchvision's.

It is built as in pytorch-fid: averages leave out the padding, and the last block has a maximum where the paper has an
average. Batch normalisation is folded into the convolutions.
"""

import contextlib
import hashlib
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from diffusion import keys
from diffusion.errors import InputError
from diffusion.files import open_to_read
from diffusion.images import to_floats
from diffusion.interop import torch_file
from diffusion.interop.safetensors_file import read_header, read_tensors

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
REMEDY = f"download {URL} by hand, and give its path"

SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
BATCH_NORM_EPSILON = 1e-3


class Outputs(NamedTuple):
    """Holds what the network says of images.

    Attributes:
      pool: the 2,048 averages of the last block, which are the features of FID and KID.
      logits: for 1,008 classes, without the last layer's bias, since the first code of the Inception Score
        (openai/improved-gan) left it out, and all published scores follow that.
    """

    pool: Float[Array, "N 2048"]
    logits: Float[Array, "N 1008"]


class BasicConv(nn.Module):
    """Convolves and rectifies, [N, H, W, C] -> [N, H', W', features]; in full float32 on every device."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x):
        strides = (self.stride, self.stride)
        # By default a GPU rounds to 10 bits of mantissa, which shows in the distance.
        full = jax.lax.Precision.HIGHEST
        return nn.relu(nn.Conv(self.features, self.kernel, strides, self.padding, precision=full, name="conv")(x))


def _conv(x, name, features, kernel=1, stride=1):
    """Applies a BasicConv, with padding if the stride is 1."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    return BasicConv(features, kernel, stride, "SAME" if stride == 1 else "VALID", name=name)(x)


def _chain(x, *layers):
    """Applies one convolution after another; each of layers holds the arguments of `_conv` after x."""
    for layer in layers:
        x = _conv(x, *layer)
    return x


def _pool(x):
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _shrink(x):
    return nn.max_pool(x, (3, 3), (2, 2))


class BlockA(nn.Module):
    """Maps 35 x 35 pixels to 224 + pool_features channels."""

    pool_features: int

    @nn.compact
    def __call__(self, x):
        one = _conv(x, "branch1x1", 64)
        five = _chain(x, ("branch5x5_1", 48), ("branch5x5_2", 64, 5))
        three = _chain(x, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
        return jnp.concatenate([one, five, three, _conv(_pool(x), "branch_pool", self.pool_features)], axis=-1)


class BlockB(nn.Module):
    """Shrinks 35 x 35 to 17 x 17 pixels and adds 480 channels."""

    @nn.compact
    def __call__(self, x):
        three = _conv(x, "branch3x3", 384, 3, 2)
        double = _chain(x, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2))
        return jnp.concatenate([three, double, _shrink(x)], axis=-1)


class BlockC(nn.Module):
    """Maps 17 x 17 pixels to 768 channels."""

    width: int

    @nn.compact
    def __call__(self, x):
        w, row, column = self.width, (1, 7), (7, 1)
        one = _conv(x, "branch1x1", 192)
        seven = _chain(x, ("branch7x7_1", w), ("branch7x7_2", w, row), ("branch7x7_3", 192, column))
        double = _chain(x, ("branch7x7dbl_1", w), ("branch7x7dbl_2", w, column), ("branch7x7dbl_3", w, row))
        double = _chain(double, ("branch7x7dbl_4", w, column), ("branch7x7dbl_5", 192, row))
        return jnp.concatenate([one, seven, double, _conv(_pool(x), "branch_pool", 192)], axis=-1)


class BlockD(nn.Module):
    """Shrinks 17 x 17 to 8 x 8 pixels and adds 512 channels."""

    @nn.compact
    def __call__(self, x):
        three = _chain(x, ("branch3x3_1", 192), ("branch3x3_2", 320, 3, 2))
        seven = _chain(x, ("branch7x7x3_1", 192), ("branch7x7x3_2", 192, (1, 7)))
        seven = _chain(seven, ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2))
        return jnp.concatenate([three, seven, _shrink(x)], axis=-1)


class BlockE(nn.Module):
    """Maps 8 x 8 pixels to 2,048 channels; the last block pools by the maximum instead of the average."""

    last: bool

    @nn.compact
    def __call__(self, x):
        one = _conv(x, "branch1x1", 320)
        three = _conv(x, "branch3x3_1", 384)
        double = _chain(x, ("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, 3))
        parts = [_conv(three, "branch3x3_2a", 384, (1, 3)), _conv(three, "branch3x3_2b", 384, (3, 1))]
        parts += [_conv(double, "branch3x3dbl_3a", 384, (1, 3)), _conv(double, "branch3x3dbl_3b", 384, (3, 1))]
        pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.last else _pool(x)
        return jnp.concatenate([one, *parts, _conv(pooled, "branch_pool", 192)], axis=-1)


class Inception(nn.Module):
    """Computes the Outputs of images [N, 299, 299, 3] in [-1, 1]."""

    @nn.compact
    def __call__(self, x):
        # The stem: plain convolutions, down to 35 x 35 pixels.
        x = BasicConv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = BasicConv(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = _shrink(BasicConv(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = BasicConv(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = _shrink(BasicConv(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x))

        # Inception blocks at 35 x 35, 17 x 17 and 8 x 8 pixels.
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = BlockA(pool_features, name=name)(x)
        x = BlockB(name="Mixed_6a")(x)
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = BlockC(width, name=name)(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(last=True, name="Mixed_7c")(BlockE(last=False, name="Mixed_7b")(x))

        # The features, and from them the logits.
        pool = x.mean(axis=(1, 2))
        full = jax.lax.Precision.HIGHEST
        return Outputs(pool, nn.Dense(NUM_CLASSES, use_bias=False, precision=full, name="fc")(pool))


@jax.jit
def apply(params: dict[str, Any], images: UInt8[Array, "N H W 3"]) -> Outputs:
    """Returns features and logits of images of any size, which are first resized to 299 x 299.

    The resizing is bilinear between pixel centres, without smoothing, like torch's interpolate with
    align_corners=False: it belongs to the definition of FID that pytorch-fid follows.

    Args:
      params: from `load` or `convert`.
      images: RGB, 0..255.
    """
    return Inception().apply({"params": params}, prepare(images))


def prepare(images: UInt8[Array, "N H W 3"]) -> Float[Array, "N 299 299 3"]:
    """Returns images as the network takes them: resized, in [-1, 1]."""
    return resize(to_floats(images))


def resize(images: Float[Array, "N H W 3"]) -> Float[Array, "N 299 299 3"]:
    """Returns images in the size that the network takes."""
    return jax.image.resize(images, (len(images), SIZE, SIZE, images.shape[3]), "bilinear", antialias=False)


def load(path: str | os.PathLike | None = None) -> dict[str, Any]:
    """Returns the network's parameters, read from a weights file.

    Args:
      path: pytorch-fid's .pth, or a .safetensors with the same names; None downloads the .pth (91 MiB) once into the
        user's cache and checks its SHA-256. A .pth with another SHA-256 is taken with a warning.

    Raises:
      InputError: the download fails, or the file is missing, damaged or of another network.
    """
    if not path:
        with contextlib.ExitStack() as stack:
            return load(_download(stack))
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"there is no file {path}; {REMEDY}")
    try:
        if path.suffix == ".safetensors":
            header = read_header(path)
            if (size := sum(tensor.nbytes for tensor in header.tensors.values())) > torch_file.FILE_LIMIT:
                raise InputError(f"its tensors have {size:,} bytes; {torch_file.FILE_LIMIT:,} are the limit")
            return convert(read_tensors(path, header.tensors))
        with open_to_read(path) as file:
            torch_file.check_size(file)
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != SHA256:
            warnings.warn(f"{path} is not {FILE}: distances by it are not comparable with published FIDs", stacklevel=2)
        return convert(torch_file.read_state_dict(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); {REMEDY}") from error
    except InputError as error:
        reason = str(error).removesuffix(f"; {REMEDY}")
        raise InputError(f"{path} cannot be used ({reason}); {REMEDY}") from error


def _download(stack: contextlib.ExitStack) -> Path:
    """Returns the file in the user's cache; where that cannot be written, one that the stack removes in the end."""
    import pooch

    folder = Path(pooch.os_cache("diffusion"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = (folder / FILE).exists() or os.access(folder, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        warnings.warn(f"{folder} cannot be written, so the Inception network is downloaded each time", stacklevel=3)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
    options = {"fname": FILE, "path": folder, "progressbar": sys.stderr.isatty()}
    try:
        return Path(pooch.retrieve(URL, known_hash=f"sha256:{SHA256}", **options))
    except (OSError, ValueError) as error:  # OSError: no network, no space or no cache; ValueError: a wrong hash
        reason = " ".join(str(error).split())
        raise InputError(f"the Inception network could not be downloaded ({reason}); {REMEDY}") from error


def convert(state: dict[str, np.ndarray]) -> dict[str, Any]:
    """Turns pytorch-fid's state dict into params; each batch normalisation becomes part of its convolution.

    Raises:
      InputError: entries are missing, have another shape, or are of no use to the network.
    """
    # `rest` loses each entry that is used, so that what is left at the end does not belong here.
    rest = {name: value for name, value in state.items() if not name.endswith(".num_batches_tracked")}
    flat = {}
    for name, shape in _shapes().items():
        if name.endswith("/bias"):
            continue  # made together with its kernel
        prefix = name.replace("/", ".").removesuffix(".kernel")
        if name == "fc/kernel":
            arrays = {name: _take(rest, "fc.weight", shape[::-1]).T}
            rest.pop("fc.bias", None)  # the Inception Score leaves it out, see Outputs
        else:
            arrays = _fold(rest, prefix, name.removesuffix("kernel"), shape)
        for key, array in arrays.items():
            if not np.isfinite(array).all():
                raise InputError(f"{prefix} is not finite; {REMEDY}")
            flat[key] = np.ascontiguousarray(array, np.float32)
    if rest:
        raise InputError(f"the weights have {len(rest)} entries too many, such as {min(rest)}; {REMEDY}")
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _fold(state, prefix, target, shape):
    """Returns the kernel and bias of a convolution whose fixed batch normalisation is folded into it."""
    block = prefix.removesuffix(".conv")
    height, width, channels, features = shape
    kernel = _take(state, f"{block}.conv.weight", (features, channels, height, width))
    scale, shift, mean, variance = (_take(state, f"{block}.bn.{name}", (features,)) for name in _NORM)
    with np.errstate(invalid="ignore"):  # what is not finite then is refused below
        gain = scale / np.sqrt(variance + BATCH_NORM_EPSILON)
    kernel = (kernel * gain[:, None, None, None]).transpose(2, 3, 1, 0)  # torch's OIHW to HWIO
    return {f"{target}kernel": kernel, f"{target}bias": shift - mean * gain}


_NORM = ("weight", "bias", "running_mean", "running_var")


def _take(state, name, shape):
    """Removes and returns an entry, whose shape is checked before it takes twice the memory in float64."""
    if name not in state:
        raise InputError(f"the weights have no {name}: they are of another network; {REMEDY}")
    array = state.pop(name)
    if array.shape != shape:
        raise InputError(f"the weights' {name} has shape {array.shape}, which must be {shape}; {REMEDY}")
    return np.asarray(array, np.float64)


def _shapes() -> dict[str, tuple[int, ...]]:
    """Returns the shape of each of the network's parameters by its name."""
    shapes = jax.eval_shape(partial(Inception().init, keys.make(0)), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    return {name: leaf.shape for name, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items()}
