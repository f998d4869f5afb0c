"""Measures one claim of the papers and writes its figure, its table and the table of its page.

    python -m benchmarks.claims --claim=NAME [--workdir=RUN or FILE.safetensors] [--out=docs/claims]

NAME is one of orders, same_latent, interpolation, inversion, step_cost, table_ablation, found_grids, and four that
read what has been measured: ddim_table and learned_tables (--evaluation=FOLDER/evaluation.csv), variance
(FOLDER/bound.json), learning_or_distilling (docs/claims/learning_or_distilling_data.csv). Writes images/NAME.png and
NAME.csv in --out, prints the table, and puts it between the markers of NAME.md where there is such a page, so that no
page differs from its data.
"""

from pathlib import Path

from absl import flags

from benchmarks.claims import (
    ddim_table,
    found_grids,
    interpolation,
    inversion,
    learned_tables,
    learning_or_distilling,
    orders,
    report,
    same_latent,
    step_cost,
    table_ablation,
    variance,
)
from diffusion import pretrained
from diffusion.commands import cli
from diffusion.errors import InputError, nearest
from diffusion.pretrained import weights
from diffusion.training import run_folder

CLAIMS = {
    "ddim_table": lambda: ddim_table.measure(_evaluation()),
    "learned_tables": lambda: learned_tables.measure(_evaluation()),
    "learning_or_distilling": lambda: learning_or_distilling.measure(_evaluation()),
    "variance": lambda: variance.measure(_evaluation()),
    "table_ablation": lambda: table_ablation.measure(*_trained()),
    "found_grids": lambda: found_grids.measure(*_trained()),
    "orders": lambda: orders.measure(),
    "same_latent": lambda: same_latent.measure(*_trained()),
    "interpolation": lambda: interpolation.measure(*_trained()),
    "inversion": lambda: inversion.measure(*_trained()),
    "step_cost": lambda: step_cost.measure(*_trained()),
}

_CLAIM = flags.DEFINE_string("claim", None, f"{', '.join(CLAIMS)}.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder, or a file of convert.py. Default: the digits that ship.")
_EVALUATION = flags.DEFINE_string(
    "evaluation",
    None,
    "evaluation.csv of evaluate.py, for ddim_table and learned_tables; its bound.json, for variance; or the data of "
    "learning_or_distilling.",
)
_OUT = flags.DEFINE_string("out", "docs/claims", "Folder of the pages.")


def main() -> None:
    claim, out = _CLAIM.value, Path(_OUT.value)
    if claim not in CLAIMS:
        raise InputError(f"claim is {claim!r}; {nearest(str(claim), CLAIMS)}")
    findings = CLAIMS[claim]()
    print(report.markdown(findings))
    for path in report.write(out, claim, findings):
        print(f"wrote {path}")


def _trained():
    """(name, trained model) that the flags ask for."""
    workdir = _WORKDIR.value
    if not workdir:
        return "the digits model that ships", pretrained.load("digits")
    if workdir.endswith(weights.SUFFIX):
        return Path(workdir).name, weights.load(workdir)
    return Path(workdir).name, run_folder.load_trained(run_folder.existing(workdir))


def _evaluation():
    if not _EVALUATION.value:
        raise InputError(f"{_CLAIM.value} reads what evaluate.py has measured; name its file with --evaluation")
    return Path(_EVALUATION.value)


if __name__ == "__main__":
    cli.start(main, about=__doc__)
