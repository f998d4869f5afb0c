"""The flags that sample.py and evaluate.py share; `sources` and `samplings` read them."""

import shlex

import numpy as np
from absl import flags

from diffusion import pretrained
from diffusion.commands import prompts, usage
from diffusion.denoiser import CLIPS
from diffusion.guidance import RULES
from diffusion.models.layers import DTYPES


def define_source_flags(draws: bool = True) -> None:
    """Defines the flags that `sources.open_source` reads, and --batch_size.

    Args:
      draws: whether the program draws samples, whose batch size may be "auto"; otherwise it is a whole number.
    """
    usage.group("The model, and how it is asked")
    shipped = ", ".join(f"{pretrained.SHIPPED}-{name}" for name in pretrained.FILES)
    flags.DEFINE_string(
        "workdir",
        None,
        f"Run folder, a file of convert.py, a folder of diffusers or the id of one on the Hugging Face Hub, or a "
        f"model that ships: {shipped}. Default: the newest run in runs/, or else "
        f"{pretrained.SHIPPED}, which is {pretrained.DEFAULT}.",
    )
    flags.DEFINE_string(
        "network",
        None,
        "The model's own network, as package.module:function: says that you trust that code, which is imported.",
    )
    flags.DEFINE_string("ema", None, "Which of the run's config.train.ema_decays, as 0.999. Default: the first.")
    flags.DEFINE_integer("seed", 0, "Image i depends only on the seed and i.", lower_bound=0, upper_bound=2**32 - 1)
    if draws:
        flags.DEFINE_string(
            "batch_size", "64", "Images at a time, or auto for what fits the memory; does not change any image."
        )
        flags.register_validator("batch_size", _is_batch_size, "give a whole number of at least 1, or auto")
    else:
        flags.DEFINE_integer("batch_size", 64, "Images at a time.", lower_bound=1, upper_bound=10**9)
    flags.DEFINE_enum("dtype", None, list(DTYPES), "Of arithmetic and matrices; bfloat16 takes half the memory.")
    flags.DEFINE_string("clip", None, f"x_0 outside [-1, 1]: {', '.join(CLIPS)}. Default: what suits the model.")
    flags.DEFINE_float("dynamic_threshold", None, "Clip x_0 at this quantile of its own pixels instead, as 0.995.")
    usage.group("Text to image, with a folder of diffusers")
    flags.DEFINE_string("prompt", None, "What the images show.")
    flags.DEFINE_string("prompts", None, "A file with a prompt in each line; images take them in turn, one each.")
    flags.DEFINE_string("negative_prompt", None, "What guidance pushes away from. Default: the empty text.")
    flags.DEFINE_string("size", None, "Of the images in pixels, as 512, or 512x768 for height and width.")
    flags.DEFINE_list("lora", None, "LoRA files to add, FILE or FILE:SCALE, as style.safetensors:0.7.")
    usage.group("Classes and guidance")
    flags.DEFINE_list(
        "labels", None, "Classes that images take in turn, by name or number: frog,cat or 0,3. Default: all."
    )
    flags.DEFINE_float("guidance_scale", 1.0, "How far to push towards the class; 1 is no guidance.")
    flags.DEFINE_list("guidance_interval", None, "LOW,HIGH: guide only at these timesteps.")
    flags.DEFINE_float("guidance_rescale", 0.0, "0..1, how far to bring guided outputs back to their usual spread.")
    flags.DEFINE_string("guidance_rule", "cfg", f"One of {', '.join(RULES)}; options follow a colon: apg:eta=0.5.")
    flags.DEFINE_string(
        "guidance_model",
        None,
        "Run folder or file of a weaker model to push away from (autoguidance); needs no classes.",
    )


def define_cache_flag() -> None:
    """Defines the flag of the programs that draw samples with a network's deep levels kept from call to call."""
    usage.group("Less work in a network call")
    flags.DEFINE_string(
        "cache",
        None,
        "Compute the deep levels of the network only in every k-th call, as 3, or in the calls of a list with commas, "
        "as 0,3,6,9 (0, for the first alone); the others take what they gave last. Less time, other images.",
    )


def define_sampler_flags() -> None:
    """Defines the flags that `samplings.open_sampling` reads besides those of `define_source_flags`."""
    usage.group("The sampler")
    flags.DEFINE_integer("steps", None, "Number of steps S. Default: config.sample.steps.")
    flags.DEFINE_string(
        "sampler",
        None,
        "A sampler of --list, options after a colon: dpm_solver_pp:order=3; a function of your own, as "
        "package.module:function; or the file of a table. Default: config.sample.sampler.",
    )
    flags.DEFINE_float("eta", None, "Short for the sampler's option eta: 0 is deterministic, 1 is DDPM.")
    flags.DEFINE_string(
        "tau", None, "Which timesteps: a grid of --list, or explicit:times=1000,500,250. Default: config.sample.tau."
    )


def _is_batch_size(text):
    return text == "auto" or (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= 1)


def as_asked() -> list[str]:
    """Returns the flags of the command line that say which model is asked and how, for the same in another program."""
    names = ["workdir", "ema", "clip", "dynamic_threshold", "network", *prompts.FLAGS]
    names += [name for name in flags.FLAGS if name.startswith("guidance_")]
    given = [flags.FLAGS[name] for name in names if flags.FLAGS[name].value != flags.FLAGS[name].default]
    return [shlex.quote(f"--{flag.name}={','.join(map(str, np.ravel(flag.value)))}") for flag in given]
