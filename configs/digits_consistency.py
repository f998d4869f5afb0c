"""x"""

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
