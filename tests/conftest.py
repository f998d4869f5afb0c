"""Strict JAX settings for all tests, and double precision on request."""

import signal

import jax
import pytest
from commands import shared_cache, train

from diffusion.process import STOPPING

jax.config.update("jax_num_cpu_devices", 8)  # for what must not depend on their number
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def float64():
    """Runs a test in double precision, for identities that are exact."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def hardly_optimized():
    """Lets XLA hardly optimize, for modules whose tests take longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def compile_once(tmp_path_factory):
    """Lets commands in other processes share what XLA compiled; most of their time is compilation."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in shared_cache(tmp_path_factory.mktemp("compiled")).items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def trained(compile_once, tmp_path_factory):
    """A folder in which `python train.py` has trained a tiny digits model for 12 steps."""
    cwd = tmp_path_factory.mktemp("trained")
    result = train(cwd, "--config.train.num_steps=12", "--config.train.log_every=5", "--config.train.save_every=5")
    assert result.returncode == 0, result.stderr
    return cwd


@pytest.fixture(autouse=True)
def hears_signals():
    """Lets tests send signals also where a shell's & or nohup has told this process, and so its children, to ignore."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPPING}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def report(capsys):
    """Prints a line that pytest does not hide."""

    def report(line):
        with capsys.disabled():
            print(f"\n  {line}", flush=True)

    return report
