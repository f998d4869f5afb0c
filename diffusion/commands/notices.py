"""Words of train.py: what is trained, what a user may not expect of it, and what comes next."""

import shlex
from collections.abc import Iterator

import jax

from diffusion import data, devices, options
from diffusion.commands import forecast, own, starts, usage
from diffusion.commands.experiment import Experiment
from diffusion.errors import printable
from diffusion.model import sampling_clip
from diffusion.training import run_folder
from diffusion.training.state import TrainState

SHOWN_CLASSES = 12
"""The most classes that the log names."""


def introduction(experiment: Experiment, state: TrainState, num_steps: int) -> Iterator[str]:
    """Yields lines on what is trained on what, and on what a user may not expect of so many steps of it."""
    images, model = experiment.dataset.images, experiment.model
    count = sum(p.size for p in jax.tree.leaves(state.params))
    yield f"{len(images):,} images {images.shape[1:]}, {count:,} parameters, {devices.describe(experiment.mesh)}"
    if (autoencoder := model.space.autoencoder) is not None:
        named = f"{printable(experiment.config.latents)}, step {autoencoder.step:,}"
        yield f"in the latents {model.space.shape} of {named}, SHA-256 {autoencoder.sha256[:8]}"
    if experiment.teacher is not None:
        yield f"a student of {printable(experiment.config.teacher)}, step {experiment.teacher.step:,}"
    if (stages := experiment.stages()) is not None:
        parts = zip(stages.steps, stages.begins, strict=True)
        yield f"stages: {', '.join(f'{steps} DDIM steps from step {begin:,}' for steps, begin in parts)}"
    yield from map(printable, experiment.dataset.notes())
    yield from describe_classes(experiment.dataset, model.conditions is not None)
    if jax.process_count() > 1:  # what the other machines do is not known here
        return
    seconds = forecast.training_seconds(experiment.model, experiment.plan.batch_size, num_steps, experiment.mesh)
    if seconds > forecast.LONG:
        yield (
            f"note: {num_steps:,} steps would take about {seconds / 86400:,.0f} days on this machine. Recipes for a "
            "CPU are configs/images_small.py and configs/small.py; a training gets shorter by smaller "
            "config.train.num_steps, train.batch_size, model.width, model.num_blocks or data.size"
        )


def start_notes(experiment: Experiment) -> Iterator[str]:
    """Yields what is wrong with the start of the samples that are shown while training."""
    table, model = experiment.table, experiment.model
    if table is not None:
        clip = sampling_clip(experiment.config, model)
        yield from starts.start_notes(table, model.schedule, model.prediction, clip)


def describe_classes(dataset: data.Dataset, told: bool) -> list[str]:
    """Says in one line which classes the data has, how many images each, and whether the network is told them."""
    if not dataset.class_names:
        return []
    shown = [f"{printable(name)} ({count:,})" for name, count in dataset.counts().items()]
    if len(shown) > SHOWN_CLASSES:
        shown = [*shown[: SHOWN_CLASSES - 1], "...", shown[-1]]
    kind = "classes" if told else "classes that the network is not told"
    return [f"{kind}: {', '.join(shown)}"]


def next_command(experiment: Experiment, folder: run_folder.RunFolder) -> str:
    """Says which command draws samples from the run, or measures an autoencoder, as the user would start it."""
    config = experiment.config
    if experiment.autoencoder is not None:
        called = f"python {usage.called('evaluate')} --workdir={shlex.quote(str(folder.path))}"
        return f"measure what it gives back with: {called}"
    named = f"--workdir={shlex.quote(str(folder.path))}{own.flag(config.network)}"
    if options.own_name(config.sample.sampler):
        named += f" --sampler={shlex.quote(config.sample.sampler)}"
    conditions = experiment.model.conditions
    if conditions is not None and (config.train.label_dropout > 0 or conditions.scales is not None):
        scale = 2 if conditions.scales is None else min(2, conditions.scales[1])
        named += f" --labels={shlex.quote(conditions.names[0])} --guidance_scale={scale:g}"
    return f"draw pictures with: python {usage.called('sample')} {named}"
