"""Published configurations are described from their config files, with the published numbers of parameters."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from diffusion import keys
from diffusion.autoencoder import make_network
from diffusion.interop.diffusers import autoencoders, clip_text, dit, unet2d, unet2d_condition
from diffusion.models import CLIPText, Transformer, UNet2D, UNet2DCondition

FOLDER = Path(__file__).parent / "published"

PUBLISHED = {
    "ddpm-cifar10-32/unet": 35_746_307,
    "ddpm-celebahq-256/unet": 113_673_219,
    "stable-diffusion-v1-5/unet": 859_520_964,
    "stable-diffusion-v1-5/vae": 83_653_863,
    "stable-diffusion-v1-5/text_encoder": 123_060_480,
    "stable-diffusion-2-1/unet": 865_910_724,
    "stable-diffusion-2-1/vae": 83_653_863,
    "stable-diffusion-2-1/text_encoder": 340_387_840,
    # DiT's repository counts 675,129,632 with the 256 x 1152 fixed sines of the places, which are no parameters here.
    "DiT-XL-2-256/transformer": 675_129_632 - 256 * 1152,
    "ldm-celebahq-256/unet": 274_056_163,
    # Counted by diffusers, as tests/agreement does.
    "cd-imagenet64/unet": 295_899_267,
    "ldm-celebahq-256/vqvae": 55_322_782,
}


def shapes(config):
    """Shapes of the parameters of the network that a config describes."""
    kind = config.get("_class_name", "CLIPTextModel")
    if kind == "CLIPTextModel":
        return clip_text.shapes_of(CLIPText(**clip_text.read_fields("it", config)))
    if kind in autoencoders.DEFAULTS:
        found = autoencoders.fields_of("it", config, autoencoders.DEFAULTS[kind])
        size = found["sample_size"]
        network, arguments = make_network(autoencoders.read_fields("it", kind, found), (size, size, 3)), ()
        shape = (size, size, 3)
    else:
        networks = {"UNet2DModel": (unet2d, UNet2D), "UNet2DConditionModel": (unet2d_condition, UNet2DCondition)}
        reader, module = networks.get(kind, (dit, Transformer))
        fields, found = reader.read_fields("it", config)
        classes = found.get("num_class_embeds") or found.get("num_embeds_ada_norm") or 0
        told = {} if module is UNet2DCondition else {"num_classes": classes}
        told |= {"null_class": False} if module is UNet2D else {}
        network, arguments = module(**fields, **told, out_channels=found["out_channels"]), (jnp.ones(1),)
        shape = unet2d.image_shape("it", found, None)
    return jax.eval_shape(network.init, keys.make(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32), *arguments)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_has_the_published_number_of_parameters(name):
    config = json.loads((FOLDER / f"{name}.json").read_text())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(config))) == PUBLISHED[name]
