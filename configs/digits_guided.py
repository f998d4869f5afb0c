"""A student that is guided in one call in place of two: it takes the guidance scale as an input (arXiv:2210.03142).

python train.py --config=configs/digits_classes.py
python train.py --config=configs/digits_guided.py
python sample.py --workdir=runs/digits_guided --guidance_scale=3
"""

from configs import default


def get_config():
    config = default.get_config()
    config.teacher = "runs/digits_classes"
    config.train.objective = "guidance_distillation:scales=1,4"
    config.train.label_dropout = 0.0  # the student is guided without an answer for "no class"
    config.train.num_steps = 1000
    config.train.batch_size = 128
    config.train.ema_decays = (0.99,)
    config.train.save_every = 500
    config.train.grid_every = 500
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.decay = "cosine"
    return config
