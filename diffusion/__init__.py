"""Fast sampling of diffusion models in JAX: train a network once, then sample it in 25, 10 or 5 steps."""

from diffusion import jax_environment  # noqa: F401, I001 - first, as it looks at what importing JAX would trip over
from diffusion import editing, gaussian, schedules, solvers, timesteps
from diffusion.around import Steering
from diffusion.brownian import Brownian
from diffusion.caching import Cache
from diffusion.errors import InputError
from diffusion.guidance import Guidance
from diffusion.sampling import Trajectory, sample
from diffusion.schedules import NoiseSchedule
from diffusion.solvers import SamplerTable

__version__ = "0.2.0"

__all__ = [
    "Brownian",
    "Cache",
    "Guidance",
    "InputError",
    "NoiseSchedule",
    "SamplerTable",
    "Steering",
    "Trajectory",
    "editing",
    "gaussian",
    "sample",
    "schedules",
    "solvers",
    "timesteps",
]
