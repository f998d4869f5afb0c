"""Your own images: a folder, .zip or .tar of JPEG and PNG files of any size.

python train.py --config=configs/images.py --config.data.path=photos.zip --config.data.size=64
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "images"
    config.data.size = 32
    config.data.channels = 3
    config.data.flip = True
    config.model.dropout = 0.1
    return config
