"""CIFAR-10 with DDPM's published recipe (Ho et al. 2020, arXiv:2006.11239, appendix B): 35.7M parameters, 800k steps.

    python train.py --config=configs/cifar.py [--config.data.path=cifar-10-binary.tar.gz]

The paper reports FID 3.17 with 1000 ancestral steps; DDIM (arXiv:2010.02502, table 1) 4.67 with 50 steps and 6.84 with
20, on the same kind of model. This project has not yet trained it to the end, nor timed it on a GPU. Ours differs in
two ways: timesteps are stratified over the batch, and the EMA warms up. Samples are drawn on DDIM's quadratic grid.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "cifar10"
    config.data.split = "train"
    config.data.flip = True
    config.model.dropout = 0.1
    config.sample.tau = "quadratic"
    return config
