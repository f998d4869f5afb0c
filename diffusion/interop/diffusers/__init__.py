"""Reads and writes the folders of diffusers' save_pretrained, without torch and without diffusers."""

from diffusion.interop.diffusers.autoencoders import is_autoencoder, load_autoencoder
from diffusion.interop.diffusers.folders import is_folder, refuse_part
from diffusion.interop.diffusers.hub import is_id
from diffusion.interop.diffusers.loading import load
from diffusion.interop.diffusers.saving import replaced, save, save_autoencoder

__all__ = [
    "is_autoencoder",
    "is_folder",
    "is_id",
    "load",
    "load_autoencoder",
    "refuse_part",
    "replaced",
    "save",
    "save_autoencoder",
]
