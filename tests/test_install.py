"""What pip installs is whole: the programs run in any folder, with the configs of the project."""

import os
import shutil
import subprocess
import sys

import pytest
from commands import ROOT, TINY, error_line, metrics

pytestmark = pytest.mark.usefixtures("compile_once")

OWN_CONFIG = """
from configs import base, default

def get_config():
    config = default.get_config()
    config.train.log_every = base.EVERY
    return config
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel of this tree holds."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("diffusion", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "setup.py", "--quiet", "build", f"--build-base={built}"]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return built / "lib"


def run_installed(installed, program, *args, cwd):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", f"diffusion.{program}", *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def test_the_package_holds_configs_weights_and_the_mark_of_its_types(installed):
    assert [path.name for path in installed.iterdir()] == ["diffusion"]
    found = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "diffusion").rglob("*.py")}
    configs = {f"diffusion/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    tables = {f"digits-tables/{calls}.json" for calls in (3, 4, 5, 6, 8, 10)}
    tables |= {f"cifar-tables/{calls}-guidance3.json" for calls in (4, 5, 6)}
    shipped = {f"diffusion/pretrained/{name}" for name in ("digits.safetensors", "cifar.safetensors", *tables)}
    others = {"diffusion/py.typed", *shipped}
    assert found == tracked | configs | others


def test_a_config_is_found_without_a_clone_also_beside_a_folder_configs_of_ones_own(installed, tmp_path):
    own = tmp_path / "configs"
    own.mkdir()
    (own / "__init__.py").write_text("raise SystemExit('not ours')")
    (own / "default.py").write_text("raise SystemExit('not ours')")
    (own / "base.py").write_text("EVERY = 1")
    (own / "mine.py").write_text(OWN_CONFIG)
    args = ("--config=configs/mine.py", *TINY, "--config.train.num_steps=2")
    result = run_installed(installed, "train", *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in metrics(tmp_path / "runs" / "mine")] == ["1", "2"]
    # What is wrong with a field is only found once the config is.
    for config in ([], ["--config=configs/digits_edm.py"]):
        wrong = run_installed(installed, "train", *config, "--config.train.keep=0", cwd=tmp_path)
        assert "keep is 0" in error_line(wrong)


def test_a_config_that_is_nowhere_is_told_from_those_that_come_along(installed, tmp_path):
    wrong = run_installed(installed, "train", "--config=configs/digist.py", cwd=tmp_path)
    assert "did you mean 'configs/digits.py'? valid: configs/cifar.py, " in error_line(wrong)
