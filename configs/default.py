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

    # The noise schedule: linear, cosine, scaled_linear, shifted_cosine, edm (for prediction edm) or rectified_flow (for
    # prediction flow). Options follow a colon, as in cosine:max_beta=0.99,num_timesteps=500.
    config.schedule = "linear"

    config.model = ml_collections.ConfigDict()  # the arguments of diffusion.models.UNet
    config.model.width = 128
    config.model.multipliers = (1, 2, 2, 2)
    config.model.num_blocks = 2
    config.model.attention_resolutions = (16,)
    config.model.num_heads = 1
    config.model.dropout = 0.0
    config.model.num_classes = 0  # 0: unconditional
    config.model.out_channels = 0  # 0: as many as the images have
    config.model.dtype = "float32"  # or bfloat16, for the arithmetic; weights and statistics stay float32
    config.model.remat = False  # compute activations again in the backward pass, to save memory

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 5000
    config.optimizer.decay = "constant"  # or cosine, to 0 at train.num_steps
    config.optimizer.clip_norm = 1.0  # of the whole gradient
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999

    config.train = ml_collections.ConfigDict()
    config.train.prediction = "eps"  # eps, x0, v, flow or edm
    config.train.objective = "simple"  # simple, hybrid or vlb; the last two learn the variance; hybrid:vlb_weight=0.01
    config.train.weighting = "simple"  # simple, snr, min_snr, p2, sigmoid or edm; with options, as min_snr:gamma=5
    config.train.label_dropout = 0.1  # of models with classes; guidance needs it
    config.train.num_steps = 800_000
    config.train.batch_size = 128
    config.train.ema_decays = (0.9999,)  # one EMA each; grids and samples are drawn with the first
    config.train.microbatches = 1  # parts a batch goes through the network in, to save memory
    config.train.fsdp = 1  # devices over which parameters and optimizer are sharded; the rest repeat them
    config.train.log_every = 100  # steps between lines of the log and rows of metrics.csv
    config.train.save_every = 5000  # steps between checkpoints
    config.train.keep = 3  # newest checkpoints kept
    config.train.keep_best = 0  # checkpoints with the lowest loss kept besides
    config.train.grid_every = 5000  # steps between sample grids

    config.sample = ml_collections.ConfigDict()  # of the grids in training; sample.py's flags override it
    config.sample.sampler = "ddim"  # options follow a colon: ddim:eta=0.5
    config.sample.steps = 25
    config.sample.tau = "uniform"  # a grid, or explicit:times=1000,500,250
    config.sample.clip = ""  # none, recompute or keep_eps; "" is what suits the model, recompute for pixels
    config.sample.num = 64
    return config
