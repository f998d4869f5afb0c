"""Our autoencoder's parameters under the names and layouts of diffusers, and what its code does with them, in NumPy."""

import numpy as np

from diffusion.interop.diffusers.autoencoders import is_pixelwise, name_of
from diffusion.interop.diffusers.state import to_tensors


def state_dict(params, levels):
    """The state of AutoencoderKL, or VQModel where there is a codebook, as {name: array}."""
    network = {name: part for name, part in params.items() if name != "scaling"}
    return to_tensors(network, lambda path: name_of(path, levels), is_pixelwise)


class Reference:
    """diffusers' forward passes, NCHW and in float64: `vae.py`, `unet_2d_blocks.py`, `resnet.py` of version 0.42."""

    def __init__(self, state, levels, num_blocks, groups):
        self.state = {name: np.asarray(array, np.float64) for name, array in state.items()}
        self.levels, self.num_blocks, self.groups = levels, num_blocks, groups

    def moments(self, x):
        """What the posterior is made of: the output of quant_conv."""
        h = self.conv("encoder.conv_in", x)
        for level in range(self.levels):
            for i in range(self.num_blocks):
                h = self.resnet(f"encoder.down_blocks.{level}.resnets.{i}", h)
            if level < self.levels - 1:
                h = np.pad(h, ((0, 0), (0, 0), (0, 1), (0, 1)))  # Downsample2D with padding 0
                h = self.conv(f"encoder.down_blocks.{level}.downsamplers.0.conv", h, stride=2, padding=0)
        h = self.middle("encoder.mid_block", h)
        h = self.conv("encoder.conv_out", silu(self.norm("encoder.conv_norm_out", h)))
        return self.conv("quant_conv", h, padding=0)

    def decode(self, z):
        h = self.conv("decoder.conv_in", self.conv("post_quant_conv", z, padding=0))
        h = self.middle("decoder.mid_block", h)
        for level in range(self.levels):
            for i in range(self.num_blocks + 1):
                h = self.resnet(f"decoder.up_blocks.{level}.resnets.{i}", h)
            if level < self.levels - 1:
                h = self.conv(f"decoder.up_blocks.{level}.upsamplers.0.conv", h.repeat(2, axis=2).repeat(2, axis=3))
        return self.conv("decoder.conv_out", silu(self.norm("decoder.conv_norm_out", h)))

    def middle(self, name, h):
        h = self.resnet(f"{name}.resnets.0", h)
        batch, channels, height, width = h.shape
        flat = self.norm(f"{name}.attentions.0.group_norm", h).reshape(batch, channels, -1).swapaxes(1, 2)
        q, k, v = (self.linear(f"{name}.attentions.0.to_{part}", flat) for part in "qkv")
        scores = q @ k.swapaxes(1, 2) / np.sqrt(channels)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = self.linear(f"{name}.attentions.0.to_out.0", weights / weights.sum(axis=-1, keepdims=True) @ v)
        h = h + out.swapaxes(1, 2).reshape(batch, channels, height, width)
        return self.resnet(f"{name}.resnets.1", h)

    def resnet(self, name, x):
        h = self.conv(f"{name}.conv1", silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", silu(self.norm(f"{name}.norm2", h)))
        if f"{name}.conv_shortcut.weight" in self.state:
            x = self.conv(f"{name}.conv_shortcut", x, padding=0)
        return x + h

    def norm(self, name, x):
        grouped = x.reshape(len(x), self.groups, -1)
        normal = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 1e-6)
        weight, bias = (self.state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return normal.reshape(x.shape) * weight + bias

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def conv(self, name, x, stride=1, padding=1):
        weight = self.state[f"{name}.weight"]
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        patches = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
        return np.einsum("bchwij,ocij->bohw", patches, weight) + self.state[f"{name}.bias"][:, None, None]


def silu(x):
    return x / (1 + np.exp(-x))
