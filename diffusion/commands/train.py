"""Trains a diffusion model: `python train.py --config=configs/cifar.py`, or without a config the embedded digits.

The run folder (runs/<config name>, or --workdir) gets config.json, environment.json, checkpoints, metrics.csv and its
plot loss.png, TensorBoard events and sample grids. The same command resumes an interrupted run, from the newest
checkpoint that is as it was written. Ctrl-C and SIGTERM, SIGHUP, SIGUSR1 or SIGXCPU save the step in progress; the exit
codes are 130 and 75.

Several processes train one model together when each gets --coordinator, --num_processes and --process_id, or
--distributed where a cluster's own environment tells them.
"""

import contextlib
import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import UInt8
from ml_collections import ConfigDict, config_flags

from diffusion import data, devices, keys
from diffusion.commands import aliases, autoencoders, cli, config_files, latents, own, plots, recipes, students, usage
from diffusion.commands.datasets import check_data, data_fields, load_data
from diffusion.commands.drawing import generate
from diffusion.commands.experiment import Experiment, make_experiment, require_levels
from diffusion.commands.notices import describe_classes, introduction, next_command, start_notes
from diffusion.errors import InputError, printable
from diffusion.images import sheet, write_png
from diffusion.model import sampling_clip
from diffusion.objectives import choice
from diffusion.process import PREEMPTED
from diffusion.training import checkpoints, environment, run_folder
from diffusion.training.loop import Run, train
from diffusion.training.recorder import Recorder, Silent
from diffusion.training.saving import CheckpointWriter
from diffusion.training.state import TrainState, ema_name
from diffusion.training.step import make_train_step
from diffusion.training.stop import Stopped, StopRequest
from diffusion.types import Params

DEFAULT_CONFIG = recipes.FOLDER / "digits.py"

cli.require_flag_files()
usage.group("The run")
_CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file. Any field: --config.train.num_steps=100")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder. Default: runs/<config name>.")
_NETWORK = flags.DEFINE_string(
    "network", None, "Your own network, as package.module:function; short for --config.network."
)
_PROFILE = flags.DEFINE_bool("profile", False, "Write a trace of a few steps to RUN/profile, for TensorBoard or XProf.")
_CHECK = flags.DEFINE_bool("check", False, "Read every image, list those that are damaged, and train nothing.")
usage.group("Several processes that train one model")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several train one model.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train one model.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this one, from 0.", lower_bound=0)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Several processes that Slurm or the like has started.")


def main() -> int:
    with StopRequest() as stop:
        try:
            several = _DISTRIBUTED.value or _COORDINATOR.value is not None
            devices.prepare(opens=not several)
            if _CHECK.value:
                return check(_CONFIG.value)
            if several:
                stop.call(devices.join_processes, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
            elif _NUM_PROCESSES.value is not None or _PROCESS_ID.value is not None:
                raise InputError("--num_processes and --process_id go with --coordinator=HOST:PORT")
            if jax.process_count() > 1:
                stop.defer()  # all stop after the same step
            return start(stop)
        except Stopped:
            print("stopped before the first step; nothing is lost")
            return stop.exit_code
        except (InputError, jax.errors.JaxRuntimeError) as error:
            if jax.process_count() == 1 or not devices.tells_of_lost(error):
                raise
            print(f"{devices.LOST} ({' '.join(str(error).split())[:200]})", file=sys.stderr)
            return PREEMPTED


def check(config: ConfigDict) -> int:
    """Lists the damaged images of the data; raises InputError if there are any."""
    damaged, count = check_data(config.data)
    for image in damaged:
        print(image)
    if damaged:
        raise InputError(
            f"{len(damaged):,} of {count:,} images cannot be read, as listed; put good copies in their places, remove "
            "them, or set config.data.skip_damaged=True"
        )
    print(f"all {count:,} images can be read")
    dataset = load_data(config.data)  # finds what else can be wrong with the classes
    for line in [*map(printable, dataset.notes()), *describe_classes(dataset, config.model.num_classes != 0)]:
        print(line)
    return 0


def start(stop: StopRequest) -> int:
    """Builds what the config asks for, which finds its mistakes before anything is written, and goes on to `run`."""
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    folder = run_folder.RunFolder(_WORKDIR.value or Path("runs", name))
    if _NETWORK.value is not None:
        _CONFIG.value.network = _NETWORK.value
    own.check_network_fields(_CONFIG.value.network, sys.argv)
    config_files.check(_CONFIG.value)
    teacher = students.open_teacher(_CONFIG.value)
    given = config_flags.get_override_values(flags.FLAGS["config"])
    if choice.is_autoencoder(_CONFIG.value.train.objective):
        experiment = autoencoders.make_experiment(_CONFIG.value)
    else:
        autoencoders.check_fields(_CONFIG.value)
        aliases.put_ours(_CONFIG.value.sample, given, recipes.defaults().sample.tau)
        config = students.complete(_CONFIG.value, teacher, given)
        experiment = make_experiment(config, teacher, latents.open_autoencoder(config, folder, teacher))
    for note in start_notes(experiment):
        say(f"note: {note}")
    with folder.locked() if jax.process_index() == 0 else contextlib.nullcontext() as lock:
        return run(experiment, folder, stop, (lambda: True) if lock is None else lock.is_ours)


def run(experiment: Experiment, folder: run_folder.RunFolder, stop: StopRequest, is_ours: Callable[[], bool]) -> int:
    """Starts or resumes the run, as long as the folder is ours; returns the exit code."""
    config, plan, model, mesh = experiment.config, experiment.plan, experiment.model, experiment.mesh
    metadata = describe(experiment)
    key = keys.make(config.seed)

    # The state: a new one, or that of the newest good checkpoint.
    begin = folder.latest_step()
    require_agreement({**metadata, "checkpoint": begin}, folder)
    state = open_state(experiment, folder, begin, metadata)
    begin = begin or 0
    # A run stopped while it drew its last sheet still has that to do.
    if begin >= plan.num_steps and (begin > plan.num_steps or folder.sheet(begin).exists()):
        if jax.process_index() == 0:
            folder.clear()
        finish(experiment, folder, begin)
        say(f"{folder.path} is trained to step {begin:,}, and config.train.num_steps asks for {plan.num_steps:,}")
        return 0
    goal = f"{plan.num_steps:,} steps of {plan.batch_size:,} images"
    say(f"resuming {folder.path} at step {begin:,} of {goal}" if begin else f"training {folder.path}: {goal}")
    for line in introduction(experiment, state, plan.num_steps - begin):
        say(line)

    # What the loop works with.
    step_key = jax.random.fold_in(key, 1)
    parts = (experiment.objective, experiment.optimizer, mesh, step_key, experiment.step_options)
    train_step = make_train_step(model, *parts, experiment.frozen)
    if jax.process_index() == 0:
        folder.create(config, environment.describe(mesh, begin), model.space.autoencoder)
    examples = stop.call(latents.examples, model, experiment.dataset, config.data.flip)
    sealed = checkpoints.sealed_record(folder.checkpoints, begin) if begin else {}
    curves = experiment.step_options.curves
    recorder = Recorder(folder.path, begin, sealed, curves) if jax.process_index() == 0 else Silent()
    keep = (config.train.keep, config.train.keep_best)
    writer = CheckpointWriter(folder.checkpoints, *keep, begin=begin, is_ours=is_ours)
    with writer, recorder:
        work = Run(
            train_step=train_step,
            batches=placed_batches(experiment, examples, begin, stop),
            learning_rate=experiment.rate,
            recorder=recorder,
            writer=writer,
            metadata=metadata,
            draw_sheet=sheet_drawer(experiment, folder, recorder),
            examples=lambda step: data.batch_indices(metadata["num_examples"], plan.batch_size, config.seed, step),
            stop=stop,
            profile=folder.profile if _PROFILE.value else None,
        )
        state, finished = train(state, plan, work)

    return conclude(experiment, folder, int(state.step), finished, stop)


def conclude(experiment: Experiment, folder: run_folder.RunFolder, step: int, finished: bool, stop: StopRequest) -> int:
    """Does what is left after the last step, and says how the run ended; returns the exit code."""
    if finished:
        with contextlib.suppress(Stopped):
            stop.call(finish, experiment, folder, step)
            say(f"done: {folder.path}; {next_command(experiment, folder)}; see also {folder.grids}")
            return 0
    say(f"stopped; saved step {step:,} in {folder.path}; the same command goes on from there")
    return stop.exit_code


def say(line: str) -> None:
    """Prints a line, from the first process only."""
    if jax.process_index() == 0:
        print(line)


def describe(experiment: Experiment) -> dict:
    """Returns what every checkpoint says of the run, and a resumed run must agree with."""
    return {
        "config": experiment.config.to_dict(),
        "image_shape": tuple(map(int, experiment.dataset.images.shape[1:])),
        "num_examples": len(experiment.dataset.images),
        "class_names": experiment.dataset.class_names,
        "damaged": experiment.dataset.damaged,
        "data": data.fingerprint(experiment.dataset),
        "generator": keys.GENERATOR,
        **students.identity(experiment.teacher),
        **latents.identity(experiment.model.space.autoencoder),
        **autoencoders.identity(experiment),
    }


def open_state(experiment: Experiment, folder: run_folder.RunFolder, begin: int | None, metadata: dict) -> TrainState:
    """Returns the state to start from, laid over the devices.

    Raises:
      InputError: the checkpoint was trained otherwise, or a new run has attention where no level is.
    """
    key = keys.make(experiment.config.seed)
    # On the host, because a teacher from a run folder lies on one device.
    taught = None if experiment.teacher is None else jax.tree.map(np.asarray, experiment.teacher.params)
    shapes = jax.eval_shape(experiment.make_state, key, taught)
    shardings = devices.state_sharding(experiment.mesh, shapes)
    if begin is None:
        if experiment.autoencoder is None:
            require_levels(experiment.config, experiment.model.image_shape)
        return jax.jit(experiment.make_state, out_shardings=shardings)(jax.random.fold_in(key, 0), taught)
    defaults = {"config": recipes.defaults().to_dict(), "damaged": [], "generator": keys.GENERATOR}
    run_folder.check_resumable(folder.metadata(begin), metadata, folder, defaults)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return checkpoints.load_state(folder.checkpoints, begin, like)


def require_agreement(facts: dict, folder: run_folder.RunFolder) -> None:
    """Raises InputError in all processes of a run if they differ in what they are about to train."""
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


def placed_batches(experiment: Experiment, examples: data.Dataset, begin: int, stop: StopRequest):
    """Yields (images, labels or None) of each step on the devices; every process loads its own rows."""
    config, mesh, size = experiment.config, experiment.mesh, experiment.plan.batch_size
    options = {"flip": config.data.flip, "workers": config.data.workers, "rows": devices.local_rows(mesh, size)}
    options["stopping"] = lambda: stop.received
    local = data.batches(examples, batch_size=size, seed=config.seed, start=begin, **options)
    sharding = devices.batch_sharding(mesh)

    def place(part):
        return jax.make_array_from_process_local_data(sharding, part, (size, *part.shape[1:]))

    conditional = experiment.model.conditions is not None
    with contextlib.closing(local), data_fields():
        for batch in local:
            yield place(batch.images), place(batch.labels) if conditional else None


def sheet_drawer(
    experiment: Experiment, folder: run_folder.RunFolder, recorder: Recorder | Silent
) -> Callable[[TrainState], None]:
    """Returns state -> None: the first process draws the loss, and what the first EMA does. No picture ends a run."""
    ema = ema_name(experiment.step_options.ema_decays[0])
    gather = jax.jit(lambda params: params, out_shardings=NamedSharding(experiment.mesh, PartitionSpec()))

    def draw(state):
        step = int(state.step)
        path = folder.sheet(step)
        params = jax.tree.map(lambda x: x.addressable_data(0), gather(state.ema_params[ema]))
        if jax.process_index() > 0 or path.exists():
            return
        plots.losses(folder.path / "metrics.csv", folder.path / "loss.png")
        try:
            picture = draw_picture(experiment, params, step)
        except (InputError, jax.errors.JaxRuntimeError) as error:  # weights gone astray for a while, or no memory
            warnings.warn(f"no sheet of step {step:,}: {str(error).splitlines()[0][:200]}", stacklevel=2)
            return
        try:
            write_png(path, picture, within=folder.path)
        except (OSError, InputError) as error:
            warnings.warn(f"no sheet of step {step:,}: {error}", stacklevel=2)
        recorder.image("samples", picture, step)

    return draw


def draw_picture(experiment: Experiment, params: Params, step: int) -> UInt8[np.ndarray, "H W C"]:
    """Returns a sheet of samples, or of what an autoencoder gives back, with the parameters after a training step."""
    if experiment.autoencoder is not None:
        return autoencoders.draw(experiment, params)
    model, config = experiment.model, experiment.config
    labels = () if model.conditions is None else range(model.conditions.null)
    shared = {"seed": config.seed, "labels": labels, "clip": sampling_clip(config, model)}
    ids = range(config.sample.num)
    drawn = generate(model, params, experiment.table_at(step), ids, mesh=devices.data_mesh(), **shared)
    return sheet(np.concatenate(list(drawn)))


def finish(experiment: Experiment, folder: run_folder.RunFolder, step: int) -> None:
    """Does what is left to do after the last step: the latents of an autoencoder are measured, by the first process."""
    if experiment.autoencoder is not None and jax.process_index() == 0:
        autoencoders.measure_latents(folder, experiment.dataset, step)


def launch() -> None:
    """Runs the program with the flags of the command line; never returns."""
    cli.start(main, about=__doc__, default_config=str(DEFAULT_CONFIG))
