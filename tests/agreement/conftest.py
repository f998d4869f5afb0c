"""Imports torchvision for the comparisons whose other side needs it."""

import re
import sys

import pytest


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, also where it was built for another torch.

    It then misses compiled operations, which are declared before it is imported: no network here calls one of them.
    """
    torch = pytest.importorskip("torch")
    declared = None
    while True:
        try:
            yield pytest.importorskip("torchvision", reason="pip install --no-deps torchvision")
            break
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        declared = declared or torch.library.Library("torchvision", "FRAGMENT")
        declared.define(f"{missing[1]}(Tensor a, Tensor b, float c) -> Tensor")
    del declared  # torch forgets what it declares when this is dropped
