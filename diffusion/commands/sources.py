"""Which model is sampled and how, as the flags of sample.py and evaluate.py ask for it."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import UInt8

from diffusion import keys
from diffusion.caching import Cache
from diffusion.commands import (
    aliases,
    caching,
    drawing,
    edits,
    guiding,
    latents,
    learned,
    opening,
    own,
    prompts,
    rollouts,
    samplers,
    starts,
    students,
)
from diffusion.commands.datasets import load_data_of
from diffusion.denoiser import Options, check_options
from diffusion.errors import InputError
from diffusion.guidance import Guidance
from diffusion.learning import analytic, paths
from diffusion.model import Trained
from diffusion.sampling import check_rule
from diffusion.sealed import digest
from diffusion.solvers import SamplerTable
from diffusion.timesteps import GRIDS

PATHS = 64
"""How many of a teacher's paths --tau=dp_path looks at."""


class Source(NamedTuple):
    """A trained model and how it is asked, whatever the sampler.

    Attributes:
      opened: the model, where it is from and what it is called.
      sha256: of its parameters, which tells models apart whatever they are called.
      settings: clip, thresholding and guidance as the flags give them, for the record.
      guidance: what these say of guidance.
      labels: classes that the images take in turn; () for an unconditional model.
      seed: of the random key.
    """

    opened: opening.Opened
    sha256: str
    settings: dict[str, Any]
    guidance: Guidance
    labels: tuple[int, ...]
    seed: int

    @property
    def name(self) -> str:
        """What people call the model."""
        return self.opened.name

    @property
    def home(self) -> Path:
        """Where files about it go by default."""
        return self.opened.home

    @property
    def trained(self) -> Trained:
        """The model."""
        return self.opened.trained

    def title(self) -> str:
        """Says which model this is."""
        return f"{self.name}, step {self.trained.step:,}"

    def sampling_options(self) -> dict[str, Any]:
        """Returns what goes to `diffusion.sample` besides the table."""
        asked = {name: self.settings[name] for name in ("clip", "dynamic_threshold")}
        return {**asked, "guidance": self.guidance}

    def facts(self) -> dict[str, Any]:
        """Returns what a table that is learned for this model, asked in this way, is learned for."""
        asked = self.settings["clip"], self.guidance, self.settings["dynamic_threshold"]
        return learned.facts_of(self.trained.model, self.sha256, *asked, self.weaker)

    @property
    def weaker(self) -> str | None:
        """Returns the SHA-256 of the model that guidance pushes away from, or None where there is none."""
        return self.settings.get("guidance_model_sha256")

    def resources(self) -> samplers.Resources:
        """Returns what samplers may need that is estimated on the model and its data."""

        def gamma(tau):
            students.check_is_denoiser(self.trained.config, "analytic_dpm")
            data = load_data_of(self.trained)
            return analytic.cached_gamma(self.home, self.trained, self.sha256, data, tau, say=print)

        def path_costs(tau):
            students.check_is_denoiser(self.trained.config, "tau found on the model")
            print(f"following {PATHS} paths through {len(tau) - 1} network calls")
            model, key = self.trained.model, rollouts.key_of(self.seed, "path")
            (noises,) = rollouts.batches(model, self.guidance, self.labels, key, range(PATHS), PATHS)
            return paths.path_costs(
                rollouts.asked(self.trained, self.settings, self.guidance), model.schedule, tau, noises
            )

        found = {"gamma": gamma, "path_costs": path_costs}
        if self.trained.model.space.autoencoder is None:
            found["max_cov"] = lambda tau: 1.0  # pixels lie in [-1, 1], and so no variance of x_0 exceeds 1
        return found


class Sampling(NamedTuple):
    """A source and the sampler that draws from it.

    Attributes:
      source: the model.
      table: the sampler.
      sampler, steps, tau: the names and the number that the table was asked for by; a table from a file has its own
        grid, and steps 0 and tau "".
      edit: what images start from and keep, or None.
      cache: which network calls compute the deep levels, or None for all.
    """

    source: Source
    table: SamplerTable
    sampler: str
    steps: int
    tau: str
    edit: edits.Edit | None = None
    cache: Cache | None = None

    def title(self, num: int) -> str:
        """Says in one line which model draws how many images with what."""
        on = f" on {self.tau}" if self.tau else ""
        edited = "" if self.edit is None else self.edit.words
        classes = guiding.named(self.source.labels, self.source.trained.model)
        drawn = f"{num:,} images{classes}{edited} with {self.table.name}{on}"
        whole = "" if self.cache is None else f", {self.cache.whole(self.table.nfe).sum()} of them whole"
        return f"{self.source.title()}: {drawn}, {self.table.nfe} network calls{whole}"

    def notes(self) -> Iterator[str]:
        """Yields what a user may not expect of the images."""
        steps = len(self.table.tau) - 1
        if self.tau in GRIDS and steps != self.steps:
            yield f"tau {self.tau} makes {steps} steps of --steps={self.steps}"
        yield from learned.notes(self.table, self.source.facts())
        model = self.source.trained.model
        if not self.table.facts:  # a learned table knows where it starts
            noise, clip = self.edit is None or self.edit.from_noise, self.source.settings["clip"]
            yield from starts.start_notes(self.table, model.schedule, model.prediction, clip, noise=noise)
        yield from () if self.edit is None else self.edit.notes

    def record(self) -> dict[str, Any]:
        """Returns everything that determines image number i, for JSON."""
        source = self.source
        return {
            "run": source.name,
            "checkpoint_step": source.trained.step,
            "ema": source.trained.ema,
            "weights_sha256": source.sha256,
            "sampler": self.sampler,
            "update_sha256": hashlib.sha256(self.table.update.tobytes()).hexdigest(),
            **self._file_record(),
            "table": self.table.name,
            "grid": self.tau,
            "steps": len(self.table.tau) - 1,
            "tau": self.table.tau.tolist(),
            "nfe": self.table.nfe,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in source.settings.items()},
            "labels": list(source.labels),
            "seed": source.seed,
            "generator": keys.GENERATOR,
            "config": source.trained.config.to_dict(),
            **({} if self.edit is None else self.edit.settings),
            **({} if self.cache is None else {"cache": np.flatnonzero(self.cache.whole(self.table.nfe)).tolist()}),
        }

    def _file_record(self):
        """Returns what tells a table from a file or a function of the user's apart from another of the same name."""
        named = samplers.is_file(self.sampler) or samplers.is_own(self.sampler) or self.sampler == learned.LEARNED
        if not named:
            return {}
        return {"table_sha256": hashlib.sha256(self.table.to_json().encode()).hexdigest()}

    def draw(self, ids: Sequence[int], mesh: Mesh, batch_size: int) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
        """Yields the images with these numbers, batch by batch."""
        (model, params, *_), source = self.source.trained, self.source
        shared = {"seed": source.seed, "labels": source.labels, "mesh": mesh, "batch_size": batch_size}
        images = drawing.generate(model, params, self.table, ids, **shared, **self._options())
        return images if self.edit is None else map(self.edit.paste, images)

    def memory(self, count: int) -> int:
        """Returns how many bytes the compiled program takes for so many images."""
        (model, params, *_), source = self.source.trained, self.source
        return drawing.working_memory(model, params, self.table, count, labels=source.labels, **self._options())

    def picture(self, images: UInt8[np.ndarray, "N H W C"], ids: Sequence[int]) -> UInt8[np.ndarray, "H W C"]:
        """Returns a sheet of images with these numbers, see `drawing.picture`."""
        return drawing.picture(images, ids, self.source.trained.model.conditions, self.source.labels)

    def frames(self, ids: Sequence[int]) -> UInt8[np.ndarray, "stages+1 N H W C"]:
        """Returns what these images look like before each network call, and at the end."""
        (model, params, *_), source = self.source.trained, self.source
        shared = {"seed": source.seed, "labels": source.labels}
        passed = drawing.frames(model, params, self.table, ids, **shared, **self._options())
        return passed if self.edit is None else np.concatenate([passed[:-1], self.edit.paste(passed[-1:])])

    def _options(self):
        """Returns what goes to `drawing` besides the table."""
        edited = {} if self.edit is None else self.edit.sampling_options()
        return {**self.source.sampling_options(), **edited, "cache": self.cache}


def open_source() -> Source:
    """Returns the model that the flags ask for.

    Raises:
      InputError: a wrong flag, no such run, or a damaged checkpoint.
    """
    given = flags.FLAGS
    asked = prompts.texts(given)
    opened = opening.open_model(given.workdir, given.ema or "")
    guides = Guidance(scale=given.guidance_scale, rule=given.guidance_rule).acts() and given.guidance_model is None
    opened = opened._replace(trained=prompts.told(given, opened.trained, asked, guides))
    trained = opened.trained
    clip = trained.clip if given.clip is None else given.clip
    check_options(trained.model.prediction, Options(clip, given.dynamic_threshold))
    if clip != "none" or given.dynamic_threshold is not None:
        latents.check_pixels(trained.model, f"clip {clip}" if given.dynamic_threshold is None else "dynamic_threshold")
    labels = guiding.labels(given.labels, trained.model)
    guide = guiding.asked(given)
    settings = {"clip": clip, "dynamic_threshold": given.dynamic_threshold, **guiding.settings(guide)}
    settings |= prompts.settings(trained.model, sized=given.size is not None)
    check_rule(trained.model.prediction, guide if guide.acts() else None)
    guiding.check_effect(given, trained, guide.acts())
    sha256, configs = opened.sha256 or digest(trained.params), [trained.config]
    if given.guidance_model is not None:
        weaker, settings["guidance_model_sha256"] = opening.open_weaker(given.guidance_model, trained.model)
        if settings["guidance_model_sha256"] == sha256:
            raise InputError("--guidance_model is the model itself, which changes nothing; name a weaker one")
        second = {"reference_fn": weaker.model.apply_fn, "reference_split": weaker.model.split}
        guide = guide.replace(reference_params=weaker.params, **second)
        configs.append(weaker.config)
    own.check_used(given.network, *configs)
    return Source(opened, sha256, settings, guide, labels, given.seed)


def at_scale(source: Source, scale: float) -> Source:
    """Returns the source with another scale of the guidance; raises InputError where the model cannot be guided."""
    guidance = source.guidance.replace(scale=scale)
    guidance.check(cond=None, acts=False)
    model = source.trained.model
    if model.guides_itself:
        model.conditions.check_scale(scale)
    elif guidance.reference_fn is None:
        guiding.check_learned(source.trained, "guidance")
    return source._replace(guidance=guidance, settings={**source.settings, "guidance_scale": scale})


def make_sampling(source: Source, sampler: str, steps: int, tau: str, eta: float | None = None) -> Sampling:
    """Returns a source with a sampler by name; eta is short for the option of that name.

    Raises:
      InputError: an unknown name, a value out of its range, or a sampler that the model cannot serve.
    """
    model = source.trained.model
    if samplers.is_file(sampler):
        steps, tau = 0, ""  # the table has its own grid
    if sampler == learned.LEARNED:
        table, tau = _learned_table(source, steps, tau, eta), ""
    else:
        table = samplers.make_table(model.schedule, sampler, steps, tau, eta=eta, resources=source.resources())
    samplers.check_fits(table, model)
    students.check_sampler(source.trained.config, source.trained.step, model.schedule, table)
    if source.guidance.acts():
        source.guidance.scales(table.t)  # refuses an interval that holds none of these times
    return Sampling(source, table, sampler, steps, tau)


def _learned_table(source, steps, tau, eta):
    """Returns the table of so many calls that was learned for the model; it has its own grid, and no eta."""
    if eta is not None:
        raise InputError("--eta does nothing for a learned table; leave it out")
    table = learned.find(source.opened, steps, source.guidance, source.weaker)
    return samplers.checked(source.trained.model.schedule, table, table.name, "learn it again")


def open_sampling() -> Sampling:
    """Returns the model and the sampler that the flags ask for; raises as `open_source` and `make_sampling`."""
    given = flags.FLAGS
    edits.check(given)
    source = open_source()
    config = source.trained.config.sample
    sampler = own.stored("sampler", "sampler", given.sampler, config.sampler)
    tau = aliases.grid(config.tau if given.tau is None else given.tau)
    sampler, tau = aliases.chosen(sampler, tau, tau_given=given.tau is not None)
    if sampler == learned.LEARNED and given.tau is not None:
        raise InputError("a learned table has its own grid; leave out --tau")
    if samplers.is_file(sampler):
        useless = [name for name in ("steps", "tau") if given[name].value is not None]
        if useless:
            raise InputError(f"the table in {sampler} has its own grid; leave out --{useless[0]}")
    steps = samplers.chosen_steps(tau, given.steps, students.default_steps(source.trained))
    sampling = make_sampling(source, sampler, steps, edits.started(given, sampler, tau), given.eta)
    table, model = edits.repeated(given, sampling.table), source.trained.model
    cache = caching.asked(given.cache, model, table, source.guidance)
    edit = edits.open_edit(given, model, source.labels, table)
    if edit is not None and edit.told is not None:
        source = source._replace(opened=source.opened.with_model(prompts.with_picture(model, edit.told)))
    return sampling._replace(source=source, table=table, edit=edit, cache=cache)
