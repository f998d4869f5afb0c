"""Your own images on a small machine: useful sheets of samples after fifteen minutes on two CPU cores.

    python train.py --config=configs/images_small.py --config.data.path=photos

The path is a folder, .zip or .tar of 300 to 5,000 pictures of any size; sub-folders are classes. The network is that of
small.py. On a GPU, and for weeks on a CPU, images.py has DDPM's.
"""

from configs import images, small


def get_config():
    return small.make_small(images.get_config())
