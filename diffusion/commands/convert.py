"""Writes a trained run to one file: `python convert.py --workdir=runs/digits --out=digits.safetensors`.

The file holds one EMA of the parameters, the config and, with --figures=FILE.json, what was measured. sample.py and
evaluate.py take it as --workdir. A folder that diffusers wrote, or a model of the Hugging Face Hub, becomes such a file
as well: `python convert.py --from=google/ddpm-cifar10-32 --out=it.safetensors`. With --to=diffusers a run or a file
becomes a folder that diffusers reads.
"""

from pathlib import Path

from absl import flags

from diffusion import pretrained
from diffusion.autoencoder import TrainedAutoencoder
from diffusion.commands import cli, opening, own, reconstructions, usage
from diffusion.errors import InputError
from diffusion.files import read_json
from diffusion.interop import diffusers
from diffusion.pretrained import autoencoders, weights
from diffusion.training import run_folder
from diffusion.training.autoencoders import load_autoencoder
from diffusion.training.run_folder import load_trained

usage.group("The model, and the file")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run folder, folder of diffusers, or an id of the Hugging Face Hub. Default: the newest in runs/."
)
flags.DEFINE_alias("from", "workdir")
_EMA = flags.DEFINE_string("ema", None, "Which of the run's config.train.ema_decays, as 0.999. Default: the first.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint. Default: the newest.", lower_bound=1)
_NETWORK = flags.DEFINE_string("network", None, "The run's own network, as package.module:function, which is imported.")
_TO = flags.DEFINE_enum("to", "file", ["file", "diffusers"], "What to write: one file, or a folder of diffusers.")
_OUT = flags.DEFINE_string(
    "out", None, "File to write, NAME.safetensors, or folder. Default: one named after the run folder."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", *weights.HALVES], "How a file keeps matrices; half precision halves its size."
)
_FIGURES = flags.DEFINE_string("figures", None, "JSON file with figures to keep as well, as evaluate.py writes them.")


def main() -> None:
    if _TO.value == "diffusers":
        _write_folder()
        return
    folder = _folder()
    out = Path(_OUT.value or f"{folder.absolute().name}{weights.SUFFIX}").expanduser()
    if out.suffix != weights.SUFFIX:
        raise InputError(f"out is {str(out)!r}; its name must end in {weights.SUFFIX}")
    figures = _read_figures(_FIGURES.value) if _FIGURES.value else {}
    trained = _write(folder, out, figures)
    size = out.stat().st_size / 2**20
    print(f"{folder}, step {trained.step:,}, EMA {trained.ema}: wrote {out}, {size:.2f} MiB")


def _write_folder():
    """Writes a model as a folder of diffusers."""
    name = _WORKDIR.value
    if not name or not _OUT.value:
        raise InputError(f"--to=diffusers needs --{'out' if name else 'workdir'}; give the one")
    if useless := [flag.name for flag in (_FIGURES, _STEP, _DTYPE) if flag.value != flag.default]:
        raise InputError(f"--{useless[0]} does nothing with --to=diffusers; leave it out")
    found = reconstructions.open_autoencoder(name, _EMA.value or "")
    if found is not None:
        trained = found.trained
        diffusers.save_autoencoder(trained, _OUT.value)
    else:
        trained = opening.open_named(name, _EMA.value or "", own.networks(_NETWORK.value)).trained
        diffusers.save(trained, _OUT.value)
        for note in diffusers.replaced(trained):
            print(f"note: {note}")
    print(f"{name}, step {trained.step:,}, EMA {trained.ema}: wrote {_OUT.value}, which diffusers reads")


def _folder():
    """Returns the folder of diffusers or the run that is written."""
    name = _WORKDIR.value
    if name and diffusers.is_folder(name):
        if useless := [flag for flag in ("ema", "step", "network") if flags.FLAGS[flag].value is not None]:
            raise InputError(f"--{useless[0]} is for runs, and {name} is a folder of diffusers; leave it out")
        return Path(name).expanduser()
    if name and pretrained.name_of(name):
        raise InputError(f"{name} is a file already, {pretrained.FILES[pretrained.name_of(name)]}; copy that")
    folder = run_folder.existing(name) if name else run_folder.newest("runs")
    if folder is None:
        raise InputError("there is no run in runs/; train one with `python train.py`, or name one with --workdir")
    return folder.path


def _write(path, out, figures):
    """Writes the model, or autoencoder, in a folder to a file; returns it."""
    found = _open_imported(path) if diffusers.is_folder(path) else _open_run(run_folder.existing(path))
    save = autoencoders.save if isinstance(found, TrainedAutoencoder) else weights.save
    save(out, found, figures, _DTYPE.value)
    return found


def _open_imported(path):
    return diffusers.load_autoencoder(path) if diffusers.is_autoencoder(path) else diffusers.load(path)


def _open_run(folder):
    ema, step = _EMA.value or "", _STEP.value
    if reconstructions.is_autoencoder(folder):
        found = load_autoencoder(folder.path, ema, step)
    else:
        found = load_trained(folder, ema, step, own.networks(_NETWORK.value))
    own.check_used(_NETWORK.value, found.config)
    return found


def _read_figures(path):
    """Returns what a JSON file holds."""
    try:
        return read_json(Path(path).expanduser())
    except (OSError, InputError) as error:
        raise InputError(f"figures {path} cannot be read as JSON ({error})") from None


def launch() -> None:
    """Runs the program with the flags of the command line; never returns."""
    cli.start(main, about=__doc__)
