"""x"""

from configs import default


def get_config():
    config = default.get_config()
    config.teacher = "shipped"
    config.train.objective = "progressive:start=64,end=4,lengths=4,1,1,1.5,2.5"
    config.train.prediction = "v"  # the teacher predicts eps, which says next to nothing about x_0 at T
    config.train.num_steps = 3000
    config.train.batch_size = 64
    config.train.ema_decays = (0.99,)
    config.train.save_every = 300
    config.train.grid_every = 1500

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 30  # in each stage
    config.optimizer.decay = "linear"
    return config
