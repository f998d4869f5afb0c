"""The ranking of samplers: what is compared, by what distance, and as a command on a user's own model."""

import csv
import re
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import command as command_line
from commands import run
from reference import refused

import diffusion
from diffusion import pretrained, schedules, solvers, testbeds, timesteps
from diffusion.commands import opening, ranked, rollouts, sources
from diffusion.commands import ranking as command
from diffusion.evaluation import ranking
from diffusion.guidance import Guidance
from diffusion.training import run_folder

LINEAR = schedules.linear(100, 1e-3, 0.12)
MAKE = ranking.maker(LINEAR)


def entries(calls=4, samplers=("ddim", "unipc:order=2", "heun", "dpm_solver:calls=grid"), grids=("uniform", "karras")):
    return ranking.candidates(MAKE, calls, samplers, grids)


def test_every_solver_is_ranked_or_left_out_for_a_reason():
    assert {*ranking.SAMPLERS} | {*ranking.LEFT_OUT} == {*solvers.SOLVERS}
    assert not {*ranking.SAMPLERS} & {*ranking.LEFT_OUT}


def test_a_candidate_spends_as_much_of_the_budget_as_it_can_and_its_texts_make_its_table():
    found = entries(calls=4)
    assert {entry.sampler.partition(":")[0]: entry.table.nfe for entry in found if entry.tau == "uniform"} == {
        "ddim": 4,
        "unipc": 4,
        "heun": 3,
        "dpm_solver": 4,
    }
    for entry in found:
        again = MAKE(entry.sampler, entry.tau, entry.steps)
        np.testing.assert_array_equal(again.update, entry.table.update)
        assert entry.steps == 4 or MAKE(entry.sampler, entry.tau, entry.steps + 1).nfe > 4


def test_no_table_comes_twice_under_two_names():
    found = ranking.candidates(MAKE, 1, grids=("uniform", "trailing"))
    keys = {entry.table.update.tobytes() + entry.table.t.tobytes() for entry in found}
    assert len(keys) == len(found) < len(ranking.SAMPLERS)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim:eta=0.5", "sa_solver:sde_eta=1", "dpm_solver_pp:sde_eta=1"])
def test_a_sampler_that_draws_noise_is_refused(sampler):
    with refused("draws noise at its steps, and no distance"):
        entries(samplers=("ddim", sampler))


@pytest.mark.usefixtures("float64")
def test_a_row_is_the_distance_to_the_solution_and_one_compilation_serves_a_number_of_calls():
    images = np.random.default_rng(1).uniform(-1, 1, (4, 1, 2, 1))
    bed = testbeds.ideal(LINEAR, images, bandwidth=0.2)
    noise = np.random.default_rng(0).standard_normal((6, 1, 2, 1))
    exact = testbeds.ode_solution(*bed, LINEAR, noise, LINEAR.num_timesteps, tolerance=1e-8)
    traced = []

    def network(*args):
        traced.append(1)
        return bed.apply_fn(*args)

    def draw(table):
        start = jnp.asarray(noise)
        return diffusion.sample(network, bed.params, table, jax.random.key(0), 6, (1, 2, 1), x_init=start)

    found = entries()
    draw(MAKE("ddim", "uniform", 7))
    once = len(traced)
    rows = list(ranking.rank(draw, found, exact))
    assert len(traced) == once * (1 + len({entry.table.nfe for entry in found}))
    assert len({entry.table.update.shape for entry in found}) > len({entry.table.nfe for entry in found})
    assert len(rows) == len(found)
    for row in rows:
        apart = np.linalg.norm((np.asarray(draw(row.candidate.table)) - exact).reshape(6, 2), axis=1) / np.sqrt(2)
        assert row.rms == pytest.approx(np.sqrt(np.mean(apart**2)), rel=1e-9)
        assert row.median == pytest.approx(np.sqrt(np.median(apart**2)), rel=1e-9)
    # More calls come nearer, so that the order says something.
    (near,) = ranking.rank(draw, ranking.candidates(MAKE, 64, ("unipc:order=2",), ("uniform",)), exact)
    assert near.rms < 0.1 * min(row.rms for row in rows)


def test_a_sample_that_is_not_finite_is_infinitely_far():
    found = ranking.squares(np.array([[1.0, 2.0], [np.nan, 0.0], [1e300, -1e300]]), np.zeros((3, 2)))
    np.testing.assert_array_equal(found, [2.5, np.inf, np.inf])


@pytest.mark.usefixtures("compile_once")
def test_the_command_ranks_a_model_by_the_distance_to_its_own_solution(trained, tmp_path):
    subprocess.run(["cp", "-r", str(trained / "runs"), str(tmp_path)], check=True)
    found = run_folder.load_trained(run_folder.existing(str(tmp_path / "runs/digits")), "")
    model = found.model
    mine = solvers.ddim(model.schedule, [900, 300, 0])
    (tmp_path / "runs/digits/tables").mkdir()
    (tmp_path / "runs/digits/tables/2.json").write_text(mine.to_json())
    args = ("--samplers=learned,ddim,unipc:order=2", "--tau=uniform", "--num=3")
    made = run("evaluate.py", "--rank", "--calls=2,1", *args, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    with open(tmp_path / "runs/digits/ranking.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["budget"], row["place"]) for row in rows] == [("2", "1"), ("2", "2"), ("2", "3"), ("1", "1")]

    # The distances are those of the samples from the same noise, which nothing was learned from.
    def samples(table):
        shared = {"prediction": model.prediction, "clip": found.clip}
        key = rollouts.key_of(0, "rank")
        drawn = diffusion.sample(model.apply_fn, found.params, table, key, 3, model.space.shape, **shared)
        return np.asarray(drawn, np.float64)

    exact = samples(solvers.unipc(model.schedule, timesteps.uniform(model.schedule, 500)))
    tables = {"ddim": solvers.ddim(model.schedule, timesteps.uniform(model.schedule, 2)), "learned": mine}
    for row in rows[:3]:
        if row["sampler"] in tables:
            expected = np.sqrt(np.mean((samples(tables[row["sampler"]]) - exact) ** 2))
            assert float(row["rms"]) == pytest.approx(expected, rel=1e-3)
    # The command that is printed draws with the first.
    commands = re.findall(r"use the first: python \S+ (.*)$", made.stdout, re.MULTILINE)
    drawn = run("sample.py", *commands[0].split(), "--num=2", "--dry_run", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert "2 network calls" in drawn.stdout


def test_what_was_measured_stays_measured_and_belongs_to_its_model_and_noises(tmp_path):
    one, other = (entry.table for entry in entries()[:2])
    begun, squares = ranked.Ranked(tmp_path, {"seed": 0}), np.array([0.1, np.inf])
    begun.add(one, range(2), squares)
    samples = begun.solution(lambda: (np.zeros(3), np.ones(3)))
    with open(tmp_path / ranked.ROWS, "a") as rows:
        rows.write('["half a li')  # it was killed here
    again = ranked.Ranked(tmp_path, {"seed": 0})
    np.testing.assert_array_equal(again.squares(one, range(2)), squares)
    assert again.squares(one, range(2, 4)) is None
    assert again.squares(other, range(2)) is None
    np.testing.assert_array_equal(again.solution(lambda: pytest.fail("it is there")), samples)
    again.add(other, range(2), squares)
    assert len(ranked.Ranked(tmp_path, {"seed": 0})) == 2
    strange = ranked.Ranked(tmp_path, {"seed": 1})
    assert len(strange) == 0
    np.testing.assert_array_equal(strange.solution(lambda: (np.ones(1), np.ones(2)))[1], np.ones(2))
    strange.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("compile_once")
def test_a_ranking_goes_on_where_it_was_stopped_and_says_the_same(trained, tmp_path):
    asked = (f"--workdir={trained}/runs/digits", "--rank", "--calls=2", "--samplers=deis", "--num=2")
    whole = run("evaluate.py", *asked, "--out=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    rows = tmp_path / "parts" / ranked.ROWS
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command_line("evaluate.py", *asked, "--out=parts"), cwd=tmp_path, **quiet) as process:
        while process.poll() is None and not (rows.exists() and rows.read_bytes().count(b"\n") > 3):
            time.sleep(0.01)
        process.kill()
    again = run("evaluate.py", *asked, "--out=parts", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert re.search(r"^\d+ rows are there already", again.stdout, re.MULTILINE)
    assert (tmp_path / "parts/ranking.csv").read_bytes() == (tmp_path / "whole/ranking.csv").read_bytes()
    assert sorted(path.name for path in (tmp_path / "parts").iterdir() if "lock" not in path.name) == ["ranking.csv"]


def test_a_guidance_without_a_solution_in_many_steps_is_refused():
    found = pretrained.load("digits")
    opened = opening.Opened("digits", None, found)
    source = sources.Source(opened, "", {}, Guidance(scale=2.0, rule="cfg++"), (), 0)
    with refused("rule cfg\\+\\+ has none: the more steps, the further it pushes"):
        command.plan(source, ["5"], None, None, None)
