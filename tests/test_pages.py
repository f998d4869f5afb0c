"""What the pages and files beside the code say of it is so."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import diffusion
from configs import default
from diffusion import options, schedules, solvers, timesteps
from diffusion.adaptive import ADAPTIVE
from diffusion.commands.samplers import SAMPLERS, TAUS
from diffusion.guidance import RULES
from diffusion.learning import paths
from diffusion.objectives.losses import OBJECTIVES
from diffusion.predictions import PREDICTIONS
from diffusion.solvers import names as foreign

ROOT = Path(__file__).parent.parent


@pytest.fixture
def generate(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate

    yield generate
    sys.modules.pop("generate", None)


def _leaves(section, name):
    for key, value in section.items():
        if hasattr(value, "items") and len(value):
            yield from _leaves(value, f"{name}.{key}")
        else:
            yield f"{name}.{key}"


def test_the_page_of_the_configuration_has_every_field_once(generate):
    listed = re.findall(r"^- `([\w.]+)`", generate.fill("<!-- generated: fields -->"), re.MULTILINE)
    assert sorted(listed) == sorted(_leaves(default.get_config(), "config"))


def test_the_page_of_recipes_has_every_config(generate):
    table = generate.fill("<!-- generated: recipes -->")
    recipes = {path.name for path in (ROOT / "configs").glob("*.py")} - {"__init__.py", "default.py"}
    assert set(re.findall(r"configs/(\w+\.py)` \|", table)) == recipes


def test_the_page_of_commands_has_the_flags_of_a_program_and_none_of_its_libraries(generate):
    section = generate.fill("<!-- generated: flags train.py -->").split("\n## ")[0]
    listed = re.findall(r"^`--(\w+)`$", section, re.MULTILINE)
    defined = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "diffusion/commands/train.py").read_text())
    assert set(defined) <= set(listed)
    assert not {"verbosity", "help", "log_dir"} & set(listed)


def test_the_page_of_samplers_has_every_one_with_its_calls_options_and_other_names(generate):
    page = generate.fill("<!-- generated: samplers -->")
    assert generate.ORDERS.keys() == SAMPLERS.keys()
    parts = dict(part.split("\n", 1) for part in page.split("\n### ")[1:])
    assert parts.keys() == {*SAMPLERS, *ADAPTIVE, *TAUS} - paths.GRIDS.keys()
    for name, function in (SAMPLERS | ADAPTIVE).items():
        for option in options.defaults(function, 2):
            assert f"`{option}`" in parts[name]
    for other, ours in foreign.SAMPLERS.items():
        assert other == ours or f"`{other}` = `{ours}`" in parts[ours.partition(":")[0]]
    assert "calls, by default: 2 S - 1\n" in parts["heun"]
    assert "calls, by default: S\n" in parts["unipc"]
    assert "arXiv:2302.04867" in parts["unipc"]
    assert all(name in page for name in foreign.AMBIGUOUS)


def test_the_citation_has_the_version_of_the_library():
    assert f"\nversion: {diffusion.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_is_short_and_its_first_block_runs_as_it_stands():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    names = {}
    exec(python_blocks("README.md")[0], names)
    assert names["images"].shape == (64, 8, 8, 1)
    assert names["table"].nfe == 10


@pytest.fixture
def tables():
    """The tables that pages add to are afterwards as they were before."""
    before = [(table, dict(table)) for table in (PREDICTIONS, RULES, OBJECTIVES)]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("page", ["index.md", "extending.md", "own.md", "caching.md"])
def test_the_python_blocks_of_a_page_run_as_they_stand_one_after_another(page):
    blocks = python_blocks(f"docs/{page}")
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_the_samplers_that_the_readme_adds_are_ddim_and_second_order_adams_bashforth():
    names = {}
    exec(python_blocks("README.md")[1], names)
    schedule = schedules.cosine()
    tau = timesteps.karras(schedule, 7)
    np.testing.assert_allclose(names["my_ddim"](schedule, tau).update, solvers.ddim(schedule, tau).update, atol=1e-14)
    wanted = solvers.lms(schedule, tau, order=2).update
    np.testing.assert_allclose(names["my_adams"](schedule, tau).update, wanted, atol=1e-13)
