"""The side of torch in a comparison: diffusers' UNet2DModel, eager or compiled, in the memory layout that is faster."""

import copy
import os
import sys
import time


def side(network, batch, steps, dtype, how, device):
    """What torch runs, and its operations by name.

    Args:
      network, batch: one of `networks.NETWORKS`, and images at a time.
      steps: DDIM steps of an operation of sampling.
      dtype: "float32" or "bfloat16", of the arithmetic.
      how: "eager" or "compile".
      device: "cpu", then on all cores, or "gpu".
    """
    import torch

    sys.modules["torchvision"] = None  # not needed, and one that was built for another torch fails to import
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    candidates, dtype = {}, getattr(torch, dtype)
    device = {"cpu": "cpu", "gpu": "cuda"}[device]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for layout in (torch.contiguous_format, torch.channels_last):
        model = unet(network).to(device, memory_format=layout)
        x = torch.randn(batch, network.image[-1], *network.image[:2]).to(device).contiguous(memory_format=layout)
        run = training_step(model, x, dtype)
        run()
        wait()
        start = time.perf_counter()
        run()
        wait()
        candidates[layout] = time.perf_counter() - start, model, x
    layout = min(candidates, key=lambda layout: candidates[layout][0])
    _, model, x = candidates[layout]
    count = sum(p.numel() for p in model.parameters())
    drawing, t, small = copy.deepcopy(model).to(dtype), torch.full((batch,), 500, device=device), x.to(dtype)
    if how == "compile":
        model = torch.compile(model)
        # CUDA graphs, as one compiled scan has no dispatch either.
        drawing = torch.compile(drawing, mode="reduce-overhead" if device == "cuda" else "default")
    training = training_step(model, x, dtype)
    operations = {
        "training": lambda: (training(), wait()),
        "network": lambda: (call(drawing, small, t), wait()),
        "sampling": lambda: (sample(drawing, small, steps), wait()),
    }
    import diffusers

    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return f"{count:,} parameters, {versions}, {torch.get_num_threads()} threads, {layout}", operations


def unet(network):
    """UNet2DModel in the layout of `network`; that of 35.7M has the config of google/ddpm-cifar10-32."""
    from diffusers import UNet2DModel

    sizes = [network.image[0] // 2**level for level in range(len(network.multipliers))]
    attention = ["Attn" if size in network.attention else "" for size in sizes]
    return UNet2DModel(
        sample_size=network.image[0],
        in_channels=network.image[-1],
        out_channels=network.image[-1],
        block_out_channels=[network.width * m for m in network.multipliers],
        layers_per_block=network.num_blocks,
        down_block_types=[f"{kind}DownBlock2D" for kind in attention],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(attention)],
        attention_head_dim=None,
        norm_num_groups=min(32, network.width // 4),
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def training_step(network, x, dtype):
    """A function that makes one step: noise, mse, gradient, clip, Adam, EMA."""
    import torch

    params = list(network.parameters())
    optimizer = torch.optim.Adam(params, lr=1e-4, fused=x.is_cuda)
    ema = [p.detach().clone() for p in params]

    def run():
        t = torch.randint(1, 1001, (x.shape[0],), device=x.device)
        signal = torch.cos(t / 1000 * torch.pi / 2)[:, None, None, None]
        noise = torch.randn_like(x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            predicted = network(signal * x + torch.sqrt(1 - signal**2) * noise, t).sample
        torch.nn.functional.mse_loss(predicted.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 0.001)

    return run


def call(network, x, t):
    import torch

    with torch.inference_mode():
        network(x, t)


def sample(network, x, steps):
    """diffusers' DDIM loop."""
    import torch
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    sample = torch.randn_like(x)
    with torch.inference_mode():
        for t in scheduler.timesteps.to(sample.device):
            sample = scheduler.step(network(sample, t).sample, t, sample).prev_sample
