"""Laws of autoencoders as users see them: the network's arithmetic, scaled latents, figures, files and refusals."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from commands import digest, error_line, run
from diffusers_autoencoder import Reference, state_dict
from tiny import KEY

from configs import digits_autoencoder
from diffusion import data
from diffusion.autoencoder import (
    Autoencoder,
    Moments,
    TrainedAutoencoder,
    code_numbers,
    make_autoencoder,
    make_network,
    measure_scaling,
    unscaled,
)
from diffusion.commands import autoencoders as commands
from diffusion.errors import InputError
from diffusion.evaluation.reconstruction import psnr, ssim
from diffusion.images import to_floats
from diffusion.models.autoencoder import PatchCritic
from diffusion.objectives import choice
from diffusion.training.autoencoders import load_autoencoder

FIELDS = {"channels": (4, 8), "num_blocks": 1, "latent_channels": 3, "groups": 2}
SHAPE = (8, 8, 1)
RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.uniform(-1, 1, (5, *SHAPE)).astype(np.float32)


def random_like(tree):
    """Random numbers in the place of every parameter, so that none is 0 or 1 by its initialisation."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.3, 0.4, x.shape), jnp.float32), tree)


def toy(matrix):
    """Patches of 2 x 2 pixels times a matrix: a linear autoencoder, whose inverse decodes."""

    def encoder(params, images):
        count, height, width, _ = images.shape
        patches = images.reshape(count, height // 2, 2, width // 2, 2).transpose(0, 1, 3, 2, 4)
        mean = patches.reshape(count, height // 2, width // 2, 4) @ matrix
        return Moments(mean, jnp.zeros_like(mean))

    def decoder(params, z):
        count, height, width, _ = z.shape
        patches = (z @ np.linalg.inv(matrix)).reshape(count, height, width, 2, 2).transpose(0, 1, 3, 2, 4)
        return patches.reshape(count, 2 * height, 2 * width, 1)

    return Autoencoder(SHAPE, 2, 4, encoder, decoder, lambda key: {"scaling": unscaled(4)})


MATRIX = np.linalg.qr(RANDOM.normal(size=(4, 4)))[0].astype(np.float32) * np.array([0.3, 1, 5, 20], np.float32)


@pytest.mark.parametrize("codes", [0, 7])
def test_the_network_computes_what_diffusers_computes_with_the_same_weights(codes):
    """Ours against their code in NumPy; tests/agreement has their code itself."""
    fields = {**FIELDS, "codes": codes, "code_channels": 2 if codes else 0}
    network = make_network(fields, SHAPE)
    params = random_like(jax.eval_shape(network.init, KEY, PIXELS)["params"])
    reference = Reference(state_dict(params, levels=2), levels=2, num_blocks=1, groups=2)
    mean, log_variance = network.apply({"params": params}, PIXELS, method="encode")
    moments = reference.moments(PIXELS.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    ours = mean if codes else np.concatenate([mean, log_variance], axis=-1)
    theirs = moments if codes else np.concatenate([moments[..., :3], moments[..., 3:].clip(-30, 20)], axis=-1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 * np.abs(theirs).max())
    z = RANDOM.normal(size=(2, 4, 4, network.depth)).astype(np.float32)
    images = network.apply({"params": params}, z, method="decode_exactly")
    decoded = reference.decode(z.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(images, decoded, rtol=0, atol=2e-4 * np.abs(decoded).max())


def test_a_linear_toy_autoencoder_gives_back_every_image():
    made = toy(MATRIX)
    params = {"scaling": measure_scaling(made, {}, [PIXELS])}
    np.testing.assert_allclose(made.decode(params, made.encode(params, PIXELS)), PIXELS, atol=3e-6)


def test_scaled_latents_of_the_measured_images_have_mean_0_and_variance_1_in_each_channel():
    made = toy(MATRIX)
    images = to_floats(data.load("digits").images)
    scaling = measure_scaling(made, {"scaling": unscaled(4)}, np.array_split(images, 7))
    z = np.asarray(made.encode({"scaling": scaling}, images), np.float64)
    np.testing.assert_allclose(z.var(axis=(0, 1, 2)), 1, atol=1e-3)
    np.testing.assert_allclose(z.mean(axis=(0, 1, 2)), 0, atol=1e-3)


def test_a_channel_that_is_the_same_everywhere_keeps_its_scale():
    scaling = measure_scaling(toy(MATRIX), {}, [np.zeros((3, *SHAPE), np.float32)])
    np.testing.assert_array_equal(scaling["scale"], np.ones(4))


def test_the_standard_deviation_is_scaled_as_the_mean_is():
    made = dataclasses.replace(toy(MATRIX), encoder=lambda params, x: Moments(x[:, :4, :4], x[:, :4, :4] ** 2))
    made = dataclasses.replace(made, latent_channels=1)
    params = {"scaling": {"shift": jnp.array([0.5]), "scale": jnp.array([4.0])}}
    found = made.moments(params, PIXELS)
    np.testing.assert_allclose(found.mean, (PIXELS[:, :4, :4] - 0.5) * 4, rtol=1e-6)
    np.testing.assert_allclose(found.std, PIXELS[:, :4, :4] ** 2 * 4, rtol=1e-6)


def test_a_batch_gives_the_same_in_parts_and_each_shape_is_traced_once():
    traced = []

    def decoder(params, z):
        traced.append(z.shape)
        return toy(MATRIX).decoder(params, z)

    made = dataclasses.replace(toy(MATRIX), decoder=decoder)
    params, z = made.init(KEY), RANDOM.normal(size=(7, 4, 4, 4)).astype(np.float32)
    whole = made.decode(params, z)
    for _ in range(2):
        np.testing.assert_array_equal(made.decode(params, z, batch_size=3), whole)
    assert traced == [(7, 4, 4, 4), (3, 4, 4, 4)]


def test_inputs_of_another_size_or_depth_are_refused():
    made, params = toy(MATRIX), {"scaling": unscaled(4)}
    for images in (PIXELS[:, :7], PIXELS.repeat(3, axis=3), PIXELS[0], PIXELS[:0]):
        with pytest.raises(InputError, match=r"takes \[B, H, W, 1\], heights and widths that are multiples of 2"):
            made.encode(params, images)
    with pytest.raises(InputError, match=r"takes \[B, H, W, 4\]"):
        made.decode(params, PIXELS)
    with pytest.raises(InputError, match="batch_size is -1"):
        made.encode(params, PIXELS, batch_size=-1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": (4, 9)}, "give a multiple of autoencoder.groups, 2"),
        ({"channels": ()}, "number of autoencoder.channels is 0"),
        ({"channels": (4, 4, 4, 4, 4)}, "8x8 cannot be halved 4 times; use sizes that are multiples of 16"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"num_blocks": 10**9}, "num_blocks is 1000000000"),
        ({"code_channels": 2}, "of no codes"),
        ({"dtype": "float16"}, "valid: float32, bfloat16"),
    ],
)
def test_fields_that_allow_no_network_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        make_autoencoder({**FIELDS, **fields}, SHAPE)


def test_with_a_codebook_images_are_decoded_from_the_codes_nearest_to_their_latents():
    fields = {**FIELDS, "codes": 5, "code_channels": 2}
    made, network = make_autoencoder(fields, SHAPE), make_network(fields, SHAPE)
    params = random_like(jax.eval_shape(made.init, KEY))
    params["scaling"] = {"shift": jnp.array([0.3, -1.0]), "scale": jnp.array([2.0, 0.5])}
    plain = {**params, "scaling": unscaled(2)}
    z, codes = np.asarray(made.encode(plain, PIXELS)), np.asarray(params["quantizer"]["embedding"])
    nearest = np.square(z[..., None, :] - codes).sum(axis=-1).argmin(axis=-1)
    np.testing.assert_array_equal(code_numbers(made, params, PIXELS), nearest)
    own = {name: part for name, part in params.items() if name != "scaling"}
    wanted = network.apply({"params": own}, codes[nearest], method="decode_exactly")
    np.testing.assert_allclose(made.decode(params, made.encode(params, PIXELS)), wanted, atol=1e-4)
    assert not np.asarray(made.moments(params, PIXELS).std).any()


@pytest.mark.parametrize("size", [4, 8, 32, 256])
def test_the_critic_judges_several_patches_of_images_of_any_size(size):
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    shape = jax.eval_shape(lambda x: PatchCritic().init_with_output(KEY, x)[0], images).shape
    assert shape[0] == 2
    assert shape[1] * shape[2] > 1


def test_psnr_of_a_constant_error_is_its_closed_form():
    a = RANDOM.integers(0, 200, (2, 4, 4, 3), dtype=np.uint8)
    np.testing.assert_allclose(psnr(a, a + np.uint8(10)), 20 * np.log10(25.5), rtol=1e-12)
    assert np.isinf(psnr(a, a)).all()


def test_ssim_is_1_of_the_same_image_and_of_constants_their_closed_form():
    a = RANDOM.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    np.testing.assert_allclose(ssim(a, a), 1, rtol=1e-12)
    for size in (4, 16):
        x, y = (np.full((1, size, size, 1), value, np.uint8) for value in (50, 80))
        c1 = 2.55**2
        np.testing.assert_allclose(ssim(x, y), (2 * 50 * 80 + c1) / (50**2 + 80**2 + c1), rtol=1e-9)


def test_ssim_in_one_window_is_the_formula():
    """In an image of 11 pixels one window lies inside."""
    x, y = RANDOM.integers(0, 256, (2, 1, 11, 11, 1), dtype=np.uint8)
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    a, b = x[0, ..., 0].astype(float), y[0, ..., 0].astype(float)
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
    cov = (window * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = 2.55**2, 7.65**2
    wanted = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    np.testing.assert_allclose(ssim(x, y), wanted, rtol=1e-9)
    with pytest.raises(InputError, match="give two uint8"):
        ssim(x, y[:, :5])


def test_a_sheet_has_reconstructions_below_their_originals():
    a, b = np.full((11, 64, 64, 1), 10, np.uint8), np.full((11, 64, 64, 1), 200, np.uint8)
    picture = commands.comparison(a, b)
    assert picture.shape == (4 * 65 + 1, 8 * 65 + 1, 1)
    assert picture[32::65, 32, 0].tolist() == [10, 200, 10, 200]
    assert picture[32::65, 32 + 65 * 5, 0].tolist() == [10, 200, 255, 255]
    assert commands.comparison(a[:3], b[:3]).shape == (2 * 65 + 1, 3 * 65 + 1, 1)


# Runs of train.py, and what the other programs do with them.

RECIPE = "--config=configs/digits_autoencoder.py"
SMALL = (
    RECIPE,
    "--config.autoencoder.channels=4,4",
    "--config.autoencoder.groups=2",
    "--config.train.batch_size=8",
    "--config.train.log_every=2",
    "--config.optimizer.decay=constant",
    "--config.sample.num=4",
)
KL = "--config.train.objective=kl_autoencoder:kl=1e-4,adversarial=0.5,adversarial_start=2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, compile_once):
    folder = tmp_path_factory.mktemp("autoencoder")
    done = run("train.py", KL, *SMALL, "--config.train.num_steps=4", "--workdir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "measure what it gives back with: python evaluate.py --workdir=run" in done.stdout
    return folder


def test_a_run_opens_as_an_autoencoder_whose_latents_are_scaled(trained):
    found = load_autoencoder(trained / "run")
    images = to_floats(data.load("digits").images)
    z = np.asarray(found.autoencoder.encode(found.params, images), np.float64)
    assert z.shape == (1797, 4, 4, 2) == (1797, *found.autoencoder.latent_shape)
    np.testing.assert_allclose(z.var(axis=(0, 1, 2)), 1, atol=1e-3)
    assert found.autoencoder.factor == 2
    assert found.step == 4
    assert re.fullmatch("[0-9a-f]{64}", found.sha256)


def test_a_file_of_an_autoencoder_holds_the_same(trained):
    assert run("convert.py", "--workdir=run", "--out=a.safetensors", cwd=trained).returncode == 0
    one, other = load_autoencoder(trained / "run"), load_autoencoder(trained / "a.safetensors")
    assert one.sha256 == other.sha256
    tiny.assert_same(one.params, other.params)
    assert one.autoencoder == other.autoencoder


def test_a_run_that_stopped_among_rivals_and_went_on_ends_in_the_same_bits(trained):
    for steps in (3, 4):
        done = run("train.py", KL, *SMALL, f"--config.train.num_steps={steps}", "--workdir=again", cwd=trained)
        assert done.returncode == 0, done.stderr
    assert digest(trained / "run", 4) == digest(trained / "again", 4)
    one, again = ((trained / name / "metrics.csv").read_text().splitlines() for name in ("run", "again"))
    assert one == [row for row in again if not row.startswith("3,")]  # each start logs its last step
    assert load_autoencoder(trained / "run").sha256 == load_autoencoder(trained / "again").sha256


def test_its_record_names_its_own_curves(trained):
    header, *rows = (trained / "run" / "metrics.csv").read_text().splitlines()
    assert header == "step,loss,grad_norm,learning_rate,skipped,kl,l1,l2,adversarial,critic,critic_weight"
    assert len(rows) == 2
    assert float(rows[0].rpartition(",")[2]) == 0
    assert float(rows[1].rpartition(",")[2]) > 0
    assert (trained / "run" / "loss.png").exists()


def test_evaluate_measures_and_shows_what_it_gives_back(trained):
    result = run("evaluate.py", "--workdir=run", "--first=20", cwd=trained)
    assert result.returncode == 0, result.stderr
    found = load_autoencoder(trained / "run")
    images = data.load("digits").images[:20]
    given_back = np.concatenate(list(commands.reconstructions(found, images)))
    assert f"{psnr(images, given_back).mean():.4f}" in result.stdout
    assert {path.name for path in (trained / "run").glob("reconstruction.*")} == {
        "reconstruction.csv",
        "reconstruction.json",
        "reconstruction.png",
    }
    again = run("evaluate.py", "--workdir=run", "--first=20", cwd=trained)
    assert again.returncode == 0, again.stderr
    assert len((trained / "run" / "reconstruction.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("sample.py", [], "run/checkpoints/4: this is an autoencoder, which draws no samples"),
        ("learn.py", [], "this is an autoencoder, which draws no samples"),
        ("evaluate.py", ["--samplers=ddim"], "--samplers does nothing for run, an autoencoder"),
        ("evaluate.py", ["--bound=5"], "--bound does nothing for run, an autoencoder"),
        ("evaluate.py", ["--ema=0.5"], "no EMA of 0.5"),
        ("train.py", [KL, *SMALL, "--config.autoencoder.channels=8,8"], "channels is .8, 8."),
    ],
)
def test_what_an_autoencoder_cannot_do_is_refused(trained, script, arguments, message):
    assert re.search(message, error_line(run(script, "--workdir=run", *arguments, cwd=trained)))


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        ("", {"model.width": 8}, "config.model.width is 8, which does nothing for an autoencoder; leave it out"),
        ("", {"train.prediction": "v"}, "prediction is 'v', which does nothing for an autoencoder"),
        ("", {"sample.steps": 5}, "config.sample.steps is 5, which does nothing for an autoencoder"),
        ("simple", {}, "config.autoencoder.latent_channels is 2, which does nothing for objective simple"),
        ("", {"autoencoder.channels": (8,) * 5}, "8x8 cannot be halved 4 times"),
        (
            "",
            {"autoencoder.codes": 8},
            "codes is 8, and the objective is kl_autoencoder; take objective vq",
        ),
        ("vq_autoencoder", {}, "codes is 0, and the objective is vq_autoencoder; set it to 512"),
        ("kl_autoencoder:kl=-1", {}, "kl of objective kl_autoencoder is -1"),
        ("kl_autoencoder:l1=0", {}, "l1 and l2 of 0, so that nothing is reconstructed"),
        ("kl_autoencoder:adversarial_start=5", {}, "adversarial_start of .* does nothing without adversarial"),
        ("kl_autoencoder:commitment=1", {}, "has no option 'commitment'; .*valid: adversarial"),
        ("kl_autoencoder:adversarial=1", {"train.keep_best": 1}, "that of a critic says nothing; set it to 0"),
        ("", {"train.microbatches": 3}, "batch_size is 64; .* multiple of 3"),
    ],
)
def test_a_config_that_asks_an_autoencoder_for_nothing_sensible_is_refused(objective, fields, message):
    config = digits_autoencoder.get_config()
    config.train.objective = objective or config.train.objective
    config.train.save_every = config.train.log_every
    for name, value in fields.items():
        section, field = name.split(".")
        config[section][field] = value
    checked = commands.make_experiment if choice.is_autoencoder(config.train.objective) else commands.check_fields
    with pytest.raises(InputError, match=message):
        checked(config)


def test_a_latent_scaling_of_other_weights_is_not_used(trained, tmp_path):
    """The scaling belongs to one checkpoint; another one has to be measured."""
    path = trained / "run" / "latents.json"
    kept = path.read_bytes()
    try:
        path.unlink()
        with pytest.raises(InputError, match="have not been measured at step 4"):
            load_autoencoder(trained / "run")
        path.write_bytes(kept.replace(b'"step": 4', b'"step": 5'))
        with pytest.raises(InputError, match="damaged"):
            load_autoencoder(trained / "run")
    finally:
        path.write_bytes(kept)
    assert isinstance(load_autoencoder(trained / "run"), TrainedAutoencoder)
