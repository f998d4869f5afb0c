"""Laws of a sweep: which rows it has, and that none is measured twice or lost."""

import csv
import json

import pytest

from diffusion.commands.sweep import Entry, Results, plan
from diffusion.errors import InputError
from diffusion.options import split


def test_options_belong_to_the_sampler_before_them():
    text = "ddim,dpm_solver_pp:order=3,variant=official,unipc,ddim:eta=0.5"
    assert split(text) == ["ddim", "dpm_solver_pp:order=3,variant=official", "unipc", "ddim:eta=0.5"]
    assert split("ddim,eta=1") == ["ddim", "eta=1"]  # which is refused as an unknown sampler


def test_etas_are_for_the_samplers_that_have_one_and_do_not_name_their_own():
    entries = plan(["ddim", "unipc", "ddim:eta=0.5"], [5, 10], [0.0, 1.0])
    assert [e for e in entries if e.sampler == "ddim"] == [Entry("ddim", s, eta) for eta in (0, 1) for s in (5, 10)]
    assert [e for e in entries if e.sampler != "ddim"] == [
        Entry(sampler, steps, None) for sampler in ("unipc", "ddim:eta=0.5") for steps in (5, 10)
    ]
    assert plan(["ddim", "euler_ancestral"], [5], []) == [Entry("ddim", 5, 0.0), Entry("euler_ancestral", 5, 1.0)]
    with pytest.raises(InputError, match="none of unipc takes one"):
        plan(["unipc"], [5], [0.0])


@pytest.mark.parametrize("twice", [(["ddim", "ddim"], [5], []), (["ddim"], [5, 5], []), (["ddim"], [5], [0.0, 0.0])])
def test_what_comes_twice_is_refused(twice):
    with pytest.raises(InputError, match="twice"):
        plan(*twice)


def test_rows_are_found_again_by_what_determines_their_samples(tmp_path):
    record = {"sampler": "ddim", "eta": 0.0, "steps": 5, "num": 100}
    results = Results(tmp_path)
    assert results.find(record, ["frechet"]) is None
    results.add(record, ["frechet"], {"frechet_pixels": 0.25}, {"seconds": 1.5})
    found = Results(tmp_path).find(record, ["frechet"])
    assert found["metrics"] == {"frechet_pixels": 0.25}
    assert Results(tmp_path).find({**record, "num": 101}, ["frechet"]) is None
    assert Results(tmp_path).find(record, ["frechet", "prdc"]) is None
    Results(tmp_path).add(record, ["prdc"], {"recall_pixels": 0.5}, {"seconds": 1.0})
    assert Results(tmp_path).find(record, ["frechet", "prdc"])["metrics"] == {
        "frechet_pixels": 0.25,
        "recall_pixels": 0.5,
    }
    assert len(json.loads((tmp_path / "evaluation.json").read_text())["rows"]) == 1


def test_the_csv_has_a_column_for_every_metric_of_any_row(tmp_path):
    results = Results(tmp_path)
    results.add({"sampler": "ddim", "steps": 5}, ["a"], {"a": 1.0}, {})
    results.add({"sampler": "unipc", "steps": 5}, ["b"], {"b": 2.0}, {})
    with open(tmp_path / "evaluation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sampler"], row["a"], row["b"]) for row in rows] == [("ddim", "1.0", ""), ("unipc", "", "2.0")]


@pytest.mark.parametrize("nothing", [([], [5], []), (["ddim"], [], [])])
def test_an_empty_sweep_is_refused(nothing):
    with pytest.raises(InputError, match="names no sampler"):
        plan(*nothing)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"other": 1}', '{"rows": [{}]}', '{"rows": [1]}'])
def test_a_damaged_file_of_results_is_refused(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(InputError, match="is damaged; delete it"):
        Results(tmp_path)
