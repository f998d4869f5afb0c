"""Laws of sampling jobs on disk: every image once, none twice, and none of another job."""

import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from reference import refused
from tiny import make_model

from diffusion import devices, files, keys, schedules, timesteps
from diffusion.commands import jobs
from diffusion.commands.drawing import generate
from diffusion.errors import InputError
from diffusion.evaluation import load_samples, samples
from diffusion.images import write_gif
from diffusion.solvers import ddim

LINEAR = schedules.linear(50, 1e-3, 0.2)
RECORD = {"run": "runs/x", "steps": 4, "tau": [50.0, 25.5, 0.0], "clip": "recompute", "guidance_scale": 1.0}
RECORD |= {"seed": 3, "labels": [0, 1]}


def network(params, x, t, cond=None):
    return jnp.tanh(x * params)


MODEL = make_model(network, LINEAR, (4, 3, 1))
TABLE = ddim(LINEAR, timesteps.uniform(LINEAR, 4), 1.0)


def drawn(ids, seed=3):
    """The images of a shard, in batches that do not divide it."""
    mesh = devices.data_mesh(1)
    return np.concatenate(list(generate(MODEL, jnp.array(0.8), TABLE, ids, seed=seed, mesh=mesh, batch_size=4)))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(jobs, "SHARD", 10)


def finished(out, ids, record=RECORD, shards=None):
    """Draws the missing shards, or those of them that are named; returns the job and what was drawn."""
    job = jobs.Job(out, ids, record)
    todo = [i for i in job.missing() if shards is None or i in shards]
    for index in todo:
        job.write(index, drawn(job.shards[index]))
    return job, todo


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("samples*.npz"))}


# Lists of numbers


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0", [0]),
        ("0-3", [0, 1, 2, 3]),
        ("7-7", [7]),
        ("5,7,100-102", [5, 7, 100, 101, 102]),
        (" 3 , 1-2 ", [3, 1, 2]),
        ("4294967295", [2**32 - 1]),
        ("007", [7]),
    ],
)
def test_numbers_and_ranges_are_read_in_the_order_written(text, wanted):
    assert jobs.parse_ids(text) == wanted


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "1,,2", "a", "1-", "-1", "3-1", "1-2-3", "1.5", "0x3", "1;2", "4294967296", "1 2", "5 - 7"]
)
def test_text_that_is_no_list_of_numbers_is_refused(text):
    with refused("seeds are"):
        jobs.parse_ids(text)


@pytest.mark.parametrize("text", ["1,1", "0-5,3", "4,2-4"])
def test_a_number_that_comes_twice_is_refused(text):
    with refused("twice"):
        jobs.parse_ids(text)


def test_a_range_is_written_as_it_is_read():
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 40):
        ids = rng.permutation(60)[:size].tolist()
        assert jobs.parse_ids(jobs.write_ids(ids)) == ids
    assert jobs.write_ids(range(1000)) == "0-999"


# Shards


@pytest.mark.parametrize("count", [1, 9, 10, 11, 20, 35])
@pytest.mark.usefixtures("small_shards")
def test_shards_hold_every_image_exactly_once_and_in_order(tmp_path, count):
    ids = list(np.random.default_rng(count).permutation(100)[:count])
    job = jobs.Job(tmp_path, ids, RECORD)
    assert [i for shard in job.shards for i in shard] == ids
    assert all(1 <= len(shard) <= 10 for shard in job.shards)
    number = -(-count // 10)
    names = [job.path(i).name for i in range(number)]
    assert names == (["samples.npz"] if number == 1 else [f"samples-{i:05}-of-{number:05}.npz" for i in range(number)])
    assert job.missing() == list(range(len(job.shards)))


@pytest.mark.usefixtures("small_shards")
def test_files_hold_the_images_their_numbers_and_their_classes(tmp_path):
    ids, labels = [*range(3, 18), 40], [5, 0, 7]
    job = jobs.Job(tmp_path, ids, RECORD)
    images = np.random.default_rng(0).integers(0, 256, (16, 4, 3, 1), np.uint8)
    job.write(0, images[:10], labels)
    job.write(1, images[10:], labels)
    found = [np.load(job.path(i)) for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([f["samples"] for f in found]), images)
    np.testing.assert_array_equal(np.concatenate([f["ids"] for f in found]), ids)
    np.testing.assert_array_equal(np.concatenate([f["labels"] for f in found]), [labels[i % 3] for i in ids])
    np.testing.assert_array_equal(job.images(0), images[:10])
    job.write(1, images[10:])
    assert sorted(np.load(job.path(1))) == ["ids", "samples"]  # a model without classes has no labels


def subfolder(parent, name):
    folder = parent / name
    folder.mkdir()
    return folder


@pytest.mark.usefixtures("small_shards")
def test_a_killed_job_draws_only_what_is_missing_and_the_same_bytes(tmp_path):
    whole, killed = subfolder(tmp_path, "whole"), subfolder(tmp_path, "killed")
    ids = range(33)
    job, todo = finished(whole, ids)
    assert todo == [0, 1, 2, 3]
    _, todo = finished(killed, ids, shards=[0, 2])
    kept = contents(killed)
    assert (todo, len(kept)) == ([0, 2], 2)
    (killed / ".samples-00001-of-00004.npz.01234567.unfinished").write_bytes(b"half a file")
    job, todo = finished(killed, ids)
    assert todo == [1, 3]
    assert job.missing() == []
    assert contents(killed) == contents(whole)
    assert kept.items() <= contents(killed).items()
    alone = np.concatenate([np.load(killed / name)["samples"] for name in contents(killed)])
    np.testing.assert_array_equal(alone, drawn(ids))


@pytest.mark.usefixtures("small_shards")
def test_a_finished_job_draws_nothing_and_a_small_one_is_drawn_anew(tmp_path):
    job, _ = finished(tmp_path, range(20))
    job.finish(seconds_with_compilation=1.5)
    assert finished(tmp_path, range(20))[1] == []
    small = subfolder(tmp_path, "small")
    for _ in range(2):
        assert finished(small, range(10))[1] == [0]


OTHERS = {
    "seed": RECORD | {"seed": 4},
    "tau": RECORD | {"tau": [50.0, 25.0, 0.0]},
    "clip": RECORD | {"clip": None},
    "labels": RECORD | {"labels": [1, 0]},
    "guidance_scale": RECORD | {"guidance_scale": 2.0},
}


@pytest.mark.parametrize("key", OTHERS)
@pytest.mark.usefixtures("small_shards")
def test_a_job_of_other_options_in_the_same_folder_is_refused_and_leaves_it_alone(tmp_path, key):
    finished(tmp_path, range(25), shards=[1])
    before, record = contents(tmp_path), (tmp_path / jobs.RECORD).read_bytes()
    with refused(f"{key} is .*--out"):
        jobs.Job(tmp_path, range(25), OTHERS[key])
    assert contents(tmp_path) == before
    assert (tmp_path / jobs.RECORD).read_bytes() == record
    assert jobs.Job(tmp_path, range(25), RECORD).missing() == [0, 2]


@pytest.mark.parametrize("ids", [range(26), range(35), range(1, 26), [*range(24), 99], range(5)], ids=str)
@pytest.mark.usefixtures("small_shards")
def test_a_job_of_other_numbers_in_the_same_folder_is_refused(tmp_path, ids):
    """Also one of a single file: it would take the record that the shards there need to be told apart by."""
    finished(tmp_path, range(25), shards=[1])
    with refused("another job"):
        jobs.Job(tmp_path, ids, RECORD)


@pytest.mark.parametrize("record", [None, b"", b"{", b"{}", b"[]"], ids=str)
@pytest.mark.usefixtures("small_shards")
def test_shards_without_a_record_that_names_them_are_refused(tmp_path, record):
    finished(tmp_path, range(25), shards=[1])
    (tmp_path / jobs.RECORD).unlink()
    if record is not None:
        (tmp_path / jobs.RECORD).write_bytes(record)
    with refused("another job"):
        jobs.Job(tmp_path, range(25), RECORD)


@pytest.mark.usefixtures("small_shards")
def test_a_job_of_one_file_and_one_of_shards_never_meet_in_a_folder(tmp_path):
    one, many = subfolder(tmp_path, "one"), subfolder(tmp_path, "many")
    finished(one, range(5))[0].finish()
    finished(many, range(25))[0].finish()
    for folder, count in ((one, 25), (many, 5)):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with refused("another job.*--out"):
            jobs.Job(folder, range(count), RECORD)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.usefixtures("small_shards")
def test_a_changed_shard_is_drawn_again_and_named(tmp_path):
    """Whatever the change is: a bit, a truncation, another shard in its place, or one that no line vouches for."""
    whole = subfolder(tmp_path, "whole")
    finished(whole, range(25))[0].finish()
    good = contents(whole)
    first, second, third = (whole / name for name in good)

    def damage(path, content):
        path.write_bytes(content)
        job = jobs.Job(whole, range(25), RECORD)
        assert (job.damaged, len(job.missing())) == ([path.name], 1)
        with refused(path.name):
            load_samples(whole)
        assert finished(whole, range(25))[1] == [int(path.name[8:13])]
        assert contents(whole) == good

    flipped = bytearray(first.read_bytes())
    flipped[40] ^= 1
    damage(first, bytes(flipped))
    damage(second, second.read_bytes()[:-1])
    damage(third, second.read_bytes())
    damage(second, b"")
    sums = whole / "samples.sha256"
    sums.write_text("".join(sums.read_text().splitlines(keepends=True)[:1]) + "a half line")
    assert finished(whole, range(25))[1] == [1, 2]
    assert contents(whole) == good


def test_the_checksums_are_those_of_sha256sum(tmp_path):
    finished(tmp_path, range(4))[0].finish()
    result = subprocess.run(["sha256sum", "-c", "samples.sha256"], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "samples.npz: OK\n"


@pytest.mark.usefixtures("small_shards")
def test_a_job_is_known_however_paths_are_spelled_and_not_if_the_generator_is_another(tmp_path):
    record = {"run": "runs/x", "weights_sha256": "a" * 64, "generator": "threefry"}
    finished(tmp_path, range(15), record)
    assert jobs.Job(tmp_path, range(15), record | {"run": "/home/me/runs/x/"}).missing() == []
    with refused("generator is rbg, there threefry"):
        jobs.Job(tmp_path, range(15), record | {"generator": "rbg"})
    with refused(r"images of another job \(another weights\)"):
        jobs.Job(tmp_path, range(15), record | {"weights_sha256": "b" * 64})


@pytest.mark.usefixtures("small_shards")
def test_a_job_of_another_generator_is_refused_in_one_line(tmp_path):
    finished(tmp_path, range(15))  # its record names none, as before it was recorded, and means the one of today
    jobs.Job(tmp_path, range(15), RECORD | {"generator": keys.GENERATOR})
    with refused("generator is rbg, there threefry2x32, partitionable"):
        jobs.Job(tmp_path, range(15), RECORD | {"generator": "rbg"})


@pytest.mark.parametrize("name", ["samples.npz", "sampling.json", "samples.sha256", "grid.png", "png", "arr_0.npz"])
def test_a_link_in_a_sample_folder_is_refused_and_what_it_points_to_stays(tmp_path, name):
    out = subfolder(tmp_path, "out")
    theirs = subfolder(tmp_path, "theirs")
    (theirs / "000003.png").write_text("dear")
    (out / name).symlink_to(theirs if name == "png" else theirs / "000003.png")
    with refused("is a link"):
        jobs.Job(out, range(4), RECORD)
    assert (theirs / "000003.png").read_text() == "dear"


def test_only_files_that_the_program_writes_are_removed_with_a_job(tmp_path):
    job, _ = finished(tmp_path, [3, 14])
    job.write_pngs()
    job.export()
    (tmp_path / "png" / "holiday.png").write_text("dear")
    (tmp_path / "png" / "000003.png.bak").write_text("dear")
    job.remove_pictures()
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == ["000003.png.bak", "holiday.png"]
    assert not (tmp_path / "arr_0.npz").exists()


@pytest.mark.parametrize("count", [7, 25])
@pytest.mark.parametrize("labels", [(), (4, 2)])
@pytest.mark.usefixtures("small_shards")
def test_one_call_reads_a_job_of_one_file_or_of_many_and_so_does_an_evaluator_of_others(tmp_path, count, labels):
    ids = [int(i) for i in np.random.default_rng(0).permutation(100)[:count]]
    images = np.random.default_rng(1).integers(0, 256, (count, 4, 3, 1), np.uint8)
    job = jobs.Job(tmp_path, ids, RECORD)
    for index in range(len(job.shards)):
        job.write(index, images[10 * index : 10 * index + 10], labels)
    job.export()
    job.finish()
    found = load_samples(tmp_path)
    np.testing.assert_array_equal(found.images, images)
    np.testing.assert_array_equal(found.ids, ids)
    wanted = [labels[i % 2] for i in ids] if labels else None
    assert (found.labels is None) == (wanted is None)
    with np.load(tmp_path / "arr_0.npz") as exported:
        np.testing.assert_array_equal(exported["arr_0"], images)
        assert exported["arr_0"].dtype == np.uint8
        assert list(exported) == ["arr_0", "arr_1"][: 1 + bool(labels)]
        if labels:
            np.testing.assert_array_equal(found.labels, wanted)
            np.testing.assert_array_equal(exported["arr_1"], wanted)
    with refused("give a larger max_memory"):
        load_samples(tmp_path, max_memory=50 / 2**30)


@pytest.mark.usefixtures("small_shards")
def test_a_job_that_is_not_finished_is_no_set_of_samples(tmp_path):
    with refused("cannot be read"):
        load_samples(tmp_path / "nowhere")
    with refused("cannot be read|no finished"):
        load_samples(tmp_path)
    finished(tmp_path, range(25), shards=[0, 2])
    with refused("2 files of a job of 3"):
        load_samples(tmp_path)
    finished(tmp_path, range(25))
    assert len(load_samples(tmp_path).images) == 25
    record = json.loads((tmp_path / jobs.RECORD).read_text())
    (tmp_path / jobs.RECORD).write_text(json.dumps(record | {"ids": "0-23,25"}))
    with refused("does not hold the images that its sampling.json lists"):
        load_samples(tmp_path)


@pytest.mark.usefixtures("small_shards")
def test_sampling_json_of_shards_holds_the_record_from_the_start_and_the_facts_at_the_end(tmp_path):
    job = jobs.Job(tmp_path, range(25), RECORD)
    at_start = json.loads((tmp_path / jobs.RECORD).read_text())
    assert at_start == RECORD | {"num": 25, "ids": "0-24"}
    job.finish(seconds_with_compilation=2.5, devices="1 x cpu")
    assert json.loads((tmp_path / jobs.RECORD).read_text()) == at_start | {
        "seconds_with_compilation": 2.5,
        "devices": "1 x cpu",
    }
    assert jobs.Job(tmp_path, range(25), RECORD).missing() == [0, 1, 2]


def test_sampling_json_beside_one_file_is_always_of_that_file(tmp_path):
    """Whenever a job that replaces another one is killed."""
    ids, other = [3, 4, 9], RECORD | {"seed": 4}
    job, _ = finished(tmp_path, ids)
    job.finish(seconds_with_compilation=2.5)
    record = json.loads((tmp_path / jobs.RECORD).read_text())
    assert record == RECORD | {"num": 3, "ids": "3-4,9", "seconds_with_compilation": 2.5}
    assert jobs.Job(tmp_path, ids, RECORD).replaces == ""
    job = jobs.Job(tmp_path, ids, other)
    assert job.replaces == "seed is 4, there 3"
    assert json.loads((tmp_path / jobs.RECORD).read_text()) == record
    job.write(0, drawn(ids, seed=4))
    assert not (tmp_path / jobs.RECORD).exists()
    job.finish()
    assert json.loads((tmp_path / jobs.RECORD).read_text())["seed"] == 4


def test_a_write_that_fails_leaves_neither_a_file_nor_a_part_of_one(tmp_path):
    job = jobs.Job(tmp_path, range(3), RECORD)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TypeError):
        files.write_atomically(job.path(0), "no bytes")
    assert sorted(tmp_path.iterdir()) == before


# Images


def test_images_depend_on_their_number_and_the_seed_and_not_on_the_batches():
    ids = [4, 0, 17, 3, 9]
    images = drawn(ids)
    assert images.dtype == np.uint8
    assert images.shape == (5, 4, 3, 1)
    np.testing.assert_array_equal(images[2:3], drawn([17]))
    assert np.any(images != drawn(ids, seed=4))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    spread = np.concatenate(list(generate(MODEL, jnp.array(0.8), TABLE, ids, seed=3, mesh=mesh, batch_size=3)))
    np.testing.assert_array_equal(spread, images)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gif_loops_over_its_frames_and_rests_on_the_last(tmp_path, channels):
    rng = np.random.default_rng(0)
    # Few colours, so that the palette of a GIF holds them all.
    colours = rng.integers(0, 256, (6, channels), np.uint8)
    frames = [colours[rng.integers(0, 6, (5, 7))] for _ in range(4)]
    write_gif(tmp_path / "a.gif", frames, milliseconds=120)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 4
        assert gif.info["loop"] == 0
        durations = []
        for i, frame in enumerate(frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
            got = np.asarray(gif.convert("RGB"))
            np.testing.assert_array_equal(got, np.broadcast_to(frame, got.shape))
    assert durations == [120, 120, 120, 1000]
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]


def test_a_gif_of_one_frame_is_a_picture(tmp_path):
    frame = np.arange(20, dtype=np.uint8).reshape(4, 5, 1)
    write_gif(tmp_path / "a.gif", [frame])
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 1
        np.testing.assert_array_equal(np.asarray(gif.convert("L")), frame[..., 0])


def test_a_job_whose_record_says_more_is_another_job(tmp_path):
    """As one begun with a second model as guidance, of which the record of this one says nothing."""
    record = RECORD | {"guidance_model_sha256": "a" * 64}
    jobs.Job(tmp_path, range(1500), record).write(0, np.zeros((1000, 4, 4, 1), np.uint8))
    jobs.Job(tmp_path, range(1500), record)
    with refused("its record has guidance_model_sha256, this job has none"):
        jobs.Job(tmp_path, range(1500), RECORD)


def test_a_finished_job_is_the_same_job(tmp_path):
    job, _ = finished(tmp_path, range(15))
    job.finish(seconds_with_compilation=1.0, devices="1 x cpu", versions={"jax": "1"})
    assert not jobs.Job(tmp_path, range(15), RECORD).replaces


def test_a_file_that_is_too_large_is_not_called_damaged(tmp_path):
    job, _ = finished(tmp_path, range(4))
    assert len(samples.read_file(job.path(0), 2**20).images) == 4
    with pytest.raises(InputError, match=r"samples\.npz has [\d,]+ bytes of samples\.npy, 10 are allowed") as caught:
        samples.read_file(job.path(0), 10)
    assert "damaged" not in str(caught.value)
