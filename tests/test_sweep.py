"""Laws of a sweep: which rows it has, and that none is measured twice or lost."""

import csv
import json

import pytest

from diffusion.commands.sweep import Entry, Results, Row, head, plan
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


def test_every_entry_comes_with_every_scale_of_the_guidance():
    entries = plan(["ddim", "unipc"], [5], [0.0], [1.0, 2.5])
    assert entries == [Entry(s, 5, eta, w) for s, eta in (("ddim", 0.0), ("unipc", None)) for w in (1.0, 2.5)]
    assert [entry.label() for entry in entries[1:3]] == ["ddim eta=0 scale=2.5", "unipc scale=1"]
    with pytest.raises(InputError, match="twice"):
        plan(["ddim"], [5], [], [2.0, 2.0])


def test_rows_say_what_flags_add_to_their_samplers():
    (entry,) = plan(["ddim"], [5], [0.0], added={"afs": "score", "cache": "2"})
    assert entry.label() == "ddim eta=0 afs=score cache=2"
    assert Row(entry, 5, 4, [1.0]).line(40).index("     5     4") == 40
    assert head(["recall"], 40).index("steps calls") == 41


@pytest.mark.parametrize("twice", [(["ddim", "ddim"], [5], []), (["ddim"], [5, 5], []), (["ddim"], [5], [0.0, 0.0])])
def test_what_comes_twice_is_refused(twice):
    with pytest.raises(InputError, match="twice"):
        plan(*twice)


def test_rows_are_found_again_by_what_determines_their_samples(tmp_path):
    record = {"run": "runs/x", "sampler": "ddim", "eta": 0.0, "tau": (5, 0), "num": 100}
    results = Results(tmp_path)
    assert results.figures(record) == {}
    results.add(record, {"frechet_pixels": 0.25}, {"seconds": 1.5})
    assert Results(tmp_path).figures(record) == {"frechet_pixels": 0.25}
    assert Results(tmp_path).figures({**record, "num": 101}) == {}
    Results(tmp_path).add(record, {"recall_pixels": 0.5}, {"seconds": 1.0})
    assert Results(tmp_path).figures(record) == {"frechet_pixels": 0.25, "recall_pixels": 0.5}
    assert len(json.loads((tmp_path / "evaluation.json").read_text())["rows"]) == 1


@pytest.mark.parametrize("spelled", ["runs/x/", "./runs/x", "/home/me/runs/x"])
def test_a_row_is_known_however_the_path_of_its_run_is_spelled(tmp_path, spelled):
    record = {"run": "runs/x", "weights_sha256": "ab", "sampler": "mine.json", "table_sha256": "cd"}
    Results(tmp_path).add(record, {"a": 1.0}, {})
    assert Results(tmp_path).figures({**record, "run": spelled, "sampler": "./mine.json"}) == {"a": 1.0}
    assert Results(tmp_path).figures({**record, "weights_sha256": "ef"}) == {}


def test_the_csv_has_a_column_for_every_metric_of_any_row(tmp_path):
    results = Results(tmp_path)
    results.add({"sampler": "ddim", "steps": 5}, {"a": 1.0}, {})
    results.add({"sampler": "unipc", "steps": 5}, {"b": 2.0}, {})
    with open(tmp_path / "evaluation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sampler"], row["a"], row["b"]) for row in rows] == [("ddim", "1.0", ""), ("unipc", "", "2.0")]


@pytest.mark.parametrize(
    "found", [None, b"", b"sampler,a\n", b"\xff\xfe" * 5000], ids=["none", "empty", "other", "no text"]
)
def test_the_csv_follows_from_the_json_whatever_it_holds(tmp_path, found):
    Results(tmp_path).add({"sampler": "ddim", "steps": 5}, {"a": 1.0}, {})
    table = tmp_path / "evaluation.csv"
    whole = table.read_bytes()
    table.unlink()
    if found is not None:
        table.write_bytes(found)
    Results(tmp_path)
    assert table.read_bytes() == whole


@pytest.mark.parametrize("nothing", [([], [5], []), (["ddim"], [], [])])
def test_an_empty_sweep_is_refused(nothing):
    with pytest.raises(InputError, match="names no sampler"):
        plan(*nothing)


ROW = '{"identity": "a", "metrics": {"b": %s}, "record": %s}'


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "[" * 10**5, '{"other": 1}', '{"rows": null}', '{"rows": 5}', '{"rows": "a"}']
    + [f'{{"rows": [{row}]}}' for row in ("{}", "1", "null", "[]")]
    + [f'{{"rows": [{ROW % values}]}}' for values in (("1", "[]"), ("NaN", "{}"), ("null", "{}"), ('"1"', "{}"))],
    ids=lambda content: content[:60],
)
def test_a_damaged_file_of_results_is_refused(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(InputError, match="is damaged; delete it"):
        Results(tmp_path)
