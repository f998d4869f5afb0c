"""A model with the sampler that draws from it, as the flags of sample.py and evaluate.py ask for it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import UInt8

from diffusion import keys
from diffusion.adaptive import Adaptive
from diffusion.brownian import Brownian
from diffusion.caching import Cache
from diffusion.commands import (
    adapting,
    aliases,
    altering,
    caching,
    drawing,
    edits,
    guiding,
    learned,
    own,
    prompts,
    samplers,
    starts,
    students,
)
from diffusion.commands.sources import Source, open_source
from diffusion.errors import InputError
from diffusion.solvers import SamplerTable, resampled
from diffusion.timesteps import GRIDS


class Sampling(NamedTuple):
    """A source and the sampler that draws from it.

    Attributes:
      source: the model.
      table: the sampler.
      sampler, steps, tau: the names and the number that the table was asked for by; a table from a file and an adaptive
        solver have a grid of their own, and steps 0 and tau "".
      edit: what images start from and keep, or None.
      cache: which network calls compute the deep levels, or None for all.
      noise: how the noise of the steps is drawn, or None for new noise in each call.
      altered: what the flags of `altering` say, for the record.
      calls: takes the number of calls of each image that is drawn, where only the images say it; or None.
    """

    source: Source
    table: SamplerTable | Adaptive
    sampler: str
    steps: int
    tau: str
    edit: edits.Edit | None = None
    cache: Cache | None = None
    noise: Brownian | None = None
    altered: Mapping[str, str] = MappingProxyType({})
    calls: list[int] | None = None

    def title(self, num: int) -> str:
        """Says in one line which model draws how many images with what."""
        on = f" on {self.tau}" if self.tau else ""
        edited = "" if self.edit is None else self.edit.words
        classes = guiding.named(self.source.labels, self.source.trained.model)
        drawn = f"{num:,} images{classes}{edited} with {self.table.name}{on}"
        if self.calls is not None:
            return (
                f"{self.source.title()}: {drawn}, as many network calls as each needs, up to {self.table.max_calls:,}"
            )
        whole = "" if self.cache is None else f", {self.cache.whole(self.table.nfe).sum()} of them whole"
        path = "" if self.noise is None else ", brownian noise"
        path += "" if self.table.start is None else ", none for the first step"
        return f"{self.source.title()}: {drawn}, {self.table.nfe} network calls{whole}{path}"

    def notes(self) -> Iterator[str]:
        """Yields what a user may not expect of the images."""
        if self.tau in GRIDS and (steps := len(self.table.tau) - 1) != self.steps:
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
            **self._table_record(),
            "table": self.table.name,
            "grid": self.tau,
            "tau": self.table.tau.tolist(),
            **{k: list(v) if isinstance(v, tuple) else v for k, v in source.settings.items()},
            "labels": list(source.labels),
            "seed": source.seed,
            "generator": keys.GENERATOR,
            "config": source.trained.config.to_dict(),
            **({} if self.edit is None else self.edit.settings),
            **self.altered,
            **({} if self.cache is None else {"cache": np.flatnonzero(self.cache.whole(self.table.nfe)).tolist()}),
        }

    def _table_record(self):
        """Returns what tells a table apart, and of one from a file or a function of the user's all of it."""
        if self.calls is not None:
            return {"adaptive": {name: getattr(self.table, name) for name in ("h_init", "end", "max_calls")}}
        update = hashlib.sha256(self.table.update.tobytes()).hexdigest()
        found = {"update_sha256": update, "nfe": self.table.nfe, "steps": len(self.table.tau) - 1}
        named = samplers.is_file(self.sampler) or samplers.is_own(self.sampler) or self.sampler == learned.LEARNED
        if not named:
            return found
        return {**found, "table_sha256": hashlib.sha256(self.table.to_json().encode()).hexdigest()}

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
        shared = {**self.source.sampling_options(), **edited}
        return shared | ({"cache": self.cache, "noise": self.noise} if self.calls is None else {"calls": self.calls})


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
    if adapting.is_adaptive(sampler):
        tau = edits.started(given, sampler, adapting.grid(given, tau))
        sampling = Sampling(source, adapting.solver(given, source, sampler, tau), sampler, 0, "", calls=[])
    else:
        sampling = _of_steps(given, source, sampler, tau)
    edit = edits.open_edit(given, source.trained.model, source.labels, sampling.table)
    if edit is not None and edit.told is not None:
        model = prompts.with_picture(source.trained.model, edit.told)
        sampling = sampling._replace(source=source._replace(opened=source.opened.with_model(model)))
    return sampling._replace(edit=edit)


def _of_steps(given, source, sampler, tau):
    """Returns the model with a sampler that has a number of steps, and with what flags add to it."""
    if sampler == learned.LEARNED and given.tau is not None:
        raise InputError("a learned table has its own grid; leave out --tau")
    if samplers.is_file(sampler):
        useless = [name for name in ("steps", "tau") if given[name].value is not None]
        if useless:
            raise InputError(f"the table in {sampler} has its own grid; leave out --{useless[0]}")
    steps = samplers.chosen_steps(tau, given.steps, students.default_steps(source.trained))
    sampling = make_sampling(source, sampler, steps, edits.started(given, sampler, tau), given.eta)
    return added(given, sampling, repeats=given.resample)


def words(given: Any) -> dict[str, str]:
    """Returns what the flags that `added` reads ask for, by their names; nothing for what is left as it is."""
    return altering.settings(given) | ({} if given.cache is None else {"cache": given.cache})


def added(given: Any, sampling: Sampling, repeats: int = 1) -> Sampling:
    """Returns the sampling with what flags add to its solver: those of `altering`, and --cache.

    Args:
      given: all flags.
      sampling: from `make_sampling`.
      repeats: as `resampled` takes them.

    Raises:
      InputError: a flag that the table or the model cannot serve.
    """
    source = sampling.source
    model, config = source.trained.model, source.trained.config
    table = altering.with_first(given, config, sampling.table)
    table = table if repeats == 1 else resampled(table, repeats)
    table = altering.with_corrector(given, config, table)
    noise = altering.noise(given, model.schedule, table)
    cache = caching.asked(given.cache, model, table, source.guidance)
    return sampling._replace(table=table, noise=noise, cache=cache, altered=altering.settings(given))
