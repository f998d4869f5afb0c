"""Opens the model that a flag names: a run folder, a file of convert.py, a folder of diffusers, or what ships."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from absl import flags

from diffusion import machine, precision, pretrained
from diffusion.commands import own, prompts
from diffusion.conditions import Prompts
from diffusion.errors import InputError
from diffusion.interop import diffusers
from diffusion.model import Model, Trained
from diffusion.pretrained import weights
from diffusion.sealed import digest
from diffusion.training import run_folder


class Opened(NamedTuple):
    """A model that was opened by its name.

    Attributes:
      name: what people call it.
      home: where files about it go by default.
      trained: the model.
      shipped: its name in the package if it is one of those, else "".
      sha256: of its parameters as they were kept, where they are held in another precision now, else "".
    """

    name: str
    home: Path
    trained: Trained
    shipped: str = ""
    sha256: str = ""

    @property
    def workdir(self) -> str:
        """What --workdir calls it."""
        return f"{pretrained.SHIPPED}-{self.shipped}" if self.shipped else self.name

    def with_model(self, model: Model) -> "Opened":
        """Returns this with another model around the same parameters."""
        return self._replace(trained=self.trained._replace(model=model))


def open_model(workdir: str | None, ema: str) -> Opened:
    """Opens a run, a weights file, a folder of diffusers, the newest run, or a model that ships.

    Args:
      workdir: as --workdir has it; None for the newest run, or else the model that ships.
      ema: which average of the parameters; "" for the first.

    Raises:
      InputError: there is no such model, or it is damaged.
    """
    opened = _open(workdir, ema)
    trained, sha256 = _as_asked(opened.trained)
    opened = opened._replace(trained=trained, sha256=sha256)
    slow = jax.default_backend() == "cpu" and machine.computes_bfloat16() is False
    if slow and precision.dtype_of(opened.trained) == "bfloat16":
        print("note: this processor does not compute in bfloat16, which takes longer here than --dtype=float32")
    return opened


def _as_asked(trained):
    """Returns the model in the precision of --dtype, and the SHA-256 of its parameters before, or "" where as kept."""
    dtype = flags.FLAGS.dtype
    if dtype is None or precision.holds(trained, dtype):
        return trained, ""
    return precision.in_dtype(trained, dtype), digest(trained.params)


def _open(workdir, ema):
    """Opens a model with arithmetic as its run, file or folder has it."""
    networks, imported = own.networks(flags.FLAGS.network), prompts.imported_options(flags.FLAGS)
    missing = workdir and not pretrained.name_of(workdir) and not Path(workdir).expanduser().exists()
    if not missing and not (workdir and diffusers.is_folder(workdir)):
        prompts.refuse_options(flags.FLAGS)
    if not workdir and (folder := run_folder.newest("runs")) is not None:
        try:
            return Opened(str(folder.path), folder.path, run_folder.load_trained(folder, ema, networks=networks))
        except InputError as error:
            raise InputError(
                f"{error}; this is the newest run, and --workdir names another, or {pretrained.SHIPPED}"
            ) from None
    found = open_named(workdir, ema, networks, imported)
    if not workdir:
        print(f"no run in runs/ has a checkpoint, so this uses the {found.shipped} model that ships with the project")
    return found


def home_of(name: str) -> Path:
    """Returns where files about a file of convert.py or a folder of diffusers go; it is no name of a run."""
    path = Path(name).expanduser()
    # Folders often have the same last name, and what is learned for one model is of no use to another.
    place = hashlib.sha256(str(path if diffusers.is_id(name) else path.absolute()).encode()).hexdigest()[:6]
    kind, stem = ("file", path.stem) if path.suffix == weights.SUFFIX else ("diffusers", path.name)
    return Path("runs", f"{kind}-{stem}-{place}")


def open_named(
    name: str | None,
    ema: str,
    networks: Mapping[str, Callable[..., Any]],
    imported: Mapping[str, Any] = MappingProxyType({}),
) -> Opened:
    """Opens a model by its name.

    Args:
      name: a run folder, a file of convert.py, a folder of diffusers or the id of such a model on the Hub, or a model
        that ships, see `pretrained.name_of`.
      ema: as for `open_model`.
      networks: see `make_model`.
      imported: what goes to `interop.diffusers.load` besides the folder.

    Raises:
      InputError: there is no such model, or it is damaged.
    """
    shipped = pretrained.name_of(name)
    is_imported = not shipped and diffusers.is_folder(name)
    if not shipped and not is_imported and not name.endswith(weights.SUFFIX):
        diffusers.refuse_part(name)
        folder = run_folder.existing(name)
        return Opened(str(folder.path), folder.path, run_folder.load_trained(folder, ema, networks=networks))
    if is_imported:
        trained = diffusers.load(name, **imported)
    else:
        trained = pretrained.load(shipped) if shipped else weights.load(name, networks)
    if ema and ema != trained.ema:
        raise InputError(f"ema is {ema}; this {'folder' if is_imported else 'file'} holds only that of {trained.ema}")
    if shipped:
        home = Path("runs", f"{pretrained.SHIPPED}-{shipped}")  # no name of a run
        return Opened(f"the {shipped} model that ships", home, trained, shipped)
    return Opened(name, home_of(name), trained)


def open_weaker(path: str, model: Model) -> tuple[Trained, str]:
    """Returns the model to push away from and the SHA-256 of its parameters as they were kept.

    Raises:
      InputError: it is not asked and read as the model itself.
    """
    if not path:
        raise InputError("--guidance_model names no model; give a run folder or a file of convert.py")
    try:
        # It is of the same size and in the same precision, and its LoRA files are its own.
        sized = diffusers.is_folder(path) and flags.FLAGS.size is not None
        imported = {"image_size": tuple(model.space.image_shape[:2])} if sized else {}
        weaker, sha256 = _as_asked(open_named(path, "", own.networks(flags.FLAGS.network), imported).trained)
    except InputError as error:
        raise InputError(str(error).replace("--workdir", "--guidance_model")) from None

    def facts(m):
        levels = [values.tolist() for values in (m.schedule.alpha_bar, m.schedule.noise_var)]
        return {"schedule": levels, "prediction": m.prediction, "image size": m.image_shape, "classes": m.conditions}

    if isinstance(model.conditions, Prompts) and isinstance(weaker.model.conditions, Prompts):
        told = weaker.model.conditions.replace(model.conditions.names, model.conditions.negative)
        weaker = weaker._replace(model=dataclasses.replace(weaker.model, conditions=told))
    theirs = facts(weaker.model)
    for name, ours in facts(model).items():
        if theirs[name] != ours:
            raise InputError(f"--guidance_model={path} differs from the model in its {name}, which must be the same")
    return weaker, sha256 or digest(weaker.params)
