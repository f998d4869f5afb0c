"""Laws of the train step, the learning rate, checkpoints, metrics and the stop request."""

import csv
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffusion import devices, experiment, schedules
from diffusion.errors import InputError
from diffusion.losses import simple_loss
from diffusion.training import checkpoints, run_folder
from diffusion.training.loop import Plan, StopRequest, train
from diffusion.training.recorder import COLUMNS, Recorder
from diffusion.training.step import ema_decay_at, init_state, make_train_step

SCHEDULE = schedules.linear(100)
KEY = jax.random.key(7)
SHAPE = (8, 8, 1)
BATCH = 8
IMAGES = np.random.default_rng(0).integers(0, 256, (BATCH, *SHAPE)).astype(np.uint8)


def apply_fn(params, x, t, cond=None, *, train=False, dropout_key=None):
    """A network small enough to compile at once."""
    return jnp.tanh(x * params["gate"]["scale"] + params["gate"]["bias"] * t[:, None, None, None] / 100)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return {"gate": {name: jnp.asarray(rng.normal(0, 0.3, SHAPE), jnp.float32)[None] for name in ("bias", "scale")}}


def make_step(num_devices, optimizer, **options):
    mesh = devices.data_mesh(num_devices)
    step = make_train_step(apply_fn, optimizer, SCHEDULE, mesh, KEY, **{"ema_decay": 0.9, **options})
    images = jax.device_put(IMAGES, NamedSharding(mesh, PartitionSpec("data")))
    return mesh, lambda state: step(state, images, None)


def start(params, optimizer, mesh):
    return jax.device_put(init_state(jax.tree.map(jnp.copy, params), optimizer), NamedSharding(mesh, PartitionSpec()))


def assert_close(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), a, b)


def test_one_step_of_gradient_descent_follows_the_gradient_of_the_loss(params):
    optimizer = optax.sgd(1.0)
    mesh, step = make_step(2, optimizer)
    state, metrics = step(start(params, optimizer, mesh))

    def loss(params):
        network = lambda x, t, cond: apply_fn(params, x, t, cond)  # noqa: E731
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(KEY, 0), i))(jnp.arange(BATCH))
        x_0 = jnp.asarray(IMAGES, jnp.float32) / 127.5 - 1
        return simple_loss(network, SCHEDULE, x_0, None, keys, jnp.arange(BATCH), BATCH).mean()

    value, grads = jax.value_and_grad(loss)(params)
    assert float(metrics.loss) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics.grad_norm) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
    assert_close(state.params, jax.tree.map(lambda p, g: p - g, params, grads), 1e-4 * float(metrics.grad_norm))


@pytest.mark.parametrize("num_devices", [2, 8])
def test_training_does_not_depend_on_the_number_of_devices(params, num_devices):
    optimizer = optax.sgd(1e-2)
    states = []
    for count in (1, num_devices):
        mesh, step = make_step(count, optimizer, flip=True)
        state = start(params, optimizer, mesh)
        for _ in range(3):
            state, _ = step(state)
        states.append(jax.device_get(state))
    assert mesh.size == num_devices
    assert_close(states[0].params, states[1].params, 1e-5)
    assert_close(states[0].ema_params, states[1].ema_params, 1e-5)


def test_every_step_draws_new_noise(params):
    optimizer = optax.sgd(0.0)
    mesh, step = make_step(1, optimizer)
    state, first = step(start(params, optimizer, mesh))
    _, second = step(state)
    assert float(first.loss) != float(second.loss)


def test_ema_follows_its_recurrence(params):
    optimizer = optax.sgd(1e-2)
    mesh, step = make_step(1, optimizer)
    state = start(params, optimizer, mesh)
    expected = jax.device_get(state.ema_params)
    for k in range(4):
        state, _ = step(state)
        decay = min(0.9, (1 + k) / (10 + k))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, jax.device_get(state.params))
    assert_close(state.ema_params, expected, 1e-5)
    assert float(ema_decay_at(10**6, 0.9999)) == pytest.approx(0.9999)


def test_the_learning_rate_warms_up_to_its_value_and_decays_to_zero():
    config = ConfigDict({"learning_rate": 2.0, "warmup_steps": 4, "decay": "cosine", "clip_norm": 1.0})
    rate = experiment.learning_rate(config, 24)
    np.testing.assert_allclose([float(rate(s)) for s in range(5)], [0.5, 1.0, 1.5, 2.0, 2.0])
    assert float(rate(14)) == pytest.approx(1.0)
    assert float(rate(24)) == pytest.approx(0.0, abs=1e-6)
    config.decay = "constant"
    assert float(experiment.learning_rate(config, 24)(1000)) == 2.0


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    """Checkpoints of steps 1..3, the newest 2 kept."""
    folder = tmp_path_factory.mktemp("checkpoints")
    optimizer = optax.adam(1e-3)
    mesh, step = make_step(2, optimizer)
    state = start(params, optimizer, mesh)
    with checkpoints.CheckpointWriter(folder, keep=2) as writer:
        for k in range(1, 4):
            state, _ = step(state)
            writer.save(k, state, {"config": {"a": 1, "b": (1, 2)}})
    return folder, jax.device_get(state), optimizer


def test_a_checkpoint_restores_every_bit_on_another_number_of_devices(saved, params):
    folder, state, optimizer = saved
    assert checkpoints.steps(folder) == [2, 3]
    like = start(params, optimizer, devices.data_mesh(1))
    restored = checkpoints.load_state(folder, 3, like)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    ema = checkpoints.load_ema(folder, 3, like.ema_params)
    jax.tree.map(np.testing.assert_array_equal, ema, state.ema_params)
    assert checkpoints.metadata(folder, 3) == {"config": {"a": 1, "b": [1, 2]}}


def test_a_checkpoint_of_another_model_is_refused_field_by_field(saved, params):
    folder, _, optimizer = saved
    like = start(params, optimizer, devices.data_mesh(1)).ema_params
    wider = jax.tree.map(lambda x: x, like)
    wider["gate"]["scale"] = jnp.zeros((1, 8, 8, 3))
    wider["extra"] = jnp.zeros(2)
    with pytest.raises(InputError) as error:
        checkpoints.load_ema(folder, 3, wider)
    assert "gate/scale: checkpoint has float32 (1, 8, 8, 1), model has float32 (1, 8, 8, 3)" in str(error.value)
    assert "extra: checkpoint has nothing, model has float32 (2,)" in str(error.value)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), like)
    with pytest.raises(InputError, match=r"float32 .* model has bfloat16"):
        checkpoints.load_ema(folder, 3, half)


def test_folders_that_are_no_checkpoints_are_not_taken_for_any(saved, tmp_path):
    for name in ("4", "5.orbax-checkpoint-tmp", "junk"):
        (tmp_path / name).mkdir()
    (tmp_path / "6").touch()
    assert checkpoints.steps(tmp_path) == []
    assert run_folder.RunFolder(tmp_path).latest_step() is None
    with pytest.raises(InputError, match="cannot be read"):
        checkpoints.metadata(tmp_path, 4)


def test_an_unreadable_checkpoint_is_named(saved, params, tmp_path):
    folder, _, optimizer = saved
    copy = tmp_path / "3"
    os.system(f"cp -r {folder}/3 {copy}")
    for path in copy.glob("ema/d/*"):
        path.write_bytes(path.read_bytes()[:20])
    for path in copy.glob("ema/**/manifest.ocdbt"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=str(copy)):
        checkpoints.load_ema(tmp_path, 3, start(params, optimizer, devices.data_mesh(1)).ema_params)


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


def test_a_signal_at_any_moment_of_a_step_loses_no_step(params, tmp_path):
    """The log row of step 2 is written after the decision whether step 2 is saved."""

    class Interrupting(Recorder):
        def scalars(self, step, *values):
            super().scalars(step, *values)
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    optimizer = optax.sgd(1e-2)
    mesh, step = make_step(1, optimizer)
    plan = Plan(num_steps=9, batch_size=BATCH, log_every=1, save_every=9, grid_every=9)
    writer = checkpoints.CheckpointWriter(tmp_path / "checkpoints", keep=2)
    with writer, Interrupting(tmp_path / "metrics.csv", 0) as recorder:
        state, finished = train(
            start(params, optimizer, mesh),
            lambda state, images, cond: step(state),
            lambda number: (IMAGES, None),
            plan,
            lambda number: 0.01,
            recorder,
            writer,
            {"a": 1},
            draw_grid=lambda state: None,
        )
    assert not finished
    assert checkpoints.steps(tmp_path / "checkpoints") == [int(state.step)]


def rows(path):
    with open(path, newline="") as file:
        return [(int(row["step"]), float(row["seconds"])) for row in csv.DictReader(file)]


def test_metrics_after_the_step_resumed_from_are_written_again(tmp_path):
    path = tmp_path / "metrics.csv"
    with Recorder(path, 0) as recorder:
        for step in (10, 20, 30):
            recorder.scalars(step, 1.0, 1.0, 1.0, 1.0, seconds=2.0)
    with open(path, "a") as file:
        file.write("40,1.0")  # cut short by a kill
    with Recorder(path, 20) as recorder:
        recorder.scalars(30, 1.0, 1.0, 1.0, 1.0, seconds=5.0)
    assert rows(path) == [(10, 2.0), (20, 4.0), (30, 9.0)]


def test_metrics_of_something_else_are_not_overwritten(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="its columns are not"):
        Recorder(path, 0)
    assert path.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize("line", ["x,1,1,1,1,1", "5,1,1,1,1,1,1", "5,1,1,1,1,much", "5,1\n6,1,1,1,1,1", "\x00,1"])
def test_a_damaged_record_of_metrics_is_refused_and_kept(tmp_path, line):
    path = tmp_path / "metrics.csv"
    path.write_text(",".join(COLUMNS) + f"\n{line}\n1,1,1,1,1,1\n")
    before = path.read_bytes()
    with pytest.raises(InputError, match="is not a record of this program"):
        Recorder(path, 10)
    assert path.read_bytes() == before


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    folder = run_folder.RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(InputError, match="another process is training"), folder.locked():
        pass
    with folder.locked():
        pass


def test_the_length_of_a_run_is_fixed_where_it_shapes_the_learning_rate():
    def metadata(decay, num_steps):
        return {"config": {"optimizer": {"decay": decay}, "train": {"num_steps": num_steps}}}

    folder = run_folder.RunFolder("somewhere")
    run_folder.check_resumable(metadata("constant", 5), metadata("constant", 9), folder)
    with pytest.raises(InputError, match="num_steps is 9, the run has 5"):
        run_folder.check_resumable(metadata("cosine", 5), metadata("cosine", 9), folder)


def test_a_step_folder_that_is_no_checkpoint_is_named_before_training(tmp_path):
    (tmp_path / "50").mkdir()
    with pytest.raises(InputError, match="50 is no complete checkpoint; delete it"):
        checkpoints.CheckpointWriter(tmp_path, keep=1)


def test_the_first_signal_is_a_request_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
