"""Laws of guidance distillation, and of what a student that takes the guidance scale can be asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from commands import error_line, run, train
from student_runs import SHORT, check_resumes, check_travels, refuses

from configs.default import get_config
from diffusion import devices, pretrained, schedules, solvers
from diffusion.commands import drawing, students
from diffusion.conditions import Conditions
from diffusion.denoiser import denoise
from diffusion.errors import InputError
from diffusion.guidance import Guidance, Now
from diffusion.models import UNet
from diffusion.objectives import choice
from diffusion.objectives.guided import guidance_distillation_loss, guided
from diffusion.objectives.losses import Batch
from diffusion.objectives.teaching import Course
from diffusion.predictions import reading

SCHEDULE = schedules.cosine(64)
SHAPE, CLASSES = (4, 4, 1), 3


def answer(x, time, labels):
    """Some network of classes, each of which has a sign and a strength of its own."""
    strength = jnp.array([0.5, -1.0, 2.0, 0.1])[labels].reshape(-1, 1, 1, 1)
    return jnp.tanh(strength * x + time.reshape(-1, 1, 1, 1) / 64)


def teacher(x, time, cond):
    labels, _ = cond
    return answer(x, time, labels)


def ideal(x, time, cond):
    """The student that is the guided teacher."""
    labels, scales = cond
    given, none = answer(x, time, labels), answer(x, time, jnp.full_like(labels, CLASSES))
    return none + scales.reshape(-1, 1, 1, 1) * (given - none)


def batch_of(network, number=64):
    x_0 = jax.random.normal(jax.random.key(5), (number, *SHAPE))
    labels = jnp.arange(number) % CLASSES
    split = jax.random.split(jax.random.key(1), number)
    return Batch(network, x_0, labels, split, jnp.arange(number), number, teacher=teacher)


def loss_of(network, prediction="eps", weights=None, **options):
    course = Course(10, "eps", null=CLASSES)
    return guidance_distillation_loss(batch_of(network), SCHEDULE, prediction, weights, course, **options)


def test_the_target_is_the_answer_of_the_guided_teacher_at_each_scale():
    """As sampling reads it, one scale after the other."""
    x, time = jax.random.normal(jax.random.key(2), (6, *SHAPE)), jnp.full(6, 40.0)
    labels = jnp.arange(6) % CLASSES
    at = reading("eps", np.float64(40), *SCHEDULE.at(40))
    for scale in (1.0, 2.5, 4.0):
        found = guided(teacher, (x, time), labels, CLASSES, jnp.full(6, scale))
        guidance = Guidance(null=jnp.full(6, CLASSES))
        now = Now(guidance, jnp.asarray(scale), jnp.ones(()), jnp.zeros((), int), jnp.zeros_like(x))
        wanted = denoise(answer, x, labels, at, now=now).x0
        np.testing.assert_allclose(at.from_x * x + at.from_output * found, wanted, rtol=1e-5, atol=1e-5)


def test_the_guided_teacher_has_no_loss_and_the_teacher_has_one():
    assert float(loss_of(ideal).value.max()) < 1e-12
    assert float(loss_of(teacher).value.mean()) > 1e-2
    alone = loss_of(teacher, scales=(0.999, 1.001))
    assert float(alone.value.max()) < 1e-5  # a scale of 1 is no guidance


def test_scales_are_drawn_evenly_from_their_range():
    seen = []

    def network(x, time, cond):
        seen.append(cond[1])
        return x

    loss_of(network, scales=(0.5, 8.0))
    scales = np.asarray(seen[0])
    assert scales.min() >= 0.5
    assert scales.max() < 8
    assert abs(scales.mean() - 4.25) < 1


def test_the_loss_takes_weights_as_that_of_an_ordinary_model():
    weights = np.linspace(1, 2, 65)
    plain, weighted = loss_of(teacher), loss_of(teacher, weights=weights)
    np.testing.assert_allclose(weighted.value, weights[np.asarray(plain.t)] * plain.value, rtol=1e-5)


def test_what_the_objective_cannot_take_is_refused():
    for scales in ((2.0, 4.0), (1.0, 1.0), (-1.0, 4.0), (1.0, np.inf), (1.0,), (0.5, np.nan)):
        with pytest.raises(InputError, match="give the lowest and the highest, with 1, no guidance"):
            loss_of(ideal, scales=scales)
    with pytest.raises(InputError, match="prediction is v, and the teacher predicts eps"):
        loss_of(ideal, prediction="v")
    for course, message in ((Course(10), "learns from a teacher"), (Course(10, "eps"), "the teacher has no classes")):
        with pytest.raises(InputError, match=message):
            guidance_distillation_loss(batch_of(ideal), SCHEDULE, "eps", None, course)


# Sampling


def model_of(network, scales):
    model = tiny.make_model(lambda params, x, t, cond=None: network(x, t, cond), SCHEDULE, SHAPE)
    return dataclasses.replace(model, conditions=Conditions(("a", "b", "c"), CLASSES, scales))


@pytest.mark.parametrize("solver", ["ddim", "unipc"])
def test_the_guided_teacher_as_a_student_draws_what_guidance_draws_at_half_the_cost(solver):
    table = solvers.SOLVERS[solver](SCHEDULE, [64, 40, 20, 10, 5, 0])
    shared = {"seed": 0, "mesh": devices.data_mesh(), "labels": range(CLASSES), "clip": "recompute"}
    widths = []

    def counted(network):
        def call(x, time, cond):
            widths.append(len(x))
            return network(x, time, cond)

        return call

    drawn = []
    for scale in (3.0, 1.0):
        for network, scales in ((answer, None), (ideal, (1.0, 4.0))):
            parts = drawing.generate(
                model_of(counted(network), scales), {}, table, range(12), guidance=Guidance(scale=scale), **shared
            )
            drawn.append(np.concatenate(list(parts)).astype(int))
    size = -(-12 // shared["mesh"].size) * shared["mesh"].size
    assert set(widths) == {size, 2 * size}
    assert set(widths[1:2]) == {size}
    for wanted, found in (drawn[:2], drawn[2:]):
        assert np.abs(wanted - found).max() <= 1
    assert np.abs(drawn[0] - drawn[2]).max() > 10


def test_frames_are_drawn_at_the_scale_as_well():
    model = model_of(ideal, (1.0, 4.0))
    table = solvers.ddim(SCHEDULE, [64, 30, 0])
    shared = {"seed": 0, "labels": range(CLASSES)}
    frames = drawing.frames(model, {}, table, range(4), guidance=Guidance(scale=3.0), **shared)
    shared |= {"guidance": Guidance(scale=3.0), "mesh": devices.data_mesh()}
    images = next(drawing.generate(model, {}, table, range(4), **shared))
    assert np.abs(frames[-1].astype(int) - images).max() <= 1


def test_a_scale_that_was_not_learned_is_refused():
    conditions = Conditions(("a",), 1, (1.0, 4.0))
    for scale in (0.9, 4.5, float("nan")):
        with pytest.raises(InputError, match=r"guidance_scale is .*trained with scales from 1 to 4"):
            conditions.told(np.zeros(2, np.int32), scale)
    labels, scales = conditions.told(np.zeros(2, np.int32), 3)
    assert (labels.shape, scales.tolist()) == ((2,), [3, 3])


FIELDS = {"width": 4, "multipliers": (1,), "num_blocks": 1, "attention_resolutions": (), "num_classes": CLASSES}


def test_a_new_student_gives_the_answer_of_its_teacher_at_every_scale():
    plain, seeing = UNet(**FIELDS), UNet(**FIELDS, sees_scale=True)
    x, t = jax.random.normal(jax.random.key(8), (3, *SHAPE)), jnp.array([1.0, 20.0, 50.0])
    labels = jnp.arange(3)
    params = jax.jit(seeing.init)(jax.random.key(2), x, t)["params"]
    own = {name: value for name, value in params.items() if name.startswith("scale")}
    params = jax.tree.map(lambda value: value + 0.1, params) | own  # many parameters begin at 0
    ordinary = {name: value for name, value in params.items() if not name.startswith("scale")}
    wanted = jax.jit(plain.apply)({"params": ordinary}, x, t, labels)
    apply = jax.jit(seeing.apply)
    for scale in (1.0, 3.0):
        found = apply({"params": params}, x, t, (labels, jnp.full(3, scale)))
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    params["scale_2"]["kernel"] += 0.3
    found = apply({"params": params}, x, t, (labels, jnp.full(3, 3.0)))
    assert float(jnp.abs(found - wanted).max()) > 1e-3
    with pytest.raises(InputError, match=r"give cond as \(labels, scales\)"):
        seeing.apply({"params": params}, x, t, labels)


# Teachers, and a run


def test_a_teacher_without_classes_or_without_no_class_is_refused():
    config = get_config()
    config.train.objective = "guidance_distillation"
    trained = pretrained.load("digits")
    with pytest.raises(InputError, match=r"config.teacher has no classes"):
        students.complete(config, trained)
    theirs = trained.config.copy_and_resolve_references()
    theirs.train.label_dropout = 0.0
    model = dataclasses.replace(trained.model, conditions=Conditions(("0", "1"), 2))
    with pytest.raises(InputError, match="has not learned what no class means"):
        students.complete(config, trained._replace(model=model, config=theirs))


def test_a_network_of_ones_own_cannot_take_more_than_its_teacher_does():
    trained = pretrained.load("digits")
    theirs = trained.config.copy_and_resolve_references()
    theirs.network = "mine:net"
    model = dataclasses.replace(trained.model, conditions=Conditions(("0", "1"), 2))
    config = get_config()
    config.train.objective, config.network = "guidance_distillation", "mine:net"
    with pytest.raises(InputError, match=r"network is 'mine:net'; with objective guidance_distillation and a teacher"):
        students.complete(config, trained._replace(model=model, config=theirs))


def test_scales_are_read_from_the_text_of_the_objective():
    assert choice.scales(choice.parse("guidance_distillation")) == (1.0, 4.0)
    assert choice.scales(choice.parse("guidance_distillation:scales=0,8")) == (0.0, 8.0)
    assert choice.scales(choice.parse("simple")) is None


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory, compile_once):
    """A folder with a tiny run with classes."""
    folder = tmp_path_factory.mktemp("guided")
    classes = ("--config=configs/digits_classes.py", "--config.train.num_steps=2")
    result = train(folder, "--workdir=teacher", *classes, *SHORT)
    assert result.returncode == 0, result.stderr
    return folder


def learn(folder, name):
    recipe = ("--config=configs/digits_guided.py", "--config.teacher=teacher", "--config.train.num_steps=4")
    return run("train.py", f"--workdir={name}", *recipe, *SHORT, cwd=folder)


def test_a_guided_student_is_an_ordinary_run_that_takes_the_scales_it_has_learned(teacher_run):
    result = learn(teacher_run, "student")
    assert result.returncode == 0, result.stderr
    assert "--guidance_scale=2" in result.stdout
    drawn = run("sample.py", "--workdir=student", "--num=2", "--guidance_scale=3", "--labels=3,5", cwd=teacher_run)
    assert "images of 3, 5 with ddim(eta=0) on uniform, 25 network calls" in drawn.stdout, drawn.stderr
    refused = error_line(run("sample.py", "--workdir=student", "--guidance_scale=9", cwd=teacher_run))
    assert "guidance_scale is 9.0; this student takes the scale as an input and was trained with scales" in refused


@pytest.mark.reliability
def test_a_guided_student_resumes_exactly_travels_and_refuses_what_it_cannot_do(teacher_run):
    check_resumes(teacher_run, "run", lambda name: learn(teacher_run, name))
    check_travels(teacher_run, "run", "--guidance_scale=3", "--labels=3,5")
    rows = ("--metrics=frechet", "--num=8", "--guidance_scale=2")
    measured = run("evaluate.py", "--workdir=run", *rows, cwd=teacher_run)
    assert measured.returncode == 0, measured.stderr
    refuses(
        teacher_run,
        ("sample.py", "--guidance_rule=apg", "--guidance_rule is for guidance in two calls"),
        ("sample.py", "--guidance_interval=1,50", "--guidance_interval is for guidance in two calls"),
        ("sample.py", "--sampler=analytic_dpm", "this is a student for few calls"),
        ("evaluate.py", "--likelihood=2", "this is a student for few calls"),
        ("learn.py", "--calls=3", "this is a student for few calls"),
    )
