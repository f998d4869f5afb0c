"""Laws of the train step, the EMAs, the learning rate and what a resumed run may change."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from ml_collections import ConfigDict
from tiny import BATCH, IMAGES, KEY, SCHEDULE, assert_close, assert_same, make_step, start

import diffusion
from diffusion import devices, solvers, timesteps
from diffusion.commands import optimizers
from diffusion.errors import InputError
from diffusion.models import UNet, as_apply_fn
from diffusion.objectives.losses import Batch, Loss
from diffusion.training import run_folder
from diffusion.training import step as training_step
from diffusion.training.step import TENTHS, StepOptions, ema_decay_at, ema_name, init_state, make_train_step


def losses(params, step=0):
    """The loss of every sample of IMAGES at a step, without the machinery of the train step."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(KEY, step), i))(jnp.arange(BATCH))
    x_0 = jnp.asarray(IMAGES, jnp.float32) / 127.5 - 1
    network = lambda x, t, cond: tiny.apply_fn(params, x, t, cond)  # noqa: E731
    return tiny.simple(Batch(network, x_0, None, keys, jnp.arange(BATCH), BATCH))


def test_one_step_of_gradient_descent_follows_the_gradient_of_the_loss():
    optimizer = optax.sgd(1.0)
    mesh, step = make_step(2, optimizer)
    state, metrics = step(start(optimizer, mesh))
    params = tiny.make_params()
    value, grads = jax.value_and_grad(lambda p: losses(p).value.mean())(params)
    assert float(metrics.loss) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics.grad_norm) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
    assert_close(state.params, jax.tree.map(lambda p, g: p - g, params, grads), 1e-4 * float(metrics.grad_norm))


@pytest.mark.parametrize(
    ("num_devices", "options"),
    [(2, {}), (8, {}), (1, {"microbatches": 4}), (2, {"microbatches": 2}), (8, {"fsdp": 4}), (2, {"fsdp": 2})],
    ids=str,
)
def test_training_does_not_depend_on_devices_microbatches_or_sharding(num_devices, options, monkeypatch):
    monkeypatch.setattr(devices, "SHARDED_FROM", 1)
    optimizer = optax.adam(1e-2)
    states = []
    for count, chosen in ((1, {}), (num_devices, options)):
        mesh, step = make_step(count, optimizer, log_every=10, **chosen)
        state = start(optimizer, mesh)
        for _ in range(3):
            state, _ = step(state)
        sharded = [not x.sharding.is_fully_replicated for x in jax.tree.leaves((state.params, state.opt_state))]
        assert any(sharded) == (chosen.get("fsdp", 1) > 1)
        states.append(jax.device_get(state))
    assert mesh.size == num_devices
    assert_close(states[0].totals, states[1].totals, 1e-4)
    assert_close(states[0].params, states[1].params, 1e-5)
    assert_close(states[0].ema_params, states[1].ema_params, 1e-5)


@pytest.mark.parametrize("options", [{}, {"fsdp": 4}], ids=str)
def test_devices_meet_once_in_a_step_and_gather_each_sharded_parameter_once(options, monkeypatch):
    monkeypatch.setattr(devices, "SHARDED_FROM", 1)
    optimizer = optax.adam(1e-2)
    mesh, step = make_step(8, optimizer, **options)
    images = jax.device_put(IMAGES, devices.batch_sharding(mesh))
    program = jax.jit(step).lower(start(optimizer, mesh), images).compile().as_text()
    found = re.findall(
        r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", program
    )
    # Numbers in the results of each kind of collective.
    sizes = {kind: [] for _, kind in found}
    for shapes, kind in found:
        sides = re.findall(r"\w\[([\d,]*)\]", shapes)
        sizes[kind].append(sum(int(np.prod([int(n) for n in side.split(",") if n])) for side in sides))
    params = sum(leaf.size for leaf in jax.tree.leaves(tiny.make_params()))
    logged = 2 * TENTHS + 2  # the loss, that of each tenth of the timesteps and how often it occurs, and who would stop
    if "fsdp" not in options:
        assert sizes == {"all-reduce": [params + logged]}
    else:
        assert sorted(sizes) == ["all-gather", "all-reduce"]
        assert sum(sizes["all-gather"]) == params
        assert params <= sum(sizes["all-reduce"]) <= params + logged + 10


def test_a_batch_that_cannot_be_shared_is_refused_with_the_number_that_can():
    count = jax.device_count()
    assert devices.training_mesh(count).shape == {"data": count, "fsdp": 1}
    assert devices.training_mesh(count, fsdp=2).shape == {"data": count // 2, "fsdp": 2}
    assert devices.training_mesh(7).size == 7
    assert devices.training_mesh(6, microbatches=3).size == 2
    with pytest.raises(InputError, match="multiple of 2"):
        devices.training_mesh(7, fsdp=2)
    with pytest.raises(InputError, match="multiple of 3"):
        devices.training_mesh(8, microbatches=3)
    with pytest.raises(InputError, match=f"fsdp is 3; it must divide the number of devices, {count}"):
        devices.training_mesh(24, fsdp=3)


def test_arrays_are_sharded_over_their_longest_axis_that_fsdp_divides():
    mesh = tiny.training_mesh(8, fsdp=4)
    arrays = {"long": np.zeros((3, 8, 64)), "odd": np.zeros((1025, 3)), "small": np.zeros(8)}
    specs = {name: tuple(s.spec) for name, s in devices.state_sharding(mesh, arrays).items()}
    assert specs == {"long": (None, None, "fsdp"), "odd": (), "small": ()}


def test_every_step_draws_new_noise():
    optimizer = optax.sgd(0.0)
    mesh, step = make_step(1, optimizer)
    state, first = step(start(optimizer, mesh))
    _, second = step(state)
    assert float(first.loss) == pytest.approx(float(losses(tiny.make_params(), 0).value.mean()), rel=1e-5)
    assert float(second.loss) == pytest.approx(float(losses(tiny.make_params(), 1).value.mean()), rel=1e-5)


def test_an_objective_is_given_what_was_frozen_and_the_first_average_of_the_parameters():
    """A toy distillation towards a teacher, and a penalty on leaving the average, against their gradients by hand."""
    teacher = jax.tree.map(lambda p: p + 0.5, tiny.make_params())

    def distil(batch):
        t = jnp.full(len(batch.x_0), 7)
        told = tiny.apply_fn(batch.frozen["teacher"], batch.x_0, t)
        error = (batch.network(batch.x_0, t, None) - told) ** 2
        drift = (batch.network(batch.x_0, t, None) - jax.lax.stop_gradient(batch.average(batch.x_0, t, None))) ** 2
        value = (error + batch.step * drift).mean(axis=(1, 2, 3))
        return Loss(value, t, value)

    def by_hand(params, average, step):
        x, t = jnp.asarray(IMAGES, jnp.float32) / 127.5 - 1, jnp.full(BATCH, 7)
        asked, told, before = (tiny.apply_fn(p, x, t) for p in (params, teacher, average))
        return jnp.mean((asked - told) ** 2 + step * (asked - before) ** 2)

    optimizer = optax.sgd(0.5)
    for count in (1, 4):
        mesh, step = make_step(count, optimizer, objective=distil, frozen={"teacher": teacher})
        state = start(optimizer, mesh)
        for k in range(3):
            params, average = jax.device_get((state.params, state.ema_params["0.9"]))
            grads = jax.grad(by_hand)(params, average, k)
            state, metrics = step(state)
            assert float(metrics.loss) == pytest.approx(float(by_hand(params, average, k)), rel=1e-5)
            assert_close(state.params, jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), 1e-5)


def test_conditions_are_dropped_at_the_rate_asked_for_by_sample_and_step_only():
    """A network that answers with its condition shows what it was told."""
    labels = np.arange(BATCH, dtype=np.int32) % 3
    model = tiny.make_model(tiny.apply_fn, SCHEDULE, tiny.SHAPE, num_classes=3)
    seen = {}

    def spy(batch):
        jax.debug.callback(lambda i, c: seen.update(zip(i.tolist(), c.tolist(), strict=True)), batch.index, batch.cond)
        return tiny.simple(batch)

    dropped = []
    for count in (1, 4):
        mesh = tiny.training_mesh(count)
        step = make_train_step(model, spy, optax.sgd(0.0), mesh, KEY, StepOptions([0.9], label_dropout=0.4))
        placed = [
            jax.device_put(x, devices.batch_sharding(mesh)) for x in (IMAGES, labels, np.zeros(count, np.float32))
        ]
        state, told = start(optax.sgd(0.0), mesh), []
        for _ in range(60):
            state, _ = step(state, *placed)
            jax.block_until_ready(state)
            jax.effects_barrier()
            told.append([seen[i] for i in range(BATCH)])
        told = np.array(told)
        assert np.all((told == labels) | (told == 3))
        dropped.append(told == 3)
    np.testing.assert_array_equal(*dropped)
    share, error = dropped[0].mean(), (0.4 * 0.6 / dropped[0].size) ** 0.5
    assert abs(share - 0.4) < 5 * error


def test_each_ema_follows_its_recurrence():
    decays = (0.9, 0.2)
    optimizer = optax.sgd(1e-2)
    mesh, step = make_step(1, optimizer, ema_decays=decays)
    state = start(optimizer, mesh, decays)
    expected = jax.device_get(state.ema_params)
    assert set(expected) == {"0.9", "0.2"}
    for k in range(4):
        state, _ = step(state)
        for name in expected:
            decay = min(float(name), (1 + k) / (10 + k))
            move = lambda e, p, d=decay: d * e + (1 - d) * p  # noqa: E731
            expected[name] = jax.tree.map(move, expected[name], jax.device_get(state.params))
    assert_close(state.ema_params, expected, 1e-5)
    assert float(ema_decay_at(10**6, 0.9999)) == pytest.approx(0.9999)
    assert ema_name(0.99999) == "0.99999"


def test_totals_are_sums_over_the_steps_since_the_last_multiple_of_log_every():
    optimizer = optax.sgd(0.0)
    mesh, step = make_step(2, optimizer, log_every=3)
    state, each = start(optimizer, mesh), []
    for _ in range(5):
        state, metrics = step(state)
        each.append(metrics)
    assert float(state.totals.steps) == 2
    for name in ("loss", "grad_norm"):
        expected = float(getattr(each[3], name)) + float(getattr(each[4], name))
        assert float(getattr(state.totals, name)) == pytest.approx(expected, rel=1e-5)
    samples = [losses(tiny.make_params(), k) for k in (3, 4)]
    for k in range(TENTHS):
        inside = [(s.t - 1) * TENTHS // SCHEDULE.num_timesteps == k for s in samples]
        count = sum(int(i.sum()) for i in inside)
        error = sum(float(s.error[i].sum()) for s, i in zip(samples, inside, strict=True))
        assert float(state.totals.counts[k]) * BATCH == pytest.approx(count, abs=1e-4)
        assert float(state.totals.errors[k]) * BATCH == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(("bad", "on_cpu"), [(np.nan, True), (np.inf, True), (np.nan, False)])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counters(bad, on_cpu, monkeypatch):
    """A batch of white images stands for one whose loss is not finite; accelerators choose in each array."""
    choose = training_step._choose
    monkeypatch.setattr(training_step, "_choose", lambda *asked: choose(*asked[:-1], on_cpu))

    def fragile(batch):
        loss = tiny.simple(batch)
        return loss._replace(value=loss.value * jnp.where(batch.x_0.min(axis=(1, 2, 3)) > 0.99, bad, 1))

    optimizer = optax.adam(1e-2)
    mesh, step = make_step(2, optimizer, objective=fragile, log_every=100)
    state, _ = step(start(optimizer, mesh))
    before = jax.device_get(state)
    for k in (1, 2):
        state, metrics = step(state, np.full_like(IMAGES, 255))
        assert not np.isfinite(float(metrics.grad_norm))
        assert (int(metrics.skipped), int(metrics.skipped_in_row)) == (k, k)
    assert_same(state.replace(step=0, skipped=0, skipped_in_row=0), before.replace(step=0, skipped=0, skipped_in_row=0))
    state, metrics = step(state)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (4, 2, 0)
    assert float(state.totals.steps) == 2


def test_any_process_that_wants_to_stop_is_heard():
    optimizer = optax.sgd(0.0)
    mesh = tiny.training_mesh(4)
    step = make_train_step(tiny.MODEL, tiny.simple, optimizer, mesh, KEY, StepOptions([0.9]))
    images = jax.device_put(IMAGES, devices.batch_sharding(mesh))
    for ballots in ([0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]):
        placed = jax.device_put(np.float32(ballots), devices.batch_sharding(mesh))
        _, metrics = step(start(optimizer, mesh), images, None, placed)
        assert (float(metrics.stop) > 0) == any(ballots)


def test_the_learning_rate_warms_up_to_its_value_and_decays_to_zero():
    config = ConfigDict({"learning_rate": 2.0, "warmup_steps": 4, "decay": "cosine", "clip_norm": 1.0})
    rate = optimizers.learning_rate(config, 24)
    np.testing.assert_allclose([float(rate(s)) for s in range(5)], [0.5, 1.0, 1.5, 2.0, 2.0])
    assert float(rate(14)) == pytest.approx(1.0)
    assert float(rate(24)) == pytest.approx(0.0, abs=1e-6)
    config.decay = "linear"
    assert float(optimizers.learning_rate(config, 24)(9)) == pytest.approx(1.5)
    # In stages that begin at 0, 24 and 30, each warms up and decays by itself.
    staged = optimizers.learning_rate(config, 42, restarts=(24, 30))
    found = [float(staged(step)) for step in (3, 14, 24, 27, 29, 30, 33, 38)]
    np.testing.assert_allclose(found, [2, 1, 0.5, 2, 1, 0.5, 2, 1])
    config.decay = "constant"
    assert float(optimizers.learning_rate(config, 24)(1000)) == 2.0


def test_a_resumed_run_may_change_its_length_and_nothing_that_it_trains():
    old = {"config": {"train": {"num_steps": 1, "batch_size": 2}, "model": {"multipliers": [1, 2]}}, "num_examples": 5}
    longer = {
        "config": {"train": {"num_steps": 9, "batch_size": 2}, "model": {"multipliers": (1, 2)}},
        "num_examples": 5,
    }
    folder = run_folder.RunFolder("somewhere")
    run_folder.check_resumable(old, longer, folder)
    longer["config"]["train"]["batch_size"] = 3
    longer["num_examples"] = 6
    with pytest.raises(
        InputError, match=r"config.train.batch_size is 3, the run has 2; num_examples is 6, the run has 5"
    ):
        run_folder.check_resumable(old, longer, folder)


def test_a_field_that_is_newer_than_the_run_counts_as_its_default():
    old, new = {"config": {"train": {"a": 1}}}, {"config": {"train": {"a": 1, "b": 2}}}
    folder = run_folder.RunFolder("somewhere")
    run_folder.check_resumable(old, new, folder, {"config": {"train": {"a": 0, "b": 2}}})
    with pytest.raises(InputError, match=r"train\.b is 2, the run has 3"):
        run_folder.check_resumable(old, new, folder, {"config": {"train": {"a": 0, "b": 3}}})
    with pytest.raises(InputError, match=r"train\.b is 2, the run has 'missing'"):
        run_folder.check_resumable(old, new, folder)


def test_the_length_of_a_run_is_fixed_where_it_shapes_the_learning_rate():
    def metadata(decay, num_steps):
        return {"config": {"optimizer": {"decay": decay}, "train": {"num_steps": num_steps}}}

    folder = run_folder.RunFolder("somewhere")
    run_folder.check_resumable(metadata("constant", 5), metadata("constant", 9), folder)
    with pytest.raises(InputError, match="num_steps is 9, the run has 5"):
        run_folder.check_resumable(metadata("cosine", 5), metadata("cosine", 9), folder)


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    folder = run_folder.RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(InputError, match="another process is training"), folder.locked():
        pass
    with folder.locked():
        pass


def test_a_state_has_the_same_types_and_numbers_in_double_precision():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(1e-3, 1e-2, 10)))
    states = []
    for double in (False, True):
        with jax.enable_x64(double):
            mesh, step = make_step(2, optimizer, log_every=5, microbatches=2)
            state = start(optimizer, mesh)
            begun = jax.tree.map(lambda x: x.dtype, state)
            for _ in range(3):
                state, _ = step(state)
            assert jax.tree.map(lambda x: x.dtype, state) == begun
            states.append(jax.device_get(state))
    assert {str(x.dtype) for x in jax.tree.leaves(states[1])} == {"float32", "int32"}
    assert_close(*states, 1e-5)


@pytest.mark.parametrize("double", [False, True])
def test_strict_promotion_of_types_trains_and_samples(double):
    network = UNet(width=8, multipliers=(1,), num_blocks=1, attention_resolutions=(8,), dropout=0.1, num_classes=2)
    init = lambda key: network.init(key, jnp.zeros((1, *tiny.SHAPE)), jnp.ones(1))["params"]  # noqa: E731
    model = tiny.make_model(as_apply_fn(network), SCHEDULE, tiny.SHAPE, num_classes=2)
    with jax.enable_x64(double), jax.numpy_dtype_promotion("strict"):
        params, optimizer, mesh = init(KEY), optax.adam(1e-2), tiny.training_mesh(1)
        assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
        step = make_train_step(model, tiny.simple, optimizer, mesh, KEY, StepOptions((0.9,), label_dropout=0.5))
        labels = np.arange(BATCH, dtype=np.int32) % 2
        state = init_state(params, optimizer, (0.9,))
        state, metrics = step(state, IMAGES, labels, np.zeros(1, np.float32))
        assert np.isfinite(float(metrics.loss))
        table = solvers.ddim(SCHEDULE, timesteps.uniform(SCHEDULE, 2), eta=1.0)
        guided = {"cond": labels[:2], "null_cond": model.conditions.nulls(2), "guidance_scale": 2.0}
        x = diffusion.sample(model.apply_fn, state.params, table, KEY, 2, tiny.SHAPE, clip="recompute", **guided)
        assert np.all(np.isfinite(x))
