"""What the pages and files beside the code say of it is so."""

import re
import sys
from pathlib import Path

import pytest

import diffusion
from configs import default

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
    defined = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "train.py").read_text())
    assert set(defined) <= set(listed)
    assert not {"verbosity", "help", "log_dir"} & set(listed)


def test_the_citation_has_the_version_of_the_library():
    assert f"\nversion: {diffusion.__version__}\n" in (ROOT / "CITATION.cff").read_text()
