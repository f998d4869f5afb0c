"""An autoencoder of your own images of 64 to 256 pixels, for a GPU: each place of the latents stands for 8x8 pixels.

    python train.py --config=configs/images_autoencoder.py --config.data.path=photos.zip --config.data.size=128

The network is that of Stable Diffusion's autoencoder at half the width, 21M parameters, and it is trained in the order
of latent diffusion: reconstruction and divergence first, then a critic as well. With sub-folders as classes,
kl_autoencoder:...,perceptual=1 adds the distance in the features of a classifier of your images. For 64 pixels take
--config.autoencoder.channels=64,128,256, with 4x4 pixels to a place. It has not been trained to the end here.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "images"
    config.data.size = 256
    config.data.channels = 3
    config.data.flip = True

    config.autoencoder.channels = (64, 128, 256, 256)
    config.autoencoder.num_blocks = 2
    config.autoencoder.latent_channels = 4
    config.autoencoder.groups = 32

    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 1000
    config.optimizer.b1 = 0.5  # a critic wants little momentum
    config.optimizer.b2 = 0.9

    config.train.objective = "kl_autoencoder:l1=1,kl=1e-6,adversarial=0.5,adversarial_start=50000"
    config.train.num_steps = 200_000
    config.train.batch_size = 16
    config.train.ema_decays = (0.999,)
    config.train.log_every = 100
    config.train.save_every = 5000
    config.train.grid_every = 5000
    config.sample.num = 16
    return config
