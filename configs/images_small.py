"""Your own images on a small machine: useful sheets of samples after fifteen minutes on two CPU cores.

    python train.py --config=configs/images_small.py --config.data.path=photos

The path is a folder, .zip or .tar of 300 to 5,000 pictures of any size; sub-folders are classes. They are scaled to
32x32 pixels; --config.data.size=64 takes about four times as long, and 128 also needs
--config.model.multipliers=1,2,4,8,8. The network is that of small.py. On a GPU, images.py has DDPM's.
"""

from configs import images, small


def get_config():
    return small.make_small(images.get_config())
