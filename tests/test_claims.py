"""The claims can be measured, here on a network small enough to compile at once, and pages keep their words."""

import csv
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from reference import refused

from diffusion import sample
from diffusion.model import Trained


@pytest.fixture(autouse=True)
def _clone_on_path(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])


def trained():
    model = tiny.MODEL
    config = ConfigDict({"sample": {"clip": "recompute"}, "data": {"name": "digits"}})
    return Trained(model, tiny.make_params(), config, 0, "0.9")


def test_distances_to_the_most_steps_shrink_and_those_to_other_latents_are_larger():
    from benchmarks.claims import same_latent

    found = same_latent.measure("tiny", trained(), steps=(2, 4, 100), num=6, shown=2)
    assert [row[0] for row in found.rows] == ["S = 2", "S = 4", "other latents, S = 100"]
    ddim = [row[1] for row in found.rows]
    assert ddim[1] < ddim[0] < ddim[2]


def test_slerp_keeps_the_norm_and_a_straight_line_does_not():
    from benchmarks.claims import interpolation

    found = interpolation.measure("tiny", trained(), steps=2, pairs=4, points=3, shown=1)
    norms = [row[1] for row in found.rows]
    assert norms[0] == pytest.approx(1, abs=0.1)
    assert norms[1] == pytest.approx(np.sqrt(0.5), abs=0.1)
    assert norms[2] is None


def test_iterations_invert_more_exactly():
    from benchmarks.claims import inversion

    found = inversion.measure("tiny", trained(), steps=(4, 10), num=3, iterations=(1, 4))
    assert all(row[3] < row[2] for row in found.rows)


def test_the_timed_python_loop_draws_the_samples_of_the_scan():
    from benchmarks.claims import step_cost

    model = trained()
    table = step_cost._table(model.model, 4)
    expected = sample(tiny.apply_fn, model.params, table, jax.random.key(0), 3, tiny.SHAPE, clip="recompute")
    np.testing.assert_allclose(step_cost.python_loop(model, table, 3), expected, rtol=0, atol=1e-5)
    found = step_cost.measure("tiny", model, batches=(2,), steps=2, lengths=(2, 4), repeats=2)
    assert [row[0] for row in found.rows] == [2]


def test_first_order_is_measured_for_ddim():
    from benchmarks.claims import orders

    found = orders.measure(steps=(10, 20, 40), methods=("DDIM", "2M"))
    np.testing.assert_allclose([row[3] for row in found.rows], [1, 2], atol=0.2)


def test_the_published_table_agrees_with_itself(tmp_path):
    from benchmarks.claims import ddim_table

    names = {"sigma-hat": ("sigma_hat", ""), "eta 1 (DDPM)": ("ddpm", "")}
    names |= {label: ("ddim", label.split()[1]) for label in ddim_table.PUBLISHED if label not in names}
    shared = {"run": "r", "checkpoint_step": 1, "ema": "0.9", "grid": "uniform", "num": 100, "clip": "none", "seed": 0}
    rows = [
        {**shared, "sampler": names[label][0], "eta": names[label][1], "steps": s, "frechet_pixels": 2 * value}
        for label, values in ddim_table.PUBLISHED.items()
        for s, value in values.items()
    ]
    path = tmp_path / "evaluation.csv"
    write_csv(path, rows)
    found = ddim_table.measure(path)
    assert len(found.rows) == 25
    for row in found.rows:
        np.testing.assert_allclose(row[5], row[6])
        np.testing.assert_allclose(row[7], row[8])
    assert "300 of 300 pairs" in found.facts
    write_csv(path, [*rows, {**rows[0], "eta": ""}])
    assert ddim_table.measure(path).rows[0][3] == "one seed"
    write_csv(path, [{**rows[0], "steps": 7}])
    with refused("at any of S = 10, 20"):
        ddim_table.measure(path)
    write_csv(path, [*rows, {**rows[0], "run": "another"}])
    with refused("2 models"):
        ddim_table.measure(path)


def test_the_bounds_of_a_model_are_laid_out_by_steps_and_variance(tmp_path):
    from benchmarks.claims import variance

    rows = [
        {"variance": name, "steps": steps, "bits": bits / steps, "standard_error": 0.1, "terms": [1.0, bits]}
        for name, bits in (("small", 30), ("large", 40), ("learned", 20))
        for steps in (10, 5)
    ]
    record = {"run": "r", "checkpoint_step": 1, "ema": "0.9", "num": 3, "seed": 0, "grid": "uniform", "clip": "none"}
    path = tmp_path / "bound.json"
    path.write_text(json.dumps({**record, "rows": rows}))
    found = variance.measure(path)
    assert [(row[0], row[1], row[3], row[5]) for row in found.rows] == [
        (5, "6.000", "8.000", "4.000"),
        (10, "3.000", "4.000", "2.000"),
    ]
    path.write_text(json.dumps({**record, "rows": rows[:2]}))
    with refused("fixed variances"):
        variance.measure(path)
    path.write_text("{}")
    with refused("is no bound.json"):
        variance.measure(path)


def test_what_is_cheapest_is_cheapest_at_the_numbers_of_images_that_are_said():
    from benchmarks.claims.learning_or_distilling import SECONDS_A_CALL, Way, cheapest

    long, table = Way("DDIM", 25, 0.03, 0.029, 0.031, 0.0, ""), Way("table", 4, 0.03, 0.029, 0.031, 60.0, "")
    student = Way("student", 1, 0.03, 0.029, 0.031, 600.0, "")
    bad = Way("bad", 1, 0.5, 0.4, 0.6, 0.0, "")
    ways = [long, table, student, bad]
    first, second = 60 / (21 * SECONDS_A_CALL), 540 / (3 * SECONDS_A_CALL)
    assert [cheapest(way, ways) for way in (long, table, student)] == [
        f"for 0 to {first:,.0f} images",
        f"for {first:,.0f} to {second:,.0f} images",
        f"from {second:,.0f} images on",
    ]
    assert table.total(first) == pytest.approx(long.total(first))
    slower = student._replace(method="slower", seconds=700.0)
    assert cheapest(slower, [*ways, slower]) == "never"


def test_figures_of_ways_to_few_calls_are_read_and_a_wrong_file_is_refused(tmp_path):
    from benchmarks.claims import learning_or_distilling

    recorded = Path(__file__).parents[1] / "docs/claims/learning_or_distilling_data.csv"
    found = learning_or_distilling.measure(recorded)
    assert len(found.rows) == len(recorded.read_text().splitlines()) - 1
    (tmp_path / "other.csv").write_text("method,calls\nDDIM,4\n")
    with refused("needs the columns method, calls"):
        learning_or_distilling.measure(tmp_path / "other.csv")
    with refused("there is no file"):
        learning_or_distilling.measure(tmp_path / "none.csv")


def test_the_ablation_learns_each_variant_once_and_goes_on(tmp_path, monkeypatch):
    from benchmarks.claims import table_ablation

    monkeypatch.setattr(table_ablation, "distances", lambda trained, table, seeds: [0.1 * len(table.t)] * len(seeds))
    monkeypatch.setattr(table_ablation, "TEACHER_CALLS", 8)
    monkeypatch.setattr(table_ablation, "ITERATIONS", 1)
    variants = [
        table_ablation.Variant("what is free", "everything", noises=4),
        table_ablation.Variant("what is free", "nothing", (), noises=4),
        table_ablation.Variant("start", "ddim", noises=4, start="ddim"),
    ]
    options = {"calls": (2, 3), "variants": variants, "seeds": (0, 1), "kept": tmp_path / "kept"}
    found = table_ablation.measure("tiny", trained(), **options)
    assert [row[2] for row in found.rows] == pytest.approx([0.2] * 3)
    assert [row[5] for row in found.rows] == pytest.approx([0.3, 0.3, None])
    monkeypatch.setattr(table_ablation, "learn", None)
    assert table_ablation.measure("tiny", trained(), **options).rows == found.rows


def test_grids_that_are_found_are_grids_of_the_steps_asked_for(monkeypatch):
    from benchmarks.claims import found_grids

    monkeypatch.setattr(found_grids, "PATHS", 4)
    monkeypatch.setattr(found_grids, "IMAGES", 32)
    monkeypatch.setattr(found_grids, "distances", lambda trained, table, seeds: [float(table.tau[0])])
    found = found_grids.measure("tiny", trained(), steps=(3,), seeds=(0,))
    assert [row[0] for row in found.rows] == [*found_grids.FORMULAS, "dp_bound", "dp_path"]
    for *_, texts in found.rows:
        times = [float(text) for text in texts.split(", ")]
        assert len(times) == 3
        assert times == sorted(times, reverse=True)


def test_a_page_keeps_what_stands_around_its_table(tmp_path):
    from benchmarks.claims import report

    found = report.Findings(("a", "b"), [(1, 0.12345), ("x", None)], report.new_figure(), "Facts;")
    page = tmp_path / "claim.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.write(tmp_path, "claim", found)
        text = page.read_text()
        assert text.startswith(f"before\n{report.BEGIN}\n\n| a | b |")
        assert text.endswith(f"{report.END}\nafter\n")
        assert "| 1 | 0.123 |" in text
        assert "old" not in text
    page.write_text("no place")
    with refused("no place for its table"):
        report.write(tmp_path, "claim", found)


def write_csv(path, rows):
    with path.open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_learned_tables_are_compared_with_the_best_sampler_of_as_many_seeds(tmp_path):
    from benchmarks.claims import learned_tables

    def row(sampler, grid, calls, seed, value):
        return {"sampler": sampler, "grid": grid, "nfe": calls, "seed": seed, "frechet_pixels": value}

    rows = [row("learned", "", 5, seed, value) for seed, value in enumerate((0.02, 0.04))]
    rows += [row("unipc", "uniform", 5, seed, 0.06) for seed in range(2)]
    rows += [row("deis", "uniform", 5, seed, 0.08) for seed in range(2)]
    rows += [row("dpm_solver_pp", "uniform", 5, 0, 0.01)]  # of one seed only
    rows += [row("ddim", "uniform", calls, seed, 1 / calls) for calls in (10, 50, 100) for seed in range(2)]
    path = tmp_path / "evaluation.csv"
    write_csv(path, rows)
    (found,) = learned_tables.measure(path).rows
    assert found[0] == 5
    assert found[2] == "0.0200 to 0.0400"
    assert found[3] == "unipc on uniform"
    np.testing.assert_allclose([found[1], found[4], found[5]], [0.03, 0.06, 0.5])
    assert found[6] == 50
    write_csv(path, rows[2:])
    with refused("no frechet_pixels of --samplers=learned"):
        learned_tables.measure(path)
