"""Every field of the configuration and its default. The other configs only change it.

Not a recipe: see digits.py, cifar.py and images.py.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The defaults: DDPM's network and schedule, with the embedded digits as data."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # of the initial weights, the order of the data and all training noise

    config.data = ml_collections.ConfigDict()
    config.data.name = "digits"  # digits, cifar10 or images
    config.data.path = ""  # cifar10: the archive ("" downloads it); images: a folder, .zip or .tar
    config.data.split = ""  # part of the data; "" is the source's default
    config.data.size = 0  # images: height and width in pixels
    config.data.channels = 0  # images: 1 (grey) or 3; 0 is 3
    config.data.flip = False  # mirror images at random
    config.data.max_memory = 4.0  # GiB; larger sets of images are read from disk while training; 0: all sets of images
    config.data.workers = 0  # processes that read and decode them; 0: threads of this one

    config.schedule = ml_collections.ConfigDict()
    config.schedule.name = "linear"  # with the options of that name below
    config.schedule.num_timesteps = 1000
    config.schedule.linear = ml_collections.ConfigDict({"beta_start": 1e-4, "beta_end": 0.02})
    config.schedule.scaled_linear = ml_collections.ConfigDict({"beta_start": 0.00085, "beta_end": 0.012})
    config.schedule.cosine = ml_collections.ConfigDict({"offset": 0.008, "max_beta": 0.999})
    config.schedule.shifted_cosine = ml_collections.ConfigDict({"image_size": 128, "base_size": 64})
    config.schedule.edm = ml_collections.ConfigDict({"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0})
    config.schedule.rectified_flow = ml_collections.ConfigDict()  # with train.prediction = "flow"

    config.model = ml_collections.ConfigDict()  # the arguments of diffusion.models.UNet
    config.model.width = 128
    config.model.multipliers = (1, 2, 2, 2)
    config.model.num_blocks = 2
    config.model.attention_resolutions = (16,)
    config.model.num_heads = 1
    config.model.dropout = 0.0
    config.model.num_classes = 0  # 0: unconditional
    config.model.out_channels = 0  # 0: as many as the images have
    config.model.dtype = "float32"  # or bfloat16

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 5000
    config.optimizer.decay = "constant"  # or cosine, to 0 at train.num_steps
    config.optimizer.clip_norm = 1.0  # of the whole gradient
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999

    config.train = ml_collections.ConfigDict()
    config.train.prediction = "eps"  # eps, x0, v or flow
    config.train.label_dropout = 0.1  # of models with classes; guidance needs it
    config.train.num_steps = 800_000
    config.train.batch_size = 128
    config.train.ema_decay = 0.9999
    config.train.log_every = 100  # steps between lines of the log and rows of metrics.csv
    config.train.save_every = 5000  # steps between checkpoints
    config.train.keep = 3  # newest checkpoints kept
    config.train.grid_every = 5000  # steps between sample grids

    config.sample = ml_collections.ConfigDict()  # of the grids in training; sample.py's flags override it
    config.sample.sampler = "ddim"  # options follow a colon: ddim:eta=0.5
    config.sample.steps = 25
    config.sample.tau = "uniform"
    config.sample.clip = "recompute"  # none, recompute or keep_eps
    config.sample.num = 64
    return config
