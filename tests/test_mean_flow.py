"""Laws of MeanFlow: of its objective, of its network, and of the samplers that its networks can and cannot serve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import error_line, run, train
from student_runs import SHORT, check_resumes, check_travels, refuses
from tiny import KEY

import diffusion
from configs import digits_meanflow
from configs.default import get_config
from diffusion import model, pretrained, schedules, solvers, testbeds
from diffusion.commands import experiment, students
from diffusion.errors import InputError
from diffusion.models import UNet
from diffusion.objectives import mean_flow
from diffusion.objectives.losses import Batch, draw_noise
from diffusion.objectives.teaching import Course
from diffusion.solvers.steps import ends

T = 50
SCHEDULE = schedules.rectified_flow(T)
MEAN, VARIANCE = 0.3, 0.2
SHAPE = (2, 2, 1)


def batch_of(network, number=256, teacher=None):
    x_0 = MEAN + VARIANCE**0.5 * jax.random.normal(jax.random.key(5), (number, *SHAPE))
    split = jax.random.split(jax.random.key(1), number)
    return Batch(network, x_0, None, split, jnp.arange(number), number, teacher=teacher)


def loss_of(network, number=256, teacher=None, **options):
    function = mean_flow.mean_flow_loss if teacher is None else mean_flow.mean_flow_distillation_loss
    course = Course(10, None if teacher is None else "flow")
    return function(batch_of(network, number, teacher), SCHEDULE, "mean_flow", None, course, **options)


def drawn(same=0.75, times=(), number=256):
    """t, s, x_t, and the velocity of the data's path, as the objective draws them."""
    batch = batch_of(None, number)
    t, s = mean_flow._draw_times(batch, same, times)
    eps, share = draw_noise(batch), t.reshape(-1, 1, 1, 1)
    return t, s, (1 - share) * batch.x_0 + share * eps, eps - batch.x_0


def noise(number, shape=SHAPE):
    return jax.random.normal(jax.random.key(9), (number, *shape))


def per_sample(value):
    return value.reshape(-1, 1, 1, 1)


def spread(t):
    """The standard deviation of x_t for the Gaussian data."""
    return ((1 - t) ** 2 * VARIANCE + t**2) ** 0.5


def exact(x, times, cond=None):
    """The mean velocity of Gaussian data, whose flow keeps (x - mean) / standard deviation of each x_t."""
    t, s = (per_sample(column) / T for column in times.T)
    span = jnp.where(t == s, 1, t - s)
    z = (x - (1 - t) * MEAN) / spread(t)
    travelled = (x - (1 - s) * MEAN - spread(s) * z) / span
    slope = (t - (1 - t) * VARIANCE) / spread(t)  # of the spread
    return jnp.where(t == s, slope * z - MEAN, travelled)


def velocity_only(x, times, cond=None):
    """The velocity at t, whatever the end."""
    return exact(x, jnp.stack([times[:, 0], times[:, 0]], -1))


def curved(x, times, cond=None):
    """Some smooth network."""
    t, s = (per_sample(column) / T for column in times.T)
    return jnp.sin(3 * x * t) + s * x**2 - jnp.cos(2 * t - s) * x


# The objective


@pytest.mark.usefixtures("float64")
def test_the_target_has_the_numerical_derivative_along_the_path():
    t, s, x, v = drawn()

    def network(x, t, s):
        return curved(x, T * jnp.stack([t, s], -1))

    h = 1e-5
    change = (network(x + h * v, t + h, s) - network(x - h * v, t - h, s)) / (2 * h)
    wanted = v - per_sample(t - s) * change
    error = jnp.mean((network(x, t, s) - wanted) ** 2, axis=(1, 2, 3))
    assert float(jnp.abs(per_sample(t - s) * change).max()) > 0.1  # it counts
    np.testing.assert_allclose(loss_of(curved).error, error, rtol=1e-7)


@pytest.mark.usefixtures("float64")
def test_nothing_of_the_target_is_moved():
    """The gradient is that of the squared error against a constant."""

    def network(scale):
        return lambda x, times, cond: scale * curved(x, times)

    t, s, x, v = drawn()
    u, change = jax.jvp(lambda x, t: curved(x, T * jnp.stack([t, s], -1)), (x, t), (v, jnp.ones_like(t)))
    wanted = v - per_sample(t - s) * change
    slope = jnp.sum(2 * (u - wanted) * u, axis=(1, 2, 3)).mean()
    found = jax.grad(lambda scale: loss_of(network(scale), power=0.0).value.mean())(1.0)
    np.testing.assert_allclose(found, slope, rtol=1e-10)


@pytest.mark.usefixtures("float64")
def test_the_exact_mean_velocity_has_no_loss_against_the_exact_velocity():
    assert float(loss_of(exact, teacher=exact).error.max()) < 1e-20
    assert float(loss_of(velocity_only, teacher=exact).error.mean()) > 1e-4
    # Of the teacher only the velocity counts.
    np.testing.assert_array_equal(loss_of(curved, teacher=velocity_only).error, loss_of(curved, teacher=exact).error)


@pytest.mark.usefixtures("float64")
def test_the_exact_mean_velocity_is_where_learning_from_data_rests():
    def slope(change, start):
        def mean_loss(change):
            def network(x, times, cond):
                return start(x, times) + change * per_sample(times[:, 0] - times[:, 1]) / T * (x - MEAN)

            return loss_of(network, 20000, power=0.0, same=0.0).value.mean()

        return abs(float(jax.grad(mean_loss)(change)))

    rests = slope(0.0, exact)
    assert rests < 0.1 * slope(0.3, exact), rests
    assert rests < 0.1 * slope(0.0, velocity_only), rests


@pytest.mark.usefixtures("float64")
def test_without_a_span_it_is_plain_flow_matching():
    t, s, x, v = drawn(same=1.0)
    np.testing.assert_array_equal(t, s)
    loss = loss_of(curved, same=1.0, power=0.0)
    error = (curved(x, T * jnp.stack([t, t], -1)) - v) ** 2
    np.testing.assert_allclose(loss.error, error.mean(axis=(1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(loss.value, error.sum(axis=(1, 2, 3)), rtol=1e-12)


def test_the_weight_divides_an_error_by_its_own_size():
    plain, weighted = (loss_of(curved, power=power) for power in (0.0, 0.75))
    np.testing.assert_allclose(weighted.value, plain.value / (plain.value + 0.01) ** 0.75, rtol=1e-5)


def test_times_are_drawn_as_the_options_say():
    t, s, *_ = drawn(same=0.6, number=20000)
    assert np.all(t >= s)
    assert abs(np.mean(np.asarray(t == s)) - 0.6) < 0.02
    # The later of two even numbers is below q with probability q^2, the earlier with 1 - (1 - q)^2.
    apart = np.asarray(t > s)
    for q in (0.2, 0.5, 0.8):
        assert abs(np.mean(np.asarray(t) < q) - q**2) < 0.02
        assert abs(np.mean(np.asarray(s)[apart] < q) - (1 - (1 - q) ** 2)) < 0.02
    normal, *_ = drawn(same=0.0, times=(-0.4, 1.5), number=20000)
    below = np.mean(np.log(normal / (1 - normal)) < -0.4)  # the later of two is below the centre in a quarter of cases
    assert abs(below - 0.25) < 0.02
    assert set(np.asarray(loss_of(curved).t)) <= set(range(1, T + 1))


def test_what_the_objective_cannot_take_is_refused():
    for arguments, message in (
        ((schedules.cosine(T), "mean_flow", None), "set config.schedule=rectified_flow"),
        ((SCHEDULE, "flow", None), "set config.train.prediction=mean_flow"),
        ((SCHEDULE, "mean_flow", np.ones(T + 1)), "has its own weights"),
    ):
        with pytest.raises(InputError, match=message):
            mean_flow.mean_flow_loss(batch_of(exact), *arguments, Course(10))
    with pytest.raises(InputError, match="learns from a teacher"):
        mean_flow.mean_flow_distillation_loss(batch_of(exact), SCHEDULE, "mean_flow", None, Course(10))


# The network and its samplers


def apply_exact(params, x, times, cond=None):
    return exact(x, times)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("tau", [[50, 0], [50, 25, 0], [50, 44, 13, 2, 0], [30, 10, 0]])
def test_any_number_of_steps_with_the_exact_mean_velocity_lands_where_the_flow_ends(tau):
    start = noise(8)
    table = solvers.ddim(SCHEDULE, tau)
    found = diffusion.sample(apply_exact, {}, table, KEY, 8, SHAPE, prediction="mean_flow", x_init=start)
    wanted = testbeds.gaussian_flow(SCHEDULE, MEAN, VARIANCE, np.asarray(start), tau[0])
    np.testing.assert_allclose(found, wanted, atol=1e-10)


def test_a_step_moves_x_by_the_mean_velocity_times_its_length():
    """x_s = x_t - (t - s) u, whatever the network says."""
    start = noise(4)

    def apply_fn(params, x, times, cond=None):
        return curved(x, times)

    tau = [50, 20, 0]
    x = start
    for t, s in ((50.0, 20.0), (20.0, 0.0)):
        x = x - (t - s) / T * curved(x, jnp.tile(jnp.array([[t, s]]), (4, 1)))
    for solver in (solvers.ddim, solvers.euler):
        table = solver(SCHEDULE, tau)
        found = diffusion.sample(apply_fn, {}, table, KEY, 4, SHAPE, prediction="mean_flow", x_init=start)
        np.testing.assert_allclose(found, x, atol=1e-5)


def test_a_stage_goes_to_the_next_time_and_one_that_draws_noise_anew_to_the_end():
    np.testing.assert_array_equal(ends(solvers.ddim(SCHEDULE, [50, 20, 5, 0])), [20, 5, 0])
    np.testing.assert_array_equal(ends(solvers.consistency(SCHEDULE, [50, 20, 5, 0])), [0, 0, 0])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (solvers.unipc(SCHEDULE, [50, 40, 20, 10, 0]), "unipc.* combines estimates of x_0"),
        (solvers.ddim(SCHEDULE, [50, 20, 0], eta=0.5), "ddim.* combines estimates"),
        (solvers.heun(SCHEDULE, [49, 20, 0]), "heun.* combines estimates"),
        (solvers.ddim(schedules.cosine(T), [50, 20, 0]), "levels of another schedule than rectified_flow"),
    ],
)
def test_samplers_that_need_estimates_of_x_0_are_refused(table, message):
    with pytest.raises(InputError, match=message):
        diffusion.sample(apply_exact, {}, table, KEY, 2, SHAPE, prediction="mean_flow")


def test_what_works_on_estimates_of_x_0_is_refused():
    table = solvers.ddim(SCHEDULE, [50, 0])
    cond = jnp.zeros(2, int)
    for options, message in (
        ({"clip": True}, "there is nothing to clip"),
        ({"dynamic_threshold": 0.9}, "there is nothing to clip"),
        ({"known": (0.0, 1.0)}, "known pixels go into estimates"),
        ({"cond": cond, "null_cond": cond, "guidance_scale": 2, "guidance_rule": "apg"}, "take cfg"),
    ):
        with pytest.raises(InputError, match=message):
            diffusion.sample(apply_exact, {}, table, KEY, 2, SHAPE, prediction="mean_flow", **options)


FIELDS = {"width": 4, "multipliers": (1,), "num_blocks": 1, "attention_resolutions": ()}


def test_a_new_network_sees_no_end_until_it_has_learned_to():
    """With the parameters of an ordinary one, it is that one."""
    plain, seeing = UNet(**FIELDS), UNet(**FIELDS, sees_end=True)
    x, t = noise(3, (4, 4, 1)), jnp.array([1.0, 20.5, 50.0])
    params = jax.jit(seeing.init)(jax.random.key(2), x, jnp.stack([t, t], -1))["params"]
    own = {name: value for name, value in params.items() if name.startswith("span")}
    params = jax.tree.map(lambda value: value + 0.1, params) | own  # many parameters begin at 0
    ordinary = {name: value for name, value in params.items() if not name.startswith("span")}
    wanted = jax.jit(plain.apply)({"params": ordinary}, x, t)
    apply = jax.jit(seeing.apply)
    for s in (t, t / 2, 0 * t):
        np.testing.assert_allclose(apply({"params": params}, x, jnp.stack([t, s], -1)), wanted, rtol=1e-6)
    params["span_2"]["kernel"] += 0.3
    assert float(jnp.abs(apply({"params": params}, x, jnp.stack([t, t / 2], -1)) - wanted).max()) > 1e-3
    with pytest.raises(InputError, match=r"this network takes .B, 2., where a step begins"):
        seeing.apply({"params": params}, x, t)


def test_a_network_of_ones_own_is_given_both_times():
    def net(image_shape, out_channels, num_classes):
        def apply(params, x, t, cond):
            return params["scale"] * x * (t[:, 0] - t[:, 1]).reshape(-1, 1, 1, 1)

        return lambda key: {"scale": jnp.ones(())}, apply

    config = get_config()
    config.network, config.train.prediction = "mine:net", "mean_flow"
    found = model.make_model(config, (4, 4, 1), networks={"mine:net": net})
    table = solvers.ddim(SCHEDULE, [50, 0])
    start = noise(2, (4, 4, 1))
    params = {"scale": jnp.asarray(0.01)}
    drawn = diffusion.sample(
        found.apply_fn, params, table, KEY, 2, (4, 4, 1), prediction=found.prediction, x_init=start
    )
    np.testing.assert_allclose(drawn, 0.5 * start, rtol=1e-5)  # x - 1 * 0.01 * 50 x


# A run


def test_the_recipe_is_a_run_whose_samplers_are_checked_before_it_starts():
    config = students.complete(digits_meanflow.get_config(), None)
    found = experiment.make_experiment(config)
    assert found.table.nfe == config.sample.steps == 2
    assert (found.model.prediction, config.sample.sampler) == ("mean_flow", "ddim")
    config.sample.sampler, config.sample.steps = "unipc", 5
    with pytest.raises(InputError, match="combines estimates of x_0"):
        experiment.make_experiment(config)


def test_a_mean_flow_begins_with_a_teacher_of_the_velocity_only():
    config = get_config()
    config.train.objective, config.train.prediction = "mean_flow", "mean_flow"
    with pytest.raises(
        InputError, match=r"config.teacher predicts eps; .*take a teacher of config.train.prediction=flow"
    ):
        students.complete(config, pretrained.load("digits"))


def test_a_mean_flow_from_scratch_resumes_exactly_and_draws_without_flags(tmp_path, compile_once):
    def learn(name):
        recipe = ("--config=configs/digits_meanflow.py", "--config.train.num_steps=4", *SHORT)
        return train(tmp_path, f"--workdir={name}", *recipe)

    check_resumes(tmp_path, "run", learn)
    drawn = run("sample.py", "--workdir=run", "--num=2", "--steps=1", cwd=tmp_path)
    assert "ddim(eta=0) on uniform, 1 network calls" in drawn.stdout, drawn.stderr
    refused = error_line(run("sample.py", "--workdir=run", "--sampler=unipc", "--steps=5", cwd=tmp_path))
    assert "combines estimates of x_0" in refused


@pytest.mark.reliability
def test_a_mean_flow_travels_in_a_file_and_refuses_what_it_cannot_do(tmp_path, compile_once):
    recipe = ("--config=configs/digits_meanflow.py", "--config.train.num_steps=2", *SHORT)
    assert train(tmp_path, "--workdir=run", *recipe).returncode == 0
    check_travels(tmp_path, "run")
    refuses(
        tmp_path,
        ("sample.py", "--clip=recompute", "there is nothing to clip"),
        ("sample.py", "--tau=dp_path", "this is a student for few calls"),
        ("evaluate.py", "--bound=2", "this is a student for few calls"),
        ("learn.py", "--calls=3", "this is a student for few calls"),
    )


@pytest.mark.reliability
@pytest.mark.parametrize("kind", ["mean_flow", "mean_flow_distillation"])
def test_a_mean_flow_from_a_teacher_resumes_exactly(tmp_path, compile_once, kind):
    flow = ("--config.schedule=rectified_flow", "--config.train.prediction=flow", "--config.train.num_steps=2")
    assert train(tmp_path, "--workdir=teacher", *flow, *SHORT).returncode == 0

    def learn(name):
        options = ("--config=configs/default.py", f"--config.train.objective={kind}", *SHORT)
        options += ("--config.train.prediction=mean_flow",)
        options += ("--config.teacher=teacher", "--config.train.num_steps=4")
        return run("train.py", f"--workdir={name}", *options, cwd=tmp_path)

    check_resumes(tmp_path, "run", learn)
