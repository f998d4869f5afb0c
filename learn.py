"""Learns samplers of few steps for a run; the program is diffusion/commands/learn.py, and --help lists its flags."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    # A signal or a closed stream should do in the seconds of imports what it does later.
    runpy.run_path(str(Path(__file__).parent / "diffusion" / "process.py"))["ready"]()

    from diffusion.commands import learn

    learn.launch()
