"""How to sample a trained run: the flags that sample.py and evaluate.py share, and what they ask for."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import UInt8

from diffusion import pretrained
from diffusion.commands.drawing import generate, trajectory
from diffusion.commands.experiment import Trained, load_data, load_trained, make_table, make_tau
from diffusion.denoiser import CLIPS, GUIDANCE_RULES, Options, check_options
from diffusion.errors import InputError
from diffusion.files import digest
from diffusion.learning import analytic
from diffusion.pretrained import weights
from diffusion.sampling import check_prediction, check_variance
from diffusion.solvers import ESTIMATED_SOLVERS, SOLVERS, SamplerTable
from diffusion.timesteps import GRIDS
from diffusion.training import run_folder

SHIPPED = "digits"
"""The model used where nothing has been trained."""

MAX_GAIN = 100
"""Errors of the network that one step multiplies by more than this are all that is left of an image."""


class Source(NamedTuple):
    """A trained model and how it is asked, whatever the sampler.

    Attributes:
      name: the run folder or weights file, for people.
      home: where files about it go by default.
      trained: the model.
      weights: SHA-256 of its weights, by which models are told apart whatever they are called.
      options: what goes to `diffusion.sample` besides the table: clip, guidance and thresholding.
      labels: classes that the images take in turn; () for an unconditional model.
      seed: of the random key.
    """

    name: str
    home: Path
    trained: Trained
    weights: str
    options: dict[str, Any]
    labels: tuple[int, ...]
    seed: int


class SamplingRun(NamedTuple):
    """A source and the sampler that draws from it: a table, on the grid named tau with steps steps asked for."""

    source: Source
    table: SamplerTable
    sampler: str
    steps: int
    tau: str

    def title(self, num: int) -> str:
        """One line: which model draws how many images with what."""
        source = f"{self.source.name}, step {self.source.trained.step:,}"
        return f"{source}: {num:,} images with {self.table.name} on {self.tau}, {self.table.nfe} network calls"

    def notes(self) -> Iterator[str]:
        """What a user may not expect of the images."""
        table, schedule = self.table, self.source.trained.model.schedule
        steps, start = len(table.tau) - 1, table.tau[0]
        if self.tau in GRIDS and steps != self.steps:
            yield f"tau {self.tau} makes {steps} steps of --steps={self.steps}"
        if start < schedule.num_timesteps:
            yield (
                f"tau starts at {start:g}, below T = {schedule.num_timesteps}: starting from pure noise leaves out the "
                f"signal there, {schedule.powers(start)[0]:.2g} of the power"
            )
        gain = np.abs(table.update[:, 0]).max()
        if gain > MAX_GAIN:
            yield (
                f"one step of {table.name} multiplies the network's errors by {gain:,.0f}, as the signal at t = "
                f"{start:g} is {table.signal[0]:.1e}: expect noise; start lower, or take another sampler"
            )

    def record(self) -> dict[str, Any]:
        """Everything that determines image number i, for JSON."""
        source = self.source
        return {
            "run": source.name,
            "checkpoint_step": source.trained.step,
            "ema": source.trained.ema,
            "weights_sha256": source.weights,
            "sampler": self.sampler,
            "update_sha256": hashlib.sha256(self.table.update.tobytes()).hexdigest(),
            "table": self.table.name,
            "grid": self.tau,
            "steps": len(self.table.tau) - 1,
            "tau": self.table.tau.tolist(),
            "nfe": self.table.nfe,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in source.options.items()},
            "labels": list(source.labels),
            "seed": source.seed,
            "config": source.trained.config.to_dict(),
        }

    def draw(self, ids: Sequence[int], mesh: Mesh, batch_size: int) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
        """The images with these numbers, batch by batch."""
        (model, params, *_), source = self.source.trained, self.source
        shared = {"seed": source.seed, "labels": source.labels, "mesh": mesh, "batch_size": batch_size}
        return generate(model, params, self.table, ids, **shared, **source.options)

    def trajectory(self, ids: Sequence[int]) -> UInt8[np.ndarray, "stages+1 N H W C"]:
        """What these images look like before each network call, and at the end."""
        (model, params, *_), source = self.source.trained, self.source
        return trajectory(model, params, self.table, ids, seed=source.seed, labels=source.labels, **source.options)


def define_source_flags() -> None:
    """The flags that `open_source` reads."""
    flags.DEFINE_string(
        "workdir",
        None,
        f"Run folder, or a file of convert.py. Default: the newest run in runs/, or the {SHIPPED} model that ships.",
    )
    flags.DEFINE_string("ema", None, "Which of the run's config.train.ema_decays, as 0.999. Default: the first.")
    flags.DEFINE_integer("seed", 0, "Image i depends on the seed and i alone.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_string(
        "clip", None, f"x_0 outside [-1, 1]: {', '.join(CLIPS)}. Default: config.sample.clip (recompute)."
    )
    flags.DEFINE_float("dynamic_threshold", None, "Clip x_0 at this quantile of its own pixels instead, as 0.995.")
    flags.DEFINE_list("labels", None, "Classes that the images take in turn, as 3 or 0,1,2. Default: all, in turn.")
    flags.DEFINE_float("guidance_scale", 1.0, "Classifier-free guidance; 1 is none.")
    flags.DEFINE_list("guidance_interval", None, "LOW,HIGH: guide only at these timesteps.")
    flags.DEFINE_float("guidance_rescale", 0.0, "0..1, how far to bring guided outputs back to their usual spread.")
    flags.DEFINE_string("guidance_rule", "cfg", f"{' or '.join(GUIDANCE_RULES)}.")
    flags.DEFINE_integer("batch_size", 64, "Images at a time; does not change any image.", lower_bound=1)


def define_sampler_flags() -> None:
    """The flags that `open_run` reads besides those of `define_source_flags`."""
    flags.DEFINE_integer("steps", None, "Sampling steps, 1..T. Default: the run's config.sample.steps (25).")
    flags.DEFINE_string(
        "sampler",
        None,
        f"{', '.join(SOLVERS | ESTIMATED_SOLVERS)}; options follow a colon: dpm_solver_pp:order=3,variant=official. "
        "Default: the run's config.sample.sampler (ddim).",
    )
    flags.DEFINE_float("eta", None, "Short for the sampler option eta: 0 is deterministic, 1 DDPM.")
    flags.DEFINE_string(
        "tau",
        None,
        f"Timesteps to visit: {', '.join(GRIDS)}, sections:10,15,20, sections:ddim25 or explicit:1000,500,250. "
        "Default: config.sample.tau (uniform).",
    )


def open_source() -> Source:
    """The model that the flags ask for.

    Raises:
      InputError: a wrong flag, no such run, or a damaged checkpoint.
    """
    given = flags.FLAGS
    name, home, trained = _open(given.workdir, given.ema or "")
    clip = trained.config.sample.clip if given.clip is None else given.clip
    check_options(trained.model.prediction, Options(clip, given.dynamic_threshold, guidance_rule=given.guidance_rule))
    options = {
        "clip": clip,
        "dynamic_threshold": given.dynamic_threshold,
        "guidance_scale": given.guidance_scale,
        "guidance_interval": _interval(given.guidance_interval),
        "guidance_rescale": given.guidance_rescale,
        "guidance_rule": given.guidance_rule,
    }
    labels = _labels(given.labels, trained.model.num_classes)
    _check_effect(given, trained.model.num_classes)
    return Source(name, home, trained, digest(trained.params), options, labels, given.seed)


def make_run(source: Source, sampler: str, steps: int, tau: str, eta: float | None = None) -> SamplingRun:
    """A source with a sampler by name; eta is short for the option of that name.

    Raises:
      InputError: an unknown name, a value out of its range, or a sampler that the model cannot serve.
    """
    trained = source.trained
    model = trained.model
    options = {} if eta is None else {"eta": eta}
    if sampler.partition(":")[0] in ESTIMATED_SOLVERS:
        grid = make_tau(model.schedule, tau, steps)
        images = load_data(trained.config.data).images
        gamma = analytic.cached_gamma(source.home, trained, source.weights, images, grid)
        options |= {"gamma": gamma, "max_cov": 1.0}
    table = make_table(model.schedule, sampler, steps, tau, **options)
    check_prediction(table, model.prediction)
    check_variance(table, model.learned_variance)
    return SamplingRun(source, table, sampler, steps, tau)


def open_run() -> SamplingRun:
    """The model and the sampler that the flags ask for; raises as `open_source` and `make_run`."""
    given = flags.FLAGS
    source = open_source()
    config = source.trained.config.sample
    sampler, tau = (config[name] if given[name].value is None else given[name].value for name in ("sampler", "tau"))
    return make_run(source, sampler, chosen_steps(tau, given.steps, config.steps), tau, given.eta)


def chosen_steps(tau: str, given: Any, default: Any) -> Any:
    """What --steps gives, or the default where it is None; refused where tau has its own number of steps."""
    if given is not None and ":" in tau:
        raise InputError(f"tau {tau} has its own number of steps; leave out --steps")
    return default if given is None else given


def _open(workdir, ema):
    """(source, home, trained): a run folder, a weights file, the newest run, or the model that ships."""
    folder = None
    if not workdir:
        folder = run_folder.newest("runs")
    elif not workdir.endswith(weights.SUFFIX):
        folder = run_folder.existing(workdir)
    if folder is not None:
        return str(folder.path), folder.path, load_trained(folder, ema)
    trained = weights.load(workdir) if workdir else pretrained.load(SHIPPED)
    if ema and ema != trained.ema:
        raise InputError(f"ema is {ema}; this file holds the one of {trained.ema} alone")
    if not workdir:
        print(f"there is no run in runs/, so this uses the {SHIPPED} model that ships with the project")
    home = Path("runs", f"file-{Path(workdir).stem}" if workdir else f"shipped-{SHIPPED}")  # no name of a run
    return workdir or f"the {SHIPPED} model that ships", home, trained


def _interval(texts):
    if texts is None:
        return None
    try:
        low, high = map(float, texts)
    except ValueError:
        raise InputError(f"guidance_interval is {','.join(texts)!r}; write LOW,HIGH as 100,700") from None
    return low, high


def _check_effect(given, num_classes):
    """Refuses flags that would have none."""
    guiding = [name for name in given if name.startswith("guidance_") and given[name].value != given[name].default]
    if guiding and not num_classes:
        raise InputError(f"this model has no classes: leave out --{guiding[0]}")
    if guiding and given.guidance_scale == 1 and given.guidance_rule == "cfg":
        raise InputError(f"--{guiding[0]} does nothing at --guidance_scale=1; give a scale, or leave it out")
    if given.clip == "none" and given.dynamic_threshold is not None:
        raise InputError("--clip=none and --dynamic_threshold exclude each other; leave one out")


def _labels(texts, num_classes):
    if not num_classes:
        if texts:
            raise InputError("this model has no classes: leave out --labels")
        return ()
    if not texts:
        return tuple(range(num_classes))
    if not all(text.isdecimal() and int(text) < num_classes for text in texts):
        raise InputError(f"labels are {','.join(texts)!r}; classes are numbered 0..{num_classes - 1}")
    return tuple(map(int, texts))
