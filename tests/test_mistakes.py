"""What a user gets wrong ends in one line that names the remedy."""

import concurrent.futures
import os
import re

import pytest
from commands import ROOT, TINY, error_line, run

pytestmark = pytest.mark.usefixtures("compile_once")

# (script, arguments, what the line says); $TRAINED is a folder with a trained run
MISTAKES = [
    ("train.py", ["--workdri=x"], "no flag --workdri; did you mean 'workdir'.*--config.FIELD"),
    ("train.py", ["--config.model.widht=8"], "no field 'widht'; did you mean 'width'"),
    ("train.py", ["--config.modle.width=8"], "no field 'modle'; did you mean 'model'"),
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
    ("train.py", ["--config.train.batch_size=0"], "batch_size is 0; it must be at least 1"),
    ("train.py", ["--config.data.name=digts"], "did you mean 'digits'"),
    ("train.py", ["--config.schedule.name=cosin"], "did you mean 'cosine'"),
    ("train.py", ["--config.train.prediction=noise"], "valid: eps, flow, v, x0"),
    ("train.py", ["--config.model.width=33"], "width is 33; it must be even"),
    ("train.py", ["--config.model.multipliers=1,1,1,1,1"], "cannot be halved 4 times"),
    ("train.py", ["--config.sample.steps=0"], "steps is 0"),
    ("train.py", ["--config.sample.clip=recomput"], "did you mean 'recompute'"),
    ("train.py", ["--config.sample.num=0"], "sample.num is 0; it must be at least 1"),
    ("train.py", ["--config.model.out_channels=3"], "images have 1 channels"),
    ("train.py", ["--config.model.num_heads=0"], "num_heads is 0"),
    ("train.py", ["--config.model.dropout=1.5"], "dropout is 1.5"),
    ("train.py", ["--config.schedule.name=cosine", "--config.schedule.cosine.max_beta=1.0"], "zero signal"),
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
    ("train.py", ["--config.optimizer.learning_rate=nan"], "learning_rate is nan; it must be above 0"),
    ("train.py", ["--config.optimizer.learning_rate=inf"], "learning_rate is inf; it must be above 0"),
    ("train.py", ["--config.optimizer.b1=1.5"], r"b1 is 1.5; it must be in 0\.\.1"),
    ("train.py", [f"--config={ROOT}/configs/images.py"], "config.data.path"),
    ("train.py", [f"--config={ROOT}/configs/images.py", "--config.data.path=nowhere.zip"], "nowhere.zip"),
    ("train.py", [f"--config={ROOT}/configs/cifar.py", "--config.data.path=nowhere.tar.gz"], "nowhere.tar.gz"),
    ("train.py", ["--workdir=$FILE/run"], "Not a directory"),
    ("train.py", [*TINY, "--workdir=$TRAINED/runs/digits", "--config.model.width=8"], "config.model.width is 8, .* 4"),
    ("convert.py", [], "there is no run in runs/; train one with"),
    ("convert.py", ["--workdir=$TRAINED/runs/digits", "--out=model.bin"], "must end in .safetensors"),
    ("convert.py", ["--workdir=$TRAINED/runs/digits", "--step=3"], "no checkpoint of step 3; there are: 5, 10, 12"),
    ("convert.py", ["--workdir=$TRAINED/runs/digits", "--figures=$FILE"], "cannot be read as JSON"),
    ("sample.py", ["--workdir=$FILE"], "holds no checkpoint"),
    ("sample.py", ["--workdir=nowhere.safetensors"], "there is no file nowhere.safetensors"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--steps=0"], r"steps is 0; .* 1\.\.1000"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--steps=1001"], r"steps is 1001; .* 1\.\.1000"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--eta=1.5"], r"eta is 1.5; it must lie in 0\.\.1"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--eta=nan"], "eta is nan"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--sampler=dimm"], "did you mean 'ddim'"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--tau=unifrom"], "did you mean 'uniform'"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--tau=explicit:10,20"], "not strictly descending"),
    (
        "sample.py",
        ["--workdir=$TRAINED/runs/digits", "--sampler=ddpm", "--eta=1"],
        "ddpm has no option 'eta'; valid: variance",
    ),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--num=0"], "num=0"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--clip=yes"], "valid: keep_eps, none, recompute"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--out=$FILE/x"], "Not a directory"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--sampler=dpm_solver_pp:ordr=3"], "did you mean 'order'"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--sampler=unipc:order=7"], r"order is 7; .* 1\.\.4"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--sampler=unipc:order=x"], "unipc:order is 'x'; write a number"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--sampler=unipc:order"], "has no value"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--guidance_scale=2"], "no classes"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--guidance_rule=cfg++"], "no classes: .*--guidance_rule"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--guidance_interval=1,5"], "no classes: .*--guidance_interval"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--labels=3"], "no classes"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--clip=none", "--dynamic_threshold=0.9"], "exclude each other"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--num=999999999999"], "num=999999999999"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--dynamic_threshold=2"], "dynamic_threshold is 2"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--seeds=5-1"], "seeds are '5-1'"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "extra"], "unexpected argument 'extra'"),
    ("sample.py", ["--workdir=$TRAINED/runs/digits", "--sampler=ddpm:variance=learned"], "predicts none"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--num=3"], "num=3"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--bound=ten"], "bound is 'ten'"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--steps=5,x"], "steps is '5,x'"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--samplers=ddim,dimm"], "did you mean 'ddim'"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--metrics=fid"], "in the space 'pixels' ask for 'frechet'"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--metrics=frechte"], "did you mean 'frechet'"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--metrics=score"], "pixels have no classes"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--features=pixles"], "did you mean 'pixels'"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--steps=5,5"], "twice"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--samplers=unipc", "--etas=0"], "none of unipc takes one"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--inception=x.pth"], "goes with --features=inception"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--features=inception", "--inception=x.pth"], "x.pth"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--bound=0"], "steps is 0"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--bound="], "bound is ''; write numbers"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--steps="], "steps is ''; write numbers"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--samplers=,"], "names no sampler"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--metrics="], "no metric is named"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--bound=5", "--metrics=frechet"], "--metrics is of samples"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--likelihood=5", "--clip=none"], "--clip goes with --bound"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--bound=5", "--clip=keep_eps"], "clip is 'keep_eps'; .*valid"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--bound=5", "--tau=sections:2,2"], "name a grid, as uniform"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--first=5"], "--first goes with --bound"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--steps=4", "--tau=sections:2,2"], "leave out --steps"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--split=test"], "no split='test'"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--likelihood=5,0"], "steps is 0"),
    ("evaluate.py", ["--workdir=$TRAINED/runs/digits", "--likelihood=5", "--first=1798"], "more than the 1797 images"),
]


@pytest.fixture(scope="session")
def mistakes(trained, tmp_path_factory):
    """All mistakes, made side by side, as most of their time is starting Python."""

    def make(mistake):
        script, args, _ = mistake
        cwd = tmp_path_factory.mktemp("mistake")
        (cwd / "file").touch()
        (cwd / "file.py").write_text("1 +")
        args = [a.replace("$TRAINED", str(trained)).replace("$FILE", str(cwd / "file")) for a in args]
        return run(script, *args, cwd=cwd), sorted(path.name for path in cwd.iterdir())

    before = sorted(trained.rglob("*"))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(make, MISTAKES))
    assert sorted(trained.rglob("*")) == before
    return results


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=lambda n: " ".join(MISTAKES[n][1])[:60] or "nothing")
def test_a_mistake_is_one_line_with_code_2_and_leaves_nothing(mistakes, number):
    result, left = mistakes[number]
    assert re.search(MISTAKES[number][2], error_line(result)), result.stderr
    assert left == ["file", "file.py"]
