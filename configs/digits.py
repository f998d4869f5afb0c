"""The 1,797 scanned 8x8 digits that come with scikit-learn: a whole run in minutes on a laptop, with no download."""

from configs import default


def get_config():
    config = default.get_config()
    config.model.width = 32
    config.model.multipliers = (1, 2)
    config.model.num_blocks = 1
    config.model.attention_resolutions = (4,)

    config.schedule = "cosine"  # at 8x8 pixels the linear one spends half its steps on noise

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.decay = "cosine"

    config.train.num_steps = 1000
    config.train.ema_decays = (0.995,)
    config.train.save_every = 500
    config.train.grid_every = 500
    return config
