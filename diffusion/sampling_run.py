"""How to sample a trained run: the flags that sample.py and evaluate.py share, and what they ask for."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import UInt8

from diffusion import analytic
from diffusion.denoiser import CLIPS, GUIDANCE_RULES, Options, check_options
from diffusion.errors import InputError
from diffusion.experiment import Trained, load_data, load_trained, make_table, make_tau
from diffusion.generate import generate, trajectory
from diffusion.sampling import check_prediction, check_variance
from diffusion.solvers import ESTIMATED_SOLVERS, SOLVERS, SamplerTable
from diffusion.timesteps import GRIDS
from diffusion.training import run_folder


class SamplingRun(NamedTuple):
    """A trained run and how to sample it.

    Attributes:
      folder, trained: the run.
      table: the sampler, on the grid named tau with steps steps asked for.
      options: what goes to `diffusion.sample` besides: clip, guidance and thresholding.
      labels: classes that the images take in turn; () for an unconditional model.
      seed: of the random key.
    """

    folder: run_folder.RunFolder
    trained: Trained
    table: SamplerTable
    sampler: str
    steps: int
    tau: str
    options: dict[str, Any]
    labels: tuple[int, ...]
    seed: int

    def title(self, num: int) -> str:
        """One line: which model draws how many images with what."""
        source = f"{self.folder.path}, step {self.trained.step:,}"
        return f"{source}: {num:,} images with {self.table.name} on {self.tau}, {self.table.nfe} network calls"

    def record(self) -> dict[str, Any]:
        """Everything that determines image number i, for JSON."""
        return {
            "run": str(self.folder.path),
            "checkpoint_step": self.trained.step,
            "ema": self.trained.ema,
            "sampler": self.sampler,
            "update_sha256": hashlib.sha256(self.table.update.tobytes()).hexdigest(),
            "table": self.table.name,
            "grid": self.tau,
            "steps": len(self.table.tau) - 1,
            "tau": self.table.tau.tolist(),
            "nfe": self.table.nfe,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()},
            "labels": list(self.labels),
            "seed": self.seed,
            "config": self.trained.config.to_dict(),
        }

    def draw(self, ids: Sequence[int], mesh: Mesh, batch_size: int) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
        """The images with these numbers, batch by batch."""
        model, params = self.trained.model, self.trained.params
        shared = {"seed": self.seed, "labels": self.labels, "mesh": mesh, "batch_size": batch_size}
        return generate(model, params, self.table, ids, **shared, **self.options)

    def trajectory(self, ids: Sequence[int]) -> UInt8[np.ndarray, "stages+1 N H W C"]:
        """What these images look like before each network call, and at the end."""
        model, params = self.trained.model, self.trained.params
        return trajectory(model, params, self.table, ids, seed=self.seed, labels=self.labels, **self.options)


def define_flags() -> None:
    """The flags that `open_run` reads."""
    flags.DEFINE_string("workdir", None, "Run folder. Default: the newest in runs/.")
    flags.DEFINE_string("ema", None, "Which of the run's config.train.ema_decays, as 0.999. Default: the first.")
    flags.DEFINE_integer("seed", 0, "Image i depends on the seed and i alone.", lower_bound=0, upper_bound=2**32 - 1)
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


def open_run() -> SamplingRun:
    """The run and the sampler that the flags ask for.

    Raises:
      InputError: a wrong flag, no such run, or a damaged checkpoint.
    """
    given = flags.FLAGS
    folder = run_folder.existing(given.workdir) if given.workdir else run_folder.newest("runs")
    trained = load_trained(folder, given.ema or "")
    config, schedule = trained.config.sample, trained.model.schedule
    if given.steps is not None and ":" in (given.tau or config.tau):
        raise InputError(f"tau {given.tau or config.tau} has its own number of steps; leave out --steps")
    sampler, steps, tau, clip = (
        config[name] if given[name].value is None else given[name].value for name in ("sampler", "steps", "tau", "clip")
    )
    check_options(trained.model.prediction, Options(clip, given.dynamic_threshold, guidance_rule=given.guidance_rule))
    options = {} if given.eta is None else {"eta": given.eta}
    if sampler.partition(":")[0] in ESTIMATED_SOLVERS:
        grid = make_tau(schedule, tau, steps)
        images = load_data(trained.config.data).images
        gamma = analytic.cached_gamma(folder.path, trained, images, grid)
        options |= {"gamma": gamma, "max_cov": 1.0}
    table = make_table(schedule, sampler, steps, tau, **options)
    check_prediction(table, trained.model.prediction)
    check_variance(table, trained.model.learned_variance)
    guidance = {
        "clip": clip,
        "dynamic_threshold": given.dynamic_threshold,
        "guidance_scale": given.guidance_scale,
        "guidance_interval": _interval(given.guidance_interval),
        "guidance_rescale": given.guidance_rescale,
        "guidance_rule": given.guidance_rule,
    }
    labels = _labels(given.labels, trained.model.num_classes, given.guidance_scale)
    return SamplingRun(folder, trained, table, sampler, steps, tau, guidance, labels, given.seed)


def _interval(texts):
    if texts is None:
        return None
    try:
        low, high = map(float, texts)
    except ValueError:
        raise InputError(f"guidance_interval is {','.join(texts)!r}; write LOW,HIGH as 100,700") from None
    return low, high


def _labels(texts, num_classes, guidance_scale):
    if not num_classes:
        if texts or guidance_scale != 1:
            raise InputError("this model has no classes: leave out --labels and --guidance_scale")
        return ()
    if not texts:
        return tuple(range(num_classes))
    if not all(text.isdecimal() and int(text) < num_classes for text in texts):
        raise InputError(f"labels are {','.join(texts)!r}; classes are numbered 0..{num_classes - 1}")
    return tuple(map(int, texts))
