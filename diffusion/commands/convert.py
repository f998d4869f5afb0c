"""Writes a trained run to one file: `python convert.py --workdir=runs/digits --out=digits.safetensors`.

The file holds one EMA of the parameters, the config and, with --figures=FILE.json, what was measured. sample.py and
evaluate.py take it as --workdir.
"""

from pathlib import Path

from absl import flags

from diffusion.commands import cli, own, reconstructions, usage
from diffusion.errors import InputError
from diffusion.files import read_json
from diffusion.pretrained import autoencoders, weights
from diffusion.training import run_folder
from diffusion.training.autoencoders import load_autoencoder
from diffusion.training.run_folder import load_trained

usage.group("The model, and the file")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder. Default: the newest in runs/.")
_EMA = flags.DEFINE_string("ema", None, "Which of the run's config.train.ema_decays, as 0.999. Default: the first.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint. Default: the newest.", lower_bound=1)
_NETWORK = flags.DEFINE_string("network", None, "The run's own network, as package.module:function, which is imported.")
_OUT = flags.DEFINE_string("out", None, "File to write, NAME.safetensors. Default: one named after the run folder.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", *weights.HALVES], "How matrices are kept; half precision halves the file."
)
_FIGURES = flags.DEFINE_string("figures", None, "JSON file with figures to keep as well, as evaluate.py writes them.")


def main() -> None:
    folder = run_folder.existing(_WORKDIR.value) if _WORKDIR.value else run_folder.newest("runs")
    if folder is None:
        raise InputError("there is no run in runs/; train one with `python train.py`, or name one with --workdir")
    out = Path(_OUT.value or f"{folder.path.name}{weights.SUFFIX}").expanduser()
    if out.suffix != weights.SUFFIX:
        raise InputError(f"out is {str(out)!r}; its name must end in {weights.SUFFIX}")
    figures = _read_figures(_FIGURES.value) if _FIGURES.value else {}
    trained = _write(folder, out, figures)
    size = out.stat().st_size / 2**20
    print(f"{folder.path}, step {trained.step:,}, EMA {trained.ema}: wrote {out}, {size:.2f} MiB")


def _write(folder, out, figures):
    """Writes the model, or autoencoder, of a run to a file; returns it."""
    if reconstructions.is_autoencoder(folder):
        found = load_autoencoder(folder.path, _EMA.value or "", _STEP.value)
        own.check_used(_NETWORK.value, found.config)
        autoencoders.save(out, found, figures, _DTYPE.value)
        return found
    trained = load_trained(folder, _EMA.value or "", _STEP.value, own.networks(_NETWORK.value))
    own.check_used(_NETWORK.value, trained.config)
    weights.save(out, trained, figures, _DTYPE.value)
    return trained


def _read_figures(path):
    """Returns what a JSON file holds."""
    try:
        return read_json(Path(path).expanduser())
    except (OSError, InputError) as error:
        raise InputError(f"figures {path} cannot be read as JSON ({error})") from None


def launch() -> None:
    """Runs the program with the flags of the command line; never returns."""
    cli.start(main, about=__doc__)
