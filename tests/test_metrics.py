"""Laws of the distances and scores of feature vectors, beside closed forms, loops and other implementations."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from diffusion.errors import InputError
from diffusion.evaluation import metrics


def gaussian(seed, count, mean=0.0, scale=1.0, dim=3):
    return mean + scale * np.random.default_rng(seed).normal(size=(count, dim))


def test_the_frechet_distance_of_moments_is_that_of_the_sets():
    a, b = gaussian(0, 40), gaussian(1, 50, mean=2, scale=3)
    assert metrics.frechet_between(metrics.moments(a), metrics.moments(b)) == metrics.frechet_distance(a, b)


@pytest.mark.parametrize(("count", "dim"), [(50, 3), (300, 64), (20, 64), (3, 100)])
def test_the_frechet_distance_of_a_set_to_itself_is_zero_and_none_is_negative(count, dim):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim))
    a[:, 0] = 2  # one never varies
    assert metrics.frechet_distance(a, a) == 0
    for near in (a[rng.permutation(count)], a * (1 + 1e-12), a + 1e-9 * rng.normal(size=a.shape)):
        assert 0 <= metrics.frechet_distance(near, a) < 1e-14 * np.trace(metrics.moments(a).cov)


def test_the_frechet_distance_of_a_shift_is_its_square_however_small():
    a = np.random.default_rng(0).normal(size=(50, 3)) * [1, 1, 0]
    assert metrics.frechet_distance(a, a + np.array([3.0, 0, 4.0])) == pytest.approx(25)
    assert metrics.frechet_distance(a, a + np.array([3e-6, 0, 4e-6])) == pytest.approx(25e-12)
    assert metrics.frechet_distance(a, a * (1 + 1e-6)) == pytest.approx(
        1e-12 * (np.trace(metrics.moments(a).cov) + np.sum(a.mean(axis=0) ** 2)), rel=1e-6
    )


def test_the_frechet_distance_of_gaussians_is_its_closed_form():
    mean, scales = np.array([1.0, 2.0]), np.array([3.0, 0.5])
    a = metrics.Moments(np.zeros(2), np.eye(2))
    b = metrics.Moments(mean, np.diag(scales**2))
    assert metrics.frechet_between(a, b) == pytest.approx(np.sum(mean**2) + np.sum((scales - 1) ** 2))


@pytest.mark.parametrize("count", [300, 20])
def test_the_frechet_distance_agrees_with_scipy_also_with_fewer_samples_than_dimensions(count):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(64, 64)) / 8
    a, b = metrics.moments(gaussian(1, count, dim=64) @ mix), metrics.moments(gaussian(2, 500, 0.2, 1.3, 64) @ mix)
    root = scipy.linalg.sqrtm(b.cov)  # of the set of full rank, as a root of the product need not exist
    cross = np.trace(scipy.linalg.sqrtm(root @ a.cov @ root + 1e-15 * np.eye(64))).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov) - 2 * cross
    assert metrics.frechet_between(a, b) == pytest.approx(expected, rel=1e-6)


def test_the_frechet_distance_is_symmetric_and_has_the_features_unit_squared():
    a, b = gaussian(0, 60), gaussian(1, 50, mean=1)
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a))
    assert metrics.frechet_distance(5 * a, 5 * b) == pytest.approx(25 * metrics.frechet_distance(a, b))


def test_moments_of_other_sizes_are_refused():
    with pytest.raises(InputError):
        metrics.frechet_between(metrics.moments(gaussian(0, 9)), metrics.moments(gaussian(0, 9, dim=4)))
    with pytest.raises(InputError):
        metrics.frechet_between(metrics.moments(gaussian(0, 9)), metrics.Moments(np.zeros(3), np.zeros((2, 2))))


def test_the_kernel_distance_of_whole_sets_is_the_mean_over_all_pairs():
    a, b = gaussian(0, 30), gaussian(1, 30, mean=0.5)
    ours = metrics.kernel_distance(a, b, subsets=3, subset_size=30)
    options = {"degree": 3, "gamma": 1 / 3, "coef0": 1}
    within = sum(
        np.mean([k[i, j] for i in range(30) for j in range(30) if i != j])
        for k in (polynomial_kernel(a, **options), polynomial_kernel(b, **options))
    )
    assert ours.mean == pytest.approx(within - 2 * polynomial_kernel(a, b, **options).mean())
    assert ours.std == pytest.approx(0, abs=1e-12)


def test_the_kernel_distance_has_no_bias_at_any_size_of_subset():
    """Of one-dimensional Gaussians it is the sum over powers p of C(3, p) (E x^p - E y^p)^2."""
    shift = 0.7
    a, b = gaussian(0, 20_000, dim=1), gaussian(1, 20_000, mean=shift, dim=1)
    expected = 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift) ** 2
    for size in (5, 50):
        ours = metrics.kernel_distance(a, b, subsets=20_000 // size, subset_size=size)
        assert abs(ours.mean - expected) < 4 * ours.std / (20_000 // size) ** 0.5 + 0.2


def test_the_kernel_distance_of_equal_distributions_is_zero_within_its_error_and_follows_from_its_seed():
    a, b = gaussian(0, 2000, dim=8), gaussian(1, 2000, dim=8)
    ours = metrics.kernel_distance(a, b, subsets=50, subset_size=200)
    assert abs(ours.mean) < 3 * ours.std
    assert metrics.kernel_distance(a, b, subsets=50, subset_size=200, seed=0) == ours
    assert metrics.kernel_distance(a, b, subsets=50, subset_size=200, seed=1) != ours


def test_the_score_is_one_for_equal_rows_and_the_number_of_classes_for_sure_and_even_ones():
    assert metrics.class_score(np.full((40, 7), 1 / 7)).mean == pytest.approx(1)
    assert metrics.class_score(np.tile(np.eye(4), (10, 1)), splits=5) == pytest.approx((4, 0))


def test_the_score_is_the_exponential_of_the_mutual_information_of_each_part():
    p = np.random.default_rng(0).dirichlet(np.ones(5), 33)
    whole = scipy.stats.entropy(p.mean(axis=0)) - scipy.stats.entropy(p, axis=1).mean()
    assert metrics.class_score(p, splits=1) == pytest.approx((np.exp(whole), 0))
    halves = [metrics.class_score(half, splits=1).mean for half in (p[:16], p[16:32])]
    assert metrics.class_score(p[:32], splits=2) == pytest.approx((np.mean(halves), np.std(halves)))


def loops(real, fake, k):
    """Precision, recall, density and coverage as their definitions read."""
    radius = NearestNeighbors(n_neighbors=k).fit(real).kneighbors()[0][:, -1]
    fake_radius = NearestNeighbors(n_neighbors=k).fit(fake).kneighbors()[0][:, -1]
    inside = np.array([[np.linalg.norm(y - x) <= r for x, r in zip(real, radius, strict=True)] for y in fake])
    recalled = [any(np.linalg.norm(y - x) <= r for y, r in zip(fake, fake_radius, strict=True)) for x in real]
    return inside.any(axis=1).mean(), np.mean(recalled), inside.sum() / (k * len(fake)), inside.any(axis=0).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [1, 1000, 2**24])
def test_precision_recall_density_and_coverage_are_their_definitions_in_blocks_of_any_size(k, block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_VALUES", block)
    real, fake = gaussian(0, 60), gaussian(1, 45, mean=0.8, scale=0.7)
    assert metrics.prdc(real, fake, k) == pytest.approx(loops(real, fake, k))


def test_identical_sets_cover_each_other_and_distant_ones_do_not():
    a = gaussian(0, 100)
    same = metrics.prdc(a, a)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert metrics.prdc(a, a + 1000) == (0, 0, 0, 0)


def test_a_distant_origin_and_copies_change_nothing():
    a, b = gaussian(0, 80), gaussian(1, 80)
    assert metrics.prdc(a + 1e6, b + 1e6) == pytest.approx(metrics.prdc(a, b))
    assert metrics.prdc(np.zeros((9, 2)), np.zeros((9, 2))).precision == 1


def test_density_of_equal_distributions_is_near_one_and_coverage_near_its_expectation():
    found = metrics.prdc(gaussian(0, 3000, dim=4), gaussian(1, 3000, dim=4), k=3)
    assert found.density == pytest.approx(1, abs=0.1)
    assert found.coverage == pytest.approx(1 - 0.5**3, abs=0.03)


BAD = [np.zeros((5, 2)), np.zeros((1, 3)), np.zeros(3), np.full((9, 3), np.nan), np.full((9, 3), np.inf)]


@pytest.mark.parametrize("metric", [metrics.frechet_distance, metrics.kernel_distance, metrics.prdc])
@pytest.mark.parametrize("bad", BAD)
def test_features_that_cannot_be_compared_are_refused(metric, bad):
    with pytest.raises(InputError):
        metric(gaussian(0, 9), bad)
    with pytest.raises(InputError):
        metric(bad, gaussian(0, 9))


@pytest.mark.parametrize(
    "options", [{"subsets": 0}, {"subset_size": 1}, {"subset_size": 10}, {"subset_size": 2.5}, {"subsets": np.nan}]
)
def test_subsets_that_cannot_be_drawn_are_refused(options):
    with pytest.raises(InputError, match="subset"):
        metrics.kernel_distance(gaussian(0, 9), gaussian(1, 12), **options)


@pytest.mark.parametrize("k", [0, 9, 1.5])
def test_neighbours_that_do_not_exist_are_refused(k):
    with pytest.raises(InputError, match="k is"):
        metrics.prdc(gaussian(0, 9), gaussian(1, 12), k)


@pytest.mark.parametrize("bad", [np.ones((3, 2)), np.array([[2.0, -1.0]]), np.ones(1), np.full((3, 2), np.nan)])
def test_probabilities_that_are_none_are_refused(bad):
    with pytest.raises(InputError):
        metrics.class_score(bad, splits=1)


@pytest.mark.parametrize("splits", [0, 4, 1.5])
def test_parts_without_images_are_refused(splits):
    with pytest.raises(InputError, match="splits"):
        metrics.class_score(np.full((3, 2), 0.5), splits)
