"""Laws of sampling from a picture, of a part of it, and of the way between two images."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from commands import run
from PIL import Image
from tiny import MODEL, made_autoencoder, make_params

from diffusion import devices, editing, keys, sample, solvers, spaces, timesteps
from diffusion.commands import drawing, edits
from diffusion.errors import InputError
from diffusion.evaluation import load_samples
from diffusion.images import to_floats, to_uint8, write_png
from diffusion.model import Model
from diffusion.training.run_folder import RunFolder, load_trained

PICTURE = np.random.default_rng(5).integers(0, 256, (8, 8, 1)).astype(np.uint8)
MASK = np.zeros((8, 8, 1), np.uint8)
MASK[:, 5:] = 255
PLAIN = dict.fromkeys(("init", "mask", "strength", "interpolate")) | {"resample": 1, "seed": 3, "num": 6}


@pytest.fixture
def files(tmp_path):
    """The paths of a picture and a mask."""
    write_png(tmp_path / "init.png", PICTURE)
    write_png(tmp_path / "mask.png", MASK)
    return {"init": tmp_path / "init.png", "mask": tmp_path / "mask.png"}


def opened(model, table, labels=(), **given):
    return edits.open_edit(SimpleNamespace(**PLAIN | given), model, labels, table)


def drawn(model, params, table, edit, count=6):
    shared = {"seed": 3, "mesh": devices.data_mesh(), "batch_size": 8} | edit.sampling_options()
    images = np.concatenate(list(drawing.generate(model, params, table, range(count), **shared)))
    return edit.paste(images)


def test_a_picture_is_noised_to_where_the_grid_starts_by_the_noise_of_each_number(files):
    given = SimpleNamespace(**PLAIN | {"init": files["init"], "strength": 0.5})
    assert edits.started(given, "ddim", "uniform") == "uniform:start=0.5"
    tau = timesteps.uniform(MODEL.schedule, 4, start=0.5)
    table = solvers.ddim(MODEL.schedule, tau)
    edit = opened(MODEL, table, init=files["init"], strength=0.5)
    key, shape = keys.make(3), MODEL.space.shape
    clean = np.broadcast_to(to_floats(PICTURE), (6, *shape))
    x_init = editing.noised(MODEL.schedule, clean, tau[0], key)
    wanted = sample(MODEL.apply_fn, make_params(), table, key, 6, shape, prediction=MODEL.prediction, x_init=x_init)
    np.testing.assert_array_equal(drawn(MODEL, make_params(), table, edit), to_uint8(wanted))
    assert not edit.from_noise


def test_the_frames_of_an_edit_end_in_its_images(files):
    table = solvers.ddpm(MODEL.schedule, timesteps.uniform(MODEL.schedule, 4))
    edit = opened(MODEL, table, **files, strength=0.9)
    passed = drawing.frames(MODEL, make_params(), table, range(6), seed=3, **edit.sampling_options())
    np.testing.assert_array_equal(edit.paste(passed[-1]), drawn(MODEL, make_params(), table, edit))


def test_the_start_is_where_it_is_asked_for_and_a_grid_of_its_own_start_stays(files):
    def started(tau, sampler="ddim", **given):
        return edits.started(SimpleNamespace(**PLAIN | given), sampler, tau)

    init, mask = files["init"], files["mask"]
    assert started("karras:rho=5") == "karras:rho=5"
    assert started("karras:rho=5", init=init) == "karras:rho=5.0,start=0.6"
    assert started("uniform", init=init, mask=mask) == "uniform"
    assert started("uniform", init=init, mask=mask, strength=0.8) == "uniform:start=0.8"
    assert started("explicit:times=500,200", init=init) == "explicit:times=500,200"
    assert started("uniform:start=0.3", init=init) == "uniform:start=0.3"
    for tau in ("explicit:times=500,200", "uniform:start=0.3"):
        with pytest.raises(InputError, match="its own start; leave out --strength"):
            started(tau, init=init, strength=0.5)
    for sampler in ("learned", "mine.json"):
        assert started("", sampler, init=init, mask=mask) == ""
        with pytest.raises(InputError, match="name a solver"):
            started("", sampler, init=init)


def test_black_pixels_of_a_mask_stay_to_the_bit_and_the_others_are_drawn(files):
    table = solvers.ddpm(MODEL.schedule, timesteps.uniform(MODEL.schedule, 4))
    edit = opened(MODEL, table, **files)
    images = drawn(MODEL, make_params(), table, edit)
    np.testing.assert_array_equal(images[:, :, :5], np.broadcast_to(PICTURE, images.shape)[:, :, :5])
    assert np.all(np.ptp(images[:, :, 5:].astype(int), axis=0).max(axis=(0, 2)) > 0)
    assert edit.from_noise  # what is drawn anew knows nothing of what was there
    other = PICTURE.copy()
    other[:, 5:] = 255 - other[:, 5:]
    write_png(files["init"], other)
    np.testing.assert_array_equal(drawn(MODEL, make_params(), table, opened(MODEL, table, **files)), images)


def latent_model(channels=(8, 8)):
    """The tiny model in the latents of an untrained autoencoder of factor 2, which has 4 channels."""

    def network(params, x, t, cond=None):
        return x * params

    space = spaces.latents(made_autoencoder(channels))
    return Model(network, MODEL.schedule, space, MODEL.prediction), np.float32(0.3)


def test_in_latents_places_are_known_where_all_their_pixels_are_and_pixels_stay_to_the_bit(files):
    model, params = latent_model()
    table = solvers.ddim(MODEL.schedule, timesteps.uniform(MODEL.schedule, 3))
    edit = opened(model, table, **files)
    values, known = edit.known
    np.testing.assert_array_equal(values, model.space.encode(PICTURE[None])[0])
    np.testing.assert_array_equal(known[..., 0], [[1, 1, 0, 0]] * 4)  # columns 0..3, and 4 and 5 share a place
    images = drawn(model, params, table, edit)
    assert images.shape == (6, 8, 8, 1)
    np.testing.assert_array_equal(images[:, :, :5], np.broadcast_to(PICTURE, images.shape)[:, :, :5])
    assert edit.notes == ()
    stripes = np.zeros((8, 8, 1), np.uint8)
    stripes[:, ::2] = 255
    write_png(files["mask"], stripes)
    assert "keeps no whole place" in opened(model, table, **files).notes[0]


def test_the_way_between_two_images_begins_and_ends_with_them():
    table = solvers.ddim(MODEL.schedule, timesteps.uniform(MODEL.schedule, 5))
    params, shared = make_params(), {"seed": 3, "mesh": devices.data_mesh()}
    way = drawn(MODEL, params, table, opened(MODEL, table, interpolate=["3", "17"]))
    (ends,) = drawing.generate(MODEL, params, table, [3, 17], **shared)
    np.testing.assert_array_equal(way[0], ends[0])
    np.testing.assert_allclose(way[-1].astype(int), ends[1].astype(int), atol=1)
    steps = np.abs(np.diff(way.astype(int), axis=0)).mean(axis=(1, 2, 3))
    assert steps.min() > 0
    assert steps.sum() < 4 * np.abs(ends[0].astype(int) - ends[1]).mean()  # it goes there, and not anywhere


def test_the_start_of_every_schedule_has_the_deviation_of_its_own():
    table = solvers.ddim(MODEL.schedule, timesteps.uniform(MODEL.schedule, 5))
    loud = dataclasses.replace(table, noise=10 * table.noise)
    plain, louder = (
        opened(MODEL, t, interpolate=["3", "17"]).start(np.arange(6, dtype=np.uint32)) for t in (table, loud)
    )
    ratio = np.hypot(loud.signal[0], loud.noise[0]) / np.hypot(table.signal[0], table.noise[0])
    np.testing.assert_allclose(louder, ratio * plain, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "labels", "message"),
    [
        ({"interpolate": ["3"]}, (), "write the numbers of two images, as 3,17"),
        ({"interpolate": ["3", "x"]}, (), "interpolate is '3,x'"),
        ({"interpolate": ["3", "3"]}, (), "write the numbers of two images"),
        ({"interpolate": ["3", "4294967296"]}, (), "interpolate is"),
        ({"interpolate": ["3", "5"], "num": 1}, (), "at least 2"),
        ({"interpolate": ["3", "5"]}, (0, 1), "of one class"),
    ],
)
def test_a_way_that_cannot_be_gone_is_refused(given, labels, message):
    table = solvers.ddim(MODEL.schedule, timesteps.uniform(MODEL.schedule, 5))
    with pytest.raises(InputError, match=message):
        opened(MODEL, table, labels, **given)


def test_a_sampler_that_adds_noise_goes_no_way_between_two_images():
    for table in (solvers.ddpm(MODEL.schedule, [50, 20, 0]), solvers.ddim(MODEL.schedule, [50, 20, 0], eta=0.5)):
        with pytest.raises(InputError, match="adds noise in its steps"):
            opened(MODEL, table, interpolate=["3", "5"])


def test_pictures_and_masks_that_do_not_fit_are_refused(files, tmp_path):
    table = solvers.ddim(MODEL.schedule, timesteps.uniform(MODEL.schedule, 2))
    (tmp_path / "text.png").write_text("no picture")
    for name, content, message in (
        ("small", np.zeros((7, 8, 1)), "--mask has 8 x 7 pixels; it must have 8 x 8 as --init"),
        ("black", np.zeros((8, 8, 1)), "black everywhere, so nothing is drawn anew"),
        ("white", np.full((8, 8, 1), 255), "white everywhere, so nothing is kept"),
    ):
        write_png(tmp_path / f"{name}.png", content.astype(np.uint8))
        with pytest.raises(InputError, match=message):
            opened(MODEL, table, init=files["init"], mask=tmp_path / f"{name}.png")
    for path, message in (("text.png", "it is damaged, or no picture"), ("nowhere.png", "No such file")):
        with pytest.raises(InputError, match=f"--init=.*{path} cannot be read .{message}"):
            opened(MODEL, table, init=tmp_path / path)


def test_a_picture_and_its_mask_of_any_size_are_resized_alike_and_it_is_said(tmp_path):
    table = solvers.ddim(MODEL.schedule, timesteps.uniform(MODEL.schedule, 2))
    wide = np.full((80, 160, 3), 40, np.uint8)
    wide[:, 80:] = 200
    mask = np.zeros((80, 160, 1), np.uint8)
    mask[:, 80:] = 255
    write_png(tmp_path / "wide.png", wide)
    write_png(tmp_path / "mask.png", mask)
    edit = opened(MODEL, table, init=tmp_path / "wide.png", mask=tmp_path / "mask.png")
    picture, keep = edit.kept
    np.testing.assert_array_equal(keep[..., 0], [[True] * 4 + [False] * 4] * 8)
    assert picture[:, :4].max() < 60 < 180 < picture[:, 4:].min()
    assert edit.notes == ("the centred square of --init, 160 x 80 pixels, is resized to 8 x 8",)


def test_it_is_said_where_next_to_nothing_of_the_picture_is_left(files):
    tau = timesteps.uniform(MODEL.schedule, 2)
    (note,) = opened(MODEL, solvers.ddim(MODEL.schedule, tau), init=files["init"]).notes
    assert note == f"at t = {tau[0]:g}, the most noise, next to nothing of --init is left"
    lower = timesteps.uniform(MODEL.schedule, 2, start=0.5)
    assert opened(MODEL, solvers.ddim(MODEL.schedule, lower), init=files["init"]).notes == ()


def test_a_mask_is_of_the_size_of_the_picture_as_it_is_seen(tmp_path):
    """Phones lay photographs on their side, and say so in EXIF."""
    table = solvers.ddim(MODEL.schedule, timesteps.uniform(MODEL.schedule, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("L", (80, 40)).save(tmp_path / "init.jpg", exif=exif)
    half = np.zeros((80, 40, 1), np.uint8)
    half[40:] = 255
    write_png(tmp_path / "seen.png", half)
    write_png(tmp_path / "stored.png", half.transpose(1, 0, 2))
    edit = opened(MODEL, table, init=tmp_path / "init.jpg", mask=tmp_path / "seen.png")
    np.testing.assert_array_equal(edit.kept[1][..., 0], [[True] * 8] * 4 + [[False] * 8] * 4)
    assert "40 x 80 pixels, is resized" in edit.notes[0]
    with pytest.raises(InputError, match="has 80 x 40 pixels; it must have 40 x 80 as --init"):
        opened(MODEL, table, init=tmp_path / "init.jpg", mask=tmp_path / "stored.png")


@pytest.mark.parametrize("start", [1.0, 0.5])
def test_what_is_drawn_anew_begins_with_what_is_there_where_the_grid_starts_below_the_top(files, start):
    tau = timesteps.uniform(MODEL.schedule, 4, start=start)
    assert opened(MODEL, solvers.ddim(MODEL.schedule, tau), **files).from_noise == (start == 1)


def test_edits_on_the_command_line(trained, files):
    """A job is known by its picture and its mask, draws the same as the library, and says what it starts from."""

    def samples(*args):
        result = run("sample.py", "--steps=3", "--num=4", *args, cwd=trained)
        assert result.returncode == 0, result.stderr
        return result.stdout

    out = trained / "edit"
    told = samples(f"--init={files['init']}", "--strength=0.5", f"--out={out}", "--gif")
    assert "4 images from init.png noised to t = 500 with ddim(eta=0) on uniform:start=0.5" in told
    assert "pure noise" not in told  # the note on a start below T is for samples without a picture
    record = json.loads((out / "sampling.json").read_text())
    assert record["tau"][0] == 500
    assert len(record["init_sha256"]) == 64
    model, params, *_ = load_trained(RunFolder(trained / "runs" / "digits"))
    tau = timesteps.uniform(model.schedule, 3, start=0.5)
    images = np.broadcast_to(to_floats(PICTURE), (4, 8, 8, 1))
    x_init = editing.noised(model.schedule, images, 500, jax.random.key(0))
    options = {"prediction": model.prediction, "clip": model.space.clip, "x_init": x_init}
    table = solvers.ddim(model.schedule, tau)
    wanted = sample(model.apply_fn, params, table, jax.random.key(0), 4, (8, 8, 1), **options)
    np.testing.assert_allclose(load_samples(out).images.astype(int), to_uint8(wanted).astype(int), atol=1)
    assert Image.open(out / "trajectory.gif").n_frames == 4

    told = samples(f"--init={files['init']}", f"--mask={files['mask']}", "--resample=2")
    assert "drawn where mask.png is white, with ddim(eta=0), resampled 2 times on uniform, 6 network calls" in told
    (folder,) = (trained / "runs" / "digits" / "samples").glob("*init=*mask=*")
    kept = load_samples(folder).images[:, :, :5]
    np.testing.assert_array_equal(kept, np.broadcast_to(PICTURE, (4, 8, 8, 1))[:, :, :5])
    assert "from number 3 to number 17" in samples("--interpolate=3,17")
    assert list((trained / "runs" / "digits" / "samples").glob("*interpolate=3-17"))
