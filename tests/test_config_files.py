"""Config files and --help: every field of a file is checked, and every flag and field is shown."""

import math
import re
import subprocess
import sys

import pytest
from commands import ROOT, error_line, run, train
from tiny import made_autoencoder

from configs import (
    cifar,
    default,
    digits,
    digits_autoencoder,
    digits_classes,
    digits_edm,
    digits_latent,
    digits_meanflow,
    images,
    images_small,
    small,
)
from diffusion.autoencoder import make_network
from diffusion.commands import autoencoders, config_files, forecast
from diffusion.commands.experiment import check_numbers, require_levels, with_classes
from diffusion.devices import training_mesh
from diffusion.errors import InputError
from diffusion.model import make_model
from diffusion.training.progress import Progress

# What stands in the body of get_config, and what the message says of it.
WRONG = (
    ("config.train.num_step = 5", "no field config.train.num_step; did you mean 'config.train.num_steps'"),
    (
        "config.optimizer.weight_decay = 0.1",
        "no field config.optimizer.weight_decay; did you mean 'config.optimizer.decay'",
    ),
    ("config.model.widht = 8", "no field config.model.widht; did you mean 'config.model.width'"),
    ("config.train.learning_rate = 1.0", "did you mean 'config.optimizer.learning_rate'"),
    ("config.trian.num_steps = 5", "line 4: the config has no field 'trian'; did you mean 'config.train'"),
    ("config.train.foo.bar = 5", "line 4: the config has no field 'foo'"),
    ("config.model.more = {'a': 1}", "no field config.model.more.a"),
    ("config.train.num_steps = 'many'", "line 4: config.train.num_steps is many; it must be a whole number"),
    ("config.train.num_steps = 1e5", "line 4: config.train.num_steps is 100000.0; it must be a whole number"),
    ("config.model.num_classes = None", "config.model.num_classes is None; it must be a whole number"),
    ("config.data.flip = 1", "line 4: config.data.flip is 1; it must be True or False"),
    ("config.train.ema_decays = 0.9", "line 4: config.train.ema_decays is 0.9; it must be a list of numbers"),
    ("config.model.multipliers = ('a',)", "config.model.multipliers is a; it must be a list of numbers"),
    ("config.train = 3", "line 4: config.train is 3; it must be a section"),
    ("del config.model", r"field config.model.\w+ is missing; begin with `config = default.get_config\(\)`"),
    ("config.schedule.name = 'cosine'", "line 4: a schedule is one text"),
    ("import nowhere", "line 4: ModuleNotFoundError: No module named 'nowhere'"),
    ("1 / 0", "line 4: ZeroDivisionError"),
    ("return None", "get_config returns None and no config"),
    ("return {'a': 1}", "and no config; end it with `return config`"),
)


def write(folder, body, name="mine.py"):
    path = folder / name
    lines = ["from configs import default", "def get_config():", "    config = default.get_config()", f"    {body}"]
    path.write_text("\n".join([*lines, "    return config", ""]))
    return str(path)


@pytest.mark.parametrize(("body", "message"), WRONG)
def test_a_mistake_in_a_config_file_names_file_field_and_remedy(tmp_path, body, message):
    with pytest.raises(InputError, match=f"config file .*mine.py.*{message}"):
        config_files.read(write(tmp_path, body))


def test_files_that_are_no_config_are_told_so(tmp_path):
    path = tmp_path / "mine.py"
    for content, message in (
        ("x = 1", "no function get_config"),
        ("from configs import defualt", "line 1: ImportError"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            config_files.read(str(path))


def test_a_mistake_in_a_config_file_is_one_line_before_anything_is_made(tmp_path):
    result = run("train.py", f"--config={write(tmp_path, 'config.train.num_step = 5')}", cwd=tmp_path)
    assert "did you mean 'config.train.num_steps'" in error_line(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py"]


@pytest.mark.parametrize("recipe", [cifar, default, digits, digits_classes, digits_edm, images, images_small, small])
def test_every_recipe_passes_the_check(recipe):
    config_files.check(recipe.get_config())


def test_a_value_of_any_other_kind_is_refused_in_every_field():
    others = {bool: 1, int: 1.5, float: "1", str: 1, tuple: ("a",)}
    for name, value in config_files.leaves(default.get_config()):
        config = default.get_config()
        section, _, last = name.removeprefix("config.").rpartition(".")
        texts = isinstance(value, tuple) and isinstance(value[0], str)
        with config.ignore_type():
            (config[section] if section else config)[last] = (1,) if texts else others[type(value)]
        with pytest.raises(InputError, match=f"{name} is"):
            config_files.check(config)


def test_numbers_out_of_any_range_are_refused():
    for name, value in config_files.leaves(default.get_config()):
        if isinstance(value, int | float) and not isinstance(value, bool):
            config = default.get_config()
            section, _, last = name.removeprefix("config.").rpartition(".")
            (config[section] if section else config)[last] = 2**40 if isinstance(value, int) else math.nan
            with pytest.raises(InputError, match=f"{name} is"):
                check_numbers(config)


def test_attention_at_a_height_that_no_level_has_is_refused():
    config = default.get_config()
    require_levels(config, (32, 32, 3))  # levels 32, 16, 8, 4
    config.model.attention_resolutions = (16, 0)
    require_levels(config, (32, 32, 3))
    config.model.attention_resolutions = (16, 2)
    with pytest.raises(InputError, match="has 2; images of 32 pixels have levels of 32, 16, 8, 4"):
        require_levels(config, (32, 32, 3))


def test_the_classes_of_the_data_are_taken_or_refused():
    def classes(asked, *names):
        config = default.get_config()
        config.model.num_classes = asked
        return with_classes(config, names).model.num_classes

    assert classes(-1, "cat", "dog") == classes(2, "cat", "dog") == 2
    assert classes(0, "cat", "dog") == classes(-1) == classes(-1, "all") == 0
    with pytest.raises(InputError, match="num_classes is 3; the data has 2"):
        classes(3, "cat", "dog")


@pytest.mark.parametrize("program", ["train", "sample", "evaluate", "convert"])
def test_help_shows_every_flag_once_and_every_field(program):
    # Exit code 0, and nothing is trained: -h is the same as --help.
    long, short = (run(f"{program}.py", flag, cwd=ROOT) for flag in ("--help", "-h"))
    assert long.returncode == short.returncode == 0
    assert long.stdout == short.stdout
    shown = re.findall(r"^  --([\w.]+)", long.stdout, re.MULTILINE)
    sources = [f"commands/{program}.py"] + ["commands/edits.py"] * (program == "sample")
    sources += ["commands/shared_flags.py", "commands/altering.py"] * (program in ("sample", "evaluate"))
    text = "".join((ROOT / "diffusion" / name).read_text() for name in sources)
    if program == "evaluate":  # it has flags of its own in place of these
        text = re.sub(r"def define_sampler_flags.*?(?=\ndef |\Z)", "", text, flags=re.DOTALL)
    flags = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text))  # of which the source may define one in two ways
    fields = [name for name, _ in config_files.leaves(default.get_config())] if program == "train" else []
    assert sorted(shown) == sorted([*flags, *fields])


def test_help_has_the_values_of_the_config_that_is_named():
    shown = run("train.py", "--config=configs/cifar.py", "--help", cwd=ROOT).stdout
    assert "--config.data.name=cifar10" in shown
    assert "steps in all" in shown


def test_classes_are_drawn_by_name_or_number(tmp_path):
    assert (
        train(tmp_path, "--config.train.num_steps=1", "--config.model.num_classes=-1", "--workdir=run").returncode == 0
    )
    code = (
        "from diffusion.commands.guiding import labels\n"
        "from diffusion.model import Conditions\n"
        "model = type('Model', (), {'conditions': Conditions(('b', '10', '2'), 3)})\n"
        "print(labels(['b', '2', '1', ' 10'], model), labels(None, model))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "(0, 2, 1, 1) (0, 1, 2)"  # the name '2' comes before the number
    wrong = run("sample.py", "--workdir=run", "--labels=3,x", cwd=tmp_path)
    assert "there is no class 'x'; valid: 0..9" in error_line(wrong)


def test_a_forecast_counts_every_operation_and_long_ones_are_told():
    config = digits.get_config()
    model, mesh = make_model(config, (8, 8, 1)), training_mesh(128, 1, 1)
    assert forecast.training_seconds(model, 128, 1000, mesh) == 0  # short on any machine
    one, two = (forecast.training_seconds(model, 128, count, mesh) for count in (10**8, 2 * 10**8))
    # The network has about 0.013 GFLOP an image; between 1 GFLOP/s and 10 PFLOP/s lies every machine.
    operations = 3 * 128 * 10**8 * 0.013e9
    assert operations / 1e16 < one < operations / 1e9
    assert two == pytest.approx(2 * one, rel=0.8)  # two measurements of a busy machine


@pytest.mark.parametrize("recipe", [digits_autoencoder, digits_meanflow, digits_latent])
def test_a_forecast_is_made_for_all_that_is_trained(recipe):
    config, mesh = recipe.get_config(), training_mesh(128, 1, 1)
    if recipe is digits_autoencoder:
        trained = autoencoders.make_trainee(make_network(config.autoencoder, (8, 8, 1)), (8, 8, 1))
    else:
        latent = made_autoencoder() if config.latents else None
        trained = make_model(config, (8, 8, 1), autoencoder=latent)
    assert forecast.training_seconds(trained, 128, 10**8, mesh) > 0


def test_the_pace_leaves_out_compilation_and_pauses(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("diffusion.training.progress.time.monotonic", lambda: clock[0])
    progress = Progress(0, 100, shown=False)
    with progress.compiling():
        clock[0] += 60
    for step in range(2, 12):
        clock[0] += 2
        progress.step(step)
        with progress.paused("drawing"):
            clock[0] += 500
    assert progress.take() == (20.0, 0.5)
    assert progress.take() == (0.0, 0.0)
    assert progress.left(50, 0.5) == "01:40"
    assert progress.left(0, 1e-4) == "11.6 days"


@pytest.mark.parametrize(("size", "multipliers"), [(32, ()), (64, ()), (128, (1, 2, 4, 8, 8))])
def test_the_small_recipe_takes_the_sizes_that_its_head_names(size, multipliers):
    config = images_small.get_config()
    config.model.multipliers = multipliers or config.model.multipliers
    config = with_classes(config, ("cat", "dog"))
    require_levels(config, (size, size, 3))
    make_model(config, (size, size, 3))
