"""A student of the digits model that ships, in one to four calls: consistency distillation.

    python train.py --config=configs/digits_consistency.py
    python sample.py --workdir=runs/digits_consistency --steps=1

It takes 6 to 10 minutes on 2 cores. Measured in November 2026, as the mean of seeds 10 to 14, the Frechet distance on
the pixels is 0.042 in one call (0.041 to 0.045), 0.037 in two (0.035 to 0.039) and 0.033 in four (0.030 to 0.036); its
teacher gives 0.031 in 25 DDIM steps (0.029 to 0.034) and 0.061 in 10. Two calls are not quite as good as 25 steps.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.teacher = "shipped"
    config.train.objective = "consistency_distillation:pretraining=0.3,gaps=0.125,0.025"
    config.train.prediction = "v"  # the teacher predicts eps, which says next to nothing about x_0 at T
    config.train.num_steps = 3000
    config.train.batch_size = 64
    config.train.ema_decays = (0.99,)
    config.train.save_every = 500
    config.train.grid_every = 1500
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.decay = "cosine"
    return config
