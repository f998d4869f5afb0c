"""Laws of the spaces of features, of what is kept of a real set, and of the names of figures."""

import jax
import numpy as np
import pytest

from diffusion import data
from diffusion.data import Dataset
from diffusion.errors import InputError
from diffusion.evaluation import classifier, features, inception, metrics
from diffusion.evaluation.features import Features, FeatureSpace


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def trained(digits):
    return classifier.train(digits)


@pytest.fixture(scope="module")
def small(digits):
    return Dataset(digits.images[:60], digits.labels[:60], digits.class_names)


@pytest.fixture
def one_training(monkeypatch, trained):
    """Counts trainings and makes them fast."""
    calls = []

    def train(dataset, *, epochs, seed):
        calls.append(seed)
        return trained._replace(data=data.fingerprint(dataset), epochs=epochs, seed=seed)

    monkeypatch.setattr(classifier, "train", train)
    return calls


def counting(space):
    """The same space, and a list that grows by one for each call of extract."""
    calls = []
    return FeatureSpace(space.name, space.key, lambda x: calls.append(len(x)) or space.extract(x)), calls


def fake_inception(dim=12, classes=5):
    """A space that is called Inception's, without its network."""
    weights = np.random.default_rng(0).normal(size=(64, dim + classes)).astype(np.float32)

    def extract(images):
        out = images.reshape(len(images), -1) / 255 @ weights
        return Features(out[:, :dim], np.asarray(jax.nn.softmax(out[:, dim:])))

    return FeatureSpace("inception", "some key", extract)


def test_the_classifier_knows_digits_it_has_not_seen(trained):
    assert trained.accuracy >= 0.97


def test_the_classifier_follows_from_data_epochs_and_seed_alone(small):
    first, again, other = (classifier.train(small, epochs=2, seed=seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert first.sha256() == again.sha256() != other.sha256()


def test_a_saved_classifier_comes_back_and_a_damaged_one_is_refused(trained, tmp_path):
    path = tmp_path / "file.safetensors"
    classifier.save(path, trained)
    found = classifier.load(path)
    assert found._replace(params=None) == trained._replace(params=None)
    assert found.sha256() == trained.sha256()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        classifier.load(path)
    with pytest.raises(InputError, match="no file"):
        classifier.load(tmp_path / "other")


def test_data_without_classes_cannot_train_a_classifier(small):
    with pytest.raises(InputError, match="folder for each class"):
        classifier.train(Dataset(small.images, None, ()))


@pytest.mark.parametrize("options", [{"epochs": 0}, {"seed": -1}])
def test_trainings_that_cannot_be_are_refused(small, options):
    with pytest.raises(InputError):
        classifier.train(small, **options)


def test_features_of_an_image_do_not_depend_on_the_batch_and_one_shape_is_compiled(small, one_training, tmp_path):
    compiled = classifier.apply._cache_size()
    one, many = (features.classifier(small, tmp_path, batch_size=size) for size in (7, 60))
    whole = many.extract(small.images)
    parts = [one.extract(part) for part in np.array_split(small.images, 4)]
    np.testing.assert_allclose(np.concatenate([p.vectors for p in parts]), whole.vectors, atol=1e-4)
    np.testing.assert_allclose(np.concatenate([p.probabilities for p in parts]), whole.probabilities, atol=1e-5)
    np.testing.assert_allclose(whole.probabilities.sum(axis=1), 1, atol=1e-5)
    assert whole.vectors.shape == (60, 128)
    assert whole.vectors.dtype == whole.probabilities.dtype == np.float32
    assert classifier.apply._cache_size() == compiled + 2


def test_a_classifier_is_trained_once_for_each_data_and_seed(small, one_training, tmp_path):
    first = features.classifier(small, tmp_path)
    assert features.classifier(small, tmp_path).key == first.key
    assert one_training == [0]
    features.classifier(small, tmp_path, seed=1)
    features.classifier(Dataset(small.images[1:], small.labels[1:], small.class_names), tmp_path)
    assert one_training == [0, 1, 0]
    assert first.facts["accuracy"] >= 0.97


def test_a_damaged_classifier_is_trained_again_with_a_warning(small, one_training, tmp_path):
    key = features.classifier(small, tmp_path).key
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="made again"):
        assert features.classifier(small, tmp_path).key == key
    assert len(one_training) == 2
    assert features.classifier(small, tmp_path).key == key


def test_images_that_a_space_does_not_take_are_refused(small, one_training, tmp_path):
    pixels, known = features.pixels(), features.classifier(small, tmp_path)
    for space, images in (
        (pixels, np.zeros((2, 17, 8, 1), np.uint8)),
        (pixels, np.zeros((2, 8, 8, 1), np.float32)),
        (pixels, np.zeros((0, 8, 8, 1), np.uint8)),
        (pixels, np.zeros((8, 8, 1), np.uint8)),
        (known, np.zeros((2, 8, 8, 3), np.uint8)),
        (known, np.zeros((2, 16, 16, 1), np.uint8)),
    ):
        with pytest.raises(InputError):
            space.extract(images)


def test_features_of_floats_are_those_of_images(small, trained, one_training, tmp_path):
    floats = small.images / np.float32(127.5) - 1
    for space in (features.pixels(), features.classifier(small, tmp_path)):
        np.testing.assert_allclose(
            space.trace(space.params, floats), space.extract(small.images).vectors, rtol=1e-4, atol=1e-4
        )


def test_the_derivative_of_features_equals_finite_differences(digits, trained):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), trained.params)
        rng = np.random.default_rng(0)
        direction = rng.normal(size=(2, 8, 8, 1))
        images = digits.images[:2] / 127.5 - 1 + 0.1 * rng.normal(size=(2, 8, 8, 1))
        _, moved = jax.jvp(lambda x: classifier.vectors(params, x), (images,), (direction,))
        ends = [classifier.vectors(params, images + way * 1e-6 * direction) for way in (1, -1)]
        np.testing.assert_allclose(moved, (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-5)
        assert np.abs(moved).max() > 0.1


def test_pixels_are_the_images_in_0_to_1(small):
    found = features.pixels().extract(small.images)
    assert found.probabilities is None
    np.testing.assert_array_equal(np.rint(found.vectors * 255).reshape(small.images.shape), small.images)


def test_a_reference_is_made_once_and_comes_back_the_same(small, tmp_path):
    space, calls = counting(features.pixels())
    first = features.make_reference(space, small, tmp_path)
    again = features.make_reference(space, small, tmp_path)
    assert calls == [60]
    assert first.identity == again.identity
    jax.tree.map(np.testing.assert_array_equal, first[:2], again[:2])
    expected = metrics.moments(first.vectors)
    jax.tree.map(np.testing.assert_allclose, tuple(first.moments), tuple(expected))


def test_a_reference_of_anything_else_is_another_one(small, tmp_path):
    pixels = features.pixels()
    other_key = FeatureSpace("pixels", "other", pixels.extract)
    other_data = small._replace(images=255 - small.images)
    for space, dataset, options in (
        (pixels, small, {}),
        (other_key, small, {}),
        (pixels, other_data, {}),
        (pixels, small, {"split": "train"}),
        (pixels, small, {"count": 50}),
    ):
        space, calls = counting(space)
        features.make_reference(space, dataset, tmp_path, **options)
        assert calls == [options.get("count", 60)]
    assert len(list(tmp_path.iterdir())) == 5


def test_a_damaged_reference_is_made_again_with_a_warning_wherever_the_damage_is(small, tmp_path):
    features.make_reference(features.pixels(), small, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for place in (0, 100, 300, len(whole) // 3, 2 * len(whole) // 3, len(whole) - 400):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        _expect_made_again(small, tmp_path, path, whole)
    path.write_bytes(whole[: len(whole) // 2])
    _expect_made_again(small, tmp_path, path, whole)


def test_a_foreign_reference_is_made_again_with_a_warning(small, tmp_path):
    features.make_reference(features.pixels(), small, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    features.make_reference(features.pixels(), small, tmp_path / "other", count=50)
    (foreign,) = (tmp_path / "other").iterdir()
    path.write_bytes(foreign.read_bytes())
    _expect_made_again(small, tmp_path, path, whole)


def _expect_made_again(dataset, folder, path, whole):
    with pytest.warns(UserWarning, match="made again"):
        features.make_reference(features.pixels(), dataset, folder)
    with np.load(path) as found:
        assert set(found) == {"mean", "cov", "vectors", "identity"}
    assert len(path.read_bytes()) == len(whole)


@pytest.mark.parametrize("count", [1, -1, 61, 2.5])
def test_a_reference_of_images_that_are_not_there_is_refused(small, tmp_path, count):
    with pytest.raises(InputError, match="count"):
        features.make_reference(features.pixels(), small, tmp_path, count=count)


def test_a_cache_that_cannot_be_used_is_a_warning_and_the_result_is_the_same(small, one_training, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        found = features.make_reference(features.pixels(), small, tmp_path / "file" / "folder")
    wanted = features.make_reference(features.pixels(), small, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found[:2], wanted[:2])
    with pytest.warns(UserWarning, match="cannot be written"):
        space = features.classifier(small, tmp_path / "file" / "folder")
    assert space.key == features.classifier(small, tmp_path).key
    # A folder lies where the file should be.
    path = next(tmp_path.glob("pixels-*"))
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="made again"):
        features.make_reference(features.pixels(), small, tmp_path)


def test_figures_are_those_of_the_metrics_and_named_after_their_space(small, one_training, tmp_path):
    for space in (features.pixels(), features.classifier(small, tmp_path)):
        reference = features.make_reference(space, small, tmp_path)
        fake = space.extract(255 - small.images[:50])
        found = features.measure(reference, fake, ["frechet", "kernel", "prdc"])
        assert found[f"frechet_{space.name}"] == pytest.approx(
            metrics.frechet_distance(reference.vectors, fake.vectors), rel=1e-9
        )
        kernel = metrics.kernel_distance(reference.vectors, fake.vectors)
        assert (found[f"kernel_{space.name}"], found[f"kernel_{space.name}_std"]) == kernel
        for name, value in metrics.prdc(reference.vectors, fake.vectors)._asdict().items():
            assert found[f"{name}_{space.name}"] == value
        assert len(found) == 7
    assert features.measure(reference, fake, ["score"]) == {
        "score_classifier": metrics.class_score(fake.probabilities, 5).mean,
        "score_classifier_std": metrics.class_score(fake.probabilities, 5).std,
    }


def test_accuracy_is_the_share_of_samples_that_the_classifier_takes_for_what_was_asked(small, one_training, tmp_path):
    space = features.classifier(small, tmp_path)
    reference, found = features.make_reference(space, small, tmp_path), space.extract(small.images)
    seen = found.probabilities.argmax(axis=1).astype(np.int32)
    wrong = np.arange(len(seen)) % 4 == 0
    asked = np.where(wrong, (seen + 1) % 10, seen)
    shares = {"accuracy_classifier": 1 - wrong.mean()}
    assert features.measure(reference, found, ["accuracy"], asked) == pytest.approx(shares)
    for labels in (None, asked[:-1]):
        with pytest.raises(InputError, match="needs the class that was asked for of each sample"):
            features.measure(reference, found, ["accuracy"], labels)
    for name in ("pixels", "inception"):
        with pytest.raises(InputError, match=f"'{name}' does not have the data's classes, which accuracy needs"):
            features.plain_names(["accuracy"], name)


def test_real_images_score_zero_against_themselves(small, tmp_path):
    space = features.pixels()
    found = features.measure(
        features.make_reference(space, small, tmp_path), space.extract(small.images), ["frechet", "prdc"]
    )
    assert found["frechet_pixels"] == pytest.approx(0, abs=1e-6)
    assert found["precision_pixels"] == found["recall_pixels"] == found["coverage_pixels"] == 1


@pytest.mark.parametrize(("name", "right"), [("fid", "frechet"), ("kid", "kernel"), ("is", "score")])
def test_a_distance_in_another_space_is_never_called_fid(small, tmp_path, name, right):
    space = features.pixels()
    reference = features.make_reference(space, small, tmp_path)
    with pytest.raises(InputError, match=f"ask for '{right}'"):
        features.measure(reference, space.extract(small.images), [name])


def test_in_inceptions_space_both_names_give_one_figure(small, tmp_path):
    space = fake_inception()
    reference = features.make_reference(space, small, tmp_path)
    fake = space.extract(255 - small.images)
    special = features.measure(reference, fake, ["fid", "kid", "is", "prdc"])
    assert special == features.measure(reference, fake) == features.measure(reference, fake, ["fid", *features.METRICS])
    names = {"fid", "kid", "kid_std", "is", "is_std", "precision", "recall", "density", "coverage"}
    assert set(special) == names


def test_metrics_that_do_not_exist_are_refused(small, tmp_path):
    space = features.pixels()
    reference = features.make_reference(space, small, tmp_path)
    fake = space.extract(small.images)
    with pytest.raises(InputError, match="did you mean 'frechet'"):
        features.measure(reference, fake, ["frechte"])
    with pytest.raises(InputError, match="no classes"):
        features.measure(reference, fake, ["score"])
    with pytest.raises(InputError, match="one space"):
        features.measure(reference, Features(fake.vectors[:, 1:], None), ["frechet"])


def test_a_caller_learns_of_too_few_samples(small, tmp_path):
    space = features.pixels()
    few = features.make_reference(space, small, tmp_path)
    images = np.tile(small.images, (2, 1, 1, 1))
    many = features.make_reference(space, Dataset(images, None, ()), tmp_path)
    assert "64 dimensions" in features.too_few(few, 120)
    assert "60 samples" in features.too_few(many, 60)
    assert features.too_few(many, 120) == ""


@pytest.mark.parametrize("count", [2, 3, 5, 6, 19, 20, 60])
def test_small_sets_lower_what_the_metrics_take_and_say_so_and_every_figure_is_there(digits, count):
    """On a made-up space with classes, whatever the size of either set."""
    space = fake_inception()
    vectors = space.extract(digits.images[:60]).vectors
    identity = {"space": "inception", "count": 60}
    reference = features.Reference(metrics.moments(vectors), vectors, identity)
    found = features.measure(reference, space.extract(digits.images[100 : 100 + count]))
    assert len(found) == 9
    assert np.isfinite(list(found.values())).all()
    chosen = features.settings(features.METRICS, 60, count)
    assert (chosen.k, chosen.subset_size) == (min(5, count - 1), count)
    assert chosen.splits == max(1, count // 10)
    assert [note.split()[1] for note in chosen.notes] == ["recall,"] * (count < 6) + ["score", "kernel"]
    assert features.settings(["frechet"], 60, count).notes == []
    assert features.settings(features.METRICS, 5000, 5000).notes == []


def test_a_set_of_one_image_is_refused_before_anything_is_drawn():
    for sizes in ((1, 60), (60, 1)):
        with pytest.raises(InputError, match="at least 2"):
            features.settings(features.METRICS, *sizes)


def test_features_that_take_noise_for_images_or_do_not_know_the_classes_are_doubted(trained):
    assert trained.chance == pytest.approx(0.1, abs=0.01)
    assert trained.noise_precision < 0.3 < 0.8 < trained.held_out_precision
    assert trained.doubts() == []
    (doubt,) = trained._replace(noise_precision=0.6).doubts()
    assert "uniform noise a precision of 0.600" in doubt
    (doubt,) = trained._replace(accuracy=0.54).doubts()
    assert "right about only 54.0%" in doubt
    assert trained._replace(accuracy=0.74, chance=0.5).doubts()
    assert trained._replace(accuracy=0.76, chance=0.5).doubts() == []
    # Without training the features of noise lie among those of images.
    key = jax.random.key(0)
    untrained = classifier._init(key, (8, 8, 1), 10, 449)[0]
    dataset, places = data.load("digits"), np.arange(300)
    facts = classifier._judge(untrained, dataset, places[:240], places[240:], 0)
    assert facts["accuracy"] < 0.4
    assert trained._replace(**facts).doubts()


def test_a_network_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="pt_inception-2015-12-05-6726825d"):
        inception.load(tmp_path / "none.pth")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be used"):
        inception.load(tmp_path / "empty.safetensors")


def test_the_networks_url_names_the_start_of_its_hash():
    assert inception.URL.endswith(f"-{inception.SHA256[:8]}.pth")
    assert len(bytes.fromhex(inception.SHA256)) == 32
