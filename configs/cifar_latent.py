"""CIFAR-10 with its ten classes, drawn in the latents of an autoencoder: colour pictures on a small machine.

    python train.py --config=configs/cifar_autoencoder.py [--config.data.path=cifar-10-binary.tar.gz]
    python train.py --config=configs/cifar_latent.py [--config.data.path=cifar-10-binary.tar.gz]
    python sample.py --labels=ship,horse --guidance_scale=2

The network has 4.1M parameters and sees 8x8 places of 4 numbers, a twelfth of the numbers of an image. It predicts v,
as latents have no bounds to clip to. The learning rate is constant and samples are drawn from an average of the
weights, so a later start with a larger config.train.num_steps goes on.
"""

from configs import cifar


def get_config():
    config = cifar.get_config()
    config.latents = "runs/cifar_autoencoder"
    config.model.num_classes = 10
    config.model.width = 64
    config.model.multipliers = (1, 2)
    config.model.attention_resolutions = (8, 4)
    config.model.num_heads = 2
    config.model.dropout = 0.0

    config.schedule = "cosine"
    config.train.prediction = "v"

    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 500

    config.train.batch_size = 64
    config.train.ema_decays = (0.9995,)
    config.train.num_steps = 60_000
    config.train.log_every = 100
    config.train.save_every = 1000
    config.train.grid_every = 2000

    config.sample.tau = "uniform"
    return config
