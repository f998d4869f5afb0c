"""Trains a diffusion model: `python train.py --config=configs/cifar.py`, or without a config the embedded digits.

The run folder (runs/<config name>, or --workdir) gets config.json, checkpoints, metrics.csv, TensorBoard events and
sample grids. The same command resumes an interrupted run.
"""

import shlex
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_flags

from diffusion import cli, denoiser, devices, experiment, files
from diffusion.data import batch_indices
from diffusion.errors import InputError, require_range
from diffusion.generate import generate
from diffusion.sampling import check_prediction
from diffusion.training import checkpoints, run_folder
from diffusion.training.loop import Plan, train
from diffusion.training.recorder import Recorder
from diffusion.training.step import init_state, make_train_step

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.py"

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file. Any field: --config.train.num_steps=100")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder. Default: runs/<config name>.")


def main() -> int:
    devices.one_device_per_core()
    config = _CONFIG.value
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    folder = run_folder.RunFolder(_WORKDIR.value or Path("runs", name))

    # Everything that can be wrong with the config is found before anything is written.
    options = config.train
    plan = Plan(*(options[k] for k in ("num_steps", "batch_size", "log_every", "save_every", "grid_every")))
    require_range("config.seed", config.seed, 0, 2**32 - 1)
    require_range("config.sample.num", config.sample.num, 1)
    require_range("config.train.keep", options.keep, 1)
    require_range("config.train.ema_decay", options.ema_decay, 0, 1, open_ends="high")
    require_range("config.train.label_dropout", options.label_dropout, 0, 1, open_ends="high")
    rate = experiment.learning_rate(config.optimizer, plan.num_steps)
    optimizer = experiment.make_optimizer(config.optimizer, rate)
    schedule = experiment.make_schedule(config.schedule)
    table = experiment.make_table(schedule, config.sample.sampler, config.sample.steps, config.sample.tau)
    data = experiment.load_data(config.data)
    model = experiment.make_model(config, data.images.shape[1:])
    if model.num_classes and len(data.class_names) != model.num_classes:
        raise InputError(
            f"config.model.num_classes is {model.num_classes}; the data has {len(data.class_names)} classes"
        )
    denoiser.check_options(options.prediction, denoiser.Options(config.sample.clip))
    check_prediction(table, options.prediction)
    with folder.locked():
        return run(config, folder, plan, table, optimizer, rate, data, model)


def run(config, folder, plan, table, optimizer, rate, data, model) -> int:
    """Starts or resumes the run; returns the exit code."""
    metadata = {
        "config": config.to_dict(),
        "image_shape": model.image_shape,
        "num_examples": len(data.images),
        "class_names": data.class_names,
    }
    mesh = devices.data_mesh(plan.batch_size)
    key = jax.random.key(config.seed)
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    state = jax.device_put(init_state(model.init(jax.random.fold_in(key, 0)), optimizer), everywhere)
    train_step = make_train_step(
        model.apply_fn,
        optimizer,
        model.schedule,
        mesh,
        jax.random.fold_in(key, 1),
        ema_decay=config.train.ema_decay,
        prediction=config.train.prediction,
        flip=config.data.flip,
        null_label=model.num_classes,
        label_dropout=config.train.label_dropout if model.num_classes else 0.0,
    )

    start = folder.latest_step()
    if start is not None:
        run_folder.check_resumable(checkpoints.metadata(folder.checkpoints, start), metadata, folder)
        state = checkpoints.load_state(folder.checkpoints, start, state)
    if (start or 0) >= plan.num_steps:
        print(f"{folder.path} is trained to step {start:,}, and config.train.num_steps asks for {plan.num_steps:,}")
        return 0

    count = sum(p.size for p in jax.tree.leaves(state.params))
    print(f"training {folder.path}" if start is None else f"resuming {folder.path} at step {start:,}")
    print(f"{len(data.images):,} images {model.image_shape}, {count:,} parameters, {devices.describe(mesh)}")

    def next_batch(step):
        chosen = batch_indices(len(data.images), plan.batch_size, config.seed, step)
        labels = jax.device_put(data.labels[chosen], split) if model.num_classes else None
        return jax.device_put(data.images[chosen], split), labels

    def draw_grid(state):
        shared = {"seed": config.seed, "labels": range(model.num_classes), "mesh": mesh, "clip": config.sample.clip}
        drawn = generate(model, state.ema_params, table, range(config.sample.num), **shared)
        grid = files.grid(np.concatenate(list(drawn)))
        files.write_png(folder.grids / f"step_{int(state.step):08d}.png", grid)
        recorder.image("samples", grid, int(state.step))

    folder.create(config)
    writer = checkpoints.CheckpointWriter(folder.checkpoints, config.train.keep)
    with writer, Recorder(folder.metrics, start or 0) as recorder:
        state, finished = train(state, train_step, next_batch, plan, rate, recorder, writer, metadata, draw_grid)
    if not finished:
        print(f"stopped; saved step {int(state.step):,} in {folder.path}; the same command goes on from there")
        return cli.INTERRUPTED
    workdir = shlex.quote(str(folder.path))
    print(f"done: {folder.path}; draw pictures with: python sample.py --steps=25 --workdir={workdir}")
    return 0


if __name__ == "__main__":
    cli.run(main, default_config=str(DEFAULT_CONFIG))
