"""An autoencoder of CIFAR-10: 32x32 colour pixels become latents of 8x8 places with 4 numbers each, and come back.

    python train.py --config=configs/cifar_autoencoder.py [--config.data.path=cifar-10-binary.tar.gz]
    python evaluate.py --workdir=runs/cifar_autoencoder --split=test

The network has 1.5M parameters, 3 MB in half precision, so that it fits on a small machine and beside a model of its
latents. The 4,000 steps take about 20 minutes on one core (110 images a second, AMD EPYC, November 2026).
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "cifar10"
    config.data.split = "train"
    config.data.flip = True

    config.autoencoder.channels = (24, 48, 96)
    config.autoencoder.latent_channels = 4

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100

    # The learning rate is constant, so that a later start with a larger config.train.num_steps goes on.
    config.train.objective = "kl_autoencoder:l1=0,l2=1,kl=1e-3"
    config.train.num_steps = 4_000
    config.train.batch_size = 32
    config.train.ema_decays = (0.999,)
    config.train.save_every = 500
    config.train.grid_every = 500
    return config
