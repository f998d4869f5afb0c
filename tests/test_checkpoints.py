"""Laws of checkpoints: every bit comes back, damage is found and named, the newest good step is used."""

import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import assert_same, make_step, start

from diffusion import devices
from diffusion.errors import InputError
from diffusion.training import checkpoints, run_folder, saving
from diffusion.training.saving import CheckpointWriter

DECAYS = (0.9, 0.99)
METADATA = {"config": {"a": 1, "b": (1, 2)}}
OPTIMIZER = optax.adam(1e-3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 1..3, the newest 2 kept; and the last state."""
    folder = tmp_path_factory.mktemp("checkpoints")
    mesh, step = make_step(2, OPTIMIZER, ema_decays=DECAYS)
    state = start(OPTIMIZER, mesh, DECAYS)
    with CheckpointWriter(folder, keep=2) as writer:
        for k in range(1, 4):
            state, _ = step(state)
            writer.save(k, state, METADATA)
    return folder, jax.device_get(state)


@pytest.fixture
def copied(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved[0], tmp_path / "copy")


def like(num_devices=1, fsdp=1):
    return start(OPTIMIZER, tiny.training_mesh(num_devices, fsdp), DECAYS)


@pytest.mark.parametrize(("num_devices", "fsdp"), [(1, 1), (4, 1), (8, 4), (8, 8)])
def test_a_checkpoint_restores_every_bit_on_another_number_of_devices(saved, num_devices, fsdp, monkeypatch):
    monkeypatch.setattr(devices, "SHARDED_FROM", 1)
    folder, state = saved
    assert checkpoints.steps(folder) == [2, 3]
    wanted = like(num_devices, fsdp)
    restored = checkpoints.load_state(folder, 3, wanted)
    assert_same(restored, state)
    placed = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), restored, wanted)
    assert all(jax.tree.leaves(placed))
    for name in ("0.9", "0.99"):
        assert_same(checkpoints.load_ema(folder, 3, name, wanted.params), state.ema_params[name])
    assert checkpoints.metadata(folder, 3) == {"config": {"a": 1, "b": [1, 2]}}


def test_a_checkpoint_of_another_model_is_refused_field_by_field(saved):
    folder, _ = saved
    wider = jax.tree.map(lambda x: x, like().params)
    wider["gate"]["scale"] = jnp.zeros((1, 8, 8, 3))
    wider["extra"] = jnp.zeros(2)
    with pytest.raises(InputError) as error:
        checkpoints.load_ema(folder, 3, "0.9", wider)
    assert "gate/scale: checkpoint has float32 (1, 8, 8, 1), model has float32 (1, 8, 8, 3)" in str(error.value)
    assert "extra: checkpoint has nothing, model has float32 (2,)" in str(error.value)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), like().params)
    with pytest.raises(InputError, match=r"float32 .* model has bfloat16"):
        checkpoints.load_ema(folder, 3, "0.9", half)


def test_the_state_of_another_optimizer_is_refused_field_by_field(saved):
    other = start(optax.sgd(1e-3, momentum=0.9), tiny.training_mesh(1), DECAYS)
    with pytest.raises(InputError, match=r"opt_state.*mu.*model has nothing"):
        checkpoints.load_state(saved[0], 3, other)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_flipped_bit_is_found_and_the_step_before_is_used(copied, capsys):
    """At 50 places, spread over all files of the checkpoint."""
    rng = random.Random(0)
    sizes = [path.stat().st_size for path in files(copied / "3")]
    found = 0
    for _ in range(50):
        path = rng.choices(files(copied / "3"), sizes)[0]
        content = path.read_bytes()
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        found += checkpoints.newest_good(copied) == 2
        warning = capsys.readouterr().err
        assert f"{copied}/3 is damaged ({path.name if path.name == 'manifest.json' else ''}" in warning
        assert path.name in warning
        path.write_bytes(content)
    print(f"{found} of 50 flipped bits detected")
    assert found == 50
    assert checkpoints.newest_good(copied) == 3


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "truncated data": lambda step: truncate(max(step.glob("train/d/*"), key=lambda p: p.stat().st_size)),
    "truncated metadata": lambda step: truncate(step / "_CHECKPOINT_METADATA"),
    "truncated manifest": lambda step: truncate(step / "manifest.json"),
    "missing manifest": lambda step: (step / "manifest.json").unlink(),
    "empty manifest": lambda step: (step / "manifest.json").write_bytes(b""),
    "missing state": lambda step: shutil.rmtree(step / "train"),
    "missing weights": lambda step: shutil.rmtree(step / "ema_0.9"),
    "empty folder": lambda step: (shutil.rmtree(step), step.mkdir()),
    "extra file": lambda step: (step / "train" / "junk").write_text("junk"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_step_before_is_used(copied, damage, capsys):
    DAMAGES[damage](copied / "3")
    assert checkpoints.newest_good(copied) == 2
    assert f"{copied}/3 is damaged" in capsys.readouterr().err
    checkpoints.load_state(copied, 2, like())


def test_one_step_is_verified_by_its_number(copied):
    assert checkpoints.verified(copied, 2) == 2
    truncate(copied / "2" / "manifest.json")
    with pytest.raises(InputError, match=r"2 is damaged"):
        checkpoints.verified(copied, 2)
    with pytest.raises(InputError, match=r"no checkpoint of step 4; there are: 2, 3"):
        checkpoints.verified(copied, 4)


def test_what_is_no_checkpoint_is_passed_over_and_remains_of_a_save_are_removed(copied, capsys):
    for name in ("unfinished-4", "unfinished-5.orbax-checkpoint-tmp-7", "junk"):
        (copied / name).mkdir()
    (copied / "6").touch()
    assert checkpoints.newest_good(copied) == 3
    assert not capsys.readouterr().err
    with CheckpointWriter(copied, keep=1, begin=3):
        pass
    assert sorted(path.name for path in copied.iterdir()) == ["2", "3", "6", "junk"]


def test_where_all_checkpoints_are_damaged_none_is_used(copied):
    for step in ("2", "3"):
        truncate(copied / step / "_CHECKPOINT_METADATA")
    with pytest.raises(InputError, match=r"every checkpoint .*3: _CHECKPOINT_METADATA is damaged; 2: "):
        checkpoints.newest_good(copied)


def test_a_folder_without_checkpoints_is_the_start_of_a_run(tmp_path):
    assert checkpoints.newest_good(tmp_path) is None
    assert run_folder.RunFolder(tmp_path).latest_step() is None
    with pytest.raises(InputError, match="cannot be read"):
        checkpoints.metadata(tmp_path, 4)


def test_metadata_without_a_config_is_refused(tmp_path):
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(1, like(), {"something": 1})
    with pytest.raises(InputError, match=r"1 cannot be read \(it has no config"):
        checkpoints.metadata(tmp_path, 1)


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_never_count_as_the_newest(tmp_path, keep):
    """A run that goes on from before them keeps what it saves, under the same numbers and others."""
    state = like()
    with CheckpointWriter(tmp_path, keep=4) as writer:
        for step in (1, 2, 3, 9):
            writer.save(step, state, METADATA)
    for step in ("2", "3", "9"):
        truncate(tmp_path / step / "manifest.json")
    assert checkpoints.newest_good(tmp_path) == 1
    with CheckpointWriter(tmp_path, keep, begin=1) as writer:
        for step in (2, 4):
            writer.save(step, state, METADATA)
            writer.wait()
            assert checkpoints.newest_good(tmp_path) == step
    assert checkpoints.steps(tmp_path) == [2, 4][-keep:]
    assert sorted(path.name for path in tmp_path.glob("damaged-*")) == ["damaged-2", "damaged-3", "damaged-9"]


def test_the_best_step_is_kept_whatever_comes_after_and_losses_that_are_not_finite_are_never_best(tmp_path):
    state = like()
    with CheckpointWriter(tmp_path, keep=1, keep_best=1) as writer:
        for step, loss in enumerate([9, 3, np.nan, 5, np.inf, 7, -np.inf], start=1):
            writer.save(step, state, METADATA, loss)
    assert checkpoints.steps(tmp_path) == [2, 7]


def test_an_old_checkpoint_goes_only_when_a_newer_one_is_whole(copied, monkeypatch):
    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.manifest, "write", fails)
    with CheckpointWriter(copied, keep=1, begin=3) as writer:
        writer.save(4, like(), METADATA)
        with pytest.raises(InputError, match=r"No space left.* step 3 is the last good one"):
            writer.wait()
    assert checkpoints.steps(copied) == [2, 3]
    assert checkpoints.newest_good(copied) == 3
