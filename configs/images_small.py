"""Your own images on a small machine, to see colours and shapes within minutes and not days.

    python train.py --config=configs/images_small.py --config.data.path=photos

On 5,000 pictures of CIFAR-10 in ten folders the 4,000 steps take a quarter of an hour on 2 cores (155 images a second,
AMD EPYC, November 2026). Sheets then show colours and the beginnings of shapes; with --guidance_scale=3 ships lie on
water and cars can be told, which is far from sharp.

The path is a folder, .zip or .tar of 300 to 5,000 pictures of any size; sub-folders are classes. They are scaled to
32x32 pixels; --config.data.size=64 takes about four times as long, and 128 also needs
--config.model.multipliers=1,2,4,8,8. The network is that of small.py. On a GPU, images.py has DDPM's.
"""

from configs import images, small


def get_config():
    return small.make_small(images.get_config())
