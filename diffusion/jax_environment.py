"""Looks at the environment variable that JAX reads while it is imported, before that; a wrong one ends in a traceback.

The package imports this module first. `devices.prepare` tells the user of a program, and the library warns.
"""

import os
import re
import sys
import warnings
from pathlib import Path

PROGRAMS = ("-m", "train.py", "sample.py", "evaluate.py", "convert.py")
"""What sys.argv names while a program of this package starts, which calls `devices.prepare`."""

_NAME = "JAX_NUM_CPU_DEVICES"

wrong_num_cpu_devices: str | None = None
"""The value of JAX_NUM_CPU_DEVICES that was taken out of the environment because it is no number of devices."""

if not re.fullmatch(r"|-1|[1-9]\d{0,3}", os.environ.get(_NAME, "")):
    wrong_num_cpu_devices = os.environ.pop(_NAME)
    if Path(sys.argv[0]).name not in PROGRAMS:
        warnings.warn(f"{_NAME} is {wrong_num_cpu_devices!r}, no number of devices; it is left out", stacklevel=2)
