"""Says which sampler and which grid, as texts, the arguments of a scheduler are here."""

from diffusion.errors import InputError
from diffusion.interop.diffusers.state import require


def spelled(name, **given):
    """Writes a name with the options that are given."""
    settings = ",".join(f"{key}={str(value).lower()}" for key, value in given.items() if value is not None)
    return f"{name}:{settings}" if settings else name


def grid(fields):
    """Returns the grid of schedulers that take S timesteps."""
    if fields.get("use_beta_sigmas"):
        return "beta:of=sigma"
    if fields.get("use_karras_sigmas"):
        return "karras"
    if fields.get("use_exponential_sigmas") or fields.get("use_lu_lambdas"):
        return "log_snr"
    spacing = fields["timestep_spacing"]
    return spelled(spacing, offset=fields["steps_offset"] or None if spacing == "leading" else None)


def exact_grid(fields):
    """Returns the grid of those whose timesteps need not be whole."""
    found = grid(fields)
    return "linspace:rounded=false" if found == "linspace" else found


def original_grid(fields):
    """Returns the grid of distilled models, whose timesteps are among those of their training."""
    return spelled("trailing", among=fields["original_inference_steps"])


_OF_SIGMAS = ("karras", "log_snr", "beta:of=sigma")


def inner_grid(fields):
    """Returns the grid of those that space S + 1 timesteps and leave out the last, which is at the data."""
    found = grid(fields)
    if fields["timestep_spacing"] == "trailing" or found in _OF_SIGMAS:
        return found
    return f"{found}{',' if ':' in found else ':'}last=false"


def end(fields):
    """Returns the option of solvers whose last step goes to timestep 0 of theirs, not to the data."""
    return None if fields["set_alpha_to_one"] else 1


def ddpm(fields):
    kind = {"fixed_large": "large", "learned_range": "learned"}.get(fields["variance_type"], "small")
    return spelled("ddpm", variance=kind)


def pndm(fields):
    return spelled("plms" if fields["skip_prk_steps"] else "pndm", end=end(fields))


_VARIANTS = {"midpoint": "official", "heun": "exact"}


def noise_left(fields):
    """Returns the option end of solvers whose last step leaves the noise of the first timestep in."""
    return None if fields.get("final_sigmas_type") == "zero" or grid(fields) in _OF_SIGMAS else 1


def multistep(fields):
    """Returns DPM-Solver++ or DPM-Solver, or their stochastic kinds."""
    order, kind, solver = (fields[name] for name in ("solver_order", "algorithm_type", "solver_type"))
    kinds = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
    require("", fields, {"algorithm_type": kinds, "solver_type": tuple(_VARIANTS), "solver_order": (1, 2, 3)})
    if kind == "sde-dpmsolver" and order == 3:
        raise InputError("solver_order is 3, which sde-dpmsolver has not; supported: 1, 2")
    # There orders are lowered below 15 steps only.
    final = None if fields["lower_order_final"] and order < 3 and not noise_left(fields) else False
    return spelled(
        "dpm_solver_pp" if kind.endswith("++") else "dpm_solver_multistep",
        order=order,
        sde_eta=1 if kind.startswith("sde") else None,
        variant=_VARIANTS[solver],
        lower_order_final=final,
        end=noise_left(fields),
    )


def singlestep(fields):
    """Returns the solver that spends each call at a time of the grid; there the last orders are always lowered."""
    kinds = ("dpmsolver++", "dpmsolver")
    require("", fields, {"algorithm_type": kinds, "solver_type": tuple(_VARIANTS), "solver_order": (1, 2, 3)})
    return spelled(
        "dpm_solver_pp_singlestep" if fields["algorithm_type"] == "dpmsolver++" else "dpm_solver",
        order=fields["solver_order"],
        variant="midpoint" if fields["solver_type"] == "midpoint" else "exact",
        calls="grid",
    )


_OTHERS = ("midpoint", "heun", "logrho")
"""Solver types of other classes, which UniPC there takes for bh2."""


def unipc(fields):
    kept = fields["lower_order_final"] or None
    skipped = ",".join(map(str, fields["disable_corrector"])) or None
    return spelled(
        "unipc",
        order=fields["solver_order"],
        variant="bh2" if fields["solver_type"] in _OTHERS else fields["solver_type"],
        lower_order_final=None if kept else False,
        disable_corrector=skipped,
        basis=None if fields["predict_x0"] else "eps",
        end=noise_left(fields),
    )


def deis(fields):
    return spelled("deis", order=fields["solver_order"], lower_order_final=False, end=noise_left(fields))


def sa(fields):
    require("", fields, {"algorithm_type": ("data_prediction",)})
    orders = {name: fields[name] for name in ("predictor_order", "corrector_order")}
    return spelled("sa_solver", **orders, lower_order_final=None if fields["lower_order_final"] else False)


def edm_grid(fields):
    return "log_snr" if fields["sigma_schedule"] == "exponential" else spelled("karras", rho=float(fields["rho"]))


def flow_grid(fields):
    """Returns the grid from 1 to 1 / T, both shifted, and then shifted again, as it is there."""
    shift, steps = float(fields["shift"]), float(fields["num_train_timesteps"])
    return spelled("shifted", shift=shift, lowest=shift / steps / (1 + (shift - 1) / steps))


def tcd(fields):
    """Returns the sampler that ends at timestep 0 of theirs, whatever set_alpha_to_one says."""
    return "tcd:end=1"


def consistency(fields):
    return spelled("consistency", sigma_min=float(fields["sigma_min"]))
