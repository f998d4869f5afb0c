"""Laws of latent space: it changes what a model sees, and nothing of how it is trained and sampled."""

import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import digest, error_line, run, saved_steps, train
from ml_collections import ConfigDict
from PIL import Image
from tiny import IMAGES, MODEL, made_autoencoder, make_params

from configs import default
from diffusion import autoencoder as autoencoders
from diffusion import data, devices, solvers, spaces, timesteps
from diffusion.commands import drawing, students
from diffusion.data import Dataset
from diffusion.data.latents import Latents
from diffusion.errors import InputError
from diffusion.images import to_floats
from diffusion.model import Trained
from diffusion.pretrained import autoencoders as files
from diffusion.training import latents

COUNT = 70


def identity(std=0.0):
    """An autoencoder that leaves images as they are."""

    def encoder(params, images):
        return autoencoders.Moments(images, jnp.full_like(images, std))

    made = autoencoders.Autoencoder(MODEL.space.shape, 1, 1, encoder, lambda params, z: z, init=lambda key: {})
    return autoencoders.TrainedAutoencoder(
        made, {"scaling": autoencoders.unscaled(1)}, ConfigDict(), 1, "0.9", f"{std}".ljust(64, "0")
    )


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 32)


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 8, 8, 1)).astype(np.uint8)
    return Dataset(images, rng.integers(0, 2, COUNT).astype(np.int32), ("a", "b"))


class Encoder:
    """Counts what it encodes; the latents are those of `identity`."""

    def __init__(self, std=0.0):
        self.calls, self.trained = 0, identity(std)

    def __call__(self, images):
        self.calls += 1
        return spaces.moments(self.trained, images)


def test_with_an_identity_autoencoder_sampling_is_that_of_pixels_bit_for_bit():
    space = spaces.latents(identity())
    params, table = make_params(), solvers.ddpm(MODEL.schedule, timesteps.uniform(MODEL.schedule, 4))
    shared = {"seed": 3, "mesh": devices.data_mesh(), "clip": "none", "batch_size": 8}
    latent = MODEL.__class__(MODEL.apply_fn, MODEL.schedule, space, MODEL.prediction)
    of_pixels, of_latents = (
        np.concatenate(list(drawing.generate(model, params, table, range(10), **shared))) for model in (MODEL, latent)
    )
    assert np.std(of_pixels) > 10
    np.testing.assert_array_equal(of_pixels, of_latents)
    np.testing.assert_array_equal(space.decode(space.encode(IMAGES)), IMAGES)


def test_latents_are_drawn_from_their_gaussians_each_by_its_own_key():
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(2, 3, 3, 2)).astype(np.float32), np.full((2, 3, 3, 2), 0.3, np.float32)
    stored = np.concatenate([mean, std], axis=-1)
    of_keys = jax.jit(jax.vmap(lambda key: spaces.draw_latents(stored, jax.random.split(key, 2))))
    drawn = of_keys(jax.random.split(jax.random.key(1), 4000))
    np.testing.assert_allclose(drawn.mean(0), mean, atol=5 * 0.3 / 4000**0.5)
    np.testing.assert_allclose(drawn.std(0), std, rtol=0.06)
    sample_keys = jax.random.split(jax.random.key(2), 2)
    both = spaces.draw_latents(stored, sample_keys)
    np.testing.assert_array_equal(both[1:], spaces.draw_latents(stored[1:], sample_keys[1:]))
    sure = np.concatenate([mean, 0 * std], axis=-1)
    np.testing.assert_array_equal(spaces.draw_latents(sure, sample_keys), mean)


@pytest.mark.parametrize("flip", [False, True])
def test_batches_of_latents_are_the_latents_of_the_batches_mirror_images_included(
    dataset, small_shards, tmp_path, flip
):
    made = latents.encoded(dataset, Encoder(0.5), "a" * 64, tmp_path, flip=flip)
    assert len(made) == COUNT
    shared = {"batch_size": 48, "seed": 4, "flip": flip}
    of_pixels = data.batches(dataset, **shared)
    of_latents = data.batches(dataset._replace(images=made), **shared)
    for _ in range(4):
        pixels, found = next(of_pixels), next(of_latents)
        np.testing.assert_allclose(found.images[..., :1], to_floats(pixels.images), atol=1e-6)
        np.testing.assert_array_equal(found.images[..., 1:], 0.5)
        np.testing.assert_array_equal(found.labels, pixels.labels)


def test_latents_are_made_once_and_never_taken_for_anything_else(dataset, small_shards, tmp_path):
    def of(changed=dataset, autoencoder="a" * 64, flip=False):
        encoder = Encoder()
        found = latents.encoded(changed, encoder, autoencoder, tmp_path, flip=flip)
        return encoder.calls, found

    calls, first = of()
    assert calls == 3
    calls, again = of()
    assert calls == 0
    everything = np.arange(COUNT)
    np.testing.assert_array_equal(first.take(everything, None), again.take(everything, None))
    one_pixel = dataset.images.copy()
    one_pixel[40, 2, 3] ^= 1
    for other in (
        {"autoencoder": "b" * 64},
        {"flip": True},
        {"changed": dataset._replace(images=one_pixel)},
        {"changed": dataset._replace(images=dataset.images[:, :4])},
        {"changed": dataset._replace(labels=1 - dataset.labels)},
    ):
        assert of(**other)[0] >= 3, other
        assert of(**other)[0] == 0, other


def test_a_killed_encoding_goes_on_where_it_was(dataset, small_shards, tmp_path):
    class Killed(Encoder):
        def __call__(self, images):
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().__call__(images)

    with pytest.raises(KeyboardInterrupt):
        latents.encoded(dataset, Killed(), "a" * 64, tmp_path)
    encoder, steps = Encoder(), []
    found = latents.encoded(dataset, encoder, "a" * 64, tmp_path, progress=lambda *done: steps.append(done))
    assert encoder.calls == 1
    assert steps == [(0, COUNT), (32, COUNT), (64, COUNT), (COUNT, COUNT)]
    np.testing.assert_allclose(found.take(np.arange(COUNT), None)[..., :1], to_floats(dataset.images), atol=1e-6)


def test_damaged_latents_are_made_again_and_a_folder_that_cannot_be_costs_only_memory(
    dataset, small_shards, tmp_path, monkeypatch
):
    latents.encoded(dataset, Encoder(), "a" * 64, tmp_path)
    (file,) = tmp_path.glob("*/000001.npy")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    encoder = Encoder()
    with pytest.warns(UserWarning, match="made again: 000001.npy is damaged"):
        found = latents.encoded(dataset, encoder, "a" * 64, tmp_path)
    assert encoder.calls == 3
    np.testing.assert_allclose(found.take(np.arange(COUNT), None)[..., :1], to_floats(dataset.images), atol=1e-6)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="latents stay in memory"):
        kept = latents.encoded(dataset, Encoder(), "a" * 64, tmp_path / "file")
    np.testing.assert_array_equal(kept.take(np.arange(COUNT), None), found.take(np.arange(COUNT), None))


def test_latents_are_taken_from_shards_in_any_order():
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(50, 2, 3, 3, 4)).astype(np.float32)
    made, index, mirrored = Latents([whole[:20], whole[20:40], whole[40:]]), rng.permutation(50), rng.random(50) < 0.5
    np.testing.assert_array_equal(made.take(index, mirrored), whole[index, mirrored.astype(int)])
    np.testing.assert_array_equal(made.take(index[:7], None), whole[index[:7], 0])


def test_a_student_works_in_the_latents_of_its_teacher_and_in_no_others():
    config, theirs = default.get_config(), default.get_config()
    config.train.objective, theirs.latents = "consistency", "runs/a"
    teacher = Trained(MODEL, {}, theirs, 1, "0.9")
    assert students.complete(config, teacher).latents == "runs/a"
    config.latents = "runs/b"
    with pytest.raises(InputError, match=r"config\.latents is 'runs/b', the teacher's is 'runs/a'"):
        students.complete(config, teacher)
    config.latents, theirs.latents = "runs/b", ""
    with pytest.raises(InputError, match=r"config\.latents is 'runs/b', the teacher's is ''"):
        students.complete(config, teacher)


@pytest.fixture(scope="module")
def autoencoder_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("autoencoder") / "digits.safetensors"
    files.save(path, made_autoencoder())
    return path


@pytest.fixture(scope="module")
def run_of(compile_once, tmp_path_factory, autoencoder_file):
    """A folder in which a tiny model of the latents has been trained for 6 steps, and how it is trained."""
    cwd = tmp_path_factory.mktemp("latent")

    def go(steps, folder="runs/latent", **environment):
        return train(
            cwd,
            f"--config.latents={autoencoder_file}",
            f"--workdir={folder}",
            "--config.data.flip=True",
            "--config.train.save_every=2",
            f"--config.train.num_steps={steps}",
            env={**os.environ, "XDG_CACHE_HOME": str(cwd / "cache"), **environment},
        )

    result = go(6)
    assert result.returncode == 0, result.stderr
    assert "encoding 1,797 images" in result.stdout
    assert "in the latents (4, 4, 4)" in result.stdout
    return cwd, go


def test_a_latent_run_that_was_stopped_ends_in_the_same_bits(run_of):
    cwd, go = run_of
    assert go(4, "runs/parts").returncode == 0
    result = go(6, "runs/parts")
    assert result.returncode == 0, result.stderr
    assert "encoding" not in result.stdout
    assert saved_steps(cwd / "runs/parts") == saved_steps(cwd / "runs/latent")
    assert digest(cwd / "runs/parts", 6) == digest(cwd / "runs/latent", 6)


def test_a_latent_run_is_sampled_converted_and_measured_as_any_other(run_of):
    cwd, _ = run_of
    drawn = run("sample.py", "--workdir=runs/latent", "--num=5", "--steps=3", "--out=a", cwd=cwd)
    assert drawn.returncode == 0, drawn.stderr
    assert run("convert.py", "--workdir=runs/latent", "--out=one.safetensors", cwd=cwd).returncode == 0
    again = run("sample.py", "--workdir=one.safetensors", "--num=5", "--steps=3", "--out=b", cwd=cwd)
    assert again.returncode == 0, again.stderr
    a, b = (np.load(cwd / name / "samples.npz")["samples"] for name in "ab")
    assert a.shape == (5, 8, 8, 1)
    assert np.std(a) > 5
    np.testing.assert_array_equal(a, b)
    record = json.loads((cwd / "a/sampling.json").read_text())
    assert record["clip"] == "none"
    args = ["--workdir=runs/latent", "--out=half.safetensors", "--dtype=float16"]
    assert run("convert.py", *args, cwd=cwd).returncode == 0
    half = run("sample.py", "--workdir=half.safetensors", "--num=5", "--steps=3", "--out=c", cwd=cwd)
    assert half.returncode == 0, half.stderr
    rounded = np.load(cwd / "c/samples.npz")["samples"]
    np.testing.assert_allclose(rounded.astype(int), a.astype(int), atol=4)  # to a few of 255 grey levels
    assert (cwd / "half.safetensors").stat().st_size < 0.7 * (cwd / "one.safetensors").stat().st_size
    refusals = {
        ("sample.py", "--clip=recompute"): "clip recompute is for models of pixels in .-1, 1., and this one works in",
        ("sample.py", "--dynamic_threshold=0.9", "--clip=recompute"): "dynamic_threshold is for models of pixels",
        ("evaluate.py", "--bound=5"): "--bound is for models of pixels",
        ("evaluate.py", "--likelihood=5"): "--likelihood is for models of pixels",
    }
    for (script, *flags), sentence in refusals.items():
        assert_told(run(script, "--workdir=runs/latent", *flags, cwd=cwd), sentence)


def assert_told(result, sentence):
    assert re.search(sentence, error_line(result)), result.stderr


def test_a_latent_run_without_its_autoencoder_or_with_another_is_refused_by_name(run_of, autoencoder_file, tmp_path):
    cwd, go = run_of
    copy = shutil.copytree(cwd / "runs/latent", cwd / "runs/copy")
    shutil.move(copy / "autoencoder.safetensors", tmp_path)
    assert_told(run("sample.py", "--workdir=runs/copy", cwd=cwd), "autoencoder.safetensors is gone")
    assert_told(go(6, "runs/copy"), "autoencoder.safetensors is gone")
    other = made_autoencoder(seed=1)
    files.save(copy / "autoencoder.safetensors", other)
    wrong = f"latents of the autoencoder with SHA-256 {made_autoencoder().sha256}, and this one has {other.sha256}"
    assert_told(run("sample.py", "--workdir=runs/copy", cwd=cwd), wrong)
    another = tmp_path / "another.safetensors"
    files.save(another, other)
    result = train(cwd, f"--config.latents={another}", "--workdir=runs/latent", "--config.data.flip=True")
    assert_told(result, "autoencoder.sha256 differs")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--config.latents=nowhere"], "config.latents: nowhere holds no checkpoint"),
        (["--config.latents=nowhere.safetensors"], "config.latents: there is no file nowhere.safetensors"),
        (
            ["--config.latents=FILE", "--config.train.objective=hybrid"],
            "objective hybrid measures bits of 8-bit pixels",
        ),
        (
            ["--config.latents=FILE", "--config.train.objective=kl_autoencoder"],
            "config.latents is .*, which does nothing for an autoencoder",
        ),
        (["--config.latents=FILE", "--config.sample.clip=recompute"], "clip=recompute is for models of pixels"),
        (["--config.latents=FILE", "--config=IMAGES"], "images are 4x4x1, and the autoencoder .* was trained on 8x8x1"),
    ],
)
def test_a_latent_run_that_cannot_be_is_refused_before_the_work(autoencoder_file, tmp_path, flags, sentence):
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    of_images = ["--config.data.name=images", "--config.data.path=pictures", "--config.data.size=4"]
    parts = [part.replace("FILE", str(autoencoder_file)) for part in flags if part != "--config=IMAGES"]
    parts += [*of_images, "--config.data.channels=1"] if "--config=IMAGES" in flags else []
    assert_told(train(tmp_path, *parts), sentence)
    assert not (tmp_path / "runs").exists()
