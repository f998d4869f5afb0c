"""Which model is asked and how, whatever the sampler, as the flags of the programs ask for it."""

from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from diffusion.commands import (
    guiding,
    latents,
    learned,
    opening,
    own,
    prompts,
    rollouts,
    samplers,
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
