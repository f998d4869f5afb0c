"""Laws of a run folder that comes from a stranger, goes away under a run, or is read while it is written."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import optax
import pytest
import tiny
from ml_collections import ConfigDict
from tiny import assert_same, start

from diffusion import files
from diffusion.errors import InputError
from diffusion.training import checkpoints, environment, manifest, run_folder, saving
from diffusion.training.saving import CheckpointWriter

OPTIMIZER = optax.adam(1e-3)
METADATA = {"config": {"a": 1}}


@pytest.fixture(scope="module")
def state():
    return start(OPTIMIZER, tiny.training_mesh(1), (0.9,))


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def outside(tmp_path):
    """What lies outside, and must be the same in the end."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("thesis.tex", "unfinished-3", "5"):
        (folder / name).write_text("years of work")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def create(path):
    """What a start of a run writes before it trains."""
    folder = run_folder.RunFolder(path)
    with folder.locked():
        folder.create(ConfigDict({"seed": 0}), environment.describe(tiny.training_mesh(1), 0))


def save(path, state, steps, **options):
    with CheckpointWriter(path / "checkpoints", **{"keep": 100, **options}) as writer:
        for step in steps:
            writer.save(step, state, METADATA)


# Links and pipes of a stranger


@pytest.mark.parametrize("name", [".lock", "checkpoints", "grids", "profile", "config.json", "environment.json"])
@pytest.mark.parametrize("target", ["folder", "file", "nothing"])
def test_a_run_is_not_written_through_a_link(run, outside, name, target):
    (run / name).symlink_to({"folder": outside, "file": outside / "thesis.tex", "nothing": outside / "new"}[target])
    if name in ("config.json", "environment.json") and target == "folder":
        (run / name).unlink()
        (run / name).symlink_to(outside / "5")
    with pytest.raises(InputError, match=f"run/{name} is a link, and below .*run nothing is written"):
        create(run)


def test_checkpoints_are_not_written_through_a_link(run, outside, state):
    (run / "checkpoints").symlink_to(outside)
    with pytest.raises(InputError, match="checkpoints is a link"):
        save(run, state, [1])


@pytest.mark.parametrize("name", [".lock", "config.json", "environment.json"])
def test_a_pipe_in_a_run_holds_nothing_up(run, name):
    os.mkfifo(run / name)
    if name == "config.json":  # it is written anew, and never read
        create(run)
        assert json.loads((run / name).read_text()) == {"seed": 0}
    elif name == "environment.json":
        with pytest.warns(match="is kept as environment-kept-1.json"):
            create(run)
    else:
        with pytest.raises(InputError, match="no regular file"):
            create(run)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def link(path):
    copy = path.rename(path.parents[2] / f"copy-{path.name}")
    path.symlink_to(copy)


def forge(content):
    """A manifest with the right sum of its own."""

    def write(path):
        text = content + "\n"
        path.write_text(text + hashlib.sha256(text.encode()).hexdigest() + "\n")

    return write


DAMAGES = {
    "a pipe for a manifest": ("manifest.json", pipe),
    "a pipe for data": ("_CHECKPOINT_METADATA", pipe),
    "a pipe more": ("pipe", os.mkfifo),
    "a link for data": ("_CHECKPOINT_METADATA", link),
    "a link more": ("link", lambda path: path.symlink_to("/dev/zero")),
    "a link to a folder": ("link", lambda path: path.symlink_to("/")),
    "a manifest of nothing": ("manifest.json", forge("null")),
    "a manifest of a list": ("manifest.json", forge('{"files": []}')),
    "a manifest of texts": ("manifest.json", forge('{"files": {"_CHECKPOINT_METADATA": "good"}}')),
    "a deep manifest": ("manifest.json", forge("[" * 10**5)),
    "a manifest of other bytes": ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_belong_in_a_checkpoint_is_damage_and_never_waited_for(run, state, capsys, damage):
    save(run, state, [1, 2])
    name, change = DAMAGES[damage]
    change(run / "checkpoints" / "2" / name)
    assert checkpoints.newest_good(run / "checkpoints") == 1
    assert "checkpoints/2 is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["a pipe for data", "a pipe more", "a link more", "a link to a folder"])
def test_metadata_of_a_checkpoint_that_nobody_has_verified_are_never_waited_for(run, state, damage):
    save(run, state, [1])
    name, change = DAMAGES[damage]
    change(run / "checkpoints" / "1" / name)
    with pytest.raises(InputError, match=f"cannot be read .{name} is no regular file"):
        checkpoints.metadata(run / "checkpoints", 1)


def test_only_what_this_program_has_written_is_removed(run, outside, state):
    folder = run / "checkpoints"
    save(run, state, [1, 2, 3])
    others = ["unfinished-business", "unfinished-3.bak", "03", "-1", "²", "0x1"]
    for name in others:
        (folder / name).mkdir()
    (folder / "2024").mkdir()  # photographs of that year: no run has written a step without a manifest
    (folder / "unfinished-8").symlink_to(outside)
    (folder / "7").symlink_to(outside)
    (folder / "unfinished-4.orbax-checkpoint-tmp-7").mkdir()
    (folder / "unfinished-removal-4").mkdir()
    save(run, state, [4], keep=1)
    assert {path.name for path in folder.iterdir()} == {*others, "2024", "unfinished-8", "7", "4"}


def test_what_killed_starts_left_is_removed_at_the_next_start(run, state):
    save(run, state, [1])
    create(run)
    names = [f".{name}.0123abcd.unfinished" for name in ("metrics.csv", "config.json", "environment.json", "mine.txt")]
    paths = [run / name for name in names] + [run / "grids" / ".step_00000012.png.0123abcd.unfinished"]
    for path in paths:
        path.touch()
    (run / "checkpoints" / "unfinished-2").mkdir()
    create(run)
    assert [path.name for path in paths if path.exists()] == [".mine.txt.0123abcd.unfinished"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["1"]


# A folder that goes away under a run


@pytest.mark.parametrize("fate", ["moved", "removed", "replaced"])
def test_a_run_whose_folder_went_away_stops_and_touches_no_other(run, state, fate):
    with files.locked(run, "training in") as lock:
        writer = CheckpointWriter(run / "checkpoints", keep=1, is_ours=lock.is_ours)
        writer.save(1, state, METADATA)
        writer.wait()
        run.rename(run.with_name("elsewhere"))
        if fate == "removed":
            shutil.rmtree(run.with_name("elsewhere"))
        if fate == "replaced":
            with files.locked(run, "training in"):
                save(run, state, [3, 5])
        before = sorted(run.rglob("*"))
        with pytest.raises(InputError, match=r"run was moved or removed while it was trained in; step 1 is the last"):
            writer.save(2, state, METADATA)
        with pytest.raises(InputError, match="was moved or removed"):
            writer.require_ours()
        with writer:
            pass
    assert sorted(run.rglob("*")) == before


def test_a_save_whose_folder_goes_away_on_the_way_gets_no_number_in_another(run, state, monkeypatch):
    write = manifest.write

    def moves(folder, **facts):
        write(folder, **facts)
        run.rename(run.with_name("elsewhere"))
        shutil.copytree(run.with_name("elsewhere"), run)

    monkeypatch.setattr(saving.manifest, "write", moves)
    with files.locked(run, "training in") as lock:
        writer = CheckpointWriter(run / "checkpoints", keep=1, is_ours=lock.is_ours)
        writer.save(1, state, METADATA)
        with pytest.raises(InputError, match="was moved or removed while it was trained in; no step was saved"):
            writer.wait()
        with writer:
            pass
    assert checkpoints.steps(run / "checkpoints") == []


def test_the_step_just_saved_is_never_removed(run, state):
    save(run, state, [50, 60])
    save(run, state, [7], keep=1)
    assert checkpoints.steps(run / "checkpoints") == [7, 60]


# A path or a save that could never be loaded

SIGNS = ["a[x]", "a*", "a?", "back\\slash", "gs:", "bad\udcff"]


@pytest.mark.parametrize("name", SIGNS, ids=map(ascii, SIGNS))
def test_a_folder_whose_checkpoints_could_not_be_loaded_is_refused_before_the_training(tmp_path, state, name):
    folder = run_folder.RunFolder(tmp_path / name / "run")
    with pytest.raises(InputError, match="checkpoints could not be read there"), folder.locked():
        pass
    with pytest.raises(InputError, match="checkpoints could not be read there"):
        save(folder.path, state, [1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sp ace", "per%20cent", "#'\"{};|&$~@!()+=,", "ümläut", "new\nline", "co:lon"])
def test_other_signs_in_a_path_do_no_harm(tmp_path, state, name):
    folder = tmp_path / name / "checkpoints"
    save(folder.parent, state, [1])
    assert_same(checkpoints.load_state(folder, 1, state), state)


def test_a_save_that_does_not_read_back_gets_no_number(run, state, monkeypatch):
    """As where orbax finds none of its own files below a folder whose name it takes for a pattern."""
    monkeypatch.setattr(checkpoints, "require_plain_path", lambda folder: None)
    odd = run / "a[x]"
    with CheckpointWriter(odd / "checkpoints", keep=1) as writer:
        writer.save(1, state, METADATA)
        with pytest.raises(InputError, match="what was written does not read back"):
            writer.wait()
    assert not list((odd / "checkpoints").iterdir())


# Readers beside a run


def test_a_checkpoint_stays_as_long_as_it_is_read(run, state):
    folder = run / "checkpoints"
    with CheckpointWriter(folder, keep=1) as writer:
        for step in (1, 2):
            writer.save(step, state, METADATA)
            writer.wait()
        with checkpoints.opened(folder) as step, checkpoints.opened(folder, 2):
            assert step == 2
            for newer in (3, 4):
                writer.save(newer, state, METADATA)
                writer.wait()
            assert_same(checkpoints.load_state(folder, step, state), state)
            assert checkpoints.steps(folder) == [2, 4]
        writer.save(5, state, METADATA)
        writer.wait()
    assert checkpoints.steps(folder) == [5]


def test_readers_beside_a_run_that_saves_without_a_pause_all_succeed(run, state):
    folder = run / "checkpoints"
    save(run, state, [1])
    code = f"""
import itertools, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import optax, tiny
from diffusion.training.saving import CheckpointWriter
state = tiny.start(optax.adam(1e-3), tiny.training_mesh(1), (0.9,))
with CheckpointWriter({str(folder)!r}, keep=1) as writer:
    for step in itertools.count(2):
        writer.save(step, state, {METADATA!r})
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        seen = []
        end = time.monotonic() + 120
        while len(seen) < 20 or seen[-1] < 6:  # until the run has gone on for some steps
            assert trainer.poll() is None
            assert time.monotonic() < end
            with checkpoints.opened(folder) as step:
                assert checkpoints.metadata(folder, step) == METADATA
                assert_same(checkpoints.load_ema(folder, step, "0.9", state.params), state.ema_params["0.9"])
                seen.append(step)
    finally:
        trainer.kill()
        trainer.wait()
    assert seen == sorted(seen)
    assert checkpoints.newest_commit(folder) > 0
