"""Laws of the data sources and of the order in which training walks through them."""

import hashlib
import io
import os
import tarfile
import zipfile
import zlib

import hostile
import numpy as np
import pooch
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from diffusion import data
from diffusion.data import cifar10, decoding, order
from diffusion.errors import InputError


def raises(match):
    """Expects an InputError of one line."""
    return pytest.raises(InputError, match=rf"\A(?=.*{match})[^\n]*\Z")


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels, file_format="PNG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def write_folder(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def load_images(path, split="", size=4, channels=3):
    return data.load("images", path=str(path), split=split, size=size, channels=channels)


# ---------------------------------------------------------------------------------------------------------- dispatch


def test_every_source_returns_uint8_nhwc_and_int32_labels_of_its_classes(tmp_path):
    write_folder(tmp_path, {"a/1.png": encoded(noise(4, 4)), "b/1.png": encoded(noise(4, 4))})
    for dataset in (data.load("digits"), load_images(tmp_path)):
        assert dataset.images.dtype == np.uint8
        assert dataset.images.ndim == 4
        assert dataset.images.flags.c_contiguous
        assert dataset.labels.dtype == np.int32
        assert dataset.labels.shape == dataset.images.shape[:1]
        assert set(dataset.labels) == set(range(len(dataset.class_names)))


def test_misspelt_name_is_answered_with_the_nearest():
    with raises("did you mean 'cifar10'"):
        data.load("cifar-10")


@pytest.mark.parametrize("name", ["digits", "cifar10"])
@pytest.mark.parametrize("wrong", [{"size": 64}, {"channels": 2}, {"split": "valid"}], ids=lambda w: next(iter(w)))
def test_fixed_sources_ignore_no_argument(name, wrong):
    (field, value) = next(iter(wrong.items()))
    with raises(f"has no {field}={value!r}; allowed: {field}="):
        data.load(name, **wrong)


def test_digits_read_no_path():
    with raises("has no path='somewhere'"):
        data.load("digits", path="somewhere")


# ------------------------------------------------------------------------------------------------------------ digits


def test_digits_are_the_bundled_ones_with_black_at_0_and_white_at_255():
    digits = data.load("digits", split="all", size=8, channels=1)
    grey, labels = load_digits(return_X_y=True)
    expected = [[round(v * 255 / 16) for v in row] for row in grey[:50].tolist()]
    assert digits.images.shape == (1797, 8, 8, 1)
    assert digits.images[:50].reshape(50, 64).tolist() == expected
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    np.testing.assert_array_equal(digits.labels, labels)


# ----------------------------------------------------------------------------------------------------------- CIFAR-10


def cifar_files(num_records, seed=0):
    """Files by name, with the pixels [N, 32, 32, 3] and labels they encode, written one record at a time."""
    rng = np.random.default_rng(seed)
    files, truth = {}, {}
    for name in (*cifar10.SPLITS["train"], *cifar10.SPLITS["test"]):
        pixels = rng.integers(0, 256, (num_records, 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, 10, num_records)
        planes = [[image[:, :, c].tobytes() for c in range(3)] for image in pixels]
        files[name] = b"".join(bytes([k]) + b"".join(p) for k, p in zip(labels, planes, strict=True))
        truth[name] = pixels, labels
    return files, truth


@pytest.fixture
def small_cifar(monkeypatch):
    monkeypatch.setattr(cifar10, "RECORDS_PER_FILE", 3)
    return cifar_files(3)


def assert_is_cifar(dataset, truth, split):
    pixels, labels = zip(*(truth[name] for name in cifar10.SPLITS[split]), strict=True)
    np.testing.assert_array_equal(dataset.images, np.concatenate(pixels))
    np.testing.assert_array_equal(dataset.labels, np.concatenate(labels))
    assert dataset.images.flags.c_contiguous
    assert len(dataset.class_names) == 10


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin/"])
def test_cifar10_folder_holds_the_records_in_file_order(tmp_path, small_cifar, split, inner):
    files, truth = small_cifar
    write_folder(tmp_path, {inner + name: content for name, content in files.items()})
    assert_is_cifar(data.load("cifar10", path=str(tmp_path), split=split), truth, split)


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar10_archive_equals_its_folder_whatever_its_order(tmp_path, small_cifar, monkeypatch, split):
    files, truth = small_cifar
    members = {f"cifar-10-batches-bin/{name}": files[name] for name in reversed(files)}
    archive = write_tar(tmp_path / "cifar-10-binary.tar.gz", members, "w:gz")
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    assert_is_cifar(data.load("cifar10", path=str(archive), split=split), truth, split)
    assert [p.name for p in tmp_path.iterdir()] == [archive.name]


def test_cifar10_test_file_has_ten_thousand_records(tmp_path):
    write_folder(tmp_path, {"test_batch.bin": bytes(10_000 * 3073)})
    assert data.load("cifar10", path=str(tmp_path), split="test").images.shape == (10_000, 32, 32, 3)


@pytest.mark.parametrize("num_bytes", [0, 3 * 3073 - 1, 2 * 3073])
def test_cifar10_file_of_another_length_is_refused(num_bytes):
    with raises("test_batch.bin does not hold 3 records .*pass path="):
        cifar10.parse_records(bytes(num_bytes), "test_batch.bin", 3)


def test_cifar10_label_above_nine_is_refused():
    with raises("label 10.*0..9"):
        cifar10.parse_records(bytes([10]) + bytes(3072), "test_batch.bin", 1)


def test_cifar10_other_archives_and_missing_files_are_refused_with_the_remedy(tmp_path):
    other = write_tar(tmp_path / "cifar-10-python.tar.gz", {"data_batch_1": b"pickle"}, "w:gz")
    for path, reason in ((other, "sha256"), (tmp_path / "none.tar.gz", "neither"), (tmp_path, "data_batch_1.bin")):
        with raises(f"{reason}.*{cifar10.URL}"):
            data.load("cifar10", path=str(path))


def test_cifar10_paths_that_hang_or_are_no_paths_are_refused(tmp_path):
    folder = tmp_path / "pipes"
    folder.mkdir()
    os.mkfifo(folder / "test_batch.bin")
    for path in (folder, "~nobody-of-this-name", "x" * 5000, "/dev/zero"):
        with raises(f"{cifar10.URL}"):
            data.load("cifar10", path=str(path), split="test")


@pytest.mark.parametrize("error", [ConnectionError("no\nroute to host"), ValueError("hash does not match")])
def test_cifar10_failed_download_says_how_to_do_it_by_hand(monkeypatch, error):
    def retrieve(*args, **kwargs):
        raise error

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with raises(f"could not be downloaded.*{cifar10.URL}.*pass path="):
        data.load("cifar10")


# ------------------------------------------------------------------------------------------------ images: which files

TREE = {
    f"{split}/{k}/{i}.png": encoded(noise(4, 4, i)) for split in ("test", "train") for k in "ba" for i in (2, 1, 10)
}


@pytest.mark.parametrize("top", ["", "archive/", "./"])
@pytest.mark.parametrize("split", ["test", "train"])
def test_folder_zip_and_tars_hold_the_same_dataset(tmp_path, split, top):
    files = {top + name: content for name, content in TREE.items()}
    paths = (
        write_folder(tmp_path / "folder", files),
        write_zip(tmp_path / "a.zip", files),
        write_tar(tmp_path / "a.tar", files),
        write_tar(tmp_path / "a.TAR.GZ", files, "w:gz"),
        write_tar(tmp_path / "a.tgz", files, "w:gz"),
    )
    names = sorted(name for name in TREE if name.startswith(split))
    expected = [np.asarray(Image.open(io.BytesIO(TREE[name]))) for name in names]
    for path in paths:
        dataset = load_images(path, split)
        np.testing.assert_array_equal(dataset.images, expected)
        assert [dataset.class_names[k] for k in dataset.labels] == [name.split("/")[1] for name in names]
        assert dataset.class_names == ("a", "b")


@pytest.mark.parametrize("names", [["1.png", "2.png"], ["all/1.png", "all/2.png"], ["b/a/1.png", "b/a/2.png"]])
def test_images_outside_class_folders_have_no_labels(tmp_path, names):
    dataset = load_images(write_folder(tmp_path, {name: encoded(noise(4, 4)) for name in names}))
    assert dataset.images.shape == (2, 4, 4, 3)
    assert dataset.labels is None
    assert dataset.class_names == ()


def test_hidden_and_other_files_are_left_out(tmp_path):
    others = ["a/._1.png", "__MACOSX/a/1.png", ".cache/1.png", "a/.2.png", "labels.csv", "a/notes.txt"]
    files = dict.fromkeys(others, b"no image") | {"a/1.PNG": encoded(noise(4, 4)), "b/1.JPeG": encoded(noise(4, 4))}
    for path in (write_folder(tmp_path / "folder", files), write_zip(tmp_path / "a.zip", files)):
        assert load_images(path).labels.tolist() == [0, 1]


def test_unknown_split_lists_the_top_folders(tmp_path):
    with raises("did you mean 'train'.*valid: test, train"):
        load_images(write_folder(tmp_path, TREE), split="tran")
    with raises("no sub-folders"):
        load_images(write_folder(tmp_path / "flat", {"1.png": encoded(noise(4, 4))}), split="train")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"path": ""}, "set path="),
        ({"size": 0}, "not size=0; set for example size=64"),
        ({"channels": 4}, "has no channels=4; allowed: channels=0, channels=1"),
        ({"path": "missing.zip"}, "does not exist"),
        ({"path": "notes.txt"}, r"no image folder, zip, tar .*pass a folder or a \.zip"),
        ({"path": "empty"}, "no images"),
        ({"path": "empty.zip"}, "no images"),
        ({"size": 10**6}, "GiB of memory.*set a smaller size="),
    ],
    ids=str,
)
def test_wrong_arguments_name_their_remedy(tmp_path, monkeypatch, arguments, remedy):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, {"notes.txt": b"", "empty/notes.txt": b"", "good/1.png": encoded(noise(4, 4))})
    write_zip(tmp_path / "empty.zip", {})
    with raises(remedy):
        load_images(**{"path": "good", **arguments})


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tgz"])
@pytest.mark.parametrize("kept", [0, 100, 0.3, 0.5])
def test_cut_off_archive_is_refused(tmp_path, suffix, kept):
    path = tmp_path / f"a{suffix}"
    write_zip(path, TREE) if suffix == ".zip" else write_tar(path, TREE, "w" if suffix == ".tar" else "w:gz")
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with raises("damaged"):
        load_images(path)


def test_tar_with_a_damaged_header_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", TREE)
    content = bytearray(path.read_bytes())
    content[content.index(b"train/b/1.png")] ^= 1
    path.write_bytes(content)
    with raises("damaged"):
        load_images(path)


def test_damaged_member_of_a_zip_is_named(tmp_path):
    path = write_zip(tmp_path / "a.zip", TREE)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 1  # in the first file written
    path.write_bytes(content)
    with raises("image test/b/2.png cannot be read"):
        load_images(path, "test")


@pytest.mark.parametrize("side", [4, 64], ids=["one thread", "threads"])
@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"<html>"])
def test_all_damaged_images_are_named_in_order(tmp_path, side, damage):
    files = {f"{i:03}.png": encoded(noise(side, side, i)) for i in range(100)}
    files |= {name: damage(files[name]) for name in ("037.png", "038.png", "090.png")}
    with raises(r"3 of 100 images cannot be read: 037.png \(.*\), 038.png \(.*\), 090.png \(.*skip_damaged=True"):
        load_images(write_folder(tmp_path, files))


def test_an_image_of_more_pixels_than_allowed_is_named(tmp_path):
    path = write_folder(tmp_path, {"large.png": encoded(noise(600, 500)), "small.png": encoded(noise(500, 500))})
    with raises(r"image large.png cannot be read \(its 500 x 600 pixels take 1 MiB, above max_decoded=1\)"):
        data.load("images", path=str(path), size=4, max_decoded=1)
    assert len(data.load("images", path=str(path), size=4, max_decoded=2).images) == 2
    for wrong in (0, 683, float("nan")):
        with raises(f"max_decoded={wrong} is out of range; it must be in 1..682"):
            data.load("images", path=str(path), size=4, max_decoded=wrong)


# --------------------------------------------------------------------------------------------------- images: pixels


def test_image_of_the_right_size_is_unchanged():
    pixels = noise(16, 16)
    np.testing.assert_array_equal(decoding.decode(encoded(pixels), 16, 3), pixels)


@pytest.mark.parametrize("transpose", [False, True])
def test_the_centre_square_is_kept(transpose):
    left, centre, right = (noise(8, 8, seed) for seed in range(3))
    pixels = np.concatenate([left, centre, right], axis=1)
    pixels, centre = (p.swapaxes(0, 1) if transpose else p for p in (pixels, centre))
    np.testing.assert_array_equal(decoding.decode(encoded(np.ascontiguousarray(pixels)), 8, 3), centre)


def test_shrinking_averages_what_is_too_fine_to_show():
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    shrunk = decoding.decode(encoded(checkerboard), 16, 1).astype(int)
    assert np.abs(shrunk - 127.5).max() < 8


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("side", [32, 256])
def test_resizing_keeps_a_linear_ramp(file_format, side):
    ramp = np.broadcast_to(np.linspace(0, 255, side)[None, :, None], (side, side, 3)).round().astype(np.uint8)
    resized = decoding.decode(encoded(np.ascontiguousarray(ramp), file_format), 16, 3)
    block_means = ramp.reshape(16, side // 16, 16, side // 16, 3).mean((1, 3))
    assert np.abs(resized - block_means)[:, 2:-2].max() < 4  # grey levels


def test_grey_is_luma_and_grey_files_become_equal_rgb_channels():
    pixels = noise(8, 8)
    luma = pixels @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    grey = decoding.decode(encoded(pixels), 8, 1)
    assert grey.shape == (8, 8, 1)
    assert np.abs(grey[..., 0] - luma).max() <= 1
    rgb = decoding.decode(encoded(grey[..., 0]), 8, 3)
    np.testing.assert_array_equal(rgb, np.repeat(grey, 3, axis=-1))


def test_sixteen_bit_grey_keeps_its_range():
    wide = (np.arange(256).reshape(16, 16) * 257).astype(np.uint16)
    np.testing.assert_array_equal(decoding.decode(encoded(wide), 16, 1).ravel(), np.arange(256))


def test_transparency_shows_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 3] = np.arange(16).reshape(4, 4) * 17
    expected = 255 - rgba[..., 3].astype(int)
    assert np.abs(decoding.decode(encoded(rgba), 4, 1)[..., 0] - expected).max() <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (decoding.decode(encoded(palette, transparency=0), 4, 3) == 255).all()
    assert (decoding.decode(encoded(palette), 4, 3) == 0).all()


def test_sixteen_bit_transparency_shows_white():
    wide = (np.arange(16).reshape(4, 4) * 4369).astype(np.uint16)
    image = Image.fromarray(wide)
    grey = decoding.decode(encoded(image, transparency=4369 * 3), 4, 1).ravel()
    np.testing.assert_array_equal(grey, [255 if k == 3 else k * 17 for k in range(16)])
    row = bytes([0, 200, 9, 100, 9, 50, 9, 1, 0, 2, 0, 3, 0])
    deep = hostile.png(2, 2, zlib.compress(row * 2), depth=16)
    head = deep.index(b"IDAT") - 4
    clear = deep[:head] + hostile.chunk(b"tRNS", bytes([200, 9, 100, 9, 50, 9])) + deep[head:]
    np.testing.assert_array_equal(decoding.decode(clear, 2, 3), [[[255, 255, 255], [1, 2, 3]]] * 2)
    np.testing.assert_array_equal(decoding.decode(deep, 2, 3), [[[200, 100, 50], [1, 2, 3]]] * 2)


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "CMYK", "I;16"])
def test_large_images_are_converted_in_strips_to_the_same_pixels(monkeypatch, mode):
    pixels = noise(50, 40)
    image = (
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(pixels).convert(mode)
    )
    if "A" in mode:
        image.putalpha(Image.fromarray(pixels[..., 1]))
    content = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    for channels in (1, 3):
        whole = decoding.decode(content, 40, channels)
        monkeypatch.setattr(decoding, "STRIP", 7 * 40)
        np.testing.assert_array_equal(decoding.decode(content, 40, channels), whole)
        monkeypatch.undo()


@pytest.mark.parametrize("damage", [b"\xff\xff\xff\xff", b"\0\0\0\x08\xff\xff", b"", b"\0\0\0\x08\0\1\1\x12\0\x03"])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_refuses_no_pixels(file_format, damage):
    whole = decoding.decode(encoded(noise(8, 8), file_format), 8, 3)
    damaged = encoded(noise(8, 8), file_format, exif=b"Exif\0\0MM\0*" + damage)
    np.testing.assert_array_equal(decoding.decode(damaged, 8, 3), whole)


def test_all_eight_orientations_are_turned_upright_as_pillow_turns_them():
    for orientation in range(9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(noise(8, 8), exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
        np.testing.assert_array_equal(decoding.decode(content, 8, 3), expected)


def test_numbers_that_are_no_grey_levels_are_refused():
    for array in (np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32), np.full((4, 4), -1, np.int32)):
        with pytest.raises(ValueError, match="its pixels"):
            decoding.decode(encoded(Image.fromarray(array), "TIFF"), 4, 1)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "TIF", "tiff"])
def test_rarer_suffixes_are_read(tmp_path, suffix):
    content = encoded(noise(4, 4), "TIFF" if suffix.lower().startswith("t") else "JPEG")
    assert len(load_images(write_folder(tmp_path, {f"1.{suffix}": content})).images) == 1


def test_cmyk_becomes_rgb():
    red = decoding.decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), 8, 3)
    assert np.abs(red - np.array([255, 0, 0])).max() <= 2


@pytest.mark.parametrize(("orientation", "upright"), [(3, lambda p: p[::-1, ::-1]), (6, lambda p: np.rot90(p, -1))])
def test_exif_orientation_is_applied(orientation, upright):
    pixels = noise(8, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decoding.decode(encoded(pixels, exif=exif), 8, 3), upright(pixels))


# ------------------------------------------------------------------------------------------------------------- order


def stream(num_examples, batch_size, seed, num_batches):
    return np.concatenate([data.batch_indices(num_examples, batch_size, seed, step) for step in range(num_batches)])


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 5), (10, 3), (7, 7), (5, 13), (1, 4), (64, 1)])
def test_every_epoch_holds_every_example_once(num_examples, batch_size):
    num_batches = -(-4 * num_examples // batch_size)
    epochs = stream(num_examples, batch_size, 0, num_batches)[: 4 * num_examples].reshape(4, num_examples)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(num_examples), (4, 1)))


def test_the_stream_does_not_depend_on_the_batch_size():
    np.testing.assert_array_equal(stream(10, 4, 3, 15), stream(10, 30, 3, 2))


def test_a_batch_depends_on_seed_and_step_alone():
    forward = [data.batch_indices(50, 8, 1, step) for step in range(40)]
    order._permutation.cache_clear()
    backward = [data.batch_indices(50, 8, 1, step) for step in reversed(range(40))]
    np.testing.assert_array_equal(forward, backward[::-1])


def test_seeds_and_epochs_draw_different_orders():
    orders = [tuple(data.batch_indices(100, 100, seed, epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25


def test_every_example_is_equally_likely_at_every_place():
    counts = np.zeros((4, 4))
    for epoch in range(2000):
        counts[np.arange(4), data.batch_indices(4, 4, 0, epoch)] += 1
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 28  # 9 degrees of freedom: passed by chance in 1 of 1,000


def test_changing_a_batch_changes_no_later_one():
    before = data.batch_indices(10, 10, 0, 0)
    data.batch_indices(10, 10, 0, 0)[:] = 0
    np.testing.assert_array_equal(data.batch_indices(10, 10, 0, 0), before)


@pytest.mark.parametrize(("name", "wrong"), [("num_examples", 0), ("batch_size", 0), ("seed", -1), ("step", -1)])
def test_order_refuses_what_is_out_of_range(name, wrong):
    with raises(f"{name}={wrong}.*at least"):
        data.batch_indices(**{"num_examples": 4, "batch_size": 2, "seed": 0, "step": 0, name: wrong})


def test_links_in_a_circle_are_followed_once(tmp_path):
    folder = tmp_path / "photos"
    (folder / "cats").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "cats" / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    (folder / "dogs").mkdir()
    (folder / "dogs" / "b.png").symlink_to(tmp_path / "b.png")
    (folder / "cats" / "circle").symlink_to(folder)
    assert len(data.load("images", path=str(folder), size=8).images) == 2
