"""CIFAR-10 with its ten classes, in pixels, for a GPU: colour pictures that can be asked for by class, and guided.

    python train.py --config=configs/cifar_classes.py [--config.data.path=cifar-10-binary.tar.gz]
    python sample.py --labels=ship,horse --guidance_scale=2

DDPM's network at half its width, a quarter of its work, with attention at 8x8 as well. It predicts v on the cosine
schedule and computes in bfloat16. The learning rate is constant and samples are drawn from an average of the weights,
so a run can be stopped at any time, and goes on with the same command. It has not been trained to an end yet.
"""

from configs import cifar


def get_config():
    config = cifar.get_config()
    config.model.num_classes = 10
    config.model.width = 64
    config.model.attention_resolutions = (16, 8)
    config.model.num_heads = 2
    config.model.dropout = 0.0
    config.model.dtype = "bfloat16"

    config.schedule = "cosine"
    config.train.prediction = "v"

    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 500

    config.train.batch_size = 256
    config.train.ema_decays = (0.9995,)
    config.train.num_steps = 20_000
    config.train.log_every = 100
    config.train.save_every = 5000
    config.train.grid_every = 5000

    config.sample.tau = "uniform"
    return config
