"""Writes a trained model of ours as a folder that diffusers' from_pretrained reads."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.numpy
from ml_collections import ConfigDict

from diffusion import files, options, schedules
from diffusion.autoencoder import TrainedAutoencoder
from diffusion.errors import InputError
from diffusion.interop.diffusers import dit, folders, schedulers, unet, unet2d
from diffusion.interop.diffusers.autoencoders import write_autoencoder
from diffusion.interop.diffusers.state import Written, to_tensors
from diffusion.model import TRANSFORMER, UNET, UNET2D, UNET2D_CONDITION, Model, Trained
from diffusion.objectives import choice
from diffusion.solvers import SOLVERS
from diffusion.solvers.ddim import VARIANCES, ddim, ddpm
from diffusion.timesteps import GRIDS, leading

_CLIP = {"recompute": True, "keep_eps": True, "none": False}


def save(trained: Trained, folder: str | os.PathLike) -> None:
    """Writes a model as a pipeline: a network, a DDPMScheduler or DDIMScheduler, and the autoencoder of its latents.

    The scheduler is DDPM's where the model's own sampler is ddpm, or else DDIM's, which other schedulers of diffusers
    take over by from_config. A network of `models.UNet` is written with its times from 1 folded into a layer, so that
    it is told the times from 0 that diffusers counts.

    Args:
      trained: the model; of latents it becomes an LDMPipeline, or with a transformer a DiTPipeline.
      folder: where it is written, with its parts; an older model of the same files there gives way.

    Raises:
      InputError: diffusers has no network, autoencoder, schedule or prediction like these, and the field is named; or
        the folder holds something else, as the weights of a larger model. Nothing is written then.
    """
    model, transformer = trained.model, trained.config.network == TRANSFORMER
    scheduler = _scheduler(trained.config, model)
    parts, kind = {"transformer" if transformer else "unet": _network(trained)}, scheduler["_class_name"]
    index = {"_class_name": kind.replace("Scheduler", "Pipeline"), "scheduler": ["diffusers", kind]}
    if model.space.autoencoder is not None:
        index["_class_name"] = "DiTPipeline" if transformer else "LDMPipeline"
        parts["vae" if transformer else "vqvae"] = write_autoencoder(model.space.autoencoder)
    if transformer:
        index["id2label"] = dict(enumerate(model.conditions.names))
    index |= {name: ["diffusers", part.config["_class_name"]] for name, part in parts.items()}
    contents = {}
    for name, part in parts.items():
        contents |= _files(part, f"{name}/")
    contents[f"scheduler/{folders.SCHEDULER}"] = _text(scheduler)
    _write(Path(folder).expanduser(), contents | {folders.INDEX: _text(index)})


def save_autoencoder(trained: TrainedAutoencoder, folder: str | os.PathLike) -> None:
    """Writes an autoencoder as an AutoencoderKL or a VQModel.

    Args:
      trained: the autoencoder.
      folder: where it is written; an older one there gives way.

    Raises:
      InputError: diffusers has none like this, or the folder holds something else. Nothing is written then.
    """
    _write(Path(folder).expanduser(), _files(write_autoencoder(trained, shift=True), ""))


def _files(part, place):
    """Returns the files of a network, its config last."""
    tensors = safetensors.numpy.save(part.tensors, {"format": "pt"})
    return {f"{place}{folders.STEM}.safetensors": tensors, f"{place}{folders.CONFIG}": _text(part.config)}


def _text(content):
    content = {**content, "_diffusers_version": unet2d.VERSION}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _write(folder, contents):
    """Writes files, the one last that says what they are, into a folder that holds no others."""
    for name in contents:
        files.remove_temporaries((folder / name).parent, re.escape(Path(name).name), folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in contents:
            raise InputError(f"{folder} holds {name}, which is no part of this model; name a new folder")
    # Without its index it is no pipeline, so half of one is never taken for the whole.
    files.remove(folder / list(contents)[-1], folder)
    for name, content in contents.items():
        files.make_folder((folder / name).parent, folder)
        files.write_atomically(folder / name, content, folder)


def _network(trained) -> Written:
    """Returns the UNet2DModel or DiTTransformer2DModel that computes what a model computes."""
    config, model = trained.config, trained.model
    if choice.is_student(config.train.objective):
        raise InputError(f"diffusers has no students of objective {config.train.objective}; give their teacher")
    if config.network == UNET2D:
        fields, params = dict(config.unet2d), trained.params
        if fields["time_scale"] != 1 or fields["time_shift"] != -1:
            raise InputError(
                f"config.unet2d.time_scale is {fields['time_scale']} and time_shift {fields['time_shift']}; diffusers "
                "tells its networks t - 1: give 1 and -1"
            )
    elif config.network == UNET:
        fields, params = unet.fields_and_params(config.model, trained.params, model.image_shape)
    elif config.network == TRANSFORMER and model.space.autoencoder is not None:
        return dit.write(config.transformer, trained.params, model.image_shape, config.model.num_classes)
    elif config.network == UNET2D_CONDITION:
        raise InputError("a text-to-image model is read from a folder of diffusers and not written; copy that folder")
    else:
        pixels = " for pixels" if config.network == TRANSFORMER else ""
        raise InputError(
            f"config.network is {config.network!r}, which diffusers does not have{pixels}; train with "
            f"config.network={UNET2D}"
        )
    written = unet2d.write_config(fields, config, model.image_shape, model.learned_variance)
    return Written(written, to_tensors(params, unet2d.name_of))


_BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
_PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def _scheduler(config: ConfigDict, model: Model) -> dict[str, Any]:
    """Returns the config of the scheduler that samples a model."""
    if model.prediction not in _PREDICTION_TYPES:
        raise InputError(
            f"config.train.prediction is {model.prediction!r}, which cannot be written for diffusers; those that can: "
            f"{', '.join(_PREDICTION_TYPES)}"
        )
    sampler = config.sample.sampler
    name, clip = sampler.partition(":")[0], config.sample.clip or model.space.clip
    shared = {
        **_betas(config.schedule),
        "prediction_type": _PREDICTION_TYPES[model.prediction],
        "clip_sample": _CLIP[clip],
        **_spacing(config.sample.tau),
    }
    # DiTPipeline takes the variance off what the network returns; elsewhere only this scheduler does.
    learned = model.learned_variance and config.network != TRANSFORMER
    if name == "ddpm" or learned:
        variance = "learned" if learned else _options(sampler, ddpm)["variance"]
        if variance == "learned" and not learned:
            raise InputError(
                f"config.sample.sampler is {config.sample.sampler!r}; DiTPipeline leaves the network's variance out: "
                "give ddpm:variance=small"
            )
        kind = dict(zip(VARIANCES, ("fixed_small", "fixed_large", "learned_range"), strict=True))[variance]
        return {"_class_name": "DDPMScheduler", **shared, "variance_type": kind}
    end = _options(sampler, ddim)["end"] if name == "ddim" else 0
    if end not in (0, 1):
        raise InputError(f"config.sample.sampler is {config.sample.sampler!r}; in diffusers end is 0 or 1")
    return {"_class_name": "DDIMScheduler", **shared, "set_alpha_to_one": end == 0}


def replaced(trained: Trained) -> list[str]:
    """Says what the scheduler that `save` writes has in the place of a model's own sampler, grid and clip.

    Raises:
      InputError: as `save` does for a scheduler.
    """
    sample, scheduler = trained.config.sample, _scheduler(trained.config, trained.model)
    name = scheduler["_class_name"]
    found = schedulers.read_scheduler(name, scheduler)
    clip = sample.clip or trained.model.space.clip
    # "trailing" is the grid of `uniform`.
    pairs = {
        "sampler": (_plain(sample.sampler, SOLVERS), _plain(found.sampler, SOLVERS)),
        "grid": (_plain(sample.tau, GRIDS).replace("uniform", "trailing"), _plain(found.tau, GRIDS)),
        "clip": (clip, found.clip),
    }
    return [
        f"its {what} {ours} becomes {theirs}, of {name}" for what, (ours, theirs) in pairs.items() if ours != theirs
    ]


def _plain(text, known):
    """Returns a choice without the options that are at their defaults, or the text where it is no choice of these."""
    try:
        return options.write(options.parse("choice", text, known, leading=2), leading=2)
    except InputError:
        return text


def _spacing(tau: str) -> dict[str, Any]:
    """Returns the fields of a grid; one that no scheduler has becomes trailing, which is `uniform`."""
    name = tau.partition(":")[0]
    if name == "leading":
        chosen = options.parse("tau", tau, {name: leading}, leading=2).complete(leading=2)
        return {"timestep_spacing": name, "steps_offset": chosen["offset"]}
    return {"timestep_spacing": "linspace" if name == "linspace" else "trailing"}


def _options(sampler, function):
    """Returns all options of a sampler that is named."""
    return options.parse("sampler", sampler, {function.__name__: function}, leading=2).complete(leading=2)


def _betas(text: str) -> Mapping[str, Any]:
    """Returns the fields of a schedule."""
    chosen = options.parse("config.schedule", text, schedules.SCHEDULES, leading=0)
    if chosen.name not in _BETA_SCHEDULES:
        raise InputError(
            f"config.schedule is {text!r}, which cannot be written for diffusers; those that can: "
            f"{', '.join(_BETA_SCHEDULES)}"
        )
    given = chosen.complete(leading=0)
    if chosen.name == "cosine" and (given["offset"], given["max_beta"]) != (0.008, 0.999):
        raise InputError(f"config.schedule is {text!r}; diffusers has the cosine one with its defaults only")
    ends = {end: given[end] for end in ("beta_start", "beta_end") if end in given}
    betas = {"num_train_timesteps": given["num_timesteps"], "beta_schedule": _BETA_SCHEDULES[chosen.name], **ends}
    return betas | ({"rescale_betas_zero_snr": True} if given["zero_snr"] else {})
