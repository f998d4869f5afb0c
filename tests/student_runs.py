"""What tests of students do with runs on the command line."""

import shutil

import numpy as np
from commands import digest, error_line, run, saved_steps

SHORT = ("--config.train.batch_size=4", "--config.train.log_every=2", "--config.train.save_every=2")
SHORT += ("--config.train.grid_every=100", "--config.train.keep=9", "--config.sample.num=4")


def check_resumes(folder, name, learn, steps=4):
    """A run that was killed after its second step, and resumed, has the same bits."""
    result = learn(name)
    assert result.returncode == 0, result.stderr
    shutil.copytree(folder / name, folder / "again")
    for step in saved_steps(folder / "again"):
        if step > 2:
            shutil.rmtree(folder / "again" / "checkpoints" / str(step))
    assert learn("again").returncode == 0
    assert digest(folder / name, steps) == digest(folder / "again", steps)
    assert (folder / name / "metrics.csv").read_bytes() == (folder / "again/metrics.csv").read_bytes()


def check_travels(folder, workdir, *asked):
    """A file of convert.py draws what the run draws."""
    assert run("convert.py", f"--workdir={workdir}", "--out=one.safetensors", cwd=folder).returncode == 0
    images = []
    for name in (workdir, "one.safetensors"):
        drawn = run("sample.py", f"--workdir={name}", "--num=2", f"--out=drawn{len(images)}", *asked, cwd=folder)
        assert drawn.returncode == 0, drawn.stderr
        images.append(np.load(folder / f"drawn{len(images)}" / "samples.npz")["samples"])
    np.testing.assert_array_equal(*images)


def refuses(folder, *mistakes):
    for script, flag, message in mistakes:
        assert message in error_line(run(script, "--workdir=run", flag, cwd=folder))
