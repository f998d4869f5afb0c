"""Holds every field of the configuration with its default; the other configs only change some of them.

It is no recipe: for those see digits.py, digits_edm.py, cifar.py and images.py.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults: DDPM's network and schedule, with the embedded digits as data."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # decides the first parameters, the order of the data and all random draws of training

    # Whom a student learns from: a run folder, a file of convert.py, or shipped; for the objectives that make students.
    config.teacher = ""  # data, schedule and network are its own where they are at their defaults here

    # Latent space: the autoencoder in whose latents the model works, a run folder or a file; for pixels none.
    config.latents = ""  # data and classes stay the model's own; the images must have the autoencoder's size

    # Where the images come from.
    config.data = ml_collections.ConfigDict()
    config.data.name = "digits"  # digits, cifar10 or images
    config.data.path = ""  # cifar10: the archive ("" downloads it); images: a folder, .zip, .tar or .tar.gz
    config.data.split = ""  # part of the data; "" for the source's default
    config.data.size = 0  # images: height and width in pixels
    config.data.channels = 0  # images: 1 (grey) or 3; 0 means 3
    config.data.labels = ""  # "": the source's classes, for images its sub-folders; none; folders: insist on them
    config.data.skip_damaged = False  # images: leave out files that cannot be read; else they are an error
    config.data.max_decoded = 256.0  # MiB; images: larger files, and those of more pixels than fit in it, are refused
    config.data.flip = False  # mirror images at random
    config.data.max_memory = 4.0  # GiB; larger sets of images are read from disk while training; 0: all sets of images
    config.data.workers = 0  # processes that read and decode images from disk; 0: threads of this one

    # The noise schedule. Options follow a colon, as in cosine:max_beta=0.99,num_timesteps=500. The names are:
    config.schedule = "linear"  # linear, cosine, scaled_linear, shifted_cosine; edm and rectified_flow for edm and flow

    # The network. One of your own has its options after a second colon, as in mine:net:depth=4, not in config.model.
    config.network = "unet"  # unet, transformer, unet2d, or a function of your own as package.module:function

    # The UNet: these are its arguments. Of these, num_classes also goes to the other networks.
    config.model = ml_collections.ConfigDict()
    config.model.width = 128  # channels at full resolution
    config.model.multipliers = (1, 2, 2, 2)  # channels of each level over width; from level to level the image halves
    config.model.num_blocks = 2  # residual blocks in each level on the way down; the way up has one more
    config.model.attention_resolutions = (16,)  # image heights at which self-attention follows every block
    config.model.num_heads = 1  # attention heads
    config.model.dropout = 0.0  # rate inside the residual blocks, in training
    config.model.num_classes = 0  # classes that the network is told; 0: none, -1: all that the data has
    config.model.out_channels = 0  # 0: as many as the images have
    config.model.dtype = "float32"  # or bfloat16, for the arithmetic; parameters and normalisation stay float32
    config.model.remat = "none"  # what the backward pass computes again, to save memory: none, products or full

    # The transformer (DiT), where config.network names it: these are its arguments.
    config.transformer = ml_collections.ConfigDict()
    config.transformer.patch = 2  # height and width of the patches that a sample is cut into
    config.transformer.width = 384  # channels of each patch; a multiple of 4 and of num_heads
    config.transformer.depth = 12  # blocks
    config.transformer.num_heads = 6  # attention heads
    config.transformer.mlp_ratio = 4.0  # channels inside each block's perceptron over width
    config.transformer.qk_norm = False  # normalise queries and keys, which long trainings may need to stay stable
    config.transformer.dropout = 0.0  # rate after attention and perceptron, in training
    config.transformer.time_shift = 0.0  # what is added to t; -1 for networks of others, whose times count from 0
    config.transformer.dtype = "float32"  # or bfloat16, for the arithmetic
    config.transformer.remat = "none"  # what the backward pass computes again: none, products or full

    # UNet2DModel of diffusers, where config.network names it: its fields by the names that they have there.
    config.unet2d = ml_collections.ConfigDict()
    config.unet2d.block_out_channels = (128, 256, 256, 256)  # channels of each level; between two the image halves
    config.unet2d.down_block_types = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")  # one a level
    config.unet2d.up_block_types = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")  # the deepest first
    config.unet2d.mid_block_type = "UNetMidBlock2D"  # "": no middle
    config.unet2d.add_attention = True  # whether the middle has attention
    config.unet2d.layers_per_block = 2  # residual blocks in each level on the way down; the way up has one more
    config.unet2d.mid_block_scale_factor = 1.0  # what the sums of the middle are divided by
    config.unet2d.downsample_padding = 1  # of the convolution that halves; 0 pads right and below only
    config.unet2d.downsample_type = "conv"  # or resnet, of the blocks with attention
    config.unet2d.upsample_type = "conv"  # or resnet, of the blocks with attention
    config.unet2d.act_fn = "silu"  # or swish, relu, gelu, mish
    config.unet2d.attention_head_dim = 8  # channels of a head; 0: one head
    config.unet2d.norm_num_groups = 32  # groups of the norms; 0: a quarter of the channels, at most 32
    config.unet2d.attn_norm_num_groups = 0  # groups before the attention of the middle; 0: as diffusers has it
    config.unet2d.norm_eps = 1e-5  # epsilon of the norms
    config.unet2d.resnet_time_scale_shift = "default"  # the time is added; scale_shift: it scales and shifts a norm
    config.unet2d.time_embedding_type = "positional"  # or fourier, of the log of the time, or learned
    config.unet2d.time_embedding_dim = 0  # width of the embedding; 0: four times the first channels
    config.unet2d.freq_shift = 0  # 1: the lowest frequency of the embedding is 1e-4
    config.unet2d.flip_sin_to_cos = True  # whether the cosines of the embedding come first
    config.unet2d.num_train_timesteps = 0  # rows of a learned embedding
    config.unet2d.center_input_sample = False  # whether x is scaled from [0, 1] to [-1, 1]
    config.unet2d.class_embed_type = ""  # "": labels; timestep, identity: numbers and vectors, from Python only
    config.unet2d.null_class = True  # whether label model.num_classes is "no class"; published networks have none
    config.unet2d.time_scale = 1.0  # the network is told time_scale t + time_shift
    config.unet2d.time_shift = -1.0  # -1, as timesteps count from 0 in diffusers
    # Published consistency models return their input at this noise.
    config.unet2d.sigma_min = 0.0  # 0: it is none of them
    config.unet2d.dropout = 0.0  # rate inside the residual blocks, in training
    config.unet2d.dtype = "float32"  # or bfloat16, for the arithmetic

    # The network of an autoencoder, for objective autoencoder, which has no use for schedule, network and model above.
    config.autoencoder = ml_collections.ConfigDict()
    config.autoencoder.channels = (32, 64)  # of each level; from level to level the image halves
    config.autoencoder.num_blocks = 1  # residual blocks in each level of the encoder; the decoder has one more
    config.autoencoder.latent_channels = 4  # numbers at each place of the latents
    config.autoencoder.groups = 8  # in which activations are normalised; all channels are multiples of it
    config.autoencoder.attention = True  # whether all places see each other at the lowest resolution
    config.autoencoder.codes = 0  # entries of a codebook; 0: none, each latent is a Gaussian
    config.autoencoder.code_channels = 0  # channels of these entries and then of the latents; 0: latent_channels
    config.autoencoder.dtype = "float32"  # or bfloat16, for the arithmetic; parameters and normalisation stay float32

    # How the parameters move: Adam, after a linear warm-up.
    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 2e-4  # the highest rate, right after the warm-up
    config.optimizer.warmup_steps = 5000  # steps in which the rate rises from 0; 0: no warm-up
    config.optimizer.decay = "constant"  # or cosine or linear, which end at 0 at train.num_steps; each stage by itself
    config.optimizer.clip_norm = 1.0  # largest norm of the whole gradient; a longer one is scaled down
    config.optimizer.b1 = 0.9  # how much of Adam's mean of the gradient a step keeps
    config.optimizer.b2 = 0.999  # how much of Adam's mean of the squared gradient a step keeps

    # What is trained, for how long, and what is saved on the way.
    config.train = ml_collections.ConfigDict()
    config.train.prediction = "eps"  # eps, x0, v, flow or edm; mean_flow for the objectives mean_flow
    # simple, hybrid or vlb; the last two learn the variance; hybrid:vlb_weight=0.01. Those that make students of few
    # calls: progressive:start=64,end=4; consistency; consistency_distillation; mean_flow; mean_flow_distillation;
    # guidance_distillation:scales=1,4, whose student takes the guidance scale as an input.
    config.train.objective = "simple"
    config.train.weighting = "simple"  # simple, snr, min_snr, p2, sigmoid or edm; with options, as min_snr:gamma=5
    config.train.label_dropout = 0.1  # share of the samples whose label is left out, if there are labels; for guidance
    config.train.num_steps = 800_000  # steps in all, those before a run was resumed included
    config.train.batch_size = 128  # images in a step, over all devices and processes
    config.train.ema_decays = (0.9999,)  # one EMA of the parameters for each; samples are drawn with the first
    config.train.microbatches = 1  # parts in which a batch goes through the network, to save memory
    config.train.fsdp = 1  # devices over which parameters and optimizer are sharded; the rest repeat them
    config.train.log_every = 100  # steps between lines of the log and rows of metrics.csv
    config.train.save_every = 5000  # steps between checkpoints
    config.train.keep = 3  # how many of the newest checkpoints are kept
    config.train.keep_best = 0  # how many checkpoints of lowest loss are kept as well
    config.train.grid_every = 5000  # steps between sheets of samples, which go to grids/

    # How samples are drawn: those shown in training, and the defaults of sample.py and evaluate.py.
    config.sample = ml_collections.ConfigDict()
    config.sample.sampler = "ddim"  # options follow a colon: ddim:eta=0.5
    config.sample.steps = 25  # S, the number of sampling steps
    config.sample.tau = "uniform"  # a grid of timesteps, or explicit:times=1000,500,250
    config.sample.clip = ""  # none, recompute or keep_eps; "" is what suits the model, recompute for pixels
    config.sample.num = 64  # samples on a sheet
    return config
