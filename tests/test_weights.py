"""Laws of weights files: what goes in comes out, and what is damaged is refused."""

import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from reference import refused
from tiny import assert_same, made_autoencoder

import diffusion
from configs import digits
from diffusion import pretrained, solvers, timesteps
from diffusion.errors import InputError
from diffusion.guidance import Guidance
from diffusion.interop import safetensors_file
from diffusion.model import Trained, make_model
from diffusion.pretrained import autoencoders, weights
from diffusion.sealed import digest
from diffusion.solvers import from_json


@pytest.fixture(scope="module")
def trained():
    config = digits.get_config()
    with config.unlocked():
        config.model.update(width=8, multipliers=(1,), num_blocks=1, attention_resolutions=())
    model = make_model(config, (8, 8, 1))
    return Trained(model, model.init(jax.random.key(0)), config, 7, "0.995")


@pytest.fixture
def file(trained, tmp_path):
    path = tmp_path / "model.safetensors"
    weights.save(path, trained, {"frechet": 0.5})
    return path


def test_weights_config_and_figures_come_back(trained, file):
    loaded = weights.load(file)
    assert_same(loaded.params, trained.params)
    assert (loaded.step, loaded.ema) == (7, "0.995")
    assert json.dumps(loaded.config.to_dict()) == json.dumps(trained.config.to_dict())
    assert loaded.model.image_shape == (8, 8, 1)
    assert weights.describe(file)["figures"] == {"frechet": 0.5}
    x, t = np.ones((2, 8, 8, 1), np.float32), np.array([3.0, 900.0])
    np.testing.assert_array_equal(
        loaded.model.apply_fn(loaded.params, x, t, None), trained.model.apply_fn(trained.params, x, t, None)
    )


@pytest.mark.parametrize(
    ("given", "kept"),
    [("/home/me/photos.zip", "photos.zip"), ("~/photos", "photos"), ("mine/photos", "mine/photos"), ("", "")],
)
def test_a_file_that_travels_names_no_folder_of_a_machine(trained, tmp_path, given, kept):
    config = trained.config.copy_and_resolve_references()
    config.data.path = config.teacher = given
    weights.save(tmp_path / "it.safetensors", trained._replace(config=config))
    found = weights.load(tmp_path / "it.safetensors").config
    assert (found.data.path, found.teacher) == (kept, kept)
    assert config.data.path == given  # the run's own stays as it is
    coder = made_autoencoder()
    with coder.config.unlocked():
        coder.config.data.path = given
    autoencoders.save(tmp_path / "coder.safetensors", coder)
    assert autoencoders.load(tmp_path / "coder.safetensors").config.data.path == kept


def test_the_same_model_gives_the_same_file(trained, file, tmp_path):
    weights.save(tmp_path / "again.safetensors", trained, {"frechet": 0.5})
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", weights.HALVES)
def test_half_precision_halves_the_file_and_is_the_rounded_model(trained, file, tmp_path, dtype):
    half = tmp_path / "half.safetensors"
    weights.save(half, trained, dtype=dtype)
    numbers = [leaf.size for leaf in jax.tree.leaves(trained.params) if leaf.ndim > 1]
    assert file.stat().st_size - half.stat().st_size == pytest.approx(2 * sum(numbers), abs=500)
    loaded = weights.load(half)
    rounded = jax.tree.map(lambda a: a.astype(dtype).astype("float32") if a.ndim > 1 else a, trained.params)
    assert_same(loaded.params, rounded)
    weights.save(tmp_path / "again.safetensors", loaded, dtype=dtype)  # rounding twice changes nothing
    assert (tmp_path / "again.safetensors").read_bytes() == half.read_bytes()
    content = bytearray(half.read_bytes())
    content[-1] ^= 1
    half.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        weights.load(half)


def test_a_weight_that_half_precision_does_not_hold_is_refused(trained, tmp_path):
    large = jax.tree.map(lambda a: a + 7e4, trained.params)
    with pytest.raises(InputError, match="which float16 does not hold; write float32"):
        weights.save(tmp_path / "half.safetensors", trained._replace(params=large), dtype="float16")
    with pytest.raises(InputError, match="dtype is 'half'; valid: float32, float16, bfloat16"):
        weights.save(tmp_path / "half.safetensors", trained, dtype="half")
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_of_the_weights_is_found(file):
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")  # behind the header
    rng = random.Random(0)
    for _ in range(20):
        place = rng.randrange(begin, len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
        with pytest.raises(InputError, match="is damaged"):
            weights.load(file)


def test_every_changed_byte_of_the_text_is_found(file):
    """Config, step, figures and names are vouched for as the weights are."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    begin = content.index(b'"__metadata__"')
    text = range(content.index(b"{", begin), content.index(b'}"}', begin))
    assert len(text) > 1000
    rng = random.Random(0)
    for place in rng.sample(text, 60):
        changed = bytes([content[place] ^ 1 << rng.randrange(7)])
        file.write_bytes(content[:place] + changed + content[place + 1 :])
        with pytest.raises(InputError):
            weights.load(file)
    changed = content[:end].replace(b'step\\": 7', b'step\\": 8')
    assert changed != content[:end]
    file.write_bytes(changed + content[end:])
    with pytest.raises(InputError, match="its text is not what was written"):
        weights.describe(file)


def test_a_file_of_the_first_format_is_read(file, trained):
    header = safetensors_file.read_header(file)
    facts = json.loads(header.metadata["model"])
    facts["format"] = "jax-fast-diffusion 1"
    del facts["digest"]
    arrays = safetensors_file.read_tensors(file, header.tensors)
    file.write_bytes(safetensors.numpy.save(arrays, {"model": json.dumps(facts)}))
    assert_same(weights.load(file).params, trained.params)


def test_weights_that_are_not_finite_are_neither_written_nor_read(trained, file, monkeypatch):
    params = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(np.nan), trained.params)
    with refused("not finite .*the training diverged"):
        weights.save(file, trained._replace(params=params))
    monkeypatch.setattr(weights, "check_finite", lambda *_: None)
    weights.save(file, trained._replace(params=params))
    monkeypatch.undo()
    with refused("not finite .*the training diverged"):
        weights.load(file)


@pytest.mark.parametrize("dtype", [*"fdebBhiq?", "bfloat16"])
def test_tensors_are_read_as_the_safetensors_library_reads_them(tmp_path, dtype):
    rng = np.random.default_rng(0)
    dtype = np.dtype(jax.numpy.bfloat16 if dtype == "bfloat16" else dtype)
    arrays = {
        name: rng.integers(0, 2, shape).astype(dtype) for name, shape in (("a", (3, 2)), ("b", ()), ("c", (0, 4)))
    }
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays, {"x": "y"}))
    header = safetensors_file.read_header(path)
    assert header.metadata == {"x": "y"}
    found = safetensors_file.read_tensors(path, header.tensors)
    assert {name: array.dtype for name, array in found.items()} == dict.fromkeys("abc", dtype)
    assert_same(found, arrays)


@pytest.mark.parametrize("kept", [0, 5, 0.5, -1])
def test_a_truncated_file_is_refused(file, kept):
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(InputError, match="is damaged"):
        weights.load(file)


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    for metadata in (None, {"format": "pt"}, {"model": "{}"}):
        path.write_bytes(safetensors.numpy.save({"a": np.zeros(3)}, metadata))
        with pytest.raises(InputError, match=r"no file of convert\.py"):
            weights.load(path)
    with pytest.raises(InputError, match="there is no file"):
        weights.load(tmp_path / "nothing.safetensors")


def test_weights_that_do_not_fit_their_config_are_refused(trained, file):
    trained.config.model.width = 16
    try:
        weights.save(file, trained)
    finally:
        trained.config.model.width = 8
    with pytest.raises(InputError, match="another network"):
        weights.load(file)


def test_models_that_ship_have_names_which_a_path_of_the_same_name_takes_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [pretrained.name_of(text) for text in (None, "", "shipped", "runs/x", "x.safetensors")] == [
        *["digits"] * 3,
        *[""] * 2,
    ]
    for name in pretrained.FILES:
        assert pretrained.name_of(f"shipped-{name}") == pretrained.name_of(f"shipped-{name}/") == name
        (tmp_path / f"shipped-{name}").mkdir()
        assert pretrained.name_of(f"shipped-{name}") == ""
    (tmp_path / "shipped").mkdir()
    assert pretrained.name_of("shipped") == ""
    with pytest.raises(
        InputError, match="no model shipped-digit ships, and there is no such folder; did you mean 'digi"
    ):
        pretrained.name_of("shipped-digit")


@pytest.mark.parametrize("name", pretrained.FILES)
def test_a_model_that_ships_is_whole_small_and_names_no_folder_of_a_machine(name):
    assert pretrained.FILES[name].stat().st_size <= 16 * 2**20
    assert not re.search(r'": "(/|~|[A-Za-z]:)', json.dumps(weights.describe(pretrained.FILES[name])))
    trained = pretrained.load(name)
    for path in pretrained.tables(name).glob("*.json"):
        table = from_json(path.read_text())
        assert table.facts["weights"] == digest(trained.params)
        assert table.facts["shape"] == list(trained.model.space.shape)


def test_the_colour_model_recognises_the_class_that_it_was_asked_for():
    """What noise does it predict best for each of its samples: that for the class asked for (arXiv:2303.16203)."""
    model, params, *_ = pretrained.load("cifar")
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert (model.space.image_shape, model.conditions.names) == ((32, 32, 3), names)
    labels, schedule = np.repeat(np.arange(10), 3), model.schedule
    guidance = Guidance(scale=3.0, null=model.conditions.nulls(30))
    options = {"prediction": model.prediction, "cond": labels, "guidance": guidance}
    table = solvers.dpm_solver_pp(schedule, timesteps.uniform(schedule, 8))
    x = diffusion.sample(model.apply_fn, params, table, jax.random.key(0), 30, model.space.shape, **options)
    images = np.asarray(model.space.decode(x))
    assert (images.dtype, images.shape) == (np.uint8, (30, 32, 32, 3))
    assert images.std() > 30

    @jax.jit
    def errors(t, signal, noise, key):
        eps = jax.random.normal(key, x.shape)
        times, noisy = jnp.full(30, t), signal * x + noise * eps
        said = [model.apply_fn(params, noisy, times, jnp.full(30, k)) for k in range(10)]
        return jnp.stack([jnp.square(v - (signal * eps - noise * x)).mean((1, 2, 3)) for v in said])

    levels = [(t, *map(float, schedule.at(t))) for t in (400.0, 600.0, 800.0)]
    total = sum(errors(*level, jax.random.key(i)) for i in range(2) for level in levels)
    assert (np.asarray(total).argmin(axis=0) == labels).mean() >= 0.6
