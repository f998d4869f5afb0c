"""Our autoencoder computes what AutoencoderKL and VQModel of diffusers compute with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers_autoencoder import state_dict

from diffusion.autoencoder import make_network

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CHANNELS, BLOCKS, GROUPS, SHAPE = (8, 16, 16), 2, 4, (16, 16, 3)
SHARED = {
    "down_block_types": ("DownEncoderBlock2D",) * len(CHANNELS),
    "up_block_types": ("UpDecoderBlock2D",) * len(CHANNELS),
    "block_out_channels": CHANNELS,
    "layers_per_block": BLOCKS,
    "norm_num_groups": GROUPS,
    "latent_channels": 4,
}


def theirs(codes):
    if codes:
        return diffusers.VQModel(**SHARED, num_vq_embeddings=codes, vq_embed_dim=3).eval()
    return diffusers.AutoencoderKL(**SHARED).eval()


@pytest.mark.parametrize("codes", [0, 11])
def test_images_and_latents_agree(torchvision, codes):
    fields = {"channels": CHANNELS, "num_blocks": BLOCKS, "groups": GROUPS, "latent_channels": 4, "codes": codes}
    network = make_network({**fields, "code_channels": 3 if codes else 0}, SHAPE)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, *SHAPE)).astype(np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.2, x.shape), jnp.float32), shapes)
    model = theirs(codes)
    state = {name: torch.from_numpy(array.copy()) for name, array in state_dict(params, len(CHANNELS)).items()}
    model.load_state_dict(state, strict=True)  # no parameter of theirs is without one of ours
    z = rng.normal(size=(2, 4, 4, network.depth)).astype(np.float32)
    with torch.no_grad():
        encoded = model.encode(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        latents = encoded.latents if codes else encoded.latent_dist.mean
        decoded = model.decode(torch.from_numpy(z.transpose(0, 3, 1, 2).copy())).sample
    mean, log_variance = network.apply({"params": params}, images, method="encode")
    pairs = [(mean, latents), (network.apply({"params": params}, z, method="decode"), decoded)]
    pairs += [] if codes else [(log_variance, encoded.latent_dist.logvar)]
    for ours, other in pairs:
        other = other.numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(ours, other, rtol=0, atol=1e-4 * np.abs(other).max())
