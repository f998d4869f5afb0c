"""What a user gets wrong ends in one line that names the remedy."""

import concurrent.futures
import contextlib
import json
import os
import queue
import re
import subprocess

import pytest
from commands import ROOT, TINY, error_line
from forked import Programs

from diffusion import schedules, solvers

pytestmark = pytest.mark.usefixtures("compile_once")

OLD_CONFIG = """
from configs import default

def get_config():
    config = default.get_config()
    config.schedule.name = "cosine"
    return config
"""

LEARNED = {**json.loads(solvers.ddim(schedules.cosine(), [900, 500, 0]).to_json()), "facts": {"prediction": "v"}}
NEWER = {**LEARNED, "version": 3}
OTHER_TABLE = solvers.ddim(schedules.cosine(50), [50, 25, 0]).to_json()

PROGRESSIVE, CONSISTENCY, MEANFLOW, GUIDED = (
    f"--config=configs/digits_{kind}.py" for kind in ("progressive", "consistency", "meanflow", "guided")
)

RUN = "--workdir=$TRAINED/runs/digits"

# (script, arguments, what the line says); $TRAINED is a folder with a trained run
MISTAKES = [
    # Text to image; those of a folder that is told texts are in test_text_to_image.py
    ("sample.py", ["--workdir=shipped", "--prompt=cat"], "--prompt is for text-to-image models, .* leave it out"),
    ("sample.py", [RUN, "--size=64"], "--size is for folders of diffusers, and this model is none"),
    ("train.py", ["--workdri=x"], "no flag --workdri; did you mean 'workdir'.*--config.FIELD"),
    ("train.py", ["--config.model.widht=8"], "no field 'widht'; did you mean 'config.model.width'"),
    ("train.py", ["--config.modle.width=8"], "no field 'modle'; did you mean 'config.model.width'"),
    ("train.py", [f"--config={ROOT}/README.md"], "README.md' is no config file; .*valid"),
    ("train.py", ["--config=$FILE.py"], "file.py, line 1: invalid syntax"),
    ("train.py", ["--config.train.learning_rate=1e-3"], "did you mean 'config.optimizer.learning_rate'"),
    ("train.py", ["--config=configs/cifra.py"], "no config file; did you mean .*cifar.py"),
    ("train.py", ["--config.train.num_steps=many"], "num_steps=many"),
    ("train.py", ["--config.train.num_steps.x=3"], "no field 'x'"),
    (
        "train.py",
        ["--config.train.num_steps", "5", "--config.train.batch_size", "5", "--config.train.keep=0"],
        "keep is 0",
    ),
    ("train.py", ["--config.train.ema_decays=abc"], "ema_decays is abc"),
    ("train.py", ["--config.data.workers=-1"], "workers is -1"),
    ("train.py", ["--coordinator=nonsense"], "write HOST:PORT"),
    ("train.py", [f"--config={ROOT}/tests/tiny.py"], "no function get_config"),
    # The run folder
    ("train.py", ["--workdir=a[x]"], r"a\[x\] holds '\[', and checkpoints could not be read there"),
    ("train.py", ["--config.train.keep_best=1", "--config.train.save_every=30"], "a multiple of log_every, 100"),
    ("train.py", ["--config.train.batch_size=0"], "batch_size is 0; it must be at least 1"),
    ("train.py", ["--config.data.name=digts"], "did you mean 'digits'"),
    ("train.py", ["--config.schedule=cosin"], "config.schedule is 'cosin'; did you mean 'cosine'"),
    ("train.py", ["--config.schedule=cosine:max_bta=0.9"], "did you mean 'max_beta'"),
    ("train.py", ["--config.schedule=cosine:0.9"], "has no name; write cosine:num_timesteps=0.9"),
    ("train.py", ["--config.schedule.name=cosine"], "config.schedule is one text .*write --config.schedule=cosine$"),
    (
        "train.py",
        ["--config.schedule.linear.beta_end=0.03"],
        "is one text .*write --config.schedule=linear:beta_end=0.03",
    ),
    ("train.py", ["--config.data.path.x=1"], "config.data.path is one text and has no field 'x'"),
    ("train.py", ["--config.model.multipliers.x=1"], "config.model.multipliers is one list and has no field 'x'"),
    ("train.py", ["--config=$OLD.py"], r"old.py, line \d+: a schedule is one text, as config.schedule = "),
    ("train.py", ["--config.train.objective=hybrid:vlb=1"], "valid: vlb_weight"),
    ("train.py", ["--config.sample.sampler=analytic_dpm"], "needs gamma, which is estimated on a trained model"),
    (
        "train.py",
        ["--config.sample.sampler=dpmpp_2m_karras", "--config.sample.tau=uniform"],
        "takes the grid karras; leave out config.sample.tau",
    ),
    ("train.py", ["--config.train.prediction=noise"], "valid: edm, eps, flow, mean_flow, v, x0"),
    ("train.py", ["--config.model.width=33"], "width is 33; it must be even"),
    ("train.py", ["--config.model.multipliers=1,1,1,1,1"], "cannot be halved 4 times"),
    ("train.py", ["--config.sample.steps=0"], "steps is 0"),
    ("train.py", ["--config.sample.clip=recomput"], "did you mean 'recompute'"),
    ("train.py", ["--config.sample.num=0"], "sample.num is 0; it must be at least 1"),
    ("train.py", ["--config.model.out_channels=3"], "samples have 1 channels"),
    ("train.py", ["--config.model.num_heads=0"], "num_heads is 0"),
    ("train.py", ["--config.model.dropout=1.5"], "dropout is 1.5"),
    ("train.py", ["--config.schedule=cosine:max_beta=1.0"], "zero signal"),
    ("train.py", ["--config.seed=-1"], "config.seed is -1"),
    ("train.py", ["--config.train.keep=0"], "keep is 0"),
    ("train.py", ["--config.train.ema_decays=1.5"], "ema_decays is 1.5"),
    ("train.py", ["--config.train.ema_decays=0.9,0.9"], "none twice"),
    ("train.py", ["--config.train.microbatches=3"], "batch_size is 128; .* multiple of 3"),
    ("train.py", ["--config.train.fsdp=1000"], "fsdp is 1000; it must divide"),
    ("train.py", ["--config.train.objective=hybird"], "did you mean 'hybrid'"),
    ("train.py", ["--config.train.weighting=min_snr:gama=5"], "did you mean 'gamma'"),
    ("train.py", ["--process_id=1"], "go with --coordinator"),
    ("train.py", ["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"], "process_id is 2"),
    ("train.py", ["--config.optimizer.learning_rate=nan"], "learning_rate is nan; it must be a number"),
    ("train.py", ["--config.optimizer.learning_rate=inf"], "learning_rate is inf; it must be above 0"),
    ("train.py", ["--config.optimizer.b1=1.5"], r"b1 is 1.5; it must be in 0\.\.1"),
    ("train.py", [f"--config={ROOT}/configs/images.py"], "config.data.path"),
    ("train.py", [f"--config={ROOT}/configs/images.py", "--config.data.path=nowhere.zip"], "nowhere.zip"),
    ("train.py", [f"--config={ROOT}/configs/cifar.py", "--config.data.path=nowhere.tar.gz"], "nowhere.tar.gz"),
    # The data: what a path can be, and what is asked of it.
    ("train.py", [f"--config={ROOT}/configs/images.py", "--check"], "set config.data.path=FOLDER"),
    ("train.py", [f"--config={ROOT}/configs/images.py", "--config.data.path=$FILE"], "no image folder, zip, tar"),
    ("train.py", [f"--config={ROOT}/configs/images.py", "--config.data.path=/dev/null"], "neither a folder nor a file"),
    (
        "train.py",
        [f"--config={ROOT}/configs/images.py", "--config.data.path=$FILE", "--config.data.max_decoded=0"],
        "config.data.max_decoded=0.0 is out of range",
    ),
    ("train.py", ["--config.data.labels=folders"], "'digits' has no config.data.labels='folders'; allowed"),
    ("train.py", ["--config.data.size=9"], "'digits' has no config.data.size=9; allowed: config.data.size=0"),
    ("train.py", ["--workdir=$FILE/run"], "Not a directory"),
    ("train.py", [*TINY, RUN, "--config.model.width=8"], "config.model.width is 8, .* 4"),
    # Students and their teachers.
    ("train.py", ["--config.teacher=shipped"], "objective simple learns from data; take .*progressive, consistency"),
    ("train.py", ["--config.train.objective=progressive"], "learns from a teacher; name one as --config.teacher=RUN"),
    ("train.py", [PROGRESSIVE, "--config.teacher=nowhere"], "config.teacher: nowhere holds no checkpoint; config.teac"),
    ("train.py", [PROGRESSIVE, "--config.teacher=no.safetensors"], "config.teacher: there is no file no.safetensors"),
    ("train.py", [PROGRESSIVE, "--config.train.prediction=eps"], "counts 20,291 times in x_0.*prediction=v"),
    ("train.py", [PROGRESSIVE, "--config.train.objective=progressive:start=12,end=5"], "cannot halve start=12 down to"),
    ("train.py", [PROGRESSIVE, "--config.train.objective=progressive:start=600,end=300"], "a teacher of 1200 steps"),
    ("train.py", [PROGRESSIVE, "--config.train.objective=progressive:end=4,lengths=1,2"], "are 1,2; give 5 numbers"),
    ("train.py", [PROGRESSIVE, "--config.train.num_steps=2"], "num_steps is 2, too few for"),
    ("train.py", [PROGRESSIVE, "--config.train.weighting=snr"], "progressive has its own weights; set it to simple"),
    ("train.py", [PROGRESSIVE, "--config.train.keep_best=1"], "keep_best compares losses, which differ from stage"),
    ("train.py", [PROGRESSIVE, "--config.sample.steps=25"], "ddim steps on the uniform grid, .*leave out config.sampl"),
    ("train.py", [PROGRESSIVE, "--config.model.width=8"], "width is 8, the teacher's is 32; .*leave it out"),
    ("train.py", [PROGRESSIVE, "--config.schedule=linear"], "schedule is 'linear', the teacher's is 'cosine'"),
    ("train.py", [PROGRESSIVE, "--config.model.num_classes=-1"], "config.teacher none; they must be the same"),
    (
        "train.py",
        [CONSISTENCY, "--config.train.objective=consistency:gaps=0.1,0.5"],
        "are 0.1,0.5; give two shares",
    ),
    ("train.py", [CONSISTENCY, "--config.train.objective=consistency:pretraining=2"], "pretraining .* is 2"),
    ("train.py", [CONSISTENCY, "--config.sample.sampler=unipc"], "a whole sample in each call, and unipc"),
    # MeanFlow, and students that take the guidance scale.
    ("train.py", [MEANFLOW, "--config.schedule=cosine"], "needs straight paths; set config.schedule=rectified_flow"),
    ("train.py", [MEANFLOW, "--config.train.prediction=flow"], "is flow; .*set config.train.prediction=mean_flow"),
    ("train.py", ["--config.train.prediction=mean_flow"], "objective simple does not learn; .*objective=mean_flow"),
    (
        "train.py",
        [MEANFLOW, "--config.train.objective=mean_flow:same=2"],
        r"same of objective mean_flow is 2.0; .* 0\.\.1",
    ),
    ("train.py", [MEANFLOW, "--config.train.objective=mean_flow:times=-0.4"], "are -0.4; give the mean of normal"),
    ("train.py", [MEANFLOW, "--config.train.objective=mean_flow:power=-1"], "power of objective mean_flow is -1"),
    ("train.py", [MEANFLOW, "--config.train.objective=mean_flow_distillation"], "learns from a teacher; name one as"),
    ("train.py", [MEANFLOW, "--config.sample.sampler=unipc", "--config.sample.steps=9"], "combines estimates of x_0"),
    ("train.py", [MEANFLOW, "--config.sample.clip=recompute"], "there is nothing to clip"),
    ("train.py", [MEANFLOW, "--config.train.weighting=snr"], "mean_flow has its own weights; set it to simple"),
    ("train.py", [MEANFLOW, "--config.teacher=shipped"], "config.teacher predicts eps; .*prediction=flow"),
    ("train.py", [GUIDED, "--config.teacher=shipped"], "config.teacher has no classes; .* needs them"),
    ("train.py", [GUIDED, "--config.teacher="], "learns from a teacher; name one as --config.teacher=RUN"),
    ("train.py", ["--config.train.objective=guidance_distillation:scales=2,4"], "are 2,4; .*as scales=1,4"),
    # Networks and samplers of one's own.
    ("train.py", ["--network=nowhere.near:net"], "there is no module nowhere in .*; start in its folder"),
    ("train.py", ["--network=json.py:dumps"], "no module json.py .*; write the module without .py"),
    ("train.py", ["--network=json:dmups"], "module json has no function 'dmups'; did you mean 'dumps'"),
    ("train.py", ["--network=file:net"], r"importing file fails with SyntaxError: .*\(file.py, line 1\)"),
    ("train.py", ["--network=operator:neg"], r"takes \(a\); it must take \(image_shape, out_channels, num_classes\)"),
    ("train.py", ["--network=bisect:insort"], "network bisect:insort fails with AttributeError: .*insert"),
    (
        "train.py",
        ["--network=unnet"],
        "config.network is 'unnet'; it must be unet, transformer, unet2d, or your own as package",
    ),
    (
        "train.py",
        ["--network=json:dumps", "--config.model.width=8"],
        "width is for network unet; .*json:dumps:width=VALUE",
    ),
    ("train.py", ["--config.network=json:dmups"], "did you mean 'dumps'"),
    ("train.py", ["--config.sample.sampler=operator:add"], "sampler operator:add fails with TypeError"),
    ("sample.py", [RUN, "--sampler=operator:is_"], "returns a bool; it must return a SamplerTable"),
    ("sample.py", [RUN, "--sampler=nowhere:f:a=1"], "there is no module nowhere"),
    ("sample.py", [RUN, "--sampler=operator:is_", "--eta=1"], "operator:is_ has no option 'eta'"),
    ("sample.py", [RUN, "--network=json:dumps"], "trained with 'unet'; leave out --network"),
    ("evaluate.py", [RUN, "--samplers=ddim,operator:is_"], "returns a bool"),
    ("convert.py", [RUN, "--network=json:dumps"], "trained with 'unet'; leave out --network"),
    ("convert.py", [], "there is no run in runs/; train one with"),
    ("convert.py", [RUN, "--out=model.bin"], "must end in .safetensors"),
    ("convert.py", [RUN, "--step=3"], "no checkpoint of step 3; there are: 5, 10, 12"),
    ("convert.py", [RUN, "--figures=$FILE"], "cannot be read as JSON"),
    ("sample.py", ["--workdir=$FILE"], "holds no checkpoint"),
    ("sample.py", ["--workdir=nowhere.safetensors"], "there is no file nowhere.safetensors"),
    ("sample.py", [RUN, "--steps=0"], r"steps is 0; .* 1\.\.1000"),
    ("sample.py", [RUN, "--steps=1001"], r"steps is 1001; .* 1\.\.1000"),
    ("sample.py", [RUN, "--eta=1.5"], r"eta is 1.5; it must lie in 0\.\.1"),
    ("sample.py", [RUN, "--eta=nan"], "eta is nan"),
    ("sample.py", [RUN, "--sampler=dimm"], "did you mean 'ddim'"),
    ("sample.py", [RUN, "--sampler=adaptive:rtol=-1"], "rtol is -1.0; it must be at least 0"),
    (
        "sample.py",
        [RUN, "--sampler=adaptive", "--steps=5"],
        "--steps is for samplers with a number of steps",
    ),
    ("sample.py", [RUN, "--sampler=adaptive", "--tau=leading"], "leading starts where its .* none; take uniform"),
    ("sample.py", [RUN, "--corrector=langevin:steps=999999999"], "network calls; give fewer, up to 1,000,000"),
    ("sample.py", [RUN, "--eta=1", "--afs=score"], "draws noise in its first step"),
    ("sample.py", [RUN, "--corrector=langevni"], "corrector is 'langevni'; did you mean 'langevin'"),
    ("sample.py", [RUN, "--sampler=unipc", "--corrector=langevin"], "cannot have a Langevin corrector; use"),
    ("sample.py", [RUN, "--noise=brownian", "--eta=0"], "draws no noise in its steps, so none can be brownian"),
    ("sample.py", [RUN, "--tau=unifrom"], "did you mean 'uniform'"),
    ("sample.py", [RUN, "--tau=explicit:times=10,20"], "not strictly descending"),
    (
        "sample.py",
        [RUN, "--sampler=ddpm", "--eta=1"],
        "ddpm has no option 'eta'; those that have one: ddim",
    ),
    # Names of other libraries
    ("sample.py", [RUN, "--sampler=uni_pc"], r"two things: unipc:order=3,variant=bh1 .* and unipc:order=2,variant=bh2"),
    ("sample.py", [RUN, "--sampler=dpm_2_ancestral", "--eta=0.5"], "dpm_solver:order=2,eta=1.0 has its eta in its opt"),
    ("sample.py", [RUN, "--sampler=PNDMScheduler()x"], "is no call of PNDMScheduler; write .* nothing after it"),
    ("sample.py", [RUN, "--sampler=edm:s_noise=1.01"], "s_churn is 0, so that no noise is added, .*give s_churn"),
    ("sample.py", [RUN, "--sampler=dpmpp_2m:s_noise=1.1"], "no noise that it acts on; give sde_eta above 0"),
    ("sample.py", [RUN, "--sampler=dpmpp_2m_beta"], "'beta' in 'dpmpp_2m_beta' means two things"),
    ("sample.py", [RUN, "--sampler=dpmpp_2m_karras", "--tau=uniform"], "takes the grid karras; leave out --tau"),
    ("sample.py", [RUN, "--sampler=euler_a:order=2"], "euler_ancestral has no option 'order'"),
    ("sample.py", [RUN, "--sampler=DPMSolverMultistepScheduler(solver_order)"], "'solver_order' is no argument"),
    ("sample.py", [RUN, "--sampler=DPMSolverMultistepScheduler(ordre=2)"], "has a field 'ordre'"),
    ("sample.py", [RUN, "--sampler=FooScheduler(order=2)"], "FooScheduler is not known with its arguments"),
    ("evaluate.py", [RUN, "--samplers=dpmpp_2m_karras"], "names a grid as well"),
    # Options of samplers and grids that others have
    ("sample.py", [RUN, "--sampler=dpm_solver:calls=fas"], "did you mean 'fast'"),
    ("sample.py", [RUN, "--sampler=unipc:end=900", "--steps=5"], "end is 900"),
    ("sample.py", [RUN, "--tau=ays", "--steps=5"], "begins at noise / signal 14.615"),
    ("sample.py", [RUN, "--tau=shifted:shift=2,mu=1"], "which say the same; give one of them"),
    ("sample.py", [RUN, "--sampler=ddim:eta=0", "--eta=1"], "leave out --eta"),
    ("sample.py", [RUN, "--sampler=ddim:eta=0,eta=1"], "'eta' twice"),
    ("sample.py", [RUN, "--sampler=ddim:0.5"], "has no name; write ddim:eta=0.5"),
    ("sample.py", [RUN, "--tau=explicit:1000,500"], "write explicit:times=1000,500"),
    ("sample.py", [RUN, "--tau=sections:10,15"], "write sections:counts=10,15"),
    ("sample.py", [RUN, "--tau=sections"], "tau sections needs counts"),
    ("sample.py", [RUN, "--sampler=nowhere.json"], "nowhere.json cannot be read"),
    ("sample.py", [RUN, "--sampler=$FILE.json"], "file.json: this is no sampler table"),
    ("sample.py", [RUN, "--sampler=$OTHER.json"], "for another noise schedule"),
    ("sample.py", [RUN, "--sampler=$OTHER.json", "--steps=3"], "leave out --steps"),
    ("sample.py", [RUN, "--guidance_rule=agp"], "did you mean 'apg'"),
    ("sample.py", [RUN, "--guidance_rule=apg:mometum=0"], "did you mean 'momentum'"),
    (
        "sample.py",
        [RUN, "--guidance_model=nowhere", "--guidance_scale=2"],
        "no checkpoint",
    ),
    ("sample.py", [RUN, "--num=0"], "num=0"),
    ("sample.py", [RUN, "--clip=yes"], "valid: keep_eps, none, recompute"),
    ("sample.py", [RUN, "--out=$FILE/x"], "Not a directory"),
    ("sample.py", [RUN, "--sampler=dpm_solver_pp:ordr=3"], "did you mean 'order'"),
    ("sample.py", [RUN, "--sampler=unipc:order=7"], r"order is 7; .* 1\.\.4"),
    (
        "sample.py",
        [RUN, "--sampler=unipc:order=x"],
        "unipc:order is 'x'; write a whole number",
    ),
    ("sample.py", [RUN, "--sampler=unipc:order"], "has no value"),
    ("sample.py", [RUN, "--guidance_scale=2"], "no classes"),
    ("sample.py", [RUN, "--guidance_rule=cfg++"], "no classes: .*--guidance_rule"),
    ("sample.py", [RUN, "--guidance_interval=1,5"], "no classes: .*--guidance_interval"),
    ("sample.py", [RUN, "--labels=3"], "no classes"),
    ("sample.py", [RUN, "--clip=none", "--dynamic_threshold=0.9"], "exclude each other"),
    ("sample.py", [RUN, "--num=999999999999"], "num=999999999999"),
    ("sample.py", [RUN, "--dynamic_threshold=2"], "dynamic_threshold is 2"),
    ("sample.py", [RUN, "--seeds=5-1"], "seeds are '5-1'"),
    ("sample.py", [RUN, "extra"], "unexpected argument 'extra'"),
    ("sample.py", [RUN, "--sampler=ddpm:variance=learned"], "predicts none"),
    ("sample.py", [RUN, "--strength=0.5"], "--strength does nothing without --init"),
    ("sample.py", [RUN, "--mask=$FILE"], "--mask does nothing without --init"),
    ("sample.py", [RUN, "--init=$FILE", "--resample=3"], "--resample does nothing without --mask"),
    ("sample.py", [RUN, "--init=$FILE"], "--init=.*file cannot be read .it is damaged, or no picture"),
    ("sample.py", [RUN, "--init=$FILE", "--strength=0"], r"strength is 0.0; it must be in 0\.\.1, without 0"),
    ("sample.py", [RUN, "--init=$FILE", "--sampler=learned"], "has its own start"),
    ("sample.py", [RUN, "--interpolate=3"], "interpolate is '3'; write the numbers of two images, as 3,17"),
    ("sample.py", [RUN, "--interpolate=3,4", "--seeds=1"], "exclude each other"),
    ("sample.py", [RUN, "--interpolate=3,4", "--eta=1"], "adds noise in its steps"),
    ("evaluate.py", [RUN, "--num=1"], "num=1"),
    ("evaluate.py", [RUN, "--bound=ten"], "bound is 'ten'"),
    ("evaluate.py", [RUN, "--steps=5,x"], "steps is '5,x'"),
    ("evaluate.py", [RUN, "--samplers=ddim,dimm"], "did you mean 'ddim'"),
    ("evaluate.py", [RUN, "--metrics=fid"], "in the space 'pixels' ask for 'frechet'"),
    ("evaluate.py", [RUN, "--metrics=frechte"], "did you mean 'frechet'"),
    ("evaluate.py", [RUN, "--metrics=score"], "pixels have no classes"),
    ("evaluate.py", [RUN, "--features=pixles"], "did you mean 'pixels'"),
    ("evaluate.py", [RUN, "--steps=5,5"], "twice"),
    ("evaluate.py", [RUN, "--samplers=unipc", "--etas=0"], "none of unipc takes one"),
    ("evaluate.py", [RUN, "--inception=x.pth"], "goes with --features=inception"),
    (
        "evaluate.py",
        [RUN, "--features=inception", "--inception=x.pth"],
        "no file x.pth; .*--inception=FILE names the file, and --features=classifier",
    ),
    ("evaluate.py", [RUN, "--bound=0"], "steps is 0"),
    ("evaluate.py", [RUN, "--bound=5", "--variances=smal"], "variances has 'smal'; did you mean 'small'"),
    ("evaluate.py", [RUN, "--bound=5", "--variances=learned"], "the model predicts none"),
    ("evaluate.py", [RUN, "--bound=5", "--variances=small,small"], "name each once"),
    ("evaluate.py", [RUN, "--variances=small"], "--variances goes with --bound"),
    ("evaluate.py", [RUN, "--bound="], "bound is ''; write numbers"),
    ("evaluate.py", [RUN, "--steps="], "steps is ''; write numbers"),
    ("evaluate.py", [RUN, "--samplers=,"], "names no sampler"),
    ("evaluate.py", [RUN, "--etas="], "etas is ''; write numbers"),
    ("evaluate.py", [RUN, "--metrics="], "no metric is named"),
    ("evaluate.py", [RUN, "--bound=5", "--metrics=frechet"], "--metrics is for samples"),
    ("evaluate.py", [RUN, "--likelihood=5", "--clip=none"], "--clip goes with --bound"),
    ("evaluate.py", [RUN, "--bound=5", "--clip=keep_eps"], "clip is 'keep_eps'; .*valid"),
    (
        "evaluate.py",
        [RUN, "--bound=5", "--tau=sections:counts=2,2"],
        "name a grid, as uniform",
    ),
    ("evaluate.py", [RUN, "--first=5"], "--first goes with --bound"),
    ("evaluate.py", [RUN, "--steps=4", "--tau=sections:counts=2,2"], "leave out --steps"),
    ("evaluate.py", [RUN, "--split=test"], r"has no config\.data\.split='test'"),
    ("evaluate.py", [RUN, "--likelihood=5,0"], "steps is 0"),
    # The size of batches
    ("sample.py", [RUN, "--batch_size=0"], "batch_size=0: give a whole number of at least 1, or auto"),
    ("learn.py", [RUN, "--batch_size=auto"], "batch_size=auto: write a whole number"),
    # Caching: networks without levels, tables of one call, and numbers that are none
    ("sample.py", [RUN, "--cache=2"], "this one has none to keep; leave it out, or take a UNet of at least 2 levels"),
    ("sample.py", ["--workdir=shipped", "--cache=1", "--steps=1"], "this table makes one; leave it out"),
    ("sample.py", ["--workdir=shipped", "--cache=0", "--steps=9"], "cache is 0; this table makes 9 calls, so give 1"),
    ("sample.py", ["--workdir=shipped", "--cache=10", "--steps=9"], "so give 1 to 9"),
    ("sample.py", ["--workdir=shipped", "--cache=1,2"], "name each once, in order, and begin with call 0"),
    ("sample.py", ["--workdir=shipped", "--cache=0,9", "--steps=9"], "the calls of this table are 0 to 8"),
    ("sample.py", ["--workdir=shipped", "--cache=2.5"], "cache is '2.5'; write a number k as 3, or calls with commas"),
    ("evaluate.py", ["--workdir=shipped", "--cache=4", "--steps=9,3"], "this table makes 3 calls, so give 1 to 3"),
    ("evaluate.py", [RUN, "--bound=5", "--cache=2"], "--cache is for samples"),
    # Folders of diffusers
    ("sample.py", ["--workdir=$FOLDER", "--steps=5"], "UNet3DModel is not supported; supported: UNet2DModel"),
    ("evaluate.py", ["--workdir=$FOLDER"], "UNet3DModel is not supported"),
    ("learn.py", ["--workdir=$FOLDER"], "UNet3DModel is not supported"),
    ("convert.py", ["--workdir=$FOLDER"], "UNet3DModel is not supported"),
    ("convert.py", ["--workdir=$FOLDER", "--step=3"], "--step is for runs, and .*folder is a folder of diffusers"),
    ("convert.py", ["--workdir=$FOLDER", "--out=it.bin"], "its name must end in .safetensors"),
    ("convert.py", ["--workdir=shipped", "--to=diffusers"], "--to=diffusers needs --out"),
    ("convert.py", ["--workdir=shipped", "--to=diffusers", "--out=x"], "makes norms of .* groups.*network=unet2d"),
    # Learned tables
    ("learn.py", [RUN, "--calls=0"], r"calls is '0'; give whole numbers in 1\.\.50, each once"),
    ("learn.py", [RUN, "--calls=1001"], r"calls is '1001'; .* 1\.\.50"),
    ("learn.py", [RUN, "--calls=five"], "calls is 'five'; give whole numbers in .*, as 3,5,10"),
    ("learn.py", [RUN, "--calls=3,3"], "each once"),
    ("learn.py", [RUN, "--scope=taus"], "did you mean 'tau'"),
    ("learn.py", [RUN, "--teacher=ddpm"], "draws noise at every step"),
    ("learn.py", [RUN, "--teacher=analytic_dpm"], "draws noise at every step"),
    ("learn.py", [RUN, "--loss=l2"], "loss is 'l2'; valid: features, l1, log, mse"),
    ("learn.py", [RUN, "--loss=log:floor=0"], "floor of loss log is 0.*must be above 0"),
    ("learn.py", [RUN, "--loss=features:space=hats"], "features is 'hats'; valid: classifier, inception, pixels"),
    ("learn.py", [RUN, "--loss=features:file=x"], "file goes with space=inception"),
    ("learn.py", [RUN, "--teacher=unpc"], "did you mean 'unipc'"),
    ("learn.py", [RUN, "--teacher=$OTHER.json"], "names a table; name a solver"),
    ("learn.py", [RUN, "--teacher_calls=5000"], "teacher_calls is 5000; this model has 1000 timesteps: give 2..1000"),
    ("learn.py", [RUN, "--calls=" + "9" * 5000], r"calls is '9{40}'; give whole numbers in 1\.\.50"),
    ("sample.py", [RUN, "--tau=dp_bound", "--steps=1"], "steps is 1; tau dp_bound has at least 2"),
    ("learn.py", [RUN, "--guidance_scale=2"], "this model has no classes"),
    (
        "sample.py",
        [RUN, "--sampler=learned", "--steps=7"],
        "no table of 7 calls .*none has been learned.*learn.py .*=7",
    ),
    ("sample.py", [RUN, "--sampler=learned", "--tau=uniform"], "its own grid; leave out --tau"),
    ("sample.py", [RUN, "--sampler=learned", "--eta=1"], "--eta does nothing"),
    ("sample.py", ["--workdir=shipped", "--sampler=$LEARNED.json"], "of another prediction, v and not eps"),
    ("sample.py", ["--workdir=shipped", "--sampler=$NEWER.json"], "its version is '3'.* up to 2"),
    ("sample.py", [RUN, "--tau=uniform:start=1.5"], "start of tau is 1.5"),
    ("train.py", ["--config.sample.sampler=learned"], "learned for a trained model"),
    ("evaluate.py", [RUN, "--likelihood=5", "--first=1798"], "more than the 1797 images"),
    # A ranking of samplers
    ("evaluate.py", [RUN, "--rank"], "--rank needs budgets of network calls; add --calls=5,10"),
    ("evaluate.py", [RUN, "--calls=5"], "--calls is for --rank; leave it out"),
    (
        "evaluate.py",
        [RUN, "--bound=5", "--batch_size=auto"],
        "batch_size is auto, .* a bound or likelihood takes a whole",
    ),
    ("evaluate.py", [RUN, "--rank", "--calls=0"], r"calls is '0'; give whole numbers in 1\.\.1000, each once"),
    ("evaluate.py", [RUN, "--rank", "--calls=5,1001"], r"calls is '5,1001'; give whole numbers in 1\.\.1000"),
    ("evaluate.py", [RUN, "--rank", "--calls=5,5"], "calls is '5,5'; .*each once"),
    ("evaluate.py", [RUN, "--rank", "--calls="], "calls is ''; give whole numbers"),
    ("evaluate.py", [RUN, "--rank", "--calls=5", "--metrics=frechet"], "--metrics does nothing with --rank; leave"),
    ("evaluate.py", [RUN, "--rank", "--calls=5", "--bound=5"], "--bound does nothing with --rank"),
    ("evaluate.py", [RUN, "--rank", "--calls=5", "--steps=5"], "--steps does nothing with --rank"),
    ("evaluate.py", [RUN, "--rank", "--calls=5", "--out=$FILE"], "file: File exists; check this path"),
    ("evaluate.py", [RUN, "--rank", "--calls=5", "--samplers=ddpm"], "sampler ddpm draws noise at its steps"),
    ("evaluate.py", [RUN, "--rank", "--calls=5", "--samplers=unpc"], "did you mean 'unipc'"),
    ("evaluate.py", [RUN, "--rank", "--calls=5", "--samplers=mine.json"], "is a table in a file, and --rank tries"),
    ("evaluate.py", [RUN, "--rank", "--calls=1", "--samplers=heun:x=1"], "heun has no option"),
    ("evaluate.py", [RUN, "--rank", "--calls=5", "--tau=explicit:times=9,5"], "--rank tries numbers of steps"),
    ("evaluate.py", [RUN, "--rank", "--calls=5", "--tau=unifrm"], "did you mean 'uniform'"),
]


@pytest.fixture(scope="session")
def mistakes(trained, tmp_path_factory):
    """All mistakes, made side by side in forks of processes that have imported JAX, which takes most of their time."""
    workers = queue.SimpleQueue()

    def make(mistake):
        script, args, _ = mistake
        cwd = tmp_path_factory.mktemp("mistake")
        (cwd / "file").touch()
        (cwd / "file.py").write_text("1 +")
        (cwd / "file.json").write_text('{"tau": [1, 0]}')
        (cwd / "old.py").write_text(OLD_CONFIG)
        (cwd / "other.json").write_text(OTHER_TABLE)
        (cwd / "learned.json").write_text(json.dumps(LEARNED))
        (cwd / "newer.json").write_text(json.dumps(NEWER))
        (cwd / "folder").mkdir()
        (cwd / "folder/config.json").write_text('{"_class_name": "UNet3DModel"}')
        names = {"LEARNED": cwd / "learned", "NEWER": cwd / "newer"}
        names |= {"TRAINED": trained, "FILE": cwd / "file", "OLD": cwd / "old", "OTHER": cwd / "other"}
        names["FOLDER"] = cwd / "folder"
        args = [re.sub(r"\$([A-Z]+)", lambda m: str(names[m[1]]), a) for a in args]
        worker = workers.get()
        made = worker.run(script.removesuffix(".py"), args, cwd)
        workers.put(worker)
        result = subprocess.CompletedProcess(args, made.code, made.out, made.err)
        return result, sorted(path.name for path in cwd.iterdir())

    before, cores = sorted(trained.rglob("*")), os.cpu_count()
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(cores) as pool:
        for _ in range(cores):
            workers.put(stack.enter_context(Programs({})))
        results = list(pool.map(make, MISTAKES))
    assert sorted(trained.rglob("*")) == before
    return results


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=lambda n: " ".join(MISTAKES[n][1])[:60] or "nothing")
def test_a_mistake_is_one_line_with_code_2_and_leaves_nothing(mistakes, number):
    result, left = mistakes[number]
    assert re.search(MISTAKES[number][2], error_line(result)), result.stderr
    made = ["file", "file.json", "file.py", "folder", "learned.json", "newer.json", "old.py", "other.json"]
    assert left == made
