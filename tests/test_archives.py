"""Laws of folders and archives: an archive is the folder, its first folders are classes, nothing hostile does harm."""

import concurrent.futures
import gzip
import io
import os
import random
import re
import tarfile
import zipfile

import hostile
import numpy as np
import pytest
from test_data import encoded, noise, raises, write_folder, write_tar, write_zip

from configs import default
from diffusion import data
from diffusion.commands import datasets
from diffusion.data import archives, decoding


def load(path, **options):
    return data.load("images", path=str(path), **{"size": 4, **options})


def names_of(path):
    reader, _ = archives.open_files(str(path))
    return sorted(reader.names)


def picture(seed=0):
    return encoded(noise(4, 4, seed))


def assert_same(some, others):
    np.testing.assert_array_equal(some.images, others.images)
    np.testing.assert_array_equal(some.labels, others.labels)
    assert some.class_names == others.class_names
    assert some.left_out == others.left_out
    assert data.fingerprint(some) == data.fingerprint(others)


# --------------------------------------------------------------------------------------------- an archive is the folder


def grow(folder, rng):
    """Writes a tree of images, other files, hidden ones, and links of all kinds that stay inside."""
    tops = ["cats", "dogs", "Vögel"]
    places = [
        folder / top / inner for top in tops for inner in ("", "2023", "2024/may") if not (top == "dogs" and inner)
    ]
    files = []
    for k in range(30):
        place = rng.choice(places)
        place.mkdir(parents=True, exist_ok=True)
        files.append(place / f"{k:02}{rng.choice(['.png', '.PNG', '.gif', '.txt', '', ' a.png', '‮.png'])}")
        files[-1].write_bytes(picture(k))
    for top in tops:
        (folder / top).mkdir(parents=True, exist_ok=True)
        (folder / top / "always.png").write_bytes(picture(100 + len(top)))
    for k in range(6):
        place, other = rng.choice([p for p in places if p.exists()]), rng.choice(files)
        if k % 2:
            os.link(other, place / f"hard{k}.png")
        else:
            (place / f"soft{k}.png").symlink_to(os.path.relpath(other, place))
    (folder / "dogs" / "twice.png").symlink_to("always.png")
    (folder / "dogs" / "thrice.png").symlink_to("../dogs/./twice.png")
    (folder / "a_link").symlink_to("cats")
    (folder / "dogs" / "round").symlink_to("..")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.png").write_bytes(b"no image")


def pack_zip(folder, path, *, backslashes=False, links=False):
    """As Info-ZIP does it: links are followed, or stored as links, and Windows writes backslashes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for top, below, found in os.walk(folder):
            for name in found + [name for name in below if os.path.islink(os.path.join(top, name))]:
                full = os.path.join(top, name)
                inner = os.path.relpath(full, folder)
                entry = zipfile.ZipInfo(inner.replace("/", "\\") if backslashes else inner)
                entry.create_system = 0 if backslashes else 3
                if links and os.path.islink(full):
                    entry.external_attr = hostile.LINK << 16
                    archive.writestr(entry, os.readlink(full))
                elif os.path.isfile(full):
                    with open(full, "rb") as file:
                        archive.writestr(entry, file.read())


@pytest.mark.parametrize("seed", range(4))
def test_archives_of_any_tree_give_what_the_tree_gives(tmp_path, seed):
    folder = tmp_path / "tree"
    grow(folder, random.Random(seed))
    expected = load(folder)
    assert expected.class_names == ("Vögel", "cats", "dogs") == tuple(sorted(expected.class_names))
    for form, compression in ((tarfile.GNU_FORMAT, ""), (tarfile.PAX_FORMAT, ":gz"), (tarfile.PAX_FORMAT, "")):
        path = tmp_path / "any.name"  # no suffix decides
        with tarfile.open(path, f"w{compression}", format=form) as archive:
            archive.add(folder, arcname=random.Random(seed).choice([".", "wrapped", "deep/er"]))
        assert_same(load(path), expected)
    pack_zip(folder, tmp_path / "links.tar", links=True)
    assert_same(load(tmp_path / "links.tar"), expected)
    # These have no links to folders.
    (folder / "a_link").unlink()
    (folder / "dogs" / "round").unlink()
    expected = load(folder)
    for backslashes in (False, True):
        pack_zip(folder, tmp_path / "files.tgz", backslashes=backslashes)
        assert_same(load(tmp_path / "files.tgz"), expected)


def test_names_in_a_zip_without_a_flag_are_utf_8(tmp_path):
    for system in (0, 3):
        plain = {**hostile.member("x", picture()), "name": "Vögel/ä.png".encode(), "flags": 0, "system": system}
        other = {**hostile.member("x", picture(1)), "name": b"b/1.png", "flags": 0, "system": system}
        hostile.write_zip(tmp_path / "a.zip", plain, other)
        assert names_of(tmp_path / "a.zip") == ["Vögel/ä.png", "b/1.png"]


def test_the_content_and_not_the_suffix_says_what_an_archive_is(tmp_path):
    files = {f"{k}/{i}.png": picture(i) for k in "ab" for i in range(3)}
    expected = load(write_folder(tmp_path / "folder", files))
    for name, write in (("a.tar", write_zip), ("b.zip", write_tar), ("c", write_zip)):
        assert_same(load(write(tmp_path / name, files)), expected)
    assert_same(load(write_tar(tmp_path / "gzipped.tar", files, "w:gz")), expected)
    assert_same(load(write_tar(tmp_path / "plain.tar.gz", files)), expected)
    prefixed = tmp_path / "program.exe"  # a zip that unpacks itself
    prefixed.write_bytes(b"MZ" + bytes(3000) + write_zip(tmp_path / "d.zip", files).read_bytes())
    assert_same(load(prefixed), expected)


def test_of_members_of_one_name_the_last_counts_as_in_unpacking(tmp_path):
    old, new, link = hostile.info("a.png", picture(1)), hostile.info("./a.png", picture(2)), tarfile.LNKTYPE
    before = hostile.info("b.png", type=link, linkname="a.png")
    hostile.tar_of(old, before, new)(tmp_path / "a.tar")
    unpacked = {"a.png": picture(2), "b.png": picture(1)}  # as GNU tar does, which removes a file before it writes one
    assert_same(load(tmp_path / "a.tar"), load(write_folder(tmp_path / "folder", unpacked)))
    write_zip(tmp_path / "a.zip", {"./a.png": picture(3), "a.png": picture(2), "b.png": picture(1)})
    assert_same(load(tmp_path / "a.zip"), load(tmp_path / "folder"))


def test_members_that_a_folder_cannot_have_are_refused_by_name(tmp_path):
    sparse, content = hostile.info(
        "a/hole.png", picture(), pax_headers={"GNU.sparse.map": "0,10", "GNU.sparse.size": "9"}
    )
    hostile.tar_of((sparse, content), tar_format=tarfile.PAX_FORMAT)(tmp_path / "a.tar")
    with raises("its member 'a/hole.png' cannot be read: it is stored with holes"):
        load(tmp_path / "a.tar")
    hostile.write_zip(tmp_path / "a.zip", hostile.member("a/1.png"), hostile.member("b\\2.png"))
    with raises(r"its member 'b.*2.png' has a backslash, others have slashes"):
        load(tmp_path / "a.zip")


def test_a_backslash_in_a_folder_is_a_letter_and_in_a_zip_of_windows_it_parts(tmp_path):
    files = {r"a\1.png": picture(), r"b\2.png": picture(1)}
    assert load(write_folder(tmp_path / "folder", files)).class_names == ()
    assert load(write_zip(tmp_path / "a.zip", files)).class_names == ("a", "b")


def test_classes_do_not_depend_on_the_order_in_which_the_disk_lists(tmp_path, monkeypatch):
    outside = write_folder(tmp_path / "outside", {"1.png": picture(1)})
    folder = write_folder(
        tmp_path / "folder", {"m/1.png": picture(2), "m/inner/2.png": picture(3), "n/1.png": picture(4)}
    )
    for name, target in (("a", folder / "m"), ("z", folder / "m" / "inner"), ("c", outside), ("b", outside)):
        (folder / name).symlink_to(target)
    (folder / "n" / "up").symlink_to(folder)
    scandir, found = os.scandir, []
    for seed in range(10):

        class Shuffled:
            def __init__(self, path, seed=seed):
                with scandir(path) as entries:
                    self.entries = sorted(entries, key=lambda entry: entry.name)
                random.Random(seed).shuffle(self.entries)

            def __enter__(self):
                return iter(self.entries)

            def __exit__(self, *_):
                pass

        monkeypatch.setattr(os, "scandir", Shuffled)
        found.append(load(folder))
    for dataset in found:
        assert_same(dataset, found[0])
    assert found[0].class_names == ("b", "m", "n")  # the folder itself, and of two links the first
    assert found[0].left_out == "4 links to folders that are read by their own names"


def test_what_is_left_out_is_counted_by_kind(tmp_path):
    others = ["a.heic", "b.HEIC", "c.gif", "README", ".hidden.gif", "x/.git/d.gif", "__MACOSX/e.gif", "v.\x1b[2J"]
    files = {"a/1.png": picture(), "b/1.png": picture()} | dict.fromkeys(others, b"")
    for path in (write_folder(tmp_path / "folder", files), write_zip(tmp_path / "a.zip", files)):
        (note,) = load(path).notes()
        assert note == r"left out: 2 .heic, 1 .\x1b[2j, 1 .gif, 1 without a suffix"
    with raises("has no images; it has 1 .heic; put files with one of .jpg"):
        load(write_folder(tmp_path / "none", {"1.heic": b""}))
    split = write_folder(
        tmp_path / "split", {"train/1.png": picture(), "train/2.gif": b"", "test/1.tga": b"", "test/1.png": b""}
    )
    assert load(split, split="train").left_out == "1 .gif"


# -------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize("top", ["", "photos/", "a/b/"])
@pytest.mark.parametrize("pack", [write_folder, write_zip, write_tar])
def test_folders_in_a_class_belong_to_it(tmp_path, pack, top):
    names = ["cats/2023/1.jpg", "cats/2024/may/1.jpg", "cats/1.jpg", "dogs/1.jpg", "dogs/1/1.jpg"]
    path = pack(tmp_path / "data", {top + name: encoded(noise(4, 4), "JPEG") for name in names})
    dataset = load(path)
    assert dataset.class_names == ("cats", "dogs")
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1]
    assert dataset.counts() == {"cats": 3, "dogs": 2}
    none = load(path, labels="none")
    assert (none.labels, none.class_names, none.counts()) == (None, (), {})
    assert data.fingerprint(none) != data.fingerprint(dataset)


def test_one_name_under_two_parents_names_both_and_what_to_do(tmp_path):
    names = [f"photos/{split}/{k}/{i}.png" for split in ("train", "test") for k in ("cat", "dog") for i in range(2)]
    path = write_folder(tmp_path, dict.fromkeys(names, picture()))
    with raises("'cat' lies both in photos/test and in photos/train.* split=photos/test .*labels=folders.*labels=none"):
        load(path)
    assert load(path, split="photos/test").class_names == load(path, split="test").class_names == ("cat", "dog")
    assert load(path, labels="folders").class_names == ("test", "train")
    assert load(path, labels="none").class_names == ()
    (path / "photos" / "test" / "x.png").write_bytes(picture())  # so test is a class, and no part of the data
    assert load(path).class_names == ("test", "train")


def test_a_stray_picture_is_named_with_what_to_do(tmp_path):
    path = write_folder(tmp_path, dict.fromkeys(["cats/1.png", "dogs/1.png", "stray.png", "x.png"], picture()))
    for labels in ("", "folders"):
        with raises(
            r"2 of the images are beside the class folders \(cats, dogs\): stray.png, x.png; move .*labels=none"
        ):
            load(path, labels=labels)
    assert load(path, labels="none").labels is None


def test_labels_are_asked_for_by_three_words(tmp_path):
    path = write_folder(tmp_path, {"1.png": picture()})
    assert load(path).labels is None
    with raises("labels=folders asks for classes, but there are no sub-folders"):
        load(path, labels="folders")
    with raises("unknown labels='folder'; did you mean 'folders'. valid: folders, none"):
        load(path, labels="folder")
    assert data.load("digits", labels="none").class_names == ()
    with raises("'digits' has no labels='folders'; allowed: labels='', labels='none'"):
        data.load("digits", labels="folders")


def test_programs_name_the_fields_of_the_config(tmp_path):
    path = write_folder(tmp_path, dict.fromkeys(["cats/1.png", "dogs/1.png", "stray.png"], picture()))
    config = default.get_config().data
    config.update({"name": "images", "path": str(path), "size": 4})
    for changes, expected in (
        ({}, "set config.data.labels=none"),
        ({"size": 0}, "not config.data.size=0; set for example config.data.size=64"),
        ({"name": "image"}, "unknown data set config.data.name='image'; did you mean 'images'"),
        ({"max_memory": -1.0}, "config.data.max_memory=-1.0 is out of range"),
        ({"labels": "none", "max_decoded": 0.5}, "config.data.max_decoded=0.5 is out of range"),
        ({"path": "nowhere"}, "config.data.path='nowhere' does not exist"),
        ({"path": "~nobody-of-this-name/x"}, "cannot be read"),
        ({"path": "x" * 5000}, "cannot be read"),
    ):
        wrong = config.copy_and_resolve_references()
        wrong.update(changes)
        with raises(re.escape(expected)):
            datasets.load_data(wrong)
    assert datasets.check_data(config) == ([], 3)


# -------------------------------------------------------------------------------------------------------------- hostile

READ = {"tar_of_many", "png_longer_than_it_says.png", "png_at_the_limit.png", "png_of_16_bits_at_the_limit.png"}
READ |= {"jpeg_at_the_limit.jpg", "jpeg_of_damaged_exif.jpg", "webp_at_the_limit.webp", "tiff_at_the_limit.tif"}
READ |= {"tiff_strip_bomb.tif"}
NAMED = {"escapes": r"\x1b[2Ja.png", "zip_of_newlines": r"a\nerror: all is well\n.png"}


def test_everything_hostile_ends_in_one_line_with_little_memory_and_nothing_written(tmp_path):
    paths, names = [], []
    for builders in (hostile.ARCHIVES, hostile.IMAGES, hostile.FOLDERS):
        for name, build in builders.items():
            path = tmp_path / "sets" / f"{len(paths):02}" / "set"
            path.parent.mkdir(parents=True)
            if builders is hostile.IMAGES:
                path.mkdir()
            build(path / name if builders is hostile.IMAGES else path)
            paths.append(path)
            names.append(name)
    home = tmp_path / "home"
    home.mkdir()
    before = sorted((str(p), p.lstat().st_mtime_ns) for p in tmp_path.rglob("*"))
    results, _ = hostile.load(paths, cwd=home)
    assert sorted((str(p), p.lstat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
    assert len(results) == len(names) >= 60
    for name, result in zip(names, results, strict=True):
        message = result["message"]
        assert result["end"] == ("read" if name in READ else "refused"), (name, message)
        assert message.isprintable(), (name, message)
        assert len(message) < 30_000, name
        assert name in READ or "set" in message or "image" in message, (name, message)
        assert NAMED.get(name, "") in message
        assert result["memory"] < hostile.GIB, (name, result)
        assert result["seconds"] < 60, (name, result)


def test_threads_wait_for_memory_and_all_get_some():
    budget, most, now = decoding.Budget(10), [], [0]

    def use(amount):
        with budget.of(amount):
            now[0] += min(amount, 10)
            most.append(now[0])
            now[0] -= min(amount, 10)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(use, [3, 100, 1, 5, 10] * 200))
    assert max(most) <= 10
    assert len(most) == 1000


def test_a_gzip_that_has_no_room_on_the_disk_is_refused(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar.gz", {"1.png": picture()}, "w:gz")
    usage = archives.tars.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(archives.tars.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with raises("does not fit unpacked .* set TMPDIR"):
        load(path)


def test_a_gzip_of_several_parts_is_read_as_a_whole(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(*(lambda entry, content: (entry, io.BytesIO(content)))(*hostile.info("1.png", picture())))
    content = buffer.getvalue()
    (tmp_path / "a.tgz").write_bytes(gzip.compress(content[:700]) + gzip.compress(content[700:]))
    assert len(load(tmp_path / "a.tgz").images) == 1
