"""Strict JAX settings for all tests, and double precision on request."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # for what must not depend on their number
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def float64():
    """Runs a test in double precision, for identities that are exact."""
    with jax.enable_x64(True):
        yield
