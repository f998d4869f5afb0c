"""The digits with their ten classes: a run in minutes on a laptop that can be asked for a digit, and guided.

    python train.py --config=configs/digits_classes.py
    python sample.py --labels=3 --guidance_scale=2

Network, length and optimizer are those of digits.py. In one of ten samples the class is left out, so that the network
also learns what "no class" means, which guidance pushes away from.
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.model.num_classes = 10
    config.train.label_dropout = 0.1
    return config
