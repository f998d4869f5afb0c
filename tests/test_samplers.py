"""Laws of samplers by name: one way for all, hand-made, estimated on data, or read from a file."""

import dataclasses

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from reference import refused

from diffusion import schedules, solvers, timesteps
from diffusion.adaptive import ADAPTIVE
from diffusion.commands import aliases
from diffusion.commands.samplers import (
    OWN_LENGTH,
    SAMPLERS,
    chosen_steps,
    default_eta,
    describe,
    make_table,
    make_tau,
)
from diffusion.errors import InputError
from diffusion.interop.diffusers import schedulers
from diffusion.solvers import names as foreign

LINEAR = schedules.linear()


def same(a, b):
    assert a.name == b.name
    for name in ("tau", "t", "signal", "noise", "update"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_a_name_makes_the_table_of_its_function(name):
    same(make_table(LINEAR, name, 7, "karras"), solvers.SOLVERS[name](LINEAR, timesteps.karras(LINEAR, 7)))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ddim:eta=0.5", lambda tau: solvers.ddim(LINEAR, tau, 0.5)),
        ("unipc:order=1,2,2,1,variant=bh1", lambda tau: solvers.unipc(LINEAR, tau, (1, 2, 2, 1), "bh1")),
        ("unipc:disable_corrector=0,2", lambda tau: solvers.unipc(LINEAR, tau, disable_corrector=(0, 2))),
        ("unipc:disable_corrector=1", lambda tau: solvers.unipc(LINEAR, tau, disable_corrector=(1,))),
        ("edm:s_churn=3,s_max=1", lambda tau: solvers.edm(LINEAR, tau, s_churn=3, s_max=1)),
    ],
)
def test_options_reach_the_function(text, wanted):
    same(make_table(LINEAR, text, 4, "uniform"), wanted(timesteps.uniform(LINEAR, 4)))


def test_eta_is_short_for_the_option():
    same(make_table(LINEAR, "ddim", 4, "uniform", eta=0.3), make_table(LINEAR, "ddim:eta=0.3", 4, "uniform"))
    assert (default_eta("ddim"), default_eta("ddim:eta=0.2"), default_eta("unipc"), default_eta("nonsense")) == (
        0.0,
        None,
        None,
        None,
    )


def test_what_is_estimated_comes_from_the_resources_and_text_goes_before_them():
    asked = []

    def gamma(tau):
        asked.append(tau)
        return np.linspace(0.9, 0.2, len(tau) - 1)

    resources = {"gamma": gamma, "max_cov": lambda tau: 1.0}
    tau = timesteps.uniform(LINEAR, 5)
    got = make_table(LINEAR, "analytic_dpm:eta=0", 5, "uniform", resources=resources)
    same(got, solvers.analytic_dpm(LINEAR, tau, np.linspace(0.9, 0.2, 5), eta=0.0, max_cov=1.0))
    np.testing.assert_array_equal(asked, [tau])
    got = make_table(LINEAR, "analytic_dpm:max_cov=0.25", 5, "uniform", resources=resources)
    same(got, solvers.analytic_dpm(LINEAR, tau, np.linspace(0.9, 0.2, 5), max_cov=0.25))
    with refused("analytic_dpm needs gamma, which is estimated on a trained model"):
        make_table(LINEAR, "analytic_dpm", 5, "uniform")


def test_a_table_in_a_file_is_itself(tmp_path):
    table = solvers.unipc(LINEAR, [1000, 400.25, 3, 0])
    (tmp_path / "mine.json").write_text(table.to_json())
    same(make_table(LINEAR, str(tmp_path / "mine.json"), 0, ""), table)
    for other in (schedules.cosine(), schedules.linear(900), schedules.edm()):
        with refused("for another noise schedule than the model's|it must start in 1..900"):
            make_table(other, str(tmp_path / "mine.json"), 0, "")
    for tau in ([5000, 3, 0], [1000, -3, 0], [7, 7], [900, 100]):
        wrong = dataclasses.replace(table, tau=np.array(tau, float))
        (tmp_path / "tau.json").write_text(wrong.to_json())
        with refused("tau.json: tau"):
            make_table(LINEAR, str(tmp_path / "tau.json"), 0, "")
    (tmp_path / "back.json").write_text(solvers.ddim(LINEAR, [1000, 500, 0]).reverse().to_json())
    with refused("goes from images to noise"):
        make_table(LINEAR, str(tmp_path / "back.json"), 0, "")
    with refused("--eta does nothing"):
        make_table(LINEAR, str(tmp_path / "mine.json"), 0, "", eta=0.5)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("grid", ["uniform", "karras", "log_snr"])
def test_a_table_that_went_through_float32_is_of_its_schedule(name, grid, tmp_path):
    schedule = schedules.SCHEDULES[name]()
    if schedule.alpha_bar[-1] == 0 and grid != "uniform":
        return
    for steps in (5, 25):
        table = make_table(schedule, "dpm_solver_pp", steps, grid)
        rounded = jax.tree.map(lambda leaf: leaf.astype(np.float32), table)
        (tmp_path / "mine.json").write_text(rounded.to_json())
        assert make_table(schedule, str(tmp_path / "mine.json"), 0, "").nfe == table.nfe


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"tau": [1, 0]}', b"\xff\xfe", b"[" * 100_000, b'{"tau": NaN}']
)
def test_a_file_that_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content)
    with refused("bad.json"):
        make_table(LINEAR, str(tmp_path / "bad.json"), 0, "")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with refused("none.json cannot be read"):
        make_table(LINEAR, str(tmp_path / "none.json"), 0, "")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("uniform", timesteps.uniform(LINEAR, 6)),
        ("karras:rho=3", timesteps.karras(LINEAR, 6, 3.0)),
        ("sections:counts=3,2,1", timesteps.sections(LINEAR, "3,2,1")),
        ("sections:counts=6", timesteps.sections(LINEAR, "6")),
        ("sections:counts=ddim25", timesteps.sections(LINEAR, "ddim25")),
        ("explicit:times=900,400.5,1", [900, 400.5, 1, 0]),
        ("explicit:times=900", [900, 0]),
    ],
)
def test_grids_have_names_and_options(text, wanted):
    np.testing.assert_array_equal(make_tau(LINEAR, text, 6), wanted)


def test_a_grid_of_its_own_length_takes_no_steps():
    assert chosen_steps("karras:rho=3", 5, 25) == 5
    assert chosen_steps("explicit:times=5,1", None, 25) == 25
    for name in OWN_LENGTH:
        with refused("has its own number of steps"):
            chosen_steps(f"{name}:x=1", 5, 25)


@pytest.mark.parametrize(("other", "ours"), foreign.SAMPLERS.items())
def test_names_of_other_libraries_are_the_tables_that_they_stand_for(other, ours):
    tau = "trailing"
    if ours in ADAPTIVE:  # which is no table
        assert aliases.meaning(other.upper()).sampler == ours
        with refused("only sample.py draws with it"):
            make_table(LINEAR, other, 9, tau)
        return
    for name in (other, other.upper(), other.replace("_", " ").replace("pp", "++")):
        made, wanted = (make_table(LINEAR, text, 9, tau) for text in (name, ours))
        np.testing.assert_array_equal(made.update, wanted.update)


@pytest.mark.parametrize(("other", "ours"), foreign.GRIDS.items())
def test_names_of_grids_are_the_grids_that_they_stand_for(other, ours):
    schedule = schedules.scaled_linear()
    np.testing.assert_array_equal(make_tau(schedule, other, 10), make_tau(schedule, ours, 10))


@pytest.mark.parametrize(
    ("name", "sampler", "tau"),
    [
        ("DDIM", "ddim", ""),
        ("DPM++ 2M Karras", "dpm_solver_pp:order=2,variant=official", "karras"),
        ("dpmpp_2m_sde_karras", "dpm_solver_pp:order=2,sde_eta=1,variant=official", "karras"),
        ("sample_dpmpp_2m", "dpm_solver_pp:order=2,variant=official", ""),
        ("k_euler_a", "euler_ancestral", ""),
        ("DPM2 a Exponential", "dpm_solver:order=2,eta=1", "log_snr"),
        ("Euler SGM Uniform", "euler", "linspace:last=false,rounded=false"),
        ("er_sde:order=2", "er_sde:order=2", ""),
        ("dpmpp_sde:eta=0.5", "dpm_solver_pp_sde:eta=0.5", ""),
        ("dpmpp_2m:s_noise=1.1", "dpm_solver_pp:order=2,variant=official,s_noise=1.1", ""),
        ("dpm_solver_multistep", "dpm_solver_multistep", ""),  # ours, and not diffusers' class of nearly this name
        (
            "DPMSolverMultistepScheduler(solver_order=3)",
            "dpm_solver_pp:order=3,variant=official,lower_order_final=false",
            "",
        ),
        (
            "DPMSolverMultistepScheduler(algorithm_type=sde-dpmsolver++, use_karras_sigmas=True)",
            "dpm_solver_pp:order=2,sde_eta=1,variant=official",
            "karras",
        ),
    ],
)
def test_what_others_write_is_read_with_its_grid_and_options(name, sampler, tau):
    assert aliases.meaning(name) == (sampler, tau)


def test_what_a_name_stands_for_is_printed(capsys):
    assert aliases.chosen("euler_a_karras", "uniform", tau_given=False) == ("euler_ancestral", "karras")
    assert capsys.readouterr().out == "note: euler_a_karras stands for --sampler=euler_ancestral --tau=karras\n"
    assert aliases.chosen("euler", "uniform", tau_given=True) == ("euler", "uniform")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", foreign.AMBIGUOUS)
def test_a_name_that_means_two_things_is_refused_with_both(name):
    with refused("means two things: .* and "):
        aliases.meaning(name) if name != "beta" else aliases.meaning("euler_beta")


def test_a_grid_that_means_two_things_names_both_flags():
    with refused("write --sampler=dpm_solver_pp:order=2,variant=official --tau=beta, or --tau=beta:of=sigma"):
        aliases.meaning("dpmpp_2m_beta")


def test_a_name_that_means_two_things_is_refused_with_a_grid_as_well_unless_it_is_ours():
    assert aliases.meaning("unipc_karras") == ("unipc", "karras")
    assert aliases.meaning("dpm_solver_pp_karras") == ("dpm_solver_pp", "karras")
    for name in ("uni_pc_karras", "UniPC Karras", "dpm_solver++_karras"):
        with refused("means two things"):
            aliases.meaning(name)


@pytest.mark.parametrize("after", ["x", "_karras", ":eta=1", ")", "(solver_order=2)"])
def test_text_after_the_call_of_a_scheduler_is_refused(after):
    with refused("is no call of DPMSolverMultistepScheduler"):
        aliases.meaning(f"DPMSolverMultistepScheduler(solver_order=2){after}")


def test_a_config_gets_our_names_in_the_place_of_others():
    section = ConfigDict({"sampler": "dpmpp_2m_karras", "tau": "uniform"})
    aliases.put_ours(section, (), "uniform")
    assert section.to_dict() == {"sampler": "dpm_solver_pp:order=2,variant=official", "tau": "karras"}
    section = ConfigDict({"sampler": "euler_a", "tau": "sgm_uniform"})
    aliases.put_ours(section, ("sample.tau",), "uniform")
    assert section.to_dict() == {"sampler": "euler_ancestral", "tau": "linspace:last=false,rounded=false"}
    for tau, given in (("uniform", ("sample.tau",)), ("leading", ())):
        with refused("takes the grid karras; leave out config.sample.tau"):
            aliases.put_ours(ConfigDict({"sampler": "dpmpp_2m_karras", "tau": tau}), given, "uniform")
    section = ConfigDict({"sampler": "dpmpp_2m_karras", "tau": "quadratic"})  # the recipe's grid, its sampler replaced
    aliases.put_ours(section, ("sample.sampler",), "uniform")
    assert section.tau == "karras"


def test_the_list_names_everything_with_its_options_and_calls():
    text = describe()
    for name in (*SAMPLERS, *timesteps.GRIDS, *OWN_LENGTH):
        assert f"  {name} " in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ") and line.split()}
    for name, calls in (("ddim", 10), ("heun", 19), ("plms", 11), ("analytic_dpm", 10)):
        assert f" {calls} calls " in lines[name]
    assert "order=2, sde_eta=0.0, variant=exact" in text
    assert max(map(len, text.splitlines())) <= 200


@pytest.mark.parametrize("name", schedulers.CLASSES)
def test_a_class_of_diffusers_means_the_same_with_and_without_its_arguments(name):
    found = schedulers.read_scheduler(name, {"_class_name": name}).sampler
    assert foreign.SAMPLERS.get(name, found) == found
    assert aliases.meaning(f"{name}()").sampler == found


@pytest.mark.parametrize(
    ("text", "sampler", "tau"),
    [
        (
            "DPMSolverMultistepScheduler(use_beta_sigmas=True)",
            "dpm_solver_pp:order=2,variant=official",
            "beta:of=sigma",
        ),
        ("LCMScheduler(original_inference_steps=40)", "consistency", "trailing:among=40"),
        ("UniPCMultistepScheduler(disable_corrector=[0,1], solver_order=3)", "unipc:order=3,variant=bh2,dis", ""),
        ("LMS Karras", "lms", "karras"),
        ("DPM++ 2M:order=3", "dpm_solver_pp:variant=official,order=3", ""),
    ],
)
def test_a_name_of_elsewhere_says_all_that_it_says(text, sampler, tau):
    found = aliases.meaning(text)
    assert found.sampler.startswith(sampler)
    assert found.tau == tau


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DDIMScheduler(beta_start=0.3)", "beta_start is of the model"),
        ("UniPCMultistepScheduler(solver_order=3,solver_order=2)", "is no argument, or its second"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        aliases.meaning(text)


def test_grids_are_known_by_the_names_of_the_uis():
    assert [aliases.grid(name) for name in ("Karras", "KL Optimal", "Trailing", "SGM Uniform")] == [
        "karras",
        "kl_optimal",
        "trailing",
        "linspace:last=false,rounded=false",
    ]
