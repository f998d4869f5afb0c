"""Strict JAX settings for all tests, and double precision on request."""

import jax
import pytest
from commands import shared_cache

jax.config.update("jax_num_cpu_devices", 8)  # for what must not depend on their number
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def float64():
    """Runs a test in double precision, for identities that are exact."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def compile_once(tmp_path_factory):
    """Lets commands in other processes share what XLA compiled; most of their time is compilation."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in shared_cache(tmp_path_factory.mktemp("compiled")).items():
            patch.setenv(name, value)
        yield
