"""Laws of the objectives of autoencoders, of the players that share their state, and of a training of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import IMAGES, KEY, SHAPE

from diffusion import devices
from diffusion.evaluation import classifier
from diffusion.images import to_floats
from diffusion.models.autoencoder import nearest_codes
from diffusion.objectives import players
from diffusion.objectives.autoencoding import (
    Parts,
    curve_names,
    kl_divergence,
    kl_terms,
    perceptual_distance,
    vq_terms,
)
from diffusion.objectives.losses import Batch
from diffusion.spaces import pixels
from diffusion.training import checkpoints
from diffusion.training.saving import CheckpointWriter
from diffusion.training.state import Trainee, init_state
from diffusion.training.step import StepOptions, make_train_step

CODES, DEPTH, COUNT = 6, 2, 8
X = jnp.asarray(to_floats(IMAGES))
RNG = np.random.default_rng(3)


def patches(x):
    """Images of 8 x 8 as 4 x 4 places of 4 numbers."""
    return x.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 4, 4)


def encode(params, x):
    out = jnp.tanh(patches(x) @ params["encoder"]["kernel"])
    return out[..., :DEPTH], out[..., DEPTH:]


def decode(params, z):
    out = jnp.tanh(z @ params["decoder"]["first"]) @ params["decoder"]["conv_out"]["kernel"]
    return out.reshape(-1, 4, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, *SHAPE)


def judge(params, x):
    return jnp.tanh(patches(x) @ params["kernel"])[..., 0]


def features(frozen, x):
    return (patches(x) @ frozen, patches(x) ** 2)


FROZEN = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
KL = Parts(encode, decode)
RIVALS = Parts(encode, decode, judge=judge, features=features)
VQ = Parts(encode, decode, nearest=nearest_codes)


def make_params(parts, weight=0.7):
    def random(*shape):
        return jnp.asarray(RNG.normal(0, 0.5, shape), jnp.float32)

    own = {"encoder": {"kernel": random(4, 2 * DEPTH)}, "decoder": {"first": random(DEPTH, 5)}}
    own["decoder"]["conv_out"] = {"kernel": random(5, 4)}
    params = {"autoencoder": own}
    if parts.judge is not None:
        params["critic"] = {"kernel": random(4, 1)}
        params["balance"] = {**players.first_balance(own), "weight": jnp.asarray(weight)}
    if parts.nearest is not None:
        params["codebook"] = players.first_codebook(random(CODES, DEPTH))
    return params


def batch_of(params, step=0, x=X, index=None):
    index = jnp.arange(COUNT) if index is None else index
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(index)
    return Batch(None, x, None, keys, index, COUNT, frozen=FROZEN, step=step, params=params)


def gradient(terms, params, **options):
    return jax.grad(lambda p: terms(batch_of(p, options.pop("step", 0)), **options).value.mean())(params)


def mean(x):
    return x.reshape(len(x), -1).mean(axis=1)


def test_the_divergence_is_its_integral():
    mean, log_variance, z = 0.7, -0.4, np.linspace(-12, 12, 200_001)
    variance = np.exp(log_variance)
    log_q = -0.5 * ((z - mean) ** 2 / variance + log_variance)
    integral = np.trapezoid(np.exp(log_q) / np.sqrt(2 * np.pi) * (log_q + 0.5 * z**2), z)
    found = kl_divergence(jnp.full((1, 2, 3), mean), jnp.full((1, 2, 3), log_variance))
    np.testing.assert_allclose(found, [6 * integral], rtol=1e-5)


def test_the_loss_is_its_formula_and_its_gradient_that_of_the_formula():
    params = make_params(RIVALS)
    options = {"l1": 0.3, "l2": 2.0, "kl": 0.01, "perceptual": 0.5}

    def formula(own):
        m, log_variance = encode(own, X)
        noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1), m.shape[1:]))(batch_of(None).keys)
        back = decode(own, m + jnp.exp(log_variance / 2) * noise)
        distance = perceptual_distance(features(FROZEN, back), features(FROZEN, X))
        divergence = (0.5 * (m**2 + jnp.exp(log_variance) - 1 - log_variance)).sum(axis=(1, 2, 3))
        return 0.3 * mean(jnp.abs(back - X)) + 2 * mean((back - X) ** 2) + 0.01 * divergence / 64 + 0.5 * distance

    terms = partial(kl_terms, parts=RIVALS._replace(judge=None), **options)
    own = {"autoencoder": params["autoencoder"]}
    np.testing.assert_allclose(terms(batch_of(own)).value, formula(own["autoencoder"]), rtol=1e-5)
    wanted = jax.grad(lambda p: formula(p).mean())(own["autoencoder"])
    tiny.assert_close(gradient(terms, own)["autoencoder"], wanted, 1e-6)


def test_each_rival_follows_its_own_hinge_loss_and_the_balance_both_gradients_of_the_last_layer():
    params = make_params(RIVALS, weight=0.7)
    own, critic = params["autoencoder"], params["critic"]
    terms = partial(kl_terms, parts=RIVALS, perceptual=0.5, adversarial=0.4, adversarial_start=3)
    alone = partial(kl_terms, parts=RIVALS._replace(judge=None), perceptual=0.5)

    def back(own):
        m, log_variance = encode(own, X)
        noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1), m.shape[1:]))(batch_of(None).keys)
        return decode(own, m + jnp.exp(log_variance / 2) * noise)

    def fools(own):
        return -judge(critic, back(own)).mean()

    def hinge(critic):
        fake, real = judge(critic, back(own)), judge(critic, X)
        return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())

    found = gradient(terms, params, step=3)
    without, kl_alone = gradient(alone, params)["autoencoder"], partial(kl_terms, parts=KL, l1=0.0)
    wanted = jax.tree.map(lambda a, b: a + 0.4 * 0.7 * b, without, jax.grad(fools)(own))
    tiny.assert_close(found["autoencoder"], wanted, 1e-6)
    tiny.assert_close(found["critic"], jax.grad(hinge)(critic), 1e-6)
    # The balance compares the gradients of the reconstruction alone, without the divergence.
    divergence = players.last(gradient(kl_alone, params)["autoencoder"])
    np.testing.assert_allclose(found["balance"]["reconstruction"], players.last(without) - divergence, atol=1e-6)
    np.testing.assert_allclose(found["balance"]["adversarial"], players.last(jax.grad(fools)(own)), atol=1e-6)
    # Before the start there is no duel.
    early = gradient(terms, params, step=2)
    tiny.assert_close(early["autoencoder"], without, 1e-6)
    assert not np.asarray(early["critic"]["kernel"]).any()


def optimizer(rate=0.05):
    return players.players_optimizer(optax.adam(rate), optax.adam(rate))


def test_the_weight_of_the_critic_is_the_ratio_of_the_norms():
    params = make_params(RIVALS)
    seen = jax.tree.map(jnp.zeros_like, params)
    seen["balance"]["reconstruction"] += jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
    seen["balance"]["adversarial"] += jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
    opt = optimizer()
    updates, _ = opt.update(seen, opt.init(params), params)
    after = optax.apply_updates(params, updates)["balance"]
    norms = [np.linalg.norm(seen["balance"][name]) for name in ("reconstruction", "adversarial")]
    np.testing.assert_allclose(after["weight"], norms[0] / norms[1], rtol=1e-5)
    # It is at most 1e4, and 0 where the critic says nothing.
    assert float(players.follow_balance({**seen["balance"], "adversarial": jnp.full((5, 4), 1e-12)})["weight"]) == 1e4
    assert float(players.follow_balance({**seen["balance"], "adversarial": jnp.zeros((5, 4))})["weight"]) == 0


def test_a_critic_without_a_gradient_stands_still_and_begins_afresh():
    params, opt = make_params(RIVALS), optimizer()
    state, zero = opt.init(params), jax.tree.map(jnp.zeros_like, params)
    for _ in range(3):
        updates, state = opt.update(zero, state, params)
        assert not np.asarray(updates["critic"]["kernel"]).any()
    tiny.assert_same(state["critic"], opt.init(params)["critic"])
    updates, _ = opt.update(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_allclose(updates["critic"]["kernel"], -0.05, rtol=1e-5)  # Adam's first step is its rate


def test_codes_are_the_running_means_of_the_vectors_nearest_to_them():
    params = make_params(VQ)
    shares, totals = np.full(CODES, 1 / CODES), np.asarray(params["codebook"]["embedding"]) / CODES
    params["codebook"] |= {"share": jnp.asarray(shares, jnp.float32), "total": jnp.asarray(totals, jnp.float32)}
    opt, state = optimizer(0.0), optimizer(0.0).init(params)
    z = np.asarray(encode(params["autoencoder"], X)[0]).reshape(-1, DEPTH)
    seen_by = jax.jit(partial(gradient, partial(vq_terms, parts=VQ)))
    for _ in range(20):
        codes = np.asarray(params["codebook"]["embedding"], np.float64)
        nearest = np.square(z[:, None] - codes).sum(axis=-1).argmin(axis=1)
        shares = 0.99 * shares + 0.01 * np.bincount(nearest, minlength=CODES) / len(z)
        totals = 0.99 * totals + 0.01 * np.stack([z[nearest == k].sum(axis=0) for k in range(CODES)]) / len(z)
        updates, state = opt.update(seen_by(params), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["codebook"]["embedding"], totals / shares[:, None], rtol=1e-4, atol=1e-5)


def test_dead_codes_take_vectors_of_the_batch_and_the_others_stay():
    params = make_params(VQ)
    alive = jnp.arange(CODES) < 4
    params["codebook"] |= {"share": jnp.where(alive, 0.25, 1e-4), "total": params["codebook"]["embedding"] * 0.25}
    seen = gradient(partial(vq_terms, parts=VQ), params, step=5)["codebook"]
    after = players.follow_codes(params["codebook"], seen)
    z = np.asarray(encode(params["autoencoder"], X)[0]).reshape(-1, DEPTH)
    distance = np.abs(np.asarray(after["embedding"])[:, None] - z).max(axis=-1).min(axis=1)
    np.testing.assert_array_less(distance[4:], 1e-5)
    assert (distance[:4] > 1e-4).all()
    np.testing.assert_allclose(after["share"][4:], 1 / CODES, rtol=1e-6)


def test_a_codebook_begins_with_vectors_of_the_first_batch():
    params = make_params(VQ)
    after = players.follow_codes(params["codebook"], gradient(partial(vq_terms, parts=VQ), params)["codebook"])
    z = np.asarray(encode(params["autoencoder"], X)[0]).reshape(-1, DEPTH)
    assert np.abs(np.asarray(after["embedding"])[:, None] - z).max(axis=-1).min(axis=1).max() < 1e-5
    assert len(np.unique(np.asarray(after["embedding"]), axis=0)) == CODES


def test_gradients_pass_a_codebook_as_if_it_were_not_there_and_commitment_draws_latents_to_their_codes():
    params = make_params(VQ)
    codes = params["codebook"]["embedding"]

    def formula(own):
        z = encode(own, X)[0]
        chosen = codes[nearest_codes(jax.lax.stop_gradient(z), codes)]
        back = decode(own, z + jax.lax.stop_gradient(chosen - z))
        return (mean(jnp.abs(back - X)) + 0.5 * mean((z - chosen) ** 2)).mean()

    found = gradient(partial(vq_terms, parts=VQ, commitment=0.5), params)
    tiny.assert_close(found["autoencoder"], jax.grad(formula)(params["autoencoder"]), 1e-6)


def test_the_perceptual_distance_is_that_of_directions():
    a = (
        jnp.asarray(RNG.normal(size=(2, 3, 3, 4)), jnp.float32),
        jnp.asarray(RNG.normal(size=(2, 1, 1, 5)), jnp.float32),
    )
    assert float(jnp.abs(perceptual_distance(a, tuple(3 * x for x in a))).max()) < 1e-6
    b = tuple(-x for x in a)
    np.testing.assert_allclose(perceptual_distance(a, b), 4, rtol=1e-5)  # |u - (-u)|^2 with |u| = 1


def test_the_classifiers_activations_are_those_that_its_answer_comes_from():
    network = classifier.Network(3)
    params = network.init(KEY, jnp.zeros((1, *SHAPE)))["params"]
    *_, last = classifier.activations(params, X, 3)
    features = params["features"]
    hidden = last.reshape(len(X), -1) @ features["kernel"] + features["bias"][None, :]
    np.testing.assert_allclose(nn_relu(hidden), network.apply({"params": params}, X).features, atol=1e-5)


def nn_relu(x):
    return np.maximum(x, 0)


# The training of all of them together.


def make_run(parts, terms, num_devices=1, fsdp=1, **options):
    """The step of a training, its first state, and state -> (state, metrics)."""

    def reconstruct(params, x, t=None, cond=None, *, dropout_keys=None):
        return decode(params["autoencoder"], encode(params["autoencoder"], x)[0])

    params = make_params(parts, weight=0.0)
    trainee = Trainee(reconstruct, pixels(SHAPE), lambda key: params)
    asked = StepOptions(
        (0.9,), averaged=players.saved_part, learning=players.learning_part, curves=curve_names(parts), **options
    )
    mesh, opt = tiny.training_mesh(num_devices, fsdp), optimizer()
    step = make_train_step(trainee, partial(terms, parts=parts), opt, mesh, KEY, asked, FROZEN)
    state = init_state(params, opt, (0.9,), None, asked.averaged, asked.curves)
    state = jax.device_put(state, devices.state_sharding(mesh, state))
    ballots = jax.device_put(np.zeros(mesh.size, np.float32), devices.batch_sharding(mesh))
    images = jax.device_put(IMAGES, devices.batch_sharding(mesh))
    return state, lambda state: step(state, images, None, ballots)


ADVERSARIAL = partial(kl_terms, perceptual=0.3, adversarial=0.5, adversarial_start=2)


@pytest.mark.parametrize(("parts", "terms"), [(RIVALS, ADVERSARIAL), (VQ, vq_terms)], ids=["adversarial", "codebook"])
def test_training_does_not_depend_on_devices_microbatches_or_sharding(parts, terms, monkeypatch):
    def trained(*args, **options):
        monkeypatch.setattr(f"{__name__}.RNG", np.random.default_rng(4))
        state, step = make_run(parts, terms, *args, **options)
        for _ in range(5):
            state, metrics = step(state)
        return jax.device_get((state.params, state.ema_params, state.totals, metrics.loss))

    alone = trained()
    for args, options in (((4,), {}), ((2,), {"microbatches": 2}), ((2, 2), {})):
        tiny.assert_close(trained(*args, **options), alone, 2e-5)


@pytest.mark.parametrize(("parts", "terms"), [(RIVALS, ADVERSARIAL), (VQ, vq_terms)], ids=["adversarial", "codebook"])
def test_a_run_resumed_from_a_checkpoint_ends_in_the_same_bits(parts, terms, tmp_path):
    """The checkpoint lies within the phase in which both rivals learn."""
    state, step = make_run(parts, terms, 2)
    like = jax.tree.map(jnp.copy, state)
    with CheckpointWriter(tmp_path, keep=3, begin=0) as writer:
        for k in range(1, 7):
            state, metrics = step(state)
            if k == 4:
                writer.save(4, state, {"config": {}}, float(metrics.loss), {})
                writer.wait()
    if parts.judge is not None:
        assert float(state.params["balance"]["weight"]) > 0
    again = checkpoints.load_state(tmp_path, 4, like)
    for _ in range(2):
        again, _ = step(again)
    tiny.assert_same(state, again)


def test_the_rows_of_the_record_are_the_means_of_the_terms():
    state, step = make_run(RIVALS, ADVERSARIAL)
    for _ in range(4):
        params = jax.tree.map(jnp.copy, state.params)
        state, metrics = step(state)
    key = jax.random.fold_in(KEY, 3)
    batch = batch_of(params, step=3)._replace(keys=jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(COUNT)))
    found = ADVERSARIAL(batch, parts=RIVALS)
    assert tuple(found.curves) == curve_names(RIVALS)
    np.testing.assert_allclose(
        metrics.totals.errors, [jnp.mean(curve) for curve in found.curves.values()], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(metrics.loss, found.value.mean(), rtol=1e-5)
    # The norm is that of the autoencoder's gradient.
    wanted = jax.grad(lambda p: ADVERSARIAL(batch._replace(params=p), parts=RIVALS).value.mean())(params)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(wanted["autoencoder"]), rtol=1e-4)


def test_the_averages_are_of_what_is_kept():
    state, step = make_run(VQ, vq_terms)
    state, _ = step(state)
    assert set(state.ema_params["0.9"]) == {"encoder", "decoder", "quantizer"}
    assert set(state.params) == {"autoencoder", "codebook"}
