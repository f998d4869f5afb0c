"""Training of autoencoders: from the config to the objects that it names, and what is drawn and measured."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from diffusion import devices, keys
from diffusion.autoencoder import TrainedAutoencoder, from_network, make_network, measure_scaling, unscaled
from diffusion.commands import config_files, recipes
from diffusion.commands.datasets import cache_folder, load_data
from diffusion.commands.experiment import Experiment, check_numbers, ema_decays, require_memory
from diffusion.commands.optimizers import learning_rate, make_optimizer
from diffusion.data import Dataset
from diffusion.errors import InputError, require_range
from diffusion.evaluation import classifier as classifiers
from diffusion.evaluation.spaces import trained_classifier
from diffusion.images import sheet, to_floats, to_uint8
from diffusion.models.autoencoder import AutoencoderNetwork, PatchCritic, nearest_codes
from diffusion.objectives import choice, players
from diffusion.objectives.autoencoding import Parts, curve_names
from diffusion.sealed import digest
from diffusion.spaces import pixels
from diffusion.training.autoencoders import SCALING, load_unscaled, read_scaling, write_scaling
from diffusion.training.loop import Plan
from diffusion.training.run_folder import RunFolder
from diffusion.training.state import Trainee
from diffusion.training.step import StepOptions
from diffusion.types import Params

USELESS = ("config.schedule", "config.network", "config.model.", "config.train.prediction", "config.train.weighting")
USELESS += ("config.train.label_dropout", "config.sample.sampler", "config.sample.steps", "config.sample.tau")
USELESS += ("config.sample.clip", "config.latents", "config.transformer.", "config.unet2d.")
"""The fields that mean nothing to an autoencoder."""

COLUMNS = 8
"""Images in a row of a sheet; their reconstructions are the row below."""


def check_fields(config: ConfigDict) -> None:
    """Raises InputError if a config sets what would have no effect on what its objective trains."""
    autoencoder = choice.is_autoencoder(config.train.objective)
    useless = USELESS if autoencoder else ("config.autoencoder.",)
    defaults = dict(config_files.leaves(recipes.defaults()))
    for name, value in config_files.leaves(config):
        if name.startswith(useless) and not config_files.same(value, defaults[name]):
            what = "an autoencoder" if autoencoder else f"objective {config.train.objective}"
            raise InputError(f"{name} is {value!r}, which does nothing for {what}; leave it out")


def make_experiment(config: ConfigDict) -> Experiment:
    """Builds everything that the config of an autoencoder asks for; finds what is wrong before anything is written.

    Raises:
      InputError: an unknown name, a value out of its range, choices that do not go together, or unreadable data.
    """
    config_files.check(config)
    check_fields(config)
    settings = config.train
    # Numbers first, then what takes time.
    plan = Plan(*(settings[name] for name in ("num_steps", "batch_size", "log_every", "save_every", "grid_every")))
    check_numbers(config)
    chosen = choice.parse(settings.objective)
    weights = _weights(config, chosen)
    mesh = devices.training_mesh(plan.batch_size, settings.fsdp, settings.microbatches)
    rate = learning_rate(config.optimizer, plan.num_steps)
    optimizer = players.players_optimizer(*(make_optimizer(config.optimizer, rate) for _ in range(2)))
    # The data and the networks.
    dataset = load_data(config.data)
    image_shape = tuple(map(int, dataset.images.shape[1:]))
    network = make_network(config.autoencoder, image_shape)
    features, frozen = _features(dataset) if weights["perceptual"] else (None, None)
    parts = make_parts(network, features, critic=weights["adversarial"] > 0)
    trainee = make_trainee(network, image_shape, critic=parts.judge is not None)
    require_memory(config, trainee)
    options = StepOptions(
        ema_decays=ema_decays(settings),
        microbatches=settings.microbatches,
        log_every=plan.log_every,
        averaged=players.saved_part,
        learning=players.learning_part,
        curves=curve_names(parts),
    )
    objective = partial(chosen.function, parts=parts, **weights)
    return Experiment(
        config=config,
        plan=plan,
        dataset=dataset,
        model=trainee,
        objective=objective,
        rate=rate,
        optimizer=optimizer,
        mesh=mesh,
        step_options=options,
        table=None,
        frozen=frozen,
        autoencoder=from_network(network, image_shape),
    )


def make_parts(
    network: AutoencoderNetwork,
    features: Callable[[Any, jax.Array], tuple[jax.Array, ...]] | None = None,
    critic: bool = False,
) -> Parts:
    """Returns the functions of an autoencoder's objective.

    Args:
      network: the autoencoder's.
      features: (frozen, images) -> activations, for the perceptual loss; None without one.
      critic: whether there is a critic.
    """

    def judge(params, images):
        return PatchCritic().apply({"params": params}, images)

    return Parts(
        encode=lambda params, images: network.apply({"params": params}, images, method="encode"),
        decode=lambda params, z: network.apply({"params": params}, z, method="decode_exactly"),
        nearest=nearest_codes if network.codes else None,
        judge=judge if critic else None,
        features=features,
    )


def make_trainee(network: AutoencoderNetwork, image_shape: tuple[int, int, int], critic: bool = False) -> Trainee:
    """Returns what is trained: all players of `objectives.players` that take part."""
    images = jnp.zeros((1, *image_shape))

    def init(key):
        key = keys.threefry(key)
        params = network.init(key, images)["params"]
        quantizer = params.pop("quantizer", None)
        result = {"autoencoder": params}
        if quantizer is not None:
            result["codebook"] = players.first_codebook(quantizer["embedding"])
        if critic:
            result["critic"] = PatchCritic().init(jax.random.fold_in(key, 1), images)["params"]
            result["balance"] = players.first_balance(params)
        return result

    def reconstruct(params, images, t=None, cond=None, *, dropout_keys=None):
        return network.apply({"params": players.saved_part(params)}, images)

    return Trainee(reconstruct, pixels(image_shape), jax.jit(keys.pinned(init)))


def identity(experiment: Experiment) -> dict[str, Any]:
    """Returns what the record of a run says of the network of its perceptual loss, {} for none."""
    return {} if experiment.frozen is None else {"features": {"classifier_sha256": digest(experiment.frozen)}}


def reconstructions(
    trained: TrainedAutoencoder, images: UInt8[np.ndarray, "N H W C"], batch_size: int = 64
) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
    """Yields images after encoding and decoding, batch by batch."""
    autoencoder, params = trained.autoencoder, trained.params
    for start in range(0, len(images), batch_size):
        batch = to_floats(images[start : start + batch_size])
        yield to_uint8(autoencoder.decode(params, autoencoder.encode(params, batch)))


def comparison(
    originals: UInt8[np.ndarray, "N H W C"], given_back: UInt8[np.ndarray, "N H W C"]
) -> UInt8[np.ndarray, "H W C"]:
    """Returns a sheet with a row of originals above a row of their reconstructions, and so on."""
    columns = min(COLUMNS, len(originals))
    white = np.full((-len(originals) % columns, *originals.shape[1:]), 255, np.uint8)
    pair = (np.concatenate([images, white]) for images in (originals, given_back))
    rows = [images.reshape(-1, 1, columns, *originals.shape[1:]) for images in pair]
    return sheet(np.concatenate(rows, axis=1).reshape(-1, *originals.shape[1:]), columns=columns)


def shown(experiment: Experiment) -> UInt8[np.ndarray, "N H W C"]:
    """Returns the images that the sheets of a run show: always the same, drawn at random."""
    count = min(experiment.config.sample.num, len(experiment.dataset.images))
    order = np.random.default_rng(experiment.config.seed).permutation(len(experiment.dataset.images))
    return np.asarray(experiment.dataset.images[np.sort(order[:count])])


def draw(experiment: Experiment, params: Params) -> UInt8[np.ndarray, "H W C"]:
    """Returns the sheet of a run with these averaged parameters."""
    autoencoder = experiment.autoencoder
    params = {**params, "scaling": unscaled(autoencoder.latent_channels)}
    trained = TrainedAutoencoder(autoencoder, params, experiment.config, 0, "", "")
    images = shown(experiment)
    return comparison(images, np.concatenate(list(reconstructions(trained, images))))


def measure_latents(folder: RunFolder, dataset: Dataset | None, step: int, ema: str = "") -> None:
    """Measures the scaling of the latents of a checkpoint on its training set, and writes it to the run.

    Args:
      folder: the run.
      dataset: what it was trained on, None to load it; where it is flipped in training, each image counts both ways.
      step: a checkpoint that is as it was written.
      ema: which of its EMAs; "" is the first.
    """
    trained = load_unscaled(folder, step, ema)
    if read_scaling(folder, trained) is not None:
        return
    dataset = load_data(trained.config.data) if dataset is None else dataset
    print(f"measuring the latents of {len(dataset.images):,} images")
    scaling = measure_scaling(trained.autoencoder, trained.params, _all_images(dataset, trained.config.data.flip))
    write_scaling(folder, trained, scaling, len(dataset.images))
    stds = ", ".join(f"{1 / scale:.3g}" for scale in scaling["scale"])
    print(f"standard deviation of the latents in each channel: {stds}; wrote {folder.path / SCALING}")


def _all_images(dataset, flip, batch_size=256):
    """Yields all images in [-1, 1], each batch as it is and, with flip, mirrored."""
    total = len(dataset.images)
    for start in range(0, total, batch_size):
        batch = to_floats(np.asarray(dataset.images[np.arange(start, min(start + batch_size, total))]))
        yield batch
        if flip:
            yield batch[:, :, ::-1]


def _weights(config, chosen):
    """Returns all options of an autoencoder's objective, after checking them and the codebook."""
    weights, name = chosen.complete(leading=2), chosen.name
    for option, value in weights.items():
        require_range(f"{option} of objective {name}", value, 0, open_ends="high")
    if weights["l1"] == 0 == weights["l2"]:
        raise InputError(f"objective {name} has l1 and l2 of 0, so that nothing is reconstructed; give one of them")
    if weights["adversarial_start"] and not weights["adversarial"]:
        raise InputError(f"adversarial_start of objective {name} does nothing without adversarial; give that weight")
    if weights["adversarial"] and config.train.keep_best:
        raise InputError("config.train.keep_best compares losses, and that of a critic says nothing; set it to 0")
    codes = config.autoencoder.codes
    if (name == "vq_autoencoder") != (codes != 0):
        remedy = "set it to 512, say" if not codes else "take objective vq_autoencoder, or 0 codes"
        raise InputError(f"config.autoencoder.codes is {codes}, and the objective is {name}; {remedy}")
    return weights


def _features(dataset):
    """Returns the perceptual network, a classifier of the data, as a function of its parameters, and these."""
    print("the perceptual loss needs a classifier of the data, which is trained once and then kept")
    trained = trained_classifier(dataset, cache_folder())
    return lambda params, images: classifiers.activations(params, images, trained.num_classes), trained.params
