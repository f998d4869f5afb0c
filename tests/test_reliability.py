"""What a run survives: the long versions of the tests on resuming, signals, damage and full disks.

`make reliability` runs them and prints their counts; short versions of most are part of `make test`. For the exchange
of checkpoints with another Python, OTHER_PYTHON names its interpreter, which has the project installed.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from commands import (
    ROOT,
    TINY,
    command,
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

from diffusion import devices as device_layout
from diffusion import schedules
from diffusion.images import write_png
from diffusion.models import UNet, as_apply_fn
from diffusion.objectives.losses import simple_loss
from diffusion.training import checkpoints
from diffusion.training.saving import CheckpointWriter
from diffusion.training.step import StepOptions, init_state, make_train_step

pytestmark = [pytest.mark.reliability, pytest.mark.usefixtures("compile_once")]


SAVING = (
    "--workdir=run",
    "--config.train.log_every=70",
    "--config.train.save_every=50",
    "--config.train.grid_every=400",
    "--config.train.ema_decays=0.9,0.99",
    "--config.data.flip=True",
)
RUN = (*SAVING, "--config.model.dropout=0.1")


def wait_for_save(folder, seconds):
    """Whether a save was seen under way."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any((folder / "checkpoints").glob("unfinished-[0-9]*")):
            return True
    return False


ADVERSARIAL = (
    "--config=configs/digits_autoencoder.py",
    "--config.autoencoder.channels=8,8",
    "--config.optimizer.decay=constant",
    "--config.train.batch_size=8",
    "--config.train.objective=kl_autoencoder:adversarial=0.5,adversarial_start=30",
)


@pytest.mark.parametrize(
    ("size", "args", "count"), [(TINY, RUN, 30), (ADVERSARIAL, SAVING, 6)], ids=["digits", "adversarial autoencoder"]
)
def test_1_a_run_killed_many_times_ends_in_the_same_bits_and_metrics(tmp_path, report, size, args, count):
    rng = random.Random(0)
    folder = tmp_path / "killed" / "run"
    folder.parent.mkdir()
    kills = {signal.SIGKILL: 0, signal.SIGTERM: 0}
    during_saves = 0
    while sum(kills.values()) < count:
        process = start_training(folder.parent, *args, "--config.train.num_steps=1000000", size=size)
        read_until(process, "first step")
        number = rng.choice(list(kills))
        if sum(kills.values()) % 3 == 0:
            during_saves += wait_for_save(folder, 60)
            number = signal.SIGKILL
        else:
            time.sleep(rng.random())
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 75}[number]
        kills[number] += 1
    reached = saved_steps(folder)[-1]
    end = f"--config.train.num_steps={reached + 100}"
    whole = tmp_path / "whole"
    whole.mkdir()
    for cwd in (folder.parent, whole):
        result = train(cwd, *args, end, size=size)
        assert result.returncode == 0, result.stderr
    assert during_saves >= count // 4
    assert digest(folder, reached + 100) == digest(whole / "run", reached + 100)
    assert (folder / "metrics.csv").read_bytes() == (whole / "run" / "metrics.csv").read_bytes()
    grids = [{p.name: p.read_bytes() for p in (f / "grids").iterdir()} for f in (folder, whole / "run")]
    assert grids[0] == grids[1]
    names = ", ".join(f"{count} {number.name}" for number, count in kills.items())
    report(f"(1) {names}, {during_saves} during a save; {reached + 100} steps: same bits, metrics and grids")


def test_2_sigterm_ends_with_code_75_and_loses_at_most_one_step(tmp_path, report):
    rng, seconds, lost = random.Random(1), [], []
    for _ in range(20):
        process = start_training(tmp_path, *RUN, "--config.train.log_every=1", "--config.train.num_steps=1000000")
        read_until(process, "step ")
        time.sleep(rng.random())
        before = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        seconds.append(time.monotonic() - before)
        assert process.returncode == 75, output
        lost.append(int(metrics(tmp_path / "run")[-1]["step"]) - saved_steps(tmp_path / "run")[-1])
    assert max(lost) <= 1
    assert max(seconds) < 10
    report(f"(2) 20 of 20 exits with code 75; at most {max(lost)} steps lost; {max(seconds):.1f} s at the most")


@pytest.mark.parametrize("fsdp", [1, 2])
def test_2_of_two_processes_one_is_signalled_and_both_save_the_same_step(tmp_path, report, fsdp):
    for signalled in (0, 1):
        join = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", f"--config.train.fsdp={fsdp}")
        options = ("--workdir=run", "--config.train.log_every=5", "--config.train.num_steps=1000000", *join)
        env = {"JAX_NUM_CPU_DEVICES": "1"}
        pair = [start_training(tmp_path, *options, f"--process_id={i}", env=env) for i in (0, 1)]
        read_until(pair[0], "step ")
        pair[signalled].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=120)[0] for process in pair]
        assert [process.returncode for process in pair] == [75, 75], outputs
        saved = saved_steps(tmp_path / "run")[-1]
        assert f"saved step {saved:,} in run" in outputs[0]
        report(f"(2) two processes, fsdp {fsdp}, process {signalled} signalled: both stopped after step {saved}")


def test_6_a_disk_that_fills_up_ends_the_run_with_its_last_good_step_whole(tmp_path, report):
    good = train(tmp_path, *RUN, "--config.train.num_steps=50")
    assert good.returncode == 0, good.stderr
    rng = random.Random(2)
    largest = max(p.stat().st_size for p in (tmp_path / "run" / "checkpoints").rglob("*") if p.is_file())
    expected = digest(tmp_path / "run", 50)
    for _ in range(10):
        limit = rng.randrange(1000, largest)
        result = train(
            tmp_path,
            *RUN,
            "--config.train.num_steps=1000000",
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            env={name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
            | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        )
        assert result.returncode == 2, result.stderr
        assert "see that the disk" in result.stderr.splitlines()[-1]
        assert digest(tmp_path / "run", 50) == expected
        assert saved_steps(tmp_path / "run") == [50]
    report("(6) 10 of 10 full disks: exit code 2 at the first save, step 50 whole")


CHANGES = {
    "model.width": "8",
    "model.multipliers": "2",
    "model.dropout": "0.5",
    "train.batch_size": "16",
    "train.ema_decays": "0.5",
    "train.prediction": "v",
    "optimizer.learning_rate": "0.1",
    "schedule": "linear",
    "data.flip": "False",
    "seed": "1",
}


def test_7_checkpoints_of_any_number_of_devices_load_on_any_other(tmp_path, report):
    model = UNet(width=8, multipliers=(1, 2), num_blocks=1, attention_resolutions=(4,), dropout=0.1)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.ones((1,)))["params"]
    optimizer = optax.adam(1e-3)
    images = np.random.default_rng(0).integers(0, 256, (50, 16, 8, 8, 1)).astype(np.uint8)
    counts = [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (8, 4)]
    meshes = {count: tiny.training_mesh(*count) for count in counts}

    def begin(mesh):
        state = init_state(jax.tree.map(jnp.copy, params), optimizer, [0.9])
        return jax.device_put(state, device_layout.state_sharding(mesh, state))

    losses = {}
    for count, mesh in meshes.items():
        schedule = schedules.cosine()
        whole = tiny.make_model(as_apply_fn(model), schedule, (8, 8, 1))
        objective = partial(simple_loss, schedule=schedule)
        step = make_train_step(whole, objective, optimizer, mesh, tiny.KEY, StepOptions([0.9], log_every=50))
        split = device_layout.batch_sharding(mesh)
        ballots = jax.device_put(np.zeros(mesh.size, np.float32), split)
        state, of_steps = begin(mesh), []
        for batch in images:
            state, metrics = step(state, jax.device_put(batch, split), None, ballots)
            of_steps.append(float(metrics.loss))
        losses[count] = of_steps
        with CheckpointWriter(tmp_path / str(count), keep=1) as writer:
            writer.save(50, state, {"config": {}})
        for other in meshes.values():
            tiny.assert_same(checkpoints.load_state(tmp_path / str(count), 50, begin(other)), state)
    difference = max(np.abs(np.subtract(losses[count], losses[counts[0]])).max() for count in counts)
    assert difference <= 1e-5
    report(f"(7) {len(counts)}^2 pairs of (devices, fsdp) bit-equal; losses of 50 steps differ by {difference:.1e}")


def test_9_a_changed_config_is_refused_by_field_before_the_first_step(tmp_path, report):
    assert train(tmp_path, *RUN, "--config.train.num_steps=10").returncode == 0
    before = digest(tmp_path / "run", 10)
    for field, value in CHANGES.items():
        result = train(tmp_path, *RUN, "--config.train.num_steps=20", f"--config.{field}={value}")
        assert f"config.{field} is" in error_line(result), field
    assert digest(tmp_path / "run", 10) == before
    assert saved_steps(tmp_path / "run") == [10]
    report(f"(9) {len(CHANGES)} of {len(CHANGES)} changed configs refused by field")


def test_9_other_images_behind_the_same_config_are_refused_before_the_first_step(tmp_path, report):
    """Their size, their number, and one of them in another version."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for i in range(8):
        write_png(folder / f"{i}.png", rng.integers(0, 256, (8, 8, 3), np.uint8))
    options = (f"--config={ROOT}/configs/images.py", "--config.data.path=images", "--workdir=run")
    options += ("--config.train.batch_size=4", "--config.train.num_steps=5")
    assert train(tmp_path, *options, "--config.data.size=8").returncode == 0
    more = (*options, "--config.train.num_steps=9")
    assert "config.data.size is 16" in error_line(train(tmp_path, *more, "--config.data.size=16"))
    write_png(folder / "0.png", rng.integers(0, 256, (8, 8, 3), np.uint8))
    assert "is another run: data differs (by its SHA-256)" in error_line(train(tmp_path, *more, "--config.data.size=8"))
    (folder / "0.png").unlink()
    assert "num_examples is 7, the run has 8" in error_line(train(tmp_path, *more, "--config.data.size=8"))
    assert saved_steps(tmp_path / "run") == [5]
    report("(9) image size, one image changed, one image less: refused by field")


def images_of(cwd, name, *args, devices=1):
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    result = run("sample.py", "--workdir=run", f"--out={name}", *args, cwd=cwd, env=env)
    assert result.returncode == 0, result.stderr
    with np.load(cwd / name / "samples.npz") as archive:
        return archive["samples"]


def test_11_samples_do_not_depend_on_batches_or_devices(tmp_path, report):
    assert train(tmp_path, *RUN, "--config.train.num_steps=300").returncode == 0
    args = ("--seeds=0-63", "--steps=10", "--eta=1")
    first = images_of(tmp_path, "first", *args, "--batch_size=64").astype(int)
    equal, greatest = [], []
    for count in (1, 2, 4, 8):
        for size in (1, 7, 64):
            images = images_of(tmp_path, f"{count}-{size}", *args, f"--batch_size={size}", devices=count)
            equal.append((images == first).mean())
            greatest.append(np.abs(images - first).max())
    assert min(equal) >= 0.999
    assert max(greatest) <= 1
    report(f"(11) 12 batches and devices: at least {min(equal):.3%} of the pixels equal, difference {max(greatest)}")


def test_11_a_job_killed_five_times_ends_in_the_same_images(tmp_path, report):
    assert train(tmp_path, *RUN, "--config.train.num_steps=300").returncode == 0
    args = ("--workdir=run", "--num=3000", "--steps=100", "--batch_size=100")
    whole = run("sample.py", *args, "--out=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    rng = random.Random(3)
    for _ in range(5):
        process = subprocess.Popen(
            command("sample.py", *args, "--out=killed"), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        time.sleep(3 + 4 * rng.random())
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        process.communicate()
    assert run("sample.py", *args, "--out=killed", cwd=tmp_path).returncode == 0
    shards = sorted(path.name for path in (tmp_path / "whole").glob("*.npz"))
    assert len(shards) == 3
    for name in shards:
        np.testing.assert_array_equal(*(np.load(tmp_path / folder / name)["samples"] for folder in ("whole", "killed")))
    report("(11) 3,000 images, killed 5 times: the same")


OTHER = os.environ.get("OTHER_PYTHON", "")


@pytest.mark.skipif(not OTHER, reason="OTHER_PYTHON names no second interpreter")
def test_12_a_checkpoint_goes_to_another_python_and_jax_and_back(tmp_path, report):
    def versions(python):
        code = "import jax, sys; print('Python', sys.version.split()[0], 'jax', jax.__version__)"
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    def other(code):
        env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
        result = subprocess.run([OTHER, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout.strip().splitlines()[-1]

    assert train(tmp_path, *RUN, "--config.train.num_steps=50").returncode == 0
    read = "from pathlib import Path; from commands import digest; print(digest(Path('run'), {}))"
    assert other(read.format(50)) == digest(tmp_path / "run", 50)
    more = [OTHER, str(ROOT / "train.py"), *TINY, *RUN, "--config.train.num_steps=100"]
    result = subprocess.run(more, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "resuming run at step 50" in result.stdout
    assert other(read.format(100)) == digest(tmp_path / "run", 100)
    assert train(tmp_path, *RUN, "--config.train.num_steps=120").returncode == 0
    report(f"(12) {versions(sys.executable)} -> {versions(OTHER)} and back: bit-equal")


@pytest.mark.parametrize(("devices", "fsdp"), [(2, 1), (8, 1), (2, 2)])
def test_ten_thousand_steps_on_several_devices_do_not_stop(tmp_path, report, devices, fsdp):
    """Several collectives a step have been seen to wait for each other for ever on a CPU."""
    options = ("--workdir=run", "--config.train.num_steps=10000", "--config.train.log_every=1000")
    options += (f"--config.train.fsdp={fsdp}",)
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    before = time.monotonic()
    result = train(tmp_path, *options, env=env)
    assert result.returncode == 0, result.stderr
    assert f"{devices} x cpu" in result.stdout
    assert int(metrics(tmp_path / "run")[-1]["step"]) == 10_000
    report(f"10,000 steps on {devices} devices, fsdp {fsdp}, in {time.monotonic() - before:.0f} s")
