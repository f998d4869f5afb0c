"""The digits by MeanFlow (arXiv:2505.13447), from scratch: one call draws a sample."""

from configs import default


def get_config():
    config = default.get_config()
    config.model.width = 32
    config.model.multipliers = (1, 2)
    config.model.num_blocks = 1
    config.model.attention_resolutions = (4,)

    config.schedule = "rectified_flow:num_timesteps=100"
    config.train.objective = "mean_flow:same=0.75,times=-0.4,1,power=1"
    config.train.prediction = "mean_flow"

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.decay = "cosine"

    config.train.num_steps = 3000
    config.train.batch_size = 128
    config.train.ema_decays = (0.995,)
    config.train.save_every = 500
    config.train.grid_every = 1500
    return config
