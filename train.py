"""Trains a diffusion model: `python train.py --config=configs/cifar.py`, or without a config the embedded digits.

The run folder (runs/<config name>, or --workdir) gets config.json, environment.json, checkpoints, metrics.csv,
TensorBoard events and sample grids. The same command resumes an interrupted run, from the newest checkpoint that is as
it was written. Ctrl-C and SIGTERM save the step in progress; the exit codes are 130 and 75.

Several processes train one model together when each gets --coordinator, --num_processes and --process_id, or
--distributed where a cluster's own environment tells them.
"""

import contextlib
import hashlib
import json
import shlex
import warnings
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_flags

from configs import default
from diffusion import data, denoiser, devices
from diffusion.commands import cli, experiment
from diffusion.commands.drawing import generate
from diffusion.errors import InputError, require_range
from diffusion.images import sheet, write_png
from diffusion.sampling import check_prediction, check_variance
from diffusion.training import checkpoints, environment, run_folder
from diffusion.training.loop import Plan, Run, train
from diffusion.training.recorder import Recorder, Silent
from diffusion.training.step import ema_name, init_state, make_train_step
from diffusion.training.stop import Stopped, StopRequest

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.py"

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file. Any field: --config.train.num_steps=100")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder. Default: runs/<config name>.")
_PROFILE = flags.DEFINE_bool("profile", False, "Write a trace of a few steps to RUN/profile, for TensorBoard or XProf.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several train one model.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train one model.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this one, from 0.", lower_bound=0)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Several processes that Slurm or the like has started.")


def main() -> int:
    devices.prepare()
    if _DISTRIBUTED.value or _COORDINATOR.value is not None:
        devices.join_processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    elif _NUM_PROCESSES.value is not None or _PROCESS_ID.value is not None:
        raise InputError("--num_processes and --process_id go with --coordinator=HOST:PORT")
    # After jax.distributed, which hears SIGTERM itself.
    with StopRequest() as stop:
        if jax.process_count() > 1:
            stop.defer()  # all stop after the same step
        try:
            return start(stop)
        except Stopped:
            print("stopped before the first step; nothing is lost")
            return stop.exit_code


def start(stop: StopRequest) -> int:
    """Finds everything that can be wrong with the config before anything is written, and goes on to `run`."""
    config = _CONFIG.value
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    folder = run_folder.RunFolder(_WORKDIR.value or Path("runs", name))
    options = config.train
    plan = Plan(*(options[k] for k in ("num_steps", "batch_size", "log_every", "save_every", "grid_every")))
    require_range("config.seed", config.seed, 0, 2**32 - 1)
    require_range("config.sample.num", config.sample.num, 1)
    require_range("config.train.keep", options.keep, 1)
    require_range("config.train.keep_best", options.keep_best, 0)
    require_range("config.train.microbatches", options.microbatches, 1)
    require_range("config.train.fsdp", options.fsdp, 1)
    require_range("config.data.workers", config.data.workers, 0)
    require_range("config.train.label_dropout", options.label_dropout, 0, 1, open_ends="high")
    experiment.ema_decays(options)
    mesh = devices.training_mesh(plan.batch_size, options.fsdp, options.microbatches)
    rate = experiment.learning_rate(config.optimizer, plan.num_steps)
    optimizer = experiment.make_optimizer(config.optimizer, rate)
    schedule = experiment.make_schedule(config.schedule)
    objective = experiment.make_objective(options, schedule)
    table = experiment.make_table(schedule, config.sample.sampler, config.sample.steps, config.sample.tau)
    dataset = experiment.load_data(config.data)
    model = experiment.make_model(config, dataset.images.shape[1:])
    if model.num_classes and len(dataset.class_names) != model.num_classes:
        raise InputError(
            f"config.model.num_classes is {model.num_classes}; the data has {len(dataset.class_names)} classes"
        )
    denoiser.check_options(options.prediction, denoiser.Options(config.sample.clip))
    check_prediction(table, options.prediction)
    check_variance(table, model.learned_variance)
    with folder.locked() if jax.process_index() == 0 else contextlib.nullcontext():
        return run(config, folder, plan, table, optimizer, rate, objective, dataset, model, mesh, stop)


def run(config, folder, plan, table, optimizer, rate, objective, dataset, model, mesh, stop) -> int:
    """Starts or resumes the run; returns the exit code."""
    metadata = {
        "config": config.to_dict(),
        "image_shape": model.image_shape,
        "num_examples": len(dataset.images),
        "class_names": dataset.class_names,
        "data": data.fingerprint(dataset),
    }
    key = jax.random.key(config.seed)
    decays = experiment.ema_decays(config.train)

    def make_state(key):
        return init_state(model.init(key), optimizer, decays)

    shapes = jax.eval_shape(make_state, key)
    shardings = devices.state_sharding(mesh, shapes)
    begin = folder.latest_step()
    require_agreement({**metadata, "checkpoint": begin}, folder)
    if begin is None:
        state = jax.jit(make_state, out_shardings=shardings)(jax.random.fold_in(key, 0))
    else:
        saved = checkpoints.metadata(folder.checkpoints, begin)
        run_folder.check_resumable(saved, metadata, folder, {"config": default.get_config().to_dict()})
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        state = checkpoints.load_state(folder.checkpoints, begin, like)
    begin = begin or 0
    talk = print if jax.process_index() == 0 else lambda *_: None
    # A run stopped while it drew its last grid still has that to do.
    if begin >= plan.num_steps and (begin > plan.num_steps or folder.grid(begin).exists()):
        talk(f"{folder.path} is trained to step {begin:,}, and config.train.num_steps asks for {plan.num_steps:,}")
        return 0
    count = sum(p.size for p in jax.tree.leaves(state.params))
    talk(f"resuming {folder.path} at step {begin:,}" if begin else f"training {folder.path}")
    talk(f"{len(dataset.images):,} images {model.image_shape}, {count:,} parameters, {devices.describe(mesh)}")

    train_step = make_train_step(
        model.apply_fn,
        objective,
        optimizer,
        model.schedule,
        mesh,
        jax.random.fold_in(key, 1),
        ema_decays=decays,
        microbatches=config.train.microbatches,
        log_every=plan.log_every,
        null_label=model.num_classes,
        label_dropout=config.train.label_dropout if model.num_classes else 0.0,
    )
    if jax.process_index() == 0:
        folder.create(config, environment.describe(mesh, begin))
    recorder = Recorder(folder.path, begin) if jax.process_index() == 0 else Silent()
    writer = checkpoints.CheckpointWriter(folder.checkpoints, config.train.keep, config.train.keep_best, begin)
    with writer, recorder:
        work = Run(
            train_step,
            placed_batches(config, dataset, plan, mesh, begin, bool(model.num_classes)),
            rate,
            recorder,
            writer,
            metadata,
            grid_drawer(config, folder, model, table, mesh, recorder),
            lambda step: data.batch_indices(len(dataset.images), plan.batch_size, config.seed, step),
            stop,
            folder.profile if _PROFILE.value else None,
        )
        state, finished = train(state, plan, work)
    if not finished:
        talk(f"stopped; saved step {int(state.step):,} in {folder.path}; the same command goes on from there")
        return stop.exit_code
    workdir = shlex.quote(str(folder.path))
    talk(f"done: {folder.path}; draw pictures with: python sample.py --steps=25 --workdir={workdir}")
    return 0


def require_agreement(facts, folder):
    """Raises InputError in all processes of a run where they differ in what they are about to train."""
    if jax.process_count() == 1:
        return
    local = ("path", "workers", "max_memory")  # of each host
    of_data = {name: value for name, value in facts["config"]["data"].items() if name not in local}
    facts = {**facts, "config": {**facts["config"], "data": of_data}}
    digests = [hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).digest()[:4] for fact in facts.values()]
    mine = np.array([int.from_bytes(digest) for digest in digests], np.uint32)
    found = multihost_utils.process_allgather(mine)
    different = [name for name, column in zip(facts, found.T, strict=True) if len(set(column.tolist())) > 1]
    if different:
        raise InputError(
            f"the processes of the run differ in {', '.join(different)}; all need the same command, the same images "
            f"and the same file system for {folder.path}"
        )


def placed_batches(config, dataset, plan, mesh, begin, with_labels):
    """(images, labels or None) of each step on the devices; every process loads its own rows."""
    rows = devices.local_rows(mesh, plan.batch_size)
    options = {"rows": rows, "flip": config.data.flip, "workers": config.data.workers}
    local = data.batches(dataset, batch_size=plan.batch_size, seed=config.seed, start=begin, **options)
    sharding = devices.batch_sharding(mesh)

    def place(part):
        return jax.make_array_from_process_local_data(sharding, part, (plan.batch_size, *part.shape[1:]))

    with contextlib.closing(local):
        for batch in local:
            yield place(batch.images), place(batch.labels) if with_labels else None


def grid_drawer(config, folder, model, table, mesh, recorder):
    """state -> None: the first process draws samples of the first EMA into grids/. A grid that fails ends no run."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    ema = ema_name(experiment.ema_decays(config.train)[0])
    gather = jax.jit(lambda params: params, out_shardings=everywhere)

    def draw(state):
        step = int(state.step)
        path = folder.grid(step)
        params = jax.tree.map(lambda x: x.addressable_data(0), gather(state.ema_params[ema]))
        if jax.process_index() > 0 or path.exists():
            return
        shared = {"seed": config.seed, "labels": range(model.num_classes), "clip": config.sample.clip}
        drawn = generate(model, params, table, range(config.sample.num), mesh=devices.data_mesh(), **shared)
        try:
            grid = sheet(np.concatenate(list(drawn)))
        except (InputError, jax.errors.JaxRuntimeError) as error:  # weights gone astray for a while, or no memory
            warnings.warn(f"no grid of step {step:,}: {str(error).splitlines()[0][:200]}", stacklevel=2)
            return
        write_png(path, grid)
        recorder.image("samples", grid, step)

    return draw


if __name__ == "__main__":
    cli.run(main, default_config=str(DEFAULT_CONFIG))
