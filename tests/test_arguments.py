"""What is given in the place of the right argument is refused by name, and all kinds of numbers are numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import refused

import diffusion
from diffusion import editing, gaussian, keys, schedules, solvers, timesteps
from diffusion.errors import InputError
from diffusion.evaluation import bound, likelihood
from diffusion.images import to_floats


def test_what_is_no_table_and_what_is_no_pixel_is_named():
    schedule = schedules.cosine()
    tau = timesteps.uniform(schedule, 3)
    table, key, shape = solvers.ddim(schedule, tau), keys.make(0), (4, 4, 1)
    network = lambda params, x, t, cond: x  # noqa: E731
    for wrong in (tau, solvers.ddim, "ddim", None):
        with refused("table is .*solver"):
            diffusion.sample(network, {}, wrong, key, 2, shape)
    bytes_ = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(np.uint8)
    floats, mask = bytes_.astype(np.float32), np.ones((1, 4, 1))
    zeros = jnp.zeros((2, *shape))
    with pytest.raises(InputError, match="type uint8"):
        jax.jit(lambda images: diffusion.sample(network, {}, table, key, 2, shape, known=(images, mask)))(bytes_)
    calls = {
        "known": lambda images: diffusion.sample(network, {}, table, key, 2, shape, known=(images, mask)),
        "x_init": lambda images: diffusion.sample(network, {}, table, key, 2, shape, x_init=images),
        "x_0": lambda images: gaussian.q_sample(schedule, images, 3, zeros),
        "x_0 ": lambda images: gaussian.q_sample(schedule, t=3, x_0=images, eps=zeros),
        "x_0  ": lambda images: likelihood.log_likelihood(network, {}, schedule, images, trace="exact"),
        "x_0 holds": lambda images: bound.variational_bound(network, {}, schedule, tau, images, key),
        "x_t": lambda images: gaussian.predict_eps(schedule, images, 3, zeros),
        "eps": lambda images: gaussian.predict_x0(schedule, zeros, 3, images),
        "images": lambda images: editing.noised(schedule, images, 3, key),
        "b ": lambda images: editing.slerp(zeros, images, 0.5),
    }
    for name, call in calls.items():
        for images in (bytes_, floats, jnp.asarray(floats)):
            with refused(name.strip()):
                call(images)
    with refused("uint8"):
        to_floats(floats)
    with refused("mask"):
        diffusion.sample(network, {}, table, key, 2, shape, known=(0.5, 255 * mask))
    # What is large without being 8-bit pixels goes through: numbers of known pixels, and noise of both signs.
    diffusion.sample(network, {}, table, key, 2, shape, known=(0, mask.astype(int)), x_init=80 * (floats - 100))


def test_numbers_of_numpy_are_numbers():
    schedule = schedules.cosine()
    table = solvers.ddim(schedule, timesteps.uniform(schedule, np.int32(3)), eta=np.float32(0.5))
    network = lambda params, x, t, cond: x * (1 if cond is None else cond[:, None])  # noqa: E731
    draw = partial(diffusion.sample, network, {}, table, keys.make(0))
    plain = draw(2, (3,))
    for one in (1, 1.0, np.float32(1), np.int64(1), np.ones(3), jnp.float32(1)):
        np.testing.assert_array_equal(draw(np.int64(2), (np.int64(3),), guidance_scale=one), plain)
    pair = {"cond": jnp.ones(2), "null_cond": jnp.zeros(2)}
    kinds = (2.0, np.float32(2), np.float64(2), jnp.float32(2))
    guided = [draw(2, (3,), guidance_scale=w, guidance_rescale=np.float32(0.5), **pair) for w in kinds]
    for one in guided[1:]:
        np.testing.assert_allclose(one, guided[0], rtol=1e-6)


@pytest.mark.parametrize("transform", [jax.grad, jax.jit])
def test_a_solver_that_is_traced_names_differentiable(transform):
    schedule = schedules.linear()
    tau = np.array([900.0, 300.0, 0.0])
    traced = {
        "tau": lambda v: solvers.dpm_solver_pp(schedule, v * tau),
        "eta": lambda v: solvers.ddim(schedule, tau, eta=v),
        "sde_eta": lambda v: solvers.dpm_solver_pp(schedule, tau, sde_eta=v),
        "option of edm": lambda v: solvers.edm(schedule, tau, s_churn=v),
        "gamma": lambda v: solvers.analytic_dpm(schedule, tau, v * np.ones(2)),
    }
    for name, build in traced.items():
        with refused(f"{name}.*differentiable"):
            transform(lambda v, build=build: build(v).update.sum())(0.9)
