"""The entry points as a user runs them: in a shell, on a tiny model."""

import csv
import dataclasses
import json
import os
import re
import resource
import shutil
import signal

import jax
import numpy as np
import pytest
from commands import (
    digest,
    error_line,
    free_port,
    metrics,
    read_until,
    run,
    saved_steps,
    start_training,
    train,
)
from PIL import Image

from diffusion import pretrained, sealed
from diffusion.evaluation import load_samples
from diffusion.pretrained import weights
from diffusion.training.run_folder import RunFolder, load_trained

pytestmark = pytest.mark.usefixtures("compile_once")


def test_a_run_folder_holds_config_checkpoints_metrics_events_and_grids(trained):
    folder = trained / "runs" / "digits"
    assert json.loads((folder / "config.json").read_text())["model"]["width"] == 4
    assert json.loads((folder / "environment.json").read_text())[0]["step"] == 0
    assert saved_steps(folder) == [5, 10, 12]
    assert [int(row["step"]) for row in metrics(folder)] == [5, 10, 12]
    assert list(folder.glob("events.out.tfevents.*"))
    assert [path.name for path in (folder / "grids").iterdir()] == ["step_00000012.png"]


def test_sampling_works_straight_after_training(trained):
    result = run("sample.py", "--steps=3", "--num=5", cwd=trained)
    assert result.returncode == 0, result.stderr
    out = trained / "runs" / "digits" / "samples" / "ddim-3steps-uniform-seed0"
    archive = np.load(out / "samples.npz")
    assert archive["samples"].shape == (5, 8, 8, 1)
    assert archive["samples"].dtype == np.uint8
    np.testing.assert_array_equal(archive["ids"], np.arange(5))
    record = json.loads((out / "sampling.json").read_text())
    assert record["tau"] == [1000, 667, 333, 0]
    assert (record["nfe"], record["seed"], record["checkpoint_step"]) == (3, 0, 12)
    # 5 images of 8 pixels, enlarged 8 times, in rows of 3, with lines of 1 pixel between.
    assert Image.open(out / "grid.png").size == (3 * 65 + 1, 2 * 65 + 1)


def test_a_sample_depends_on_the_seed_and_its_number_alone(trained):
    def samples(name, *args):
        result = run("sample.py", "--steps=2", "--eta=1", f"--out={name}", *args, cwd=trained)
        assert result.returncode == 0, result.stderr
        return np.load(trained / name / "samples.npz")["samples"].astype(int)

    alone, sevens, whole = (samples(f"batch{b}", "--num=9", f"--batch_size={b}") for b in (1, 7, 64))
    assert np.abs(alone - whole).max() <= 1  # rounding differs with the shape of the batch, by one grey level at most
    assert np.abs(sevens - whole).max() <= 1
    np.testing.assert_array_equal(whole, samples("again", "--num=9"))
    assert np.abs(whole - samples("other", "--num=9", "--seed=1")).max() > 50


def test_a_command_given_again_takes_every_program_from_the_cache_and_says_so(trained, tmp_path):
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    told = []
    for _ in range(2):
        done = run("sample.py", "--steps=2", "--num=2", "--out=cached", cwd=trained, env=env)
        assert done.returncode == 0, done.stderr
        said = r"programs: (\d+) compiled and (\d+) from the cache, in \d+\.\d s; (\d+) kept in (.*)"
        told.append(re.fullmatch(said, done.stdout.splitlines()[-1]).groups())
    (made, *first), second = told
    assert int(made) > 0
    assert first == ["0", made, str(tmp_path)]
    assert second == ("0", made, "0", str(tmp_path))


def test_a_dry_run_prints_the_table_and_writes_nothing(trained):
    before = sorted(trained.rglob("*"))
    result = run("sample.py", "--dry_run", "--steps=2", "--sampler=ddim:eta=0.5", cwd=trained)
    assert result.returncode == 0, result.stderr
    assert "ddim(eta=0.5)" in result.stdout
    assert re.search(r"^ +1000\.00 +0\.0", result.stdout, flags=re.MULTILINE)
    assert sorted(trained.rglob("*")) == before


def test_a_large_job_is_resumed_where_it_was_killed(trained, tmp_path):
    args = ("--steps=1", "--num=2100", f"--out={tmp_path}", "--batch_size=500")
    first = run("sample.py", *args, "--gif", cwd=trained)
    assert first.returncode == 0, first.stderr
    shards = sorted(tmp_path.glob("samples-*-of-00003.npz"))
    contents = [np.load(path)["samples"] for path in shards]
    assert [len(c) for c in contents] == [1000, 1000, 100]
    assert Image.open(tmp_path / "trajectory.gif").n_frames == 2
    shards[1].unlink()
    again = run("sample.py", *args, cwd=trained)
    assert "1,100 of 2,100 images are there already" in again.stdout
    for path, content in zip(shards, contents, strict=True):
        np.testing.assert_array_equal(np.load(path)["samples"], content)
    some = run("sample.py", "--steps=1", "--seeds=1500,3", "--png", f"--out={tmp_path / 'some'}", cwd=trained)
    assert some.returncode == 0, some.stderr
    chosen = np.load(tmp_path / "some" / "samples.npz")["samples"].astype(int)
    assert np.abs(chosen - np.stack([contents[1][500], contents[0][3]])).max() <= 1
    assert sorted(path.name for path in (tmp_path / "some" / "png").iterdir()) == ["000003.png", "001500.png"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".sampling.lock"]
    other = run("sample.py", "--steps=2", *args[1:], cwd=trained)
    assert "holds images of another job" in error_line(other)
    # The same run by another spelling of its path is the same job; a changed file is drawn again.
    shards[2].write_bytes(shards[1].read_bytes())
    workdir = f"--workdir={trained}/runs/../runs/digits/"
    spelled = run("sample.py", *args, workdir, "--npz", cwd=trained)
    assert "1 file(s) are not as they were written, and are drawn again: samples-00002-of-00003.npz" in spelled.stdout
    assert "2,000 of 2,100 images are there already" in spelled.stdout
    np.testing.assert_array_equal(load_samples(tmp_path).images, np.concatenate(contents))
    np.testing.assert_array_equal(np.load(tmp_path / "arr_0.npz")["arr_0"], np.concatenate(contents))


def test_an_adaptive_sampler_says_its_calls_and_repeats_its_job(trained, tmp_path):
    asked = (f"--workdir={trained}/runs/digits", "--sampler=adaptive:order=2", "--tau=uniform:start=0.9", "--num=5")
    first, again = (run("sample.py", *asked, "--out=images", cwd=tmp_path) for _ in range(2))
    assert "as many network calls as each needs" in first.stdout
    record = json.loads((tmp_path / "images" / "sampling.json").read_text())
    assert re.search(r"network calls of an image: \d+ to \d+, ", first.stdout)
    assert again.returncode == 0, again.stderr
    assert "replaces the images of another job" not in again.stdout  # although it tells how many calls there were
    assert record["adaptive"]["end"] == 1.0


def test_a_linked_folder_of_samples_is_refused_and_what_it_points_to_stays(trained, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "samples.npz").write_text("dear")
    (trained / "runs" / "digits" / "samples").mkdir(exist_ok=True)
    link = trained / "runs" / "digits" / "samples" / "ddim-4steps-uniform-seed0"
    link.symlink_to(theirs)
    try:
        assert "is a link" in error_line(run("sample.py", "--steps=4", "--num=2", cwd=trained))
    finally:
        link.unlink()
    assert [(path.name, path.read_text()) for path in theirs.iterdir()] == [("samples.npz", "dear")]


def test_analytic_dpm_estimates_its_variances_once(trained):
    args = ("--sampler=analytic_dpm", "--steps=2", "--num=2")
    first, second = (run("sample.py", *args, cwd=trained) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert "estimating" in first.stdout
    assert "estimating" not in second.stdout
    known = sealed.read(trained / "runs" / "digits" / "analytic_gamma.json")
    (of_weights,) = known.values()
    assert all(0 <= gamma <= 2 for gamma in of_weights.values())


def test_a_model_with_classes_is_guided(tmp_path):
    result = train(tmp_path, "--config.train.num_steps=3", "--config.model.num_classes=10")
    assert result.returncode == 0, result.stderr
    drawn = {}
    for name, args in (("free", ()), ("guided", ("--guidance_scale=3",)), ("one", ("--guidance_scale=1.0",))):
        shared = ("--steps=3", "--num=4", "--labels=3,7", f"--out={name}")
        result = run("sample.py", *shared, *args, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        drawn[name] = np.load(tmp_path / name / "samples.npz")
    np.testing.assert_array_equal(drawn["free"]["labels"], [3, 7, 3, 7])
    np.testing.assert_array_equal(drawn["free"]["samples"], drawn["one"]["samples"])
    wrong = run("sample.py", "--labels=10", cwd=tmp_path)
    assert "there is no class '10'; valid: 0..9" in error_line(wrong)
    # The number of a label means the class of that name, so data of other classes is refused.
    model = load_trained(RunFolder(tmp_path / "runs" / "digits"))
    names = tuple(f"class {i}" for i in range(10))
    other = dataclasses.replace(model.model, conditions=model.model.conditions._replace(names=names))
    weights.save(tmp_path / "other.safetensors", model._replace(model=other))
    wrong = run("evaluate.py", "--workdir=other.safetensors", "--bound=2", cwd=tmp_path)
    assert "has the classes 0, 1, 2, 3, 4 and 5 more, and the model was trained with class 0," in error_line(wrong)


def test_a_model_that_learns_its_variance_is_sampled_by_any_table_and_measured(tmp_path):
    result = train(tmp_path, "--config.train.num_steps=3", "--config.train.objective=hybrid")
    assert result.returncode == 0, result.stderr
    for sampler in ("ddim", "ddpm:variance=learned"):
        drawn = run("sample.py", "--num=2", f"--sampler={sampler}", f"--out={sampler[:4]}", cwd=tmp_path)
        assert drawn.returncode == 0, drawn.stderr
    measured = run("evaluate.py", "--bound=2,5", "--likelihood=20", "--first=20", cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    rows = json.loads((tmp_path / "runs" / "digits" / "bound.json").read_text())["rows"]
    wanted = [(variance, steps) for variance in ("small", "large", "learned") for steps in (2, 5)]
    assert [(row["variance"], row["steps"]) for row in rows] == wanted
    published = run("evaluate.py", "--bound=5", "--variances=large_published", "--first=20", cwd=tmp_path)
    assert published.returncode == 0, published.stderr
    added = json.loads((tmp_path / "runs" / "digits" / "bound.json").read_text())["rows"][-1]
    large = next(row for row in rows if (row["variance"], row["steps"]) == ("large", 5))
    assert added["variance"] == "large_published"
    assert added["bits"] != large["bits"]
    likelihood = json.loads((tmp_path / "runs" / "digits" / "likelihood.json").read_text())
    assert likelihood["num"] == 20
    assert all(0 < row["bits"] < 50 for row in [*rows, *likelihood["rows"]]), likelihood


def test_ctrl_c_and_sigterm_save_and_the_same_command_resumes_there(tmp_path):
    args = ("--config.train.num_steps=100000", "--config.train.log_every=10", "--workdir=run")
    saved = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        process = start_training(tmp_path, *args)
        read_until(process, f"step {(saved // 10 + 2) * 10}/")
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == code, output
        assert saved + 10 <= int(re.search(r"saved step ([\d,]+)", output)[1].replace(",", "")) <= saved + 10**4
        saved = saved_steps(tmp_path / "run")[-1]
        assert f"saved step {saved:,} in run" in output

    result = train(tmp_path, *args[1:], f"--config.train.num_steps={saved + 15}")
    assert result.returncode == 0, result.stderr
    assert f"resuming run at step {saved:,}" in result.stdout
    steps = [int(row["step"]) for row in metrics(tmp_path / "run")]
    assert steps == sorted({*range(10, saved + 15, 10), saved + 15})
    left = tmp_path / "run" / "checkpoints" / "unfinished-removal-3"  # as of a start killed after its last sheet
    left.mkdir()
    assert "is trained to step" in train(tmp_path, *args[1:], f"--config.train.num_steps={saved + 15}").stdout
    assert not left.exists()


def test_a_grid_that_cannot_be_drawn_is_told_and_ends_no_run(tmp_path):
    """Weights of 1e36 are finite, and all that is drawn with them is not."""
    options = ("--config.optimizer.learning_rate=1e36", "--config.sample.clip=none")
    result = train(tmp_path, "--workdir=run", "--config.train.num_steps=1", *options)
    assert result.returncode == 0, result.stderr
    assert "warning: no sheet of step 1: image 0 is not finite" in result.stderr
    assert saved_steps(tmp_path / "run") == [1]
    assert not list((tmp_path / "run" / "grids").iterdir())


def test_processes_that_are_about_to_train_different_things_are_refused(tmp_path):
    join = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--workdir=run")
    pair = [
        start_training(tmp_path, *join, f"--process_id={i}", f"--config.seed={i}", env={"JAX_NUM_CPU_DEVICES": "1"})
        for i in (0, 1)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [2, 2], outputs
    assert all("error: the processes of the run differ in config" in output for output in outputs)
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_two_processes_train_one_model_and_stop_after_the_same_step(tmp_path):
    shared = ("--workdir=run", "--config.train.num_steps=100000", "--config.train.log_every=10")
    shared += ("--config.train.grid_every=10",)
    join = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
    pair = [
        start_training(tmp_path, *shared, *join, f"--process_id={i}", env={"JAX_NUM_CPU_DEVICES": "1"}) for i in (0, 1)
    ]
    read_until(pair[0], "step 20/")
    pair[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [75, 75], outputs
    (saved,) = saved_steps(tmp_path / "run")
    assert f"saved step {saved:,} in run" in outputs[0]
    grids = sorted(path.name for path in (tmp_path / "run" / "grids").iterdir())
    assert grids[:2] == ["step_00000010.png", "step_00000020.png"]
    # One process ends where two would have: resumed for one more step, and trained from the start.
    for workdir in ("run", "alone"):
        result = train(tmp_path, *shared[1:], f"--workdir={workdir}", f"--config.train.num_steps={saved + 1}")
        assert result.returncode == 0, result.stderr
    losses = [[float(row["loss"]) for row in metrics(tmp_path / name)] for name in ("run", "alone")]
    np.testing.assert_allclose(*losses, atol=1e-5)


def test_an_interrupted_run_ends_in_the_same_bits(trained, tmp_path):
    for steps in (7, 12):
        args = (f"--config.train.num_steps={steps}", "--config.train.log_every=5", "--config.train.save_every=100")
        result = train(tmp_path, *args)
        assert result.returncode == 0, result.stderr
    folders = [cwd / "runs" / "digits" for cwd in (trained, tmp_path)]
    assert digest(folders[0], 12) == digest(folders[1], 12)


def figure_columns(result):
    """The names of the figures in a table of evaluate.py, one list for each header."""
    return [line.split()[3:] for line in result.stdout.splitlines() if line.startswith("sampler")]


def test_weights_are_known_by_what_they_are_and_not_by_their_file(trained, tmp_path):
    """Neither rows of a sweep nor estimates for Analytic-DPM are taken from the weights that a file held before."""
    shared = ("--workdir=model.safetensors", "--steps=2", "--out=out")
    rows, gamma = [], []
    for number in range(2):
        model = pretrained.load("digits")
        changed = jax.tree.map(lambda x, number=number: x * (1 - 0.1 * number), model.params)
        weights.save(tmp_path / "model.safetensors", model._replace(params=changed))
        for script, args in (("evaluate.py", ("--num=70",)), ("sample.py", ("--num=2", "--sampler=analytic_dpm"))):
            result = run(script, *shared, *args, cwd=tmp_path)
            assert result.returncode == 0, result.stderr
        rows.append(json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"])
        (home,) = (tmp_path / "runs").glob("file-model-*")
        gamma.append(sealed.read(home / "analytic_gamma.json"))
    assert [len(of_weights) for of_weights in (*rows, *gamma)] == [1, 2, 1, 2]
    assert rows[1][0]["metrics"] != rows[1][1]["metrics"]


def test_without_a_run_the_shipped_model_is_used_and_a_sweep_measures_each_sampler_once(tmp_path):
    args = ("--samplers=ddim,unipc:order=2", "--etas=0,1", "--steps=2,3", "--num=70", "--out=out")
    first, again = (run("evaluate.py", *args, cwd=tmp_path) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert "digits model that ships" in first.stdout
    with open(tmp_path / "out" / "evaluation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    named = [(row["sampler"], row["eta"], row["steps"]) for row in rows]
    assert named == [(s, eta, n) for s, eta in (("ddim", "0.0"), ("ddim", "1.0"), ("unipc:order=2", "")) for n in "23"]
    assert all(float(row["frechet_pixels"]) > 0 for row in rows)
    assert Image.open(tmp_path / "out" / "evaluation.png").size[0] > 500
    figures = [line for line in first.stdout.splitlines() if line.startswith(("ddim", "unipc"))]
    assert figures == [line for line in again.stdout.splitlines() if line.startswith(("ddim", "unipc"))]
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    assert len(record) == 6
    more = run("evaluate.py", *args[1:], "--samplers=ddim", "--metrics=kernel", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    after = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    assert [set(row["metrics"]) >= {"frechet_pixels", "kernel_pixels"} for row in after] == [True] * 4 + [False] * 2
    # A command shows the figures that it asks for, whatever the rows have besides.
    assert figure_columns(more) == [["kernel_pixels", "kernel_pixels_std"]]
    mixed = run("evaluate.py", "--samplers=ddim,heun", *args[1:], "--metrics=kernel", cwd=tmp_path)
    assert mixed.returncode == 0, mixed.stderr
    assert figure_columns(mixed) == [["kernel_pixels", "kernel_pixels_std"]]
    assert "one step of heun multiplies the network's errors" in mixed.stdout


def test_a_run_becomes_one_file_that_draws_the_same_images(trained):
    assert run("convert.py", "--out=model.safetensors", cwd=trained).returncode == 0
    drawn = {}
    for name, args in (("run", ()), ("file", ("--workdir=model.safetensors",))):
        result = run("sample.py", "--steps=2", "--num=4", f"--out={name}", *args, cwd=trained)
        assert result.returncode == 0, result.stderr
        drawn[name] = np.load(trained / name / "samples.npz")["samples"]
    np.testing.assert_array_equal(drawn["run"], drawn["file"])
    assert "holds only that of 0.995" in error_line(
        run("sample.py", "--workdir=model.safetensors", "--ema=0.5", cwd=trained)
    )


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(trained, tmp_path):
    folder = shutil.copytree(trained / "runs" / "digits", tmp_path / "run")
    data = max((folder / "checkpoints" / "12").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    result = run("sample.py", "--workdir=run", "--num=2", "--steps=2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"warning: checkpoint run/checkpoints/12 is damaged .* using step 10", result.stderr)
    assert "run, step 10: 2 images" in result.stdout
    args = ("--workdir=run", "--config.train.log_every=5", "--config.train.save_every=5")
    again = train(tmp_path, *args, "--config.train.num_steps=12")
    assert again.returncode == 0, again.stderr
    assert "resuming run at step 10" in again.stdout
    assert digest(folder, 12) == digest(trained / "runs" / "digits", 12)


def test_each_ema_can_be_sampled(tmp_path):
    args = ("--config.train.num_steps=5", "--config.train.ema_decays=0.1,0.9", "--config.optimizer.learning_rate=0.1")
    result = train(tmp_path, *args)
    assert result.returncode == 0, result.stderr
    drawn = {}
    for name, args in (("default", ()), ("first", ("--ema=0.1",)), ("second", ("--ema=0.9",))):
        result = run("sample.py", "--num=2", f"--out={name}", *args, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        drawn[name] = np.load(tmp_path / name / "samples.npz")["samples"]
    np.testing.assert_array_equal(drawn["default"], drawn["first"])
    assert (drawn["first"] != drawn["second"]).any()
    assert "valid: 0.1, 0.9" in error_line(run("sample.py", "--ema=0.5", cwd=tmp_path))


def test_a_full_disk_ends_in_one_line_and_no_half_checkpoint(tmp_path):
    def no_large_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    # With the cache of compiled programs that users have; it is as full as the disk.
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    result = train(tmp_path, "--config.train.num_steps=3", "--workdir=run", preexec_fn=no_large_files, env=env)
    assert result.returncode == 2
    # What else found no place, such as the plot of the loss, is a warning before it.
    error = result.stderr.splitlines()[-1]
    assert re.search(r"error: a checkpoint could not be written to .* no earlier one; see that the disk", error)
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
