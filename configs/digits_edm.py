"""The digits in EDM's form (Karras et al., arXiv:2206.00364): its noise levels, its preconditioning and its weights.

    python train.py --config=configs/digits_edm.py

Same network, length and optimizer as digits.py.
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.schedule = "edm"
    config.train.prediction = "edm"  # weighting simple is EDM's own here: it weighs the error of F by 1
    config.sample.sampler = "heun"
    config.sample.steps = 13  # 25 network calls
    return config
