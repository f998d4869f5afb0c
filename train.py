"""Trains a diffusion model; the program is diffusion/commands/train.py, and --help lists its flags."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    # A signal or a closed stream should do in the seconds of imports what it does later.
    runpy.run_path(str(Path(__file__).parent / "diffusion" / "process.py"))["ready"](resumes=True)

    from diffusion.commands import train

    train.launch()
