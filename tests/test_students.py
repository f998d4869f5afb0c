"""Laws of the objectives that make students, of a student's training, and of what it refuses afterwards."""

import dataclasses
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from commands import digest, error_line, run, saved_steps, train
from tiny import KEY

import diffusion
from configs import digits_consistency, digits_progressive
from configs.default import get_config
from diffusion import devices, gaussian, pretrained, schedules, solvers, testbeds, timesteps
from diffusion.commands import experiment, students
from diffusion.errors import InputError
from diffusion.models.layers import dropout
from diffusion.objectives import choice, consistency, progressive
from diffusion.objectives.losses import Batch
from diffusion.objectives.teaching import Course
from diffusion.training import checkpoints, saving
from diffusion.training import step as training_step
from diffusion.training.step import StepOptions, init_state, make_train_step

SCHEDULE = schedules.cosine(64)
MEAN, VARIANCE = 0.3, 0.2


def batch_of(network, number=256, teacher=None, step=0, shape=(2, 2, 1)):
    x_0 = MEAN + VARIANCE**0.5 * jax.random.normal(jax.random.key(5), (number, *shape))
    split = jax.random.split(jax.random.key(1), number)
    return Batch(network, x_0, None, split, jnp.arange(number), number, teacher=teacher, step=step)


def bound(testbed):
    return partial(testbed.apply_fn, testbed.params)


def levels(t):
    return gaussian.signal_noise(SCHEDULE, t, jnp.zeros((t.size, 1, 1, 1)))


def exact_estimate(x, t):
    """E[x_0 | x_t] of the Gaussian data."""
    a, n = levels(t)
    return MEAN + a * VARIANCE / (a**2 * VARIANCE + n**2) * (x - a * MEAN)


def ddim_step(x, x0, t, s):
    (a, n), (a_end, n_end) = levels(t), levels(s)
    return a_end * x0 + n_end * (x - a * x0) / n


def ideal_student(steps):
    """v of the x_0 with which one step lands where two exact DDIM steps do, solved for; T is 64."""
    gap = 64 // steps

    def network(x, time, cond=None):
        t = jnp.round(time).astype(int)
        middle, s = t - gap // 2, t - gap
        between = ddim_step(x, exact_estimate(x, t), t, middle)
        landed = ddim_step(between, exact_estimate(between, middle), middle, s)
        (a, n), (a_end, n_end) = levels(t), levels(s)
        x0 = (landed - n_end / n * x) / (a_end - n_end / n * a)
        return (a * x - x0) / n  # v of x_t = a x_0 + n eps where a^2 + n^2 = 1

    return network


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("taught_by", ["eps", "v", "x0"])
def test_a_student_that_lands_where_two_exact_steps_land_has_no_loss_in_any_stage(taught_by):
    teacher = bound(testbeds.gaussian(SCHEDULE, MEAN, VARIANCE, taught_by))
    course = Course(30, taught_by, clip=False)
    options = {"start": 16, "end": 4}
    for step, steps in ((0, 16), (9, 16), (10, 8), (29, 4)):
        # From the second stage on, the teacher is a student and predicts v.
        told = teacher if steps == 16 else bound(testbeds.gaussian(SCHEDULE, MEAN, VARIANCE, "v"))
        batch = batch_of(ideal_student(steps), teacher=told, step=step)
        loss = progressive.progressive_loss(batch, SCHEDULE, "v", None, course, **options)
        assert float(loss.value.max()) < 1e-16
        assert set(np.asarray(loss.t)) == set(range(64 // steps, 65, 64 // steps))
        # The teacher itself, which makes steps of half the length, is no such student.
        wrong = progressive.progressive_loss(batch._replace(network=told), SCHEDULE, "v", None, course, **options)
        assert (steps == 16 and taught_by != "v") or float(wrong.value.mean()) > 1e-7


@pytest.mark.usefixtures("float64")
def test_an_ideal_student_samples_in_n_steps_what_its_teacher_samples_in_twice_as_many():
    testbed = testbeds.gaussian(SCHEDULE, MEAN, VARIANCE, "v")
    start = jax.random.normal(KEY, (8, 2, 2, 1))
    network = ideal_student(4)

    def draw(apply_fn, params, steps):
        table = solvers.ddim(SCHEDULE, timesteps.uniform(SCHEDULE, steps))
        return diffusion.sample(apply_fn, params, table, KEY, 8, (2, 2, 1), prediction="v", x_init=start)

    found = draw(lambda params, x, t, cond: network(x, t), {}, 4)
    np.testing.assert_allclose(found, draw(*testbed, 8), atol=1e-9)


def test_the_error_of_a_student_weighs_max_of_snr_and_one():
    teacher = bound(testbeds.gaussian(SCHEDULE, MEAN, VARIANCE, "v"))
    course = Course(10, "v", clip=False)
    loss = progressive.progressive_loss(batch_of(teacher, teacher=teacher), SCHEDULE, "v", None, course, 32, 32)
    a2, n2 = SCHEDULE.powers(np.asarray(loss.t))
    np.testing.assert_allclose(loss.value, np.maximum(a2 / n2, 1) * loss.error, rtol=1e-5)


def test_stages_halve_the_steps_and_divide_the_run_by_their_lengths():
    plan = progressive.stages(100, 16, 2, (4, 1, 1, 4))
    assert plan == ((16, 8, 4, 2), (0, 40, 50, 60))
    assert [plan.at(step) for step in (0, 1, 40, 41, 50, 60, 61, 100)] == [16, 16, 16, 8, 8, 4, 2, 2]
    assert progressive.stages(7, 1, 1) == ((1,), (0,))
    for arguments, message in (
        ((100, 12, 5), "cannot halve start=12 down to end=5"),
        ((100, 4, 8), "cannot halve"),
        ((100, 8, 0), "end of objective progressive is 0"),
        ((100, 8, 2, (1, 2)), "give 3 numbers above 0"),
        ((100, 8, 4, (1, 0)), "give 2 numbers above 0"),
        ((2, 8, 1), "num_steps is 2, too few for 4 stages"),
    ):
        with pytest.raises(InputError, match=message):
            progressive.stages(*arguments)


# Consistency


def exact_consistency(x, time, cond=None):
    """The end of the exact flow from x, as a network that predicts x_0 (`testbeds.gaussian_flow`, in JAX)."""
    a, n = levels(jnp.round(time).astype(int))
    return MEAN + (VARIANCE / (a**2 * VARIANCE + n**2)) ** 0.5 * (x - a * MEAN)


def test_the_consistency_function_of_these_tests_is_that_of_the_testbed():
    x = np.random.default_rng(0).normal(size=(4, 2, 2, 1))
    wanted = testbeds.gaussian_flow(SCHEDULE, MEAN, VARIANCE, x, 40)
    np.testing.assert_allclose(exact_consistency(jnp.asarray(x), jnp.full(4, 40)), wanted, rtol=1e-4)


def consistency_loss(kind, network, gap, **options):
    """The loss with r = t - gap T."""
    teacher = bound(testbeds.gaussian(FINE, MEAN, VARIANCE, "x0"))
    course, settings = Course(10, "x0", clip=False), {"pretraining": 0.0, "gaps": (gap, gap)} | options
    loss = choice.STUDENTS[kind]
    return loss(batch_of(network, 512, teacher), FINE, "x0", None, course, **settings)


FINE = schedules.cosine(4096)


def fine_consistency(x, time, cond=None):
    a, n = gaussian.signal_noise(FINE, jnp.round(time).astype(int), x)
    return MEAN + (VARIANCE / (a**2 * VARIANCE + n**2)) ** 0.5 * (x - a * MEAN)


@pytest.mark.usefixtures("float64")
def test_the_exact_consistency_function_has_a_distillation_loss_of_third_order_in_the_gap():
    """One step of Heun's method errs by O(gap^3) where the schedule is smooth."""
    errors = []
    for gap in (1 / 16, 1 / 32, 1 / 64):
        loss = consistency_loss("consistency_distillation", fine_consistency, gap)
        middle = (loss.t > 1000) & (loss.t < 3000)
        errors.append(float(jnp.mean(loss.error[middle]) ** 0.5))
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert np.all((orders > 2.7) & (orders < 3.4)), orders


@pytest.mark.usefixtures("float64")
def test_the_exact_consistency_function_is_where_consistency_training_rests():
    """The slope of the loss along a change that grows with t vanishes with the gap; elsewhere it does not."""

    def slope(change):
        def mean_loss(change):
            def network(x, time, cond):
                grows = time.reshape(-1, 1, 1, 1) / FINE.num_timesteps
                return fine_consistency(x, time) + change * grows * (x - MEAN)

            return consistency_loss("consistency", network, 1 / 64).error.mean()

        return float(jax.grad(mean_loss)(change))

    rests, moves = abs(slope(0.0)), abs(slope(0.3))
    assert rests < 0.1 * moves, (rests, moves)


def test_a_consistency_run_begins_as_the_training_of_an_ordinary_model():
    """In the pretraining the loss is the squared error of x_0 itself, weighted by max(SNR, 1)."""
    for step in (0, 4):
        batch = batch_of(lambda x, time, cond: 0 * x, step=step)
        loss = consistency.consistency_loss(batch, SCHEDULE, "x0", None, Course(10), 0.5, (0.2, 0.1))
        error = jnp.mean(batch.x_0**2, axis=(1, 2, 3))
        np.testing.assert_allclose(loss.error, error, rtol=1e-5)
        a2, n2 = SCHEDULE.powers(np.asarray(loss.t))
        np.testing.assert_allclose(loss.value, np.maximum(a2 / n2, 1) * error, rtol=1e-5)


def test_the_gap_closes_by_the_same_factor_in_each_step():
    for step, gap in ((4, 0.5), (7, 0.25), (10, 0.125)):
        batch = batch_of(lambda x, time, cond: x, step=step)
        points = consistency._draw(batch, SCHEDULE, "x0", None, Course(10), 0.4, (0.5, 0.125))
        np.testing.assert_array_equal(points.r, np.maximum(points.t - round(64 * gap), 0))


def test_both_estimates_have_the_same_dropout():
    """A network that shows nothing but its dropout agrees with itself."""

    def apply_fn(params, x, t, cond=None, *, dropout_keys=None):
        return params["scale"] * dropout(dropout_keys, 0, 0.5, jnp.ones_like(x)) / 2

    model = tiny.make_model(apply_fn, SCHEDULE, tiny.SHAPE, "x0")
    seen = []

    def objective(batch):
        loss = consistency.consistency_loss(batch._replace(step=10), SCHEDULE, "x0", None, Course(10))
        shown = batch.network(batch.x_0, batch.index, None)
        jax.debug.callback(lambda *facts: seen.append(facts), loss.t, loss.error, shown.mean(axis=(1, 2, 3)))
        return loss

    mesh, optimizer = tiny.training_mesh(1), optax.sgd(0.0)
    step = make_train_step(model, objective, optimizer, mesh, KEY, StepOptions((0.9,)))
    state = init_state({"scale": jnp.ones(())}, optimizer, (0.9,))
    step(state, tiny.IMAGES, None, jnp.zeros(1))
    jax.effects_barrier()
    t, error, shown = seen[0]
    assert len(set(shown.tolist())) > 4  # dropout acts
    assert np.all(np.asarray(error)[t > 2] == 0)


# Training


STAGED = partial(
    progressive.progressive_loss,
    schedule=tiny.SCHEDULE,
    prediction="v",
    weights=None,
    course=Course(6, "v"),
    start=4,
    end=2,
)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(1e-2, 0.0, 6)))
STUDENT = tiny.make_model(tiny.apply_fn, tiny.SCHEDULE, tiny.SHAPE, "v")


def staged_step(promotions):
    options = StepOptions((0.9,), promotions=promotions)
    step = make_train_step(STUDENT, STAGED, OPTIMIZER, tiny.training_mesh(1), KEY, options)
    return lambda state: step(state, tiny.IMAGES, None, jnp.zeros(1))[0]


def first_state():
    params = tiny.make_params()
    return init_state(params, OPTIMIZER, (0.9,), jax.tree.map(jnp.copy, params))


def same(left, right):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), left, right)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_two_stages_are_two_runs_of_which_the_second_learns_from_the_first(on_cpu, monkeypatch):
    """Accelerators choose in each array what a CPU chooses by a branch."""
    choose = training_step._choose
    monkeypatch.setattr(training_step, "_choose", lambda *asked: choose(*asked[:-1], on_cpu))
    step, state = staged_step((3,)), first_state()
    plain, other = staged_step(()), first_state()
    for _ in range(3):
        state, other = step(state), plain(other)
    same(state.teacher, tiny.make_params())
    # The second run: its parameters are its teacher, its optimizer is new, and the rate goes on by the count.
    params = jax.device_get(other.params)
    fresh = OPTIMIZER.init(params)
    fresh = (fresh[0], (fresh[1][0], other.opt_state[1][1]))
    copies = [jax.tree.map(jnp.asarray, params) for _ in range(2)]
    other = other.replace(teacher=copies[0], ema_params={"0.9": copies[1]}, opt_state=fresh)
    for _ in range(3):
        state, other = step(state), plain(other)
    # Two programs, so the last bits may differ.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), (state.teacher, state), (params, other))


def test_a_state_with_a_teacher_comes_back_from_disk_bit_for_bit_across_a_stage(tmp_path):
    step, state = staged_step((3,)), first_state()
    for _ in range(2):
        state = step(state)
    with saving.CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(2, state, {"config": {}})
    like = jax.device_put(first_state(), devices.state_sharding(tiny.training_mesh(1), first_state()))
    resumed = checkpoints.load_state(tmp_path, 2, like)
    for _ in range(3):
        state, resumed = step(state), step(resumed)
    same(state, resumed)


SMALL = ("--config.train.batch_size=4", "--config.train.log_every=2", "--config.train.save_every=2")
SHORT = (*SMALL, "--config.train.grid_every=100", "--config.train.keep=9", "--config.sample.num=4")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, compile_once):
    """A tiny run that predicts v, in a folder where its students are trained."""
    folder = tmp_path_factory.mktemp("students")
    result = train(folder, "--workdir=teacher", "--config.train.num_steps=2", "--config.train.prediction=v", *SHORT)
    assert result.returncode == 0, result.stderr
    return folder


def learn(folder, workdir, *args):
    arguments = ("--config=configs/digits_progressive.py", "--config.teacher=teacher", *SHORT, *args)
    return run("train.py", f"--workdir={workdir}", *arguments, cwd=folder)


PROGRESSIVE = ("--config.train.objective=progressive:start=4,end=2", "--config.train.num_steps=6")


def test_a_student_is_an_ordinary_run_that_resumes_exactly_and_refuses_what_it_cannot_do(teacher):
    result = learn(teacher, "student", *PROGRESSIVE)
    assert result.returncode == 0, result.stderr
    # Killed before the second stage, and resumed.
    shutil.copytree(teacher / "student", teacher / "again")
    for step in saved_steps(teacher / "again"):
        if step > 2:
            shutil.rmtree(teacher / "again" / "checkpoints" / str(step))
    assert learn(teacher, "again", *PROGRESSIVE).returncode == 0
    assert digest(teacher / "student", 6) == digest(teacher / "again", 6)
    assert (teacher / "student/metrics.csv").read_bytes() == (teacher / "again/metrics.csv").read_bytes()
    # Another teacher, or another length.
    longer = learn(teacher, "again", *PROGRESSIVE[:1], "--config.train.num_steps=8")
    assert "num_steps is 8, the run has 6" in error_line(longer)
    # It samples without its teacher and without flags.
    (teacher / "teacher").rename(teacher / "away")
    try:
        drawn = run("sample.py", "--workdir=student", "--num=2", cwd=teacher)
        assert drawn.returncode == 0, drawn.stderr
        assert "ddim(eta=0) on uniform, 2 network calls" in drawn.stdout
        refused = error_line(run("sample.py", "--workdir=student", "--steps=25", cwd=teacher))
        assert "has learned one thing, 2 ddim steps on the uniform grid" in refused
        bits = error_line(run("evaluate.py", "--workdir=student", "--bound=2", cwd=teacher))
        assert "this is a student for few calls" in bits
    finally:
        (teacher / "away").rename(teacher / "teacher")
    # A teacher that was trained on is another one.
    more = ("--config.train.num_steps=4", "--config.train.prediction=v")
    assert train(teacher, "--workdir=teacher", *more, *SHORT).returncode == 0
    changed = error_line(learn(teacher, "student", *PROGRESSIVE))
    assert "teacher.sha256 differs (by its SHA-256)" in changed
    assert "teacher.step is 4, the run has 2" in changed


@pytest.mark.reliability
@pytest.mark.parametrize("kind", ["consistency", "consistency_distillation"])
def test_a_consistency_student_samples_in_two_calls_without_flags(teacher, kind):
    result = learn(teacher, kind, f"--config.train.objective={kind}", "--config.train.num_steps=2")
    assert result.returncode == 0, result.stderr
    drawn = run("sample.py", f"--workdir={kind}", "--num=2", cwd=teacher)
    assert "consistency on uniform, 2 network calls" in drawn.stdout, drawn.stderr
    refused = error_line(run("sample.py", f"--workdir={kind}", "--sampler=unipc", cwd=teacher))
    assert "draws a whole sample in each call, and unipc" in refused


# What a student takes from its teacher, and what it refuses


def shipped():
    return pretrained.load("digits")


def test_a_student_is_as_its_teacher_where_the_recipe_is_silent():
    trained = shipped()
    config = digits_progressive.get_config()
    config.model.dropout = 0.1
    found = students.complete(config, trained)
    assert (found.schedule, found.model.width, found.data.name) == ("cosine", 32, "digits")
    assert (found.train.prediction, found.model.dropout) == ("v", 0.1)
    assert tuple(found.sample[name] for name in ("sampler", "steps", "tau")) == ("ddim", 4, "uniform")
    silent = get_config()
    silent.train.objective = "consistency"
    assert students.complete(silent, trained._replace()).train.prediction == "eps"
    assert students.complete(get_config(), None) == get_config()


@pytest.mark.parametrize("recipe", [digits_progressive, digits_consistency])
def test_the_recipes_learn_from_the_model_that_ships(recipe):
    config = recipe.get_config()
    trained = students.open_teacher(config)
    assert students.identity(trained)["teacher"]["step"] == 3000
    students.complete(config, trained)


def test_sheets_are_drawn_with_the_steps_of_the_stage():
    trained = shipped()
    config = digits_progressive.get_config()
    config.train.objective, config.train.num_steps = "progressive:start=8,end=2", 90
    found = experiment.make_experiment(students.complete(config, trained), trained)
    assert [found.table_at(step).nfe for step in (1, 30, 31, 60, 61, 90)] == [8, 8, 4, 4, 2, 2]
    assert [students.default_steps(trained._replace(config=found.config, step=step)) for step in (30, 60, 90)] == [
        8,
        4,
        2,
    ]


def refuses(message, config, **options):
    with pytest.raises(InputError, match=message):
        students.check_sampler(config, None, SCHEDULE, **options)


def test_a_progressive_student_takes_only_the_table_it_was_trained_for():
    config = students.complete(digits_progressive.get_config(), shipped())
    students.check_sampler(config, None, SCHEDULE, solvers.ddim(SCHEDULE, [64, 48, 32, 16, 0]))
    students.check_sampler(config, None, SCHEDULE, solvers.euler(SCHEDULE, [64, 48, 32, 16, 0]))  # the same table
    for table in (
        solvers.ddim(SCHEDULE, [64, 32, 0]),
        solvers.ddim(SCHEDULE, [64, 48, 32, 15, 0]),
        solvers.ddim(SCHEDULE, [64, 48, 32, 16, 0], eta=0.5),
        solvers.dpm_solver_pp(SCHEDULE, [64, 48, 32, 16, 0]),
    ):
        refuses("has learned one thing, 4 ddim steps", config, table=table)


def test_a_consistency_student_takes_any_grid_but_only_fresh_noise():
    config = students.complete(digits_consistency.get_config(), shipped())
    for tau in ([64, 0], [64, 20, 0], [60, 40, 20, 10, 0]):
        students.check_sampler(config, None, SCHEDULE, solvers.consistency(SCHEDULE, tau))
    students.check_sampler(config, None, SCHEDULE, solvers.ddim(SCHEDULE, [64, 0]))  # one call is one call
    for table in (solvers.ddim(SCHEDULE, [64, 32, 0]), solvers.unipc(SCHEDULE, [64, 32, 0])):
        refuses("draws a whole sample in each call", config, table=table)


def student_of(objective, num_steps=100):
    """A trained progressive or consistency student, as its teacher would be opened."""
    trained = shipped()
    config = trained.config.copy_and_resolve_references()
    config.train.objective, config.train.num_steps = objective, num_steps
    return trained._replace(config=config, step=num_steps)


@pytest.mark.parametrize(
    ("teacher_objective", "objective", "message"),
    [
        ("progressive:start=8,end=4", "progressive:start=4,end=1", "needs a teacher of 8; take progressive:start=2"),
        ("progressive:start=2,end=1", "progressive:start=1,end=1", "take the teacher that it learned from"),
        ("progressive:start=8,end=4", "consistency", "is itself a student of objective progressive"),
        ("consistency", "progressive", "is itself a student of objective consistency"),
        ("hybrid", "progressive", None),
    ],
)
def test_from_a_student_only_its_next_halving_can_be_learned(teacher_objective, objective, message):
    config = get_config()
    config.train.objective = objective
    if message is None:
        variance = shipped()
        teacher = variance._replace(model=dataclasses.replace(variance.model, learned_variance=True))
        message = "predicts its variance"
    else:
        teacher = student_of(teacher_objective)
    with pytest.raises(InputError, match=message):
        students.complete(config, teacher)


def test_a_progressive_student_can_be_halved_further():
    config = get_config()
    config.train.objective = "progressive:start=2,end=1"
    assert students.complete(config, student_of("progressive:start=8,end=4")).sample.steps == 1
