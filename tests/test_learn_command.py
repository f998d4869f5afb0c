"""The command that learns tables, as a user runs it, on a tiny model."""

import json
import signal
import subprocess

import pytest
from commands import command, read_until, run

pytestmark = pytest.mark.usefixtures("compile_once")

LEARN = ("--workdir=runs/digits", "--noises=8", "--teacher_calls=8")


@pytest.fixture
def model(trained, tmp_path):
    """A folder with a trained run of its own."""
    subprocess.run(["cp", "-r", str(trained / "runs"), str(tmp_path)], check=True)
    return tmp_path


def test_a_learned_table_is_used_by_the_name_learned_and_is_not_learned_twice(model):
    first = run("learn.py", *LEARN, "--calls=2,3", cwd=model)
    assert first.returncode == 0, first.stderr
    assert "best hand-made" in first.stdout
    again = run("learn.py", *LEARN, "--calls=2,3", cwd=model)
    assert again.stdout.count("is there already") == 2
    drawn = run("sample.py", "--workdir=runs/digits", "--sampler=learned", "--steps=2", "--num=4", cwd=model)
    assert drawn.returncode == 0, drawn.stderr
    assert "2 network calls" in drawn.stdout
    (record,) = (model / "runs/digits/samples").glob("learned-2steps*/sampling.json")
    stored = json.loads((model / "runs/digits/tables/2.json").read_text())
    assert json.loads(record.read_text())["tau"] == stored["tau"]
    assert stored["facts"]["prediction"] == "eps"
    # By the path of its file it is the same sampler; and what is not as it was learned is said.
    other = run(
        "sample.py", "--workdir=runs/digits", "--sampler=runs/digits/tables/2.json", "--clip=none", "--num=4", cwd=model
    )
    assert "note: learned(2 calls) was learned at clip recompute, and is used at none" in other.stdout


def test_learning_that_was_killed_goes_on_and_ends_in_the_same_bits(model):
    paths = [model / "runs/digits/tables" / name for name in ("2.json", "2.csv")]
    assert run("learn.py", *LEARN, "--calls=2", cwd=model).returncode == 0
    whole = [path.read_bytes() for path in paths]
    killed = subprocess.Popen(
        command("learn.py", *LEARN, "--calls=2", "--again"), cwd=model, stdout=subprocess.PIPE, text=True
    )
    read_until(killed, "  from")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for path in paths:
        path.unlink()
    after = run("learn.py", *LEARN, "--calls=2", cwd=model)
    assert "going on after" in after.stdout, after.stderr
    assert [path.read_bytes() for path in paths] == whole


def test_a_table_of_an_earlier_step_is_used_with_a_note(model):
    assert run("learn.py", *LEARN, "--calls=2", cwd=model).returncode == 0
    path = model / "runs/digits/tables/2.json"
    stored = json.loads(path.read_text())
    stored["facts"]["weights"] = "0" * 64
    path.write_text(json.dumps(stored))
    drawn = run("sample.py", "--workdir=runs/digits", "--sampler=learned", "--steps=2", "--num=2", cwd=model)
    assert "learned for other parameters than these" in drawn.stdout, drawn.stderr


def test_what_lies_in_the_place_of_a_table_is_refused_before_the_work(model):
    tables = model / "runs/digits/tables"
    (tables / "2.csv").mkdir(parents=True)
    in_place = run("learn.py", *LEARN, "--calls=2", cwd=model)
    (tables / "2.csv").rmdir()
    (tables / "2.json").symlink_to("elsewhere")
    link = run("learn.py", *LEARN, "--calls=2", cwd=model)
    for refused, text in ((in_place, "2.csv is no regular file"), (link, "2.json is a link")):
        assert refused.returncode == 2
        assert text in refused.stderr
        assert refused.stdout == ""
