"""Reads the folders that diffusers' save_pretrained writes, without torch and without diffusers."""

from diffusion.interop.diffusers.folders import is_folder
from diffusion.interop.diffusers.loading import load

__all__ = ["is_folder", "load"]
