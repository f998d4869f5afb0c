"""Laws of files: pixels and pictures hold what they should, and nothing is half written."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reference import refused

from diffusion import files, sealed
from diffusion.images import labelled_sheet, sheet, to_uint8, write_png


def test_a_labelled_sheet_is_a_sheet_with_a_row_for_each_name_beside_it():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (5, 64, 64, 3)).astype(np.uint8)
    names = ["cat", "frog", "cat", "cat", "a name that is longer than any margin"]
    found = labelled_sheet(images, names)
    white = np.full_like(images[:2], 255)
    rows = [images[[0, 2, 3]], np.concatenate([images[[1]], white]), np.concatenate([images[[4]], white])]
    wanted = sheet(np.concatenate(rows), columns=3)
    margin = found.shape[1] - wanted.shape[1]
    np.testing.assert_array_equal(found[:, margin:], wanted)
    for row in range(3):  # something is written beside each row, and nothing that touches an edge
        beside = found[row * 65 : row * 65 + 65, :margin]
        assert 0 < np.mean(beside < 128) < 0.2
        assert np.all(beside[[0, -1]] == 255)
        assert np.all(beside[:, [0, -1]] == 255)


def test_pixels_survive_the_way_to_floats_and_back():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(levels / 127.5 - 1), levels)
    np.testing.assert_array_equal(to_uint8(np.array([-3.0, 3.0])), [0, 255])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_image_in_reading_order(channels, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (5, 40, 40, channels)).astype(np.uint8)
    write_png(tmp_path / "grid.png", sheet(images, min_height=0))
    canvas = np.asarray(Image.open(tmp_path / "grid.png")).reshape(2 * 41 + 1, 3 * 41 + 1, channels)
    for i, image in enumerate(images):
        top, left = i // 3 * 41 + 1, i % 3 * 41 + 1
        np.testing.assert_array_equal(canvas[top : top + 40, left : left + 40], image)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")
    with pytest.raises(TypeError):
        files.write_atomically(path, "not bytes")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": [1.5, float("nan")], "b": {"c": (float("inf"), 2)}})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "a": [1.5, None],
        "b": {"c": [None, 2]},
    }


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    folder = tmp_path / "a"
    with files.locked(folder, "training in"):
        with refused("another process is training in .*a;"), files.locked(folder, "training in"):
            pass
        with files.locked(folder, "measuring into", ".other"):
            pass
    with files.locked(folder, "training in"):
        pass


def test_a_digest_is_of_names_types_shapes_and_values():
    params = {"a": {"b": np.arange(6.0)}, "c": np.zeros(2, np.float32)}
    assert sealed.digest(params) == sealed.digest({"c": params["c"].copy(), "a": {"b": np.arange(6.0)}})
    others = [{"a": {"x": np.arange(6.0)}}, {"a": {"b": np.arange(6.0).reshape(2, 3)}}, {"c": np.zeros(2)}]
    others += [{"a": {"b": np.arange(6.0) + 1e-9}}]
    assert len({sealed.digest({**params, **other}) for other in [{}, *others]}) == 5


# A folder that a stranger has laid out


@pytest.fixture
def outside(tmp_path):
    """A file and a folder that nobody has named, with a precious file in each."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for path in (tmp_path / "thesis.tex", folder / "thesis.tex"):
        path.write_text("years of work")
    return folder


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def precious(outside):
    return [path.read_text() for path in (outside.parent / "thesis.tex", outside / "thesis.tex")] == [
        "years of work"
    ] * 2 and [path.name for path in outside.iterdir()] == ["thesis.tex"]


def test_a_lock_is_neither_truncated_nor_followed(run, outside):
    (run / ".lock").write_text("words")
    with files.locked(run, "training in"):
        pass
    assert (run / ".lock").read_text() == "words"
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(outside.parent / "thesis.tex")
    with refused(r"\.lock is a link"), files.locked(run, "training in"):
        pass
    assert precious(outside)


WRITES = {
    "write": lambda path, run: files.write_atomically(path, b"new", run),
    "write JSON": lambda path, run: files.write_json(path, {}, run),
    "make folder": files.make_folder,
    "append": files.open_to_append,
    "read": lambda path, run: files.read(path, within=run),
    "remove folder": lambda path, run: files.remove_folder(path.parent, run),
    "remove": files.remove,
    "remove matching": lambda path, run: files.remove_matching(path.parent, ".*", run),
}


@pytest.mark.parametrize("way", WRITES)
def test_nothing_below_a_folder_goes_through_a_link(run, outside, way):
    (run / "checkpoints").symlink_to(outside)
    with refused("checkpoints is a link"):
        WRITES[way](run / "checkpoints" / "thesis.tex", run)
    assert precious(outside)


def test_the_folder_itself_may_be_a_link_of_the_user(run, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(run)
    with files.locked(link, "training in") as lock:
        files.write_atomically(link / "a", b"1", link)
        assert lock.is_ours()
    assert (run / "a").read_bytes() == b"1"


def test_a_link_in_place_of_a_file_is_replaced_or_removed_and_its_target_stays(run, outside):
    for name in ("a", "b"):
        (run / name).symlink_to(outside.parent / "thesis.tex")
    files.write_atomically(run / "a", b"new")
    files.remove(run / "b", run)
    assert (run / "a").read_bytes() == b"new"
    assert not (run / "b").is_symlink()
    assert precious(outside)


def test_pipes_and_devices_are_refused_at_once(run):
    os.mkfifo(run / ".lock")
    with refused("no regular file"), files.locked(run, "training in"):
        pass
    for path in (run / ".lock", "/dev/zero"):
        with refused("no regular file"):
            files.read(path)
    with refused("no regular file"):
        files.open_to_append("/dev/null")


def test_a_file_is_read_up_to_a_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert files.read(tmp_path / "a", limit=5) == b"12345"
    with refused("more than 4 bytes"):
        files.read(tmp_path / "a", limit=4)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 10**5, b'{"a": ' * 10**4], ids=range(5))
def test_what_is_no_json_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with refused("a.json is damaged, or no JSON file"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read_a_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.write_atomically(tmp_path / "a", b"")
        with files.locked(tmp_path, "training in"):
            pass
    finally:
        os.umask(before)
    for name in ("a", ".lock"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_only_files_of_the_names_asked_for_are_removed(tmp_path, monkeypatch):
    names = [".a.csv.0123abcd.unfinished", ".b.csv.0123abcd.unfinished", ".a.csv.backup01", "a.csv", "000001.png"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "000002.png").mkdir()
    files.remove_temporaries(tmp_path, r"a\.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names[1:], "000002.png"])
    files.remove_matching(tmp_path, r"\d{6}\.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names[1:4], "000002.png"])
    # What a killed process leaves behind is such a name.
    monkeypatch.setattr(os, "replace", lambda *_: sys.exit())
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(SystemExit):
        files.write_atomically(tmp_path / "a.csv", b"new")
    monkeypatch.undo()
    assert len(list(tmp_path.glob(".a.csv.*.unfinished"))) == 1
    files.remove_temporaries(tmp_path, r"a\.csv")
    assert not list(tmp_path.glob(".a.csv.*.unfinished"))


@pytest.mark.parametrize("what", ["moved", "removed", "replaced"])
def test_a_lock_knows_that_its_folder_is_another_now(run, what):
    with files.locked(run, "training in") as lock:
        assert lock.is_ours()
        run.rename(run.with_name("elsewhere"))
        if what == "removed":
            shutil.rmtree(run.with_name("elsewhere"))
        if what == "replaced":
            with files.locked(run, "training in") as other:
                assert other.is_ours()
                assert not lock.is_ours()
        assert not lock.is_ours()


def test_a_file_that_is_kept_aside_never_takes_the_place_of_another(tmp_path):
    for content in ("1", "2"):
        (tmp_path / "a.csv").write_text(content)
        files.keep_aside(tmp_path / "a.csv", tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a-kept-1.csv": "1", "a-kept-2.csv": "2"}


def test_a_file_in_use_is_not_unused(tmp_path):
    path = tmp_path / "a"
    path.touch()
    for _ in range(2):
        with files.in_use(path), files.in_use(path), files.unused(path, unknown=True) as free:
            assert not free
        with files.unused(path, unknown=True) as free:
            assert free
    with files.in_use(tmp_path / "nothing"):
        pass


def test_what_killed_processes_left_is_removed_and_what_is_being_written_stays(tmp_path):
    (tmp_path / ".a.json.0123abcd.unfinished").write_bytes(b"half")
    with files.open_atomically(tmp_path / "a.json") as file:
        file.write(b"whole")
        files.remove_temporaries(tmp_path, r"a\.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"whole"
