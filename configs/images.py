"""Your own images: a folder, .zip or .tar of JPEG, PNG, WebP, TIFF or BMP files; sub-folders are classes.

    python train.py --config=configs/images.py --config.data.path=photos.zip --config.data.size=64

DDPM's network of 35.7M parameters, for a GPU. On a CPU, or to see something within minutes, take images_small.py.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "images"
    config.data.size = 32
    config.data.channels = 3
    config.data.flip = True
    config.model.num_classes = -1
    config.model.dropout = 0.1
    return config
