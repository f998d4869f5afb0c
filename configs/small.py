"""CIFAR-10 on a small machine, to see colours and shapes within minutes and not days.

    python train.py --config=configs/small.py

The 4,000 steps take a quarter of an hour on 2 cores; see images_small.py for what they show.

The network has 2.5M parameters, most of them where the image is small, and predicts v on the cosine schedule. The
learning rate is constant, so that a later start with a larger config.train.num_steps goes on.
"""

from configs import cifar


def make_small(config):
    """Gives a recipe the network and the intervals of a small machine."""
    config.model.width = 16
    config.model.multipliers = (1, 2, 4, 8)
    config.model.num_blocks = 1
    config.model.attention_resolutions = (8,)
    config.model.dropout = 0.0

    config.schedule = "cosine"
    config.train.prediction = "v"

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100

    config.train.batch_size = 32
    config.train.ema_decays = (0.995,)
    config.train.num_steps = 4000
    config.train.log_every = 50
    config.train.save_every = 500
    config.train.grid_every = 500
    return config


def get_config():
    return make_small(cifar.get_config())
