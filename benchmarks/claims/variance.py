"""Learned variances at few steps (improved DDPM, arXiv:2102.09672), from the bounds that evaluate.py has measured."""

import json
import os
from pathlib import Path

from benchmarks.claims.report import Findings, new_figure
from diffusion.errors import InputError


def measure(path: str | os.PathLike) -> Findings:
    """Bits per dimension of one model with its three variances, for each number of steps.

    Args:
      path: bound.json of evaluate.py --bound, of a model that learns its variance.

    Raises:
      InputError: there is no such file, or its model has no learned variance.
    """
    record = _read(Path(path))
    bounds = {(row["variance"], row["steps"]): row for row in record["rows"]}
    variances = list(dict.fromkeys(variance for variance, _ in bounds))
    if "learned" not in variances:
        raise InputError(f"{path} is of a model with fixed variances; train with --config.train.objective=hybrid")
    steps = sorted({steps for _, steps in bounds})
    columns = ["S"]
    for variance in variances:
        columns += [variance, "standard error"]
    columns += ["learned, last term", "small, last term"]
    rows = []
    for count in steps:
        found = [bounds[variance, count] for variance in variances]
        cells = [cell for row in found for cell in (f"{row['bits']:.3f}", row["standard_error"])]
        rows.append((count, *cells, *(bounds[variance, count]["terms"][-1] for variance in ("learned", "small"))))
    facts = (
        f"{record['run']}, step {record['checkpoint_step']:,}, EMA {record['ema']}; bits per dimension of "
        f"{record['num']:,} images, seed {record['seed']}, grid {record['grid']}, clip {record['clip']};"
    )
    return Findings(columns, rows, _figure(bounds, variances, steps), facts)


def _read(path):
    try:
        record = json.loads(path.read_text())
        return {**record, "rows": list(record["rows"])}
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; evaluate.py --bound writes it") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no bound.json of evaluate.py") from None


def _figure(bounds, variances, steps):
    figure = new_figure()
    axes = figure.subplots()
    for number, variance in enumerate(variances):
        values = [bounds[variance, count]["bits"] for count in steps]
        axes.semilogx(steps, values, marker="os^"[number % 3], label=variance)
    axes.set_xticks(steps, [str(count) for count in steps])
    axes.minorticks_off()
    axes.set(xlabel="steps S", ylabel="bits per dimension, an upper bound", title="Variances of the reverse steps")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
