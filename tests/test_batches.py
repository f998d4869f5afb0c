"""Laws of the batches of a training run: the same for threads, worker processes, shards, folders and archives."""

import contextlib
import gc
import io
import itertools
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
import zipfile

import numpy as np
import pytest
from commands import ROOT, error_line, run, train
from PIL import Image
from test_data import encoded, noise, raises, write_folder, write_tar, write_zip

from configs import default
from diffusion import data
from diffusion.commands import datasets
from diffusion.data import batching, order, streaming

COUNT, SIDE, BATCH = 30, 6, 12  # three epochs do not end with a batch


def numbered(i):
    """Image number i as its red and green, with a blue ramp that shows whether it is mirrored."""
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = i % 256, i // 256, np.arange(SIDE)
    return pixels


def numbers(images):
    return images[:, 0, 0, 0].astype(int) + 256 * images[:, 0, 0, 1].astype(int)


def write_numbered(folder, count=COUNT):
    return write_folder(folder, {f"{'ab'[i % 2]}/{i:05}.png": encoded(numbered(i)) for i in range(count)})


def load(path, max_memory=0.0, **options):
    return data.load("images", path=str(path), **{"size": SIDE, "channels": 3, "max_memory": max_memory, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("numbered"))


@pytest.fixture(scope="module")
def held(folder):
    return load(folder, 1.0)


@pytest.fixture(scope="module")
def streamed(folder):
    return load(folder)


def plain(count=COUNT, labels=True):
    """A data set in memory, with no files behind it."""
    images = np.stack([numbered(i) for i in range(count)])
    return data.Dataset(images, np.arange(count, dtype=np.int32) if labels else None, ())


def take(dataset, number, **options):
    with data.batches(dataset, **{"batch_size": BATCH, "seed": 1, **options}) as iterator:
        return list(itertools.islice(iterator, number))


def take_shards(dataset, number, shards, batch_size=BATCH, **options):
    """Global batches, put together from the shares of several processes."""
    with contextlib.ExitStack() as stack:
        iterators = []
        for p in range(shards):
            rows = range(p * batch_size // shards, (p + 1) * batch_size // shards)
            shard = data.batches(dataset, batch_size=batch_size, rows=rows, **{"seed": 1, **options})
            iterators.append(stack.enter_context(shard))
        return [data.Batch(*map(np.concatenate, zip(*map(next, iterators), strict=True))) for _ in range(number)]


def assert_equal(some, others):
    assert len(some) == len(others)
    for a, b in zip(some, others, strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)


# ------------------------------------------------------------------------------------------------------------- content


def test_a_batch_holds_the_examples_of_its_indices():
    dataset = plain()
    for step, batch in enumerate(take(dataset, 6, seed=3)):
        indices = data.batch_indices(COUNT, BATCH, 3, step)
        assert batch.images.dtype == np.uint8
        assert batch.labels.dtype == np.int32
        np.testing.assert_array_equal(batch.images, dataset.images[indices])
        np.testing.assert_array_equal(batch.labels, indices)


@pytest.mark.parametrize("flip", [False, True])
def test_a_resumed_run_sees_the_same_batches(held, streamed, flip):
    whole = take(held, 9, flip=flip)
    for dataset in (held, streamed):
        assert_equal(take(dataset, 4, start=5, flip=flip), whole[5:])


def test_a_batch_may_hold_several_epochs():
    (batch,) = take(plain(4), 1, batch_size=12)
    np.testing.assert_array_equal(np.bincount(batch.labels), [3, 3, 3, 3])


def test_shares_may_differ_in_size(held, streamed):
    whole = take(held, 3, batch_size=10, flip=True)
    for dataset in (held, streamed):
        assert_equal(take_shards(dataset, 3, 4, batch_size=10, flip=True), whole)
    assert_equal(take(held, 3, batch_size=10, rows=slice(2, 5)), take(held, 3, batch_size=10, rows=range(2, 5)))


@pytest.mark.parametrize("max_memory", [0.0, 1.0])
def test_grey_images_without_classes(tmp_path, max_memory):
    pixels = [noise(SIDE, SIDE, i)[..., 0] for i in range(5)]
    dataset = load(
        write_folder(tmp_path, {f"{i}.png": encoded(p) for i, p in enumerate(pixels)}), max_memory, channels=1
    )
    (batch,) = take(dataset, 1, batch_size=5)
    assert batch.labels is None
    np.testing.assert_array_equal(batch.images[..., 0], np.stack(pixels)[data.batch_indices(5, 5, 1, 0)])


def test_changing_a_batch_changes_neither_the_data_nor_later_batches():
    dataset = plain()
    before = take(dataset, 4)
    for batch in data.batches(dataset, batch_size=BATCH, seed=1):
        batch.images[:], batch.labels[:] = 0, 0
        break
    assert_equal(take(dataset, 4), before)


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"start": -1}, "step=-1"),
        ({"workers": -1}, "workers=-1 is out of range"),
        *(
            ({"rows": rows}, r"0\.\.11")
            for rows in (
                range(0),
                range(12, 13),
                slice(6, 13),
                slice(-1, 3),
                slice(5, 5),
                slice(0, 5, 0),
                slice(-13, 5),
            )
        ),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_at_the_call(wrong, remedy):
    with raises(remedy):
        data.batches(plain(), **{"batch_size": BATCH, "seed": 0, **wrong})


def test_no_images_give_no_batches():
    with raises("num_examples=0"):
        data.batches(plain()._replace(images=np.empty((0, 2, 2, 1), np.uint8)), batch_size=1, seed=0)


# ----------------------------------------------------------------------------------------------------------- mirroring


def mirrored(batches):
    """{(epoch, image): whether it was mirrored}; every other image is exactly as in the data."""
    seen = {}
    for k, image in enumerate(itertools.chain.from_iterable(b.images for b in batches)):
        i = int(numbers(image[None])[0])
        flip = bool(image[0, 0, 2])
        np.testing.assert_array_equal(image, numbered(i)[:, :: -1 if flip else 1])
        seen[k // COUNT, i] = flip
    return seen


def test_mirroring_depends_on_seed_epoch_and_image_alone():
    dataset = plain()
    reference = mirrored(take(dataset, 10, batch_size=COUNT, flip=True))
    assert len(reference) == 10 * COUNT
    for batch_size in (1, 7, 4 * COUNT):
        other = mirrored(take(dataset, -(-10 * COUNT // batch_size), batch_size=batch_size, flip=True))
        assert {key: other[key] for key in reference} == reference


def test_mirroring_is_a_fair_coin_for_each_seed_epoch_and_place():
    flips = np.array([[order._coins(1000, seed, epoch) for epoch in range(10)] for seed in range(10)], float) - 0.5
    for mean, samples in (
        (flips.mean(), flips.size),
        ((flips[1:] * flips[:-1]).mean() * 2, flips[1:].size),  # of neighbouring seeds
        ((flips[:, 1:] * flips[:, :-1]).mean() * 2, flips[:, 1:].size),
        ((flips[..., 1:] * flips[..., :-1]).mean() * 2, flips[..., 1:].size),
    ):
        assert abs(mean) < 4 * 0.5 / np.sqrt(samples)  # standard deviations


def test_images_are_left_as_they_are_unless_asked():
    assert not any(mirrored(take(plain(), 5)).values())


# -------------------------------------------------------------------------------------------------- threads and workers


def assert_epochs_are_whole(batches, count, epochs):
    seen = np.concatenate([numbers(b.images) for b in batches])[: count * epochs]
    counts = np.bincount(seen, minlength=count)
    print(f"{count:,} images over {epochs} epochs: each seen {counts.min()} to {counts.max()} times")
    assert counts.tolist() == [epochs] * count


SLOW = pytest.mark.reliability


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW)])
def test_streamed_batches_are_those_of_memory(held, streamed, workers, shards):
    batches = take_shards(streamed, 9, shards, workers=workers, flip=True)
    assert_equal(batches, take(held, 9, flip=True))
    assert_epochs_are_whole(batches, COUNT, 3)


def test_worker_processes_share_the_batches_of_memory(held, streamed):
    assert_equal(take_shards(streamed, 9, 2, workers=2, flip=True), take(held, 9, flip=True))


@pytest.mark.reliability
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_three_epochs_hold_every_image_three_times_whatever_workers_and_shards(tmp_path, workers, shards):
    path = write_numbered(tmp_path, 2000)
    held, streamed = load(path, 1.0), load(path)
    reference = take(held, 63, batch_size=96, flip=True)  # 62.5 batches are three epochs
    batches = take_shards(streamed, 63, shards, batch_size=96, workers=workers, flip=True)
    print(f"{workers} workers, {shards} shards: ", end="")
    assert_epochs_are_whole(batches, 2000, 3)
    assert_equal(batches, reference)


def workers_alive():
    return [p for p in multiprocessing.active_children() if p.is_alive()]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_comes_in_its_turn_and_ends_the_iterator(tmp_path, workers):
    path = write_numbered(tmp_path)
    dataset, reference = load(path), take(load(path, 1.0), 10)
    (path / "b" / "00007.png").write_bytes(b"<html>")
    good = next(k for k, batch in enumerate(reference) if 7 in numbers(batch.images))
    iterator = data.batches(dataset, batch_size=BATCH, seed=1, workers=workers)
    assert_equal(list(itertools.islice(iterator, good)), reference[:good])
    for _ in range(3):
        with raises("image b/00007.png cannot be read"):
            next(iterator)
    assert not workers_alive()


@pytest.mark.parametrize("end", ["close", "drop"])
def test_closing_or_dropping_the_iterator_stops_its_workers(streamed, end):
    iterator = data.batches(streamed, batch_size=BATCH, seed=1, workers=2)
    next(iterator)
    assert len(workers_alive()) == 2
    if end == "drop":
        del iterator
        gc.collect()
    else:
        iterator.close()
        iterator.close()
        with raises("are closed"):
            next(iterator)
    assert not workers_alive()


def test_a_closed_iterator_in_memory_is_as_dead_as_any():
    iterator = data.batches(plain(), batch_size=BATCH, seed=1)
    iterator.close()
    with raises("are closed"):
        next(iterator)


def test_workers_outlive_the_signals_that_ask_the_run_to_stop_and_their_death_is_an_error(held, streamed):
    reference = take(held, 40)
    with data.batches(streamed, batch_size=BATCH, seed=1, workers=2) as iterator:
        first = [next(iterator)]
        for worker in workers_alive():
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.5)
        assert_equal(first + list(itertools.islice(iterator, 39)), reference)
        os.kill(workers_alive()[0].pid, signal.SIGKILL)
        for _ in range(2):
            with raises("has died .*exit code -9.*fewer than workers=2"):
                for _ in range(1000):
                    next(iterator)
    assert not workers_alive()


# ------------------------------------------------------------------------------------------------------ images in files


def test_image_files_are_indexed_like_the_array_they_stand_for(held, streamed):
    files, array = streamed.images, held.images
    assert isinstance(files, data.ImageFiles)
    assert (files.shape, files.dtype, files.ndim, len(files)) == (array.shape, array.dtype, array.ndim, len(array))
    for index in (0, -1, np.int64(3), slice(2, 5), slice(None, None, -7), np.array([5, 5, 0]), [1, 2]):
        np.testing.assert_array_equal(files[index], array[index])
    for beyond in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError):
            files[beyond]
    np.testing.assert_array_equal(list(files), array)


def archives(folder, top=""):
    files = {f"{top}{p.relative_to(folder)}": p.read_bytes() for p in sorted(folder.rglob("*.png"))}
    out = folder.parent / f"archives{len(top)}"
    out.mkdir(exist_ok=True)
    with zipfile.ZipFile(out / "deflated.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return [out / "deflated.zip", write_zip(out / "a.zip", files), write_tar(out / "a.tar", files)]


def test_folders_zips_and_tars_stream_the_same_and_can_be_pickled(folder, held):
    for path in (folder, *archives(folder, "wrapped/")):
        dataset = load(path)
        np.testing.assert_array_equal(dataset.images[:3], held.images[:3])
        copy = pickle.loads(pickle.dumps(dataset))
        assert_equal(take(copy, 3), take(held, 3))


def test_data_is_streamed_where_its_pixels_exceed_max_memory(folder):
    gib = COUNT * SIDE * SIDE * 3 / 2**30
    assert isinstance(load(folder, gib).images, np.ndarray)
    assert isinstance(load(folder, gib * 0.999).images, data.ImageFiles)
    with raises("max_memory=-1 is out of range"):
        load(folder, -1)


def test_a_config_chooses_and_one_from_before_these_fields_means_their_defaults(folder):
    config = default.get_config().data
    config.update({"name": "images", "path": str(folder), "size": SIDE, "max_memory": 0.0})
    assert isinstance(datasets.load_data(config).images, data.ImageFiles)
    for name in ("max_memory", "workers"):
        del config[name]
    assert isinstance(datasets.load_data(config).images, np.ndarray)


def test_tar_gz_is_not_streamed_but_held(tmp_path, folder, held):
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}
    for name in ("a.tar.gz", "a.tgz"):
        path = write_tar(tmp_path / name, files, "w:gz")
        assert_equal(take(load(path, 1.0), 2), take(held, 2))
        with raises("cannot be read out of order; unpack it, or repack it"):
            load(path)


def test_of_a_streamed_set_those_images_are_tried_that_stand_for_it(tmp_path):
    count = 250
    path = write_numbered(tmp_path, count)
    good = data.fingerprint(load(path))
    tried = {k * (count - 1) // 99 for k in range(100)}
    for i in (min(tried - {0}), min(set(range(count)) - tried)):
        name = sorted(path.rglob("*.png"))[i]
        inner, content = str(name.relative_to(path)), name.read_bytes()
        name.write_bytes(b"<html>")
        if i in tried:
            with raises(rf"image {inner} cannot be read .* \(100 of 250 were tried; train.py --check reads them all"):
                load(path)
        else:
            assert len(load(path).images) == count
        listed, number = data.check("images", path=str(path), size=SIDE)
        assert ([image.name for image in listed], number) == ([inner], count)
        name.write_bytes(content)
    assert data.fingerprint(load(path)) == good


def test_damage_in_an_archive_is_found_when_the_image_is_read(tmp_path, folder):
    _, path, _ = archives(folder)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT", content.index(b"00007.png")) + 8] ^= 1
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(content)
    with raises("image b/00007.png cannot be read .its checksum is wrong"):
        take(load(damaged), 3, batch_size=COUNT)


def test_zip_members_that_cannot_be_unpacked_are_named(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("1.png", encoded(numbered(1)))
    with raises("image 1.png cannot be read .it is packed by method 12"):
        load(path)


# --------------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprint_of_image_files_is_that_of_any_container_held_or_streamed(folder, held):
    paths = (folder, *archives(folder), *archives(folder, "wrapped/"))
    assert {data.fingerprint(load(path, gib)) for path in paths for gib in (0, 1)} == {data.fingerprint(held)}


def test_fingerprint_tells_image_files_apart(tmp_path, folder):
    originals = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}
    renamed = {name.replace("a/00002", "a/x"): content for name, content in originals.items()}
    moved = {name.replace("a/00002", "b/00002"): content for name, content in originals.items()}
    other = originals | {"a/00002.png": encoded(numbered(3))}
    sets = [write_folder(tmp_path / str(k), files) for k, files in enumerate((originals, renamed, moved, other))]
    prints = {data.fingerprint(load(path)) for path in sets} | {data.fingerprint(load(sets[0], channels=1))}
    assert len(prints) == 5


@pytest.mark.parametrize("count", [20, 700_000], ids=["all of a small set", "a sample of a large one"])
def test_fingerprint_tells_arrays_apart(count):
    images = np.zeros((count, 6, 6, 3), np.uint8)
    labels = np.zeros(count, np.int32)
    base = data.Dataset(images, labels, ("a", "b"))
    first, last, labelled = images.copy(), images.copy(), labels.copy()
    first[0], last[-1 if count == 20 else -1 - (count - 1) % 700], labelled[-1] = 1, 1, 1
    others = [
        base._replace(images=first),
        base._replace(images=last),
        base._replace(labels=labelled),
        base._replace(class_names=("a", "c")),
        base._replace(images=images[:-1]),
        base._replace(images=images.reshape(count, 3, 12, 3)),
        base._replace(labels=None),
    ]
    assert len({data.fingerprint(dataset) for dataset in (base, *others)}) == len(others) + 1
    assert data.fingerprint(data.Dataset(images.copy(), labels.astype(np.int64), ("a", "b"))) == data.fingerprint(base)


def test_steps_have_no_end():
    steps = batching.Steps(plain(), BATCH, 0, 10**12, True, range(BATCH))
    assert steps[0].images.shape == (BATCH, SIDE, SIDE, 3)


@pytest.mark.parametrize("sampled", [True, False])
def test_a_good_copy_in_place_of_a_damaged_image_lets_the_run_go_on(tmp_path, sampled):
    """The run finds damage before its first step, or in the middle; the copy has other bytes in either case."""
    path = write_numbered(tmp_path, 250)
    names = sorted(path.rglob("*.png"))
    tried = {k * 249 // 99 for k in range(100)}
    name = names[next(i for i in range(1, 250) if (i in tried) == sampled)]
    content = name.read_bytes()
    name.write_bytes(content[:40])
    if sampled:
        with raises("put a good copy in its place"):
            load(path)
        name.write_bytes(encoded(Image.open(io.BytesIO(content)), compress_level=0))
        load(path)
        return
    started = load(path)
    with raises("put a good copy in its place"):
        take(started, 22)
    name.write_bytes(encoded(Image.open(io.BytesIO(content)), compress_level=0))
    resumed = load(path)
    assert data.fingerprint(resumed) == data.fingerprint(started)
    assert_equal(take(resumed, 22), take(load(path, 1.0), 22))


@pytest.mark.parametrize("max_memory", [0.0, 1.0])
def test_damaged_images_are_left_out_and_the_set_is_that_of_the_others(tmp_path, max_memory):
    path, whole = write_numbered(tmp_path / "some", 250), write_numbered(tmp_path / "others", 250)
    gone = [f"{'ab'[i % 2]}/{i:05}.png" for i in (0, 7, 8, 249)]
    for name in gone:
        (path / name).write_bytes(b"<html>")
        (whole / name).unlink()
    dataset, others = load(path, max_memory, skip_damaged=True), load(whole, max_memory)
    np.testing.assert_array_equal(dataset.images[:], others.images[:])
    np.testing.assert_array_equal(dataset.labels, others.labels)
    assert data.fingerprint(dataset) == data.fingerprint(others)
    assert dataset.damaged == tuple(sorted(gone))
    assert list(dataset.notes()) == [f"left out 4 images that cannot be read: {', '.join(sorted(gone))}"]
    assert_equal(take(dataset, 9), take(others, 9))
    (path / gone[0]).write_bytes(encoded(numbered(0)))  # as a repaired image is no part of the run
    assert data.fingerprint(load(path, max_memory, skip_damaged=True)) != data.fingerprint(dataset)


def test_a_class_without_a_readable_image_is_refused(tmp_path):
    files = {"a/1.png": encoded(numbered(1)), "b/1.png": b"<html>"}
    with raises("no image of class b can be read, such as b/1.png .cannot identify"):
        load(write_folder(tmp_path / "one", files), skip_damaged=True)
    with raises("1 of 1 images cannot be read|image b/1.png cannot be read"):
        load(write_folder(tmp_path / "all", {"b/1.png": b"<html>"}), skip_damaged=True)


# ------------------------------------------------------------------------------------------------------------- hanging


class Hanging:
    """Images of which the first batch comes and no other ever does, as on a network disk that is gone."""

    dtype, ndim, shape = np.dtype(np.uint8), 4, (COUNT, SIDE, SIDE, 3)

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        if HANGS.is_set():
            time.sleep(600)
        HANGS.set()
        return np.zeros((len(index), *self.shape[1:]), np.uint8)


HANGS = threading.Event()


def test_hung_workers_keep_nobody_from_stopping(monkeypatch):
    monkeypatch.setattr(streaming, "PATIENCE", 1.0)
    stop = threading.Event()
    dataset = data.Dataset(Hanging(), None, ())
    iterator = data.batches(dataset, batch_size=BATCH, seed=1, workers=1, stopping=stop.is_set)
    next(iterator)
    (worker,) = workers_alive()
    begin = time.monotonic()
    threading.Timer(0.5, stop.set).start()
    with raises("no images came after the run was asked to stop"):
        next(iterator)
    iterator.close()
    assert 1 < time.monotonic() - begin < 10
    worker.join(5)
    assert not worker.is_alive()


@pytest.mark.parametrize("build", [slice(-3, None), slice(None, None, -1), slice(2, -2), slice(-12, 12, 5)], ids=str)
def test_rows_may_be_counted_from_the_end(held, build):
    whole = take(held, 2)
    for some, all_rows in zip(take(held, 2, rows=build), whole, strict=True):
        np.testing.assert_array_equal(some.images, all_rows.images[build])


# ------------------------------------------------------------------------------------------------------------ programs

IMAGES = (f"--config={ROOT}/configs/images.py", "--config.data.path=set", f"--config.data.size={SIDE}")


def test_train_check_lists_every_damaged_image_and_trains_nothing(tmp_path):
    path = write_numbered(tmp_path / "set")
    assert "all 30 images can be read" in run("train.py", *IMAGES, "--check", cwd=tmp_path).stdout
    for name in ("a/00002.png", "b/00007.png"):
        (path / name).write_bytes(b"<html>")
    result = run("train.py", *IMAGES, "--check", "--config.data.max_memory=0", cwd=tmp_path)
    assert result.stdout.splitlines() == [f"{n} (cannot identify image file)" for n in ("a/00002.png", "b/00007.png")]
    assert re.search("2 of 30 images cannot be read, as listed; .*config.data.skip_damaged=True", error_line(result))
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.reliability
def test_a_run_that_a_damaged_image_ended_goes_on_after_its_repair(tmp_path):
    path = write_numbered(tmp_path / "set", 250)
    names = sorted(path.rglob("*.png"))
    damaged = names[next(i for i in range(250) if i not in {k * 249 // 99 for k in range(100)})]
    content = damaged.read_bytes()
    damaged.write_bytes(b"<html>")
    options = (*IMAGES, "--config.data.max_memory=0", "--workdir=run", "--config.train.num_steps=40")
    failed = train(tmp_path, *options)
    assert "put a good copy in its place" in error_line(failed)
    damaged.write_bytes(encoded(Image.open(io.BytesIO(content)), compress_level=0))
    assert train(tmp_path, *options).returncode == 0
    # With the damaged one left out it is another run, and says so.
    damaged.write_bytes(b"<html>")
    other = (*options, "--workdir=other", "--config.data.skip_damaged=True", "--config.train.num_steps=3")
    started = train(tmp_path, *other)
    assert started.returncode == 0, started.stderr
    assert f"left out 1 images that cannot be read: {damaged.relative_to(path)}" in started.stdout
    damaged.write_bytes(content)
    assert "num_examples is 250, the run has 249" in error_line(train(tmp_path, *other, "--config.train.num_steps=4"))
