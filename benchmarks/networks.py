"""The networks that the benchmarks take by name."""

from typing import Any, NamedTuple


class Network(NamedTuple):
    """A UNet in DDPM's layout, as every side of a comparison builds it."""

    width: int
    multipliers: tuple[int, ...]
    num_blocks: int
    attention: tuple[int, ...]
    image: tuple[int, int, int]

    def ours(self, **fields: Any) -> Any:
        """The network in Flax, with other fields besides."""
        from diffusion.models import UNet  # here, as processes of torch do without JAX

        return UNet(self.width, self.multipliers, self.num_blocks, self.attention, **fields)


NETWORKS = {
    "digits": Network(32, (1, 2), 1, (4,), (8, 8, 1)),
    "2.2M": Network(32, (1, 2, 2, 2), 2, (16,), (32, 32, 3)),
    "35.7M": Network(128, (1, 2, 2, 2), 2, (16,), (32, 32, 3)),
}
"""35.7M is DDPM's for CIFAR-10, 2.2M the same with a quarter of its width, and digits that of configs/digits.py."""
