"""Laws of diffusers folders that need neither torch nor diffusers; tests/agreement compares with diffusers itself."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from commands import run
from tiny import assert_same, made_autoencoder

from configs import default
from diffusion import keys, schedules, solvers, timesteps
from diffusion.commands import datasets, samplers
from diffusion.errors import InputError
from diffusion.interop import diffusers, torch_file
from diffusion.interop.diffusers import autoencoders, folders, schedulers
from diffusion.interop.diffusers.state import to_tensors
from diffusion.model import Trained, make_model, make_schedule
from diffusion.pretrained import weights
from diffusion.pretrained.autoencoders import load as load_file
from diffusion.training.autoencoders import load_autoencoder

STEM = "diffusion_pytorch_model"


def make_trained(shape=(8, 8, 1), **sections):
    """A model of small random weights, after the defaults and these fields."""
    config = default.get_config()
    with config.unlocked(), config.ignore_type():
        for name, fields in sections.items():
            config[name] = fields if isinstance(fields, str) else {**config[name], **fields}
    model = make_model(config, shape)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, keys.make(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32), shapes)
    return Trained(model, params, config, 7, "0.9999")


FIELDS = {
    "block_out_channels": (8, 12),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def trained():
    return make_trained(network="unet2d", unet2d=FIELDS, sample={"sampler": "ddpm:variance=large", "clip": "recompute"})


@pytest.fixture
def folder(trained, tmp_path):
    diffusers.save(trained, tmp_path / "mine")
    return tmp_path / "mine"


def answers(trained):
    x = np.random.default_rng(1).standard_normal((2, *trained.model.image_shape)).astype(np.float32)
    return jax.jit(trained.model.apply_fn)(trained.params, x, jnp.array([1, 640]))


def test_what_a_folder_has_in_the_place_of_the_own_sampler_is_said(trained):
    assert diffusers.replaced(trained) == []
    for sampler, tau, expected in (
        ("ddpm:variance=large", "uniform", []),
        ("unipc:order=3", "trailing", ["its sampler unipc becomes ddim, of DDIMScheduler"]),
        ("ddim:eta=1", "trailing", ["its sampler ddim:eta=1.0 becomes ddim, of DDIMScheduler"]),
        ("ddim:end=1", "leading:offset=1", []),
        ("ddim", "karras:rho=3", ["its grid karras:rho=3.0 becomes trailing, of DDIMScheduler"]),
    ):
        config = trained.config.copy_and_resolve_references()
        config.sample.update(sampler=sampler, tau=tau, clip="keep_eps" if "ddpm" not in sampler else "recompute")
        assert diffusers.replaced(trained._replace(config=config)) == expected


def test_a_model_comes_back_from_its_folder(trained, folder):
    found = diffusers.load(folder)
    assert_same(found.params, trained.params)
    assert found.config.unet2d.to_dict() == trained.config.unet2d.to_dict()
    assert found.config.schedule == trained.config.schedule
    sample = found.config.sample
    assert (sample.sampler, sample.tau, sample.clip) == ("ddpm:variance=large", "trailing", "recompute")
    np.testing.assert_array_equal(answers(found), answers(trained))
    diffusers.save(found, folder.parent / "again")
    for name in ("model_index.json", "unet/config.json", f"unet/{STEM}.safetensors", "scheduler/scheduler_config.json"):
        assert (folder.parent / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_an_imported_model_comes_back_from_a_file_of_ours(folder, tmp_path):
    found = diffusers.load(folder)
    weights.save(tmp_path / "it.safetensors", found)
    again = weights.load(tmp_path / "it.safetensors")
    assert_same(again.params, found.params)
    np.testing.assert_array_equal(answers(again), answers(found))
    assert json.loads(again.config.to_json()) == json.loads(found.config.to_json())


def test_classes_and_what_no_class_means_come_back(tmp_path):
    trained = make_trained(network="unet2d", unet2d=FIELDS, model={"num_classes": 3}, train={"label_dropout": 0.2})
    diffusers.save(trained, tmp_path)
    assert json.loads((tmp_path / "unet/config.json").read_text())["num_class_embeds"] == 4
    found = diffusers.load(tmp_path)
    assert found.model.conditions.null == 3
    assert found.config.train.label_dropout == 0.2
    np.testing.assert_array_equal(answers(found), answers(trained))


def test_our_unet_becomes_a_unet2d_that_is_told_one_less(tmp_path):
    """Its timesteps from 1 are folded into the first layer of the embedding, exactly but for rounding."""
    fields = {"width": 128, "multipliers": (1, 1), "num_blocks": 1, "attention_resolutions": (4,), "num_classes": 2}
    trained = make_trained((8, 8, 1), model=fields)
    diffusers.save(trained, tmp_path)
    found = diffusers.load(tmp_path)
    assert found.config.network == "unet2d"
    wanted = answers(trained)
    np.testing.assert_allclose(answers(found), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


SAMPLED = {"sampler": "ddpm:variance=small", "clip": "recompute"}


@pytest.mark.parametrize(
    ("sections", "fields"),
    [
        ({"sample": {"sampler": "ddim:end=1"}}, {"_class_name": "DDIMScheduler", "set_alpha_to_one": False}),
        ({"sample": {"sampler": "ddim:eta=0.5"}}, {"_class_name": "DDIMScheduler", "set_alpha_to_one": True}),
        ({"sample": {"tau": "leading:offset=1"}}, {"timestep_spacing": "leading", "steps_offset": 1}),
        ({"sample": {"tau": "linspace"}}, {"timestep_spacing": "linspace"}),
        ({"sample": SAMPLED}, {"_class_name": "DDPMScheduler", "variance_type": "fixed_small"}),
        # Only DDPM's scheduler takes the variance off the output of a network.
        ({"train": {"objective": "hybrid"}}, {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}),
        (
            {"train": {"objective": "hybrid"}, "sample": SAMPLED},
            {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
        ),
    ],
)
def test_the_scheduler_that_is_written_is_the_models(sections, fields, tmp_path):
    diffusers.save(make_trained(network="unet2d", unet2d=FIELDS, **sections), tmp_path)
    written = json.loads((tmp_path / SCHEDULER).read_text())
    assert {name: written[name] for name in fields} == fields


UNET2D = {"network": "unet2d", "unet2d": FIELDS}
HEADS = {"width": 128, "multipliers": (1, 2), "num_heads": 4, "attention_resolutions": (8,)}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"width": 32, "multipliers": (1, 2)}}, "makes norms of 8, 16, 24, 32 groups.*network=unet2d"),
        ({"model": HEADS}, "num_heads is 4 in levels of different"),
        ({"network": "transformer"}, "network is 'transformer', which diffusers does not have"),
        (
            {"network": "unet2d", "unet2d": {**FIELDS, "time_shift": 0.0}},
            "time_shift 0.0; diffusers tells its networks",
        ),
        (
            {"network": "unet2d", "unet2d": FIELDS, "train": {"prediction": "flow"}},
            "prediction is 'flow', which cannot",
        ),
        ({"network": "unet2d", "unet2d": FIELDS, "schedule": "edm"}, "schedule is 'edm', which cannot"),
        ({"network": "unet2d", "unet2d": FIELDS, "sample": {"sampler": "ddim:end=100"}}, "in diffusers end is 0 or 1"),
    ],
)
def test_what_diffusers_lacks_is_refused_before_anything_is_written(sections, said, tmp_path):
    trained = make_trained((8, 8, 1), **sections)
    with pytest.raises(InputError, match=said):
        diffusers.save(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_anything_else_is_left_as_it_is(trained, folder):
    before = (folder / WEIGHTS).read_bytes()
    diffusers.save(trained, folder)
    assert (folder / WEIGHTS).read_bytes() == before
    for name in ("vae/config.json", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
        (folder / folders.INDEX).write_text("theirs")
        with pytest.raises(InputError, match=f"holds {name}, which is no part of this model; name a new folder"):
            diffusers.save(trained, folder)
        assert (folder / folders.INDEX).read_text() == "theirs"
        (folder / name).unlink()


def test_names_of_classes_that_come_twice_have_their_numbers(tmp_path):
    trained = make_trained(network="unet2d", unet2d=FIELDS, model={"num_classes": 3})
    diffusers.save(trained, tmp_path)
    edit(tmp_path / folders.INDEX, id2label={"0": "crane", "1": "crane", "2": "owl"})
    assert diffusers.load(tmp_path).model.conditions.names == ("crane 0", "crane 1", "owl")


def test_a_network_without_a_label_for_no_class_does_not_learn_it():
    fields = {"network": "unet2d", "unet2d": {**FIELDS, "null_class": False}, "model": {"num_classes": 3}}
    with pytest.raises(InputError, match=r"label_dropout is 0\.1, and the network has no label for"):
        make_trained(**fields, train={"label_dropout": 0.1})
    assert make_trained(**fields, train={"label_dropout": 0.0}).model.conditions.null == 3


# How files can lie in a folder.


def read(folder):
    return safetensors.numpy.load_file(folder / f"unet/{STEM}.safetensors")


def test_weights_in_parts_are_read_as_in_one_file(trained, folder):
    tensors = read(folder)
    (folder / f"unet/{STEM}.safetensors").unlink()
    parts, listed = {}, {}
    for i, name in enumerate(sorted(tensors)):
        file = f"{STEM}-0000{i % 3 + 1}-of-00003.safetensors"
        parts.setdefault(file, {})[name], listed[name] = tensors[name], file
    for file, part in parts.items():
        safetensors.numpy.save_file(part, folder / "unet" / file)
    (folder / f"unet/{STEM}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    assert_same(diffusers.load(folder).params, trained.params)
    (folder / "unet" / sorted(parts)[1]).unlink()
    with pytest.raises(InputError, match=r"00002-of-00003\.safetensors cannot be read"):
        diffusers.load(folder)


def test_half_precision_is_taken_where_it_is_asked_for_or_alone(trained, folder):
    half = {name: array.astype(np.float16) for name, array in read(folder).items()}
    safetensors.numpy.save_file(half, folder / f"unet/{STEM}.fp16.safetensors")
    assert_same(diffusers.load(folder).params, trained.params)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32), trained.params)
    assert_same(diffusers.load(folder, variant="fp16").params, rounded)
    (folder / f"unet/{STEM}.safetensors").unlink()
    assert_same(diffusers.load(folder).params, rounded)


def test_early_folders_have_their_parts_in_one_place_and_old_names(trained, folder):
    def old(name):
        for new, before in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            name = name.replace(new, before)
        return name

    early = folder.parent / "early"
    early.mkdir()
    safetensors.numpy.save_file({old(n): a for n, a in read(folder).items()}, early / f"{STEM}.safetensors")
    for file in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        shutil.copy(folder / file, early)
    assert_same(diffusers.load(early).params, trained.params)


def test_a_network_alone_takes_the_scheduler_beside_it_or_the_one_that_is_given(folder):
    assert diffusers.load(folder / "unet").config.sample.sampler == "ddpm:variance=large"
    given = {"_class_name": "DDIMScheduler", "num_train_timesteps": 10}
    assert diffusers.load(folder / "unet", scheduler=given).model.schedule.num_timesteps == 10
    alone = folder.parent / "alone"
    shutil.copytree(folder / "unet", alone)
    with pytest.raises(InputError, match="has a network without its scheduler; name the folder of its pipeline"):
        diffusers.load(alone)
    assert diffusers.load(alone, scheduler=given).config.sample.steps == 10


def write_autoencoder(folder):
    """Writes a small autoencoder as diffusers does; returns it as it is here."""
    made = made_autoencoder(channels=(8, 8))
    levels = len(made.config.autoencoder.channels)
    params = {name: part for name, part in made.params.items() if name != "scaling"}
    tensors = to_tensors(params, lambda path: autoencoders.name_of(path, levels), autoencoders.is_pixelwise)
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / f"{STEM}.safetensors")
    config = {"_class_name": "AutoencoderKL", "in_channels": 1, "out_channels": 1, "sample_size": 8}
    config |= {"block_out_channels": [8, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8}
    config |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    (folder / "config.json").write_text(json.dumps(config))
    return made


def test_an_autoencoder_alone_becomes_a_file_of_ours_also_in_half_precision(tmp_path):
    made = write_autoencoder(tmp_path / "vae")
    found = diffusers.load_autoencoder(tmp_path / "vae")
    assert_same(found.params["encoder"], made.params["encoder"])
    for name in ("float32", "float16"):
        result = run("convert.py", "--workdir=vae", f"--out={name}.safetensors", f"--dtype={name}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    whole, half = (load_file(tmp_path / f"{name}.safetensors") for name in ("float32", "float16"))
    assert_same(whole.params, found.params)
    rounded = jax.tree.map(lambda a: a.astype("float16").astype("float32") if a.ndim > 1 else a, found.params)
    assert_same(half.params, rounded)
    for name in ("vae", "float32.safetensors"):
        result = run("convert.py", f"--workdir={name}", "--to=diffusers", f"--out=from-{name}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert_same(diffusers.load_autoencoder(tmp_path / f"from-{name}").params, found.params)


def test_tensors_can_be_read_twice_from_every_kind_of_file(folder, monkeypatch):
    """As those are that blocks of DiT store again and again."""
    tensors = read(folder)
    monkeypatch.setattr(torch_file, "read_state_dict", lambda path, limit: dict(tensors))
    (folder / f"unet/{STEM}.bin").touch()
    for suffix in ("safetensors", "bin"):
        found = folders.open_weights(folder / "unet", 10**6)
        assert found.where.endswith(suffix)
        for _ in range(2):
            np.testing.assert_array_equal(found.read("conv_in.bias"), tensors["conv_in.bias"])
        (folder / f"unet/{STEM}.safetensors").unlink(missing_ok=True)


def test_what_a_folder_has_not_is_refused_and_not_ignored(tmp_path):
    write_autoencoder(tmp_path / "vae")
    for wrong, said in (
        (("0.999",), "ema is 0.999; .*vae holds only that of published"),
        (("", 3), "step is 3, and .*"),
    ):
        with pytest.raises(InputError, match=said):
            load_autoencoder(tmp_path / "vae", *wrong)
    found = run("evaluate.py", "--workdir=vae", cwd=tmp_path)
    assert (found.returncode, "images that this model was trained on are not known" in found.stderr) == (2, True)


def test_a_model_is_compared_with_images_of_its_size_and_keeps_what_it_was_trained_on():
    trained = make_trained((8, 8, 3), network="unet2d", unet2d=FIELDS)
    with pytest.raises(InputError, match=r"data has images of \(8, 8, 1\), and the model draws \(8, 8, 3\)"):
        datasets.load_data_of(datasets.compared_with(trained, "digits"))
    trained = make_trained((8, 8, 1), network="unet2d", unet2d=FIELDS, data={"name": "images", "path": "gone"})
    assert len(datasets.load_data_of(datasets.compared_with(trained, "digits")).images) == 1797
    assert trained.config.data.path == "gone"


def test_a_pipeline_of_another_network_is_refused_by_the_name_of_its_class(folder):
    (folder / "unet").rename(folder / "transformer")
    edit(folder / "transformer/config.json", _class_name="FluxTransformer2DModel")
    with pytest.raises(InputError, match=r"transformer/config\.json: FluxTransformer2DModel is not supported"):
        diffusers.load(folder)


# What is refused, in one line.


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


CONFIG, SCHEDULER, WEIGHTS = "unet/config.json", "scheduler/scheduler_config.json", f"unet/{STEM}.safetensors"


def damage(folder, what):
    """Does something to a folder."""
    tensors = read(folder)
    path = folder / WEIGHTS
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif what == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif what == "none":
        path.rename(path.with_name("flax_model.msgpack"))
    elif what == "missing":
        del tensors["conv_in.bias"], tensors["conv_out.bias"]
        safetensors.numpy.save_file(tensors, path)
    elif what == "extra":
        safetensors.numpy.save_file({**tensors, "controlnet.weight": np.zeros(3, np.float32)}, path)
    elif what == "shape":
        safetensors.numpy.save_file({**tensors, "conv_in.bias": np.zeros(3, np.float32)}, path)
    elif what == "nan":
        safetensors.numpy.save_file({**tensors, "conv_in.bias": np.full(8, np.nan, np.float32)}, path)
    elif what == "whole":
        safetensors.numpy.save_file({**tensors, "conv_in.bias": np.zeros(8, np.int32)}, path)
    else:
        path.with_suffix(".safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret"}}))
        path.unlink()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("cut", "is damaged, or no safetensors file"),
        ("pointer", "is a pointer of git lfs and not the weights; run `git lfs pull`"),
        ("none", r"holds no weights .*; it has flax_model.msgpack"),
        ("missing", "lacks conv_in.bias, conv_out.bias: it holds another network"),
        ("extra", "has, and this network does not, controlnet.weight"),
        ("shape", r"conv_in.bias has shape \(3,\), and its config wants \(8,\)"),
        ("nan", "conv_in.bias is not finite"),
        ("whole", "conv_in.bias has numbers of type int32"),
        ("outside", "names files outside its folder"),
    ],
)
def test_damaged_weights_are_refused_by_name(what, said, folder):
    damage(folder, what)
    with pytest.raises(InputError, match=said) as error:
        diffusers.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        (
            CONFIG,
            {"_class_name": "UNet3DModel"},
            "UNet3DModel is not supported; supported: UNet2DModel, DiT",
        ),
        (CONFIG, {"down_block_types": ["KDownBlock2D", "DownBlock2D"]}, "down_block_types has 'KDownBlock2D'; .*valid"),
        (CONFIG, {"mid_block_type": "UNetMidBlock3D"}, "mid_block_type is 'UNetMidBlock3D', which is not supported"),
        (CONFIG, {"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift is 'spatial'; valid: default, scale"),
        (CONFIG, {"act_fn": "elu"}, "act_fn is 'elu'; .*valid: gelu"),
        (CONFIG, {"window_size": 8}, "has a field 'window_size', which this version does not know"),
        (CONFIG, {"sample_size": None}, "sample_size is null; give image_size"),
        (CONFIG, {"sample_size": 7}, "an input of 7x7 cannot be halved 1 times"),
        (CONFIG, {"out_channels": 5}, "out_channels is 5, of 1 in_channels"),
        (CONFIG, {"norm_num_groups": 5}, "norm_num_groups is 5; it must divide the 8 channels"),
        (CONFIG, {"layers_per_block": 5000}, "more than 1,000 blocks"),
        (CONFIG, {"block_out_channels": "wide"}, "describes no model that this version knows|give widths"),
        (SCHEDULER, {"_class_name": "ScoreSdeVpScheduler"}, "json: ScoreSdeVpScheduler is not supported; supp.*: DDPM"),
        (
            SCHEDULER,
            {"_class_name": "DPMSolverSinglestepScheduler", "solver_type": "logrho", "variance_type": None},
            "solver_type is 'logrho', which is not supported; supported: midpoint, heun",
        ),
        (SCHEDULER, {"thresholding": True, "sample_max_value": 1.5}, "sample_max_value is 1.5, .* supported: 1.0, 1"),
        (SCHEDULER, {"trained_betas": [0.1]}, "trained_betas is .*, which is not supported; supported: null"),
        (SCHEDULER, {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', .*supported: linear, scaled_linear"),
        (SCHEDULER, {"clip_sample_range": 2.0}, "clip_sample_range is 2.0, which is not supported"),
        (SCHEDULER, {"variance_type": "learned"}, "variance_type is 'learned', which is not supported"),
        (SCHEDULER, {"snr_shift": 3.0}, "has a field 'snr_shift', which this version does not know"),
        (SCHEDULER, {"beta_end": "a lot"}, "describes no scheduler that this version knows"),
        (SCHEDULER, {"beta_end": 2.0}, "one-step variances lie between 0 and 1"),
        (SCHEDULER, {"num_train_timesteps": 2.5}, "num_train_timesteps is 2.5; it must be whole"),
        (SCHEDULER, {"_class_name": "UniPCMultistepScheduler", "solver_order": 9}, "order is 9; it must be a whole"),
        (SCHEDULER, {"_class_name": "DEISMultistepScheduler", "solver_order": 7}, "order is 7; it must be a whole"),
        (CONFIG, {"time_embedding_type": "fourier"}, "fourier embedding takes the log of times, and the first would"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(file, fields, said, folder):
    edit(folder / file, **fields)
    with pytest.raises(InputError, match=said) as error:
        diffusers.load(folder)
    assert "\n" not in str(error.value)
    assert str(error.value).count(str(folder)) == 1


def test_other_folders_are_told_apart(folder, tmp_path):
    assert diffusers.is_folder(folder)
    assert diffusers.is_folder(folder / "unet")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps({"seed": 0}))
    for other in (tmp_path / "run", tmp_path / "nowhere", folder / WEIGHTS):
        assert not diffusers.is_folder(other)
        with pytest.raises(InputError, match=r"is no folder of diffusers: it has neither model_index\.json"):
            diffusers.load(other)


def test_a_config_keeps_fields_that_its_class_does_not_read():
    """As the configs of Stable Diffusion do."""
    config = {"_class_name": "PNDMScheduler", "clip_sample": False, "skip_prk_steps": True, "steps_offset": 1}
    found = schedulers.read_scheduler("it", config)
    assert (found.sampler, found.tau, found.clip) == ("plms:end=1", "leading:offset=1", "none")


@pytest.mark.parametrize(
    ("kind", "fields", "sampler", "tau", "clip", "steps"),
    [
        ("DDPM", {}, "ddpm:variance=small", "leading", "recompute", 1000),
        ("DDPM", {"variance_type": "fixed_large"}, "ddpm:variance=large", "leading", "recompute", 1000),
        ("DDPM", {"variance_type": "learned_range"}, "ddpm:variance=learned", "leading", "recompute", 1000),
        ("DDIM", {"clip_sample": False, "timestep_spacing": "linspace"}, "ddim", "linspace", "none", 50),
        ("DDIM", {"thresholding": True, "clip_sample": False}, "ddim", "leading", "keep_eps", 50),
        ("DDIM", {"set_alpha_to_one": False}, "ddim:end=1", "leading", "keep_eps", 50),
        ("PNDM", {}, "pndm:end=1", "leading", "none", 50),
        (
            "DPMSolverMultistep",
            {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
            "dpm_solver_pp:order=2,sde_eta=1,variant=official",
            "karras",
            "none",
            50,
        ),
        (
            "DPMSolverMultistep",
            {"algorithm_type": "dpmsolver", "solver_type": "heun", "final_sigmas_type": "sigma_min"},
            "dpm_solver_multistep:order=2,variant=exact,lower_order_final=false,end=1",
            "linspace:last=false",
            "none",
            50,
        ),
        (
            "DPMSolverSinglestep",
            {},
            "dpm_solver_pp_singlestep:order=2,variant=midpoint,calls=grid",
            "linspace:last=false",
            "none",
            50,
        ),
        ("UniPCMultistep", {"solver_type": "bh1"}, "unipc:order=2,variant=bh1", "linspace:last=false", "none", 50),
        ("EulerAncestralDiscrete", {"timestep_spacing": "trailing"}, "euler_ancestral", "trailing", "none", 50),
        ("KDPM2Discrete", {"use_exponential_sigmas": True}, "dpm_solver:order=2", "log_snr", "none", 50),
        ("FlowMatchEulerDiscrete", {}, "euler", "shifted:shift=1.0,lowest=0.001", "none", 50),
        ("EulerDiscrete", {}, "euler", "linspace:rounded=false", "none", 50),
        ("DEISMultistep", {}, "deis:order=2,lower_order_final=false,end=1", "linspace:last=false", "none", 50),
        ("SASolver", {}, "sa_solver:predictor_order=2,corrector_order=2", "linspace:last=false", "none", 50),
        ("KDPM2AncestralDiscrete", {"use_beta_sigmas": True}, "dpm_solver:order=2,eta=1", "beta:of=sigma", "none", 50),
        ("TCD", {}, "tcd:end=1", "trailing:among=50", "none", 4),
        ("LCM", {"clip_sample": True}, "consistency", "trailing:among=50", "recompute", 4),
        ("FlowMatchHeunDiscrete", {}, "rk:order=2,basis=flow", "shifted:shift=1.0,lowest=0.001", "none", 50),
    ],
)
def test_a_scheduler_is_a_sampler_a_grid_a_clip_and_steps(kind, fields, sampler, tau, clip, steps):
    found = schedulers.read_scheduler("it", {"_class_name": f"{kind}Scheduler", **fields})
    assert (found.sampler, found.tau, found.clip, found.steps) == (sampler, tau, clip, steps)
    table = samplers.make_table(make_schedule(found.schedule), found.sampler, found.steps, found.tau)
    assert len(table.tau) - 1 == found.steps


# Options that came with the schedulers of others.


@pytest.mark.parametrize("grid", [timesteps.leading, timesteps.linspace])
def test_a_grid_without_its_last_timestep_is_that_of_one_step_more_but_for_it(grid):
    schedule = schedules.linear()
    for steps in (1, 7, 25):
        longer = grid(schedule, steps + 1)
        np.testing.assert_array_equal(grid(schedule, steps, last=False), [*longer[:-2], 0])
    np.testing.assert_array_equal(
        timesteps.leading(schedule, 10, offset=1)[:-1], timesteps.leading(schedule, 10)[:-1] + 1
    )


@pytest.mark.parametrize("solver", [solvers.ddim, solvers.plms, solvers.pndm])
def test_a_table_that_ends_at_a_time_makes_the_steps_of_a_grid_through_it(solver):
    schedule = schedules.linear()
    through = solver(schedule, [1000, 800, 600, 400, 200, 1, 0])
    ended = solver(schedule, [1000, 800, 600, 400, 200, 0], end=1)
    assert ended.nfe == through.nfe - 1
    registers = slice(0, 1)  # what it keeps for further steps may differ
    np.testing.assert_allclose(ended.update[:, registers], through.update[:-1, registers], rtol=0, atol=1e-12)
    with pytest.raises(InputError, match=r"end is 201; it must lie in 0\.\.200"):
        solver(schedule, [1000, 200, 0], end=201)


def test_zero_snr_is_an_option_of_the_schedules_that_can_have_it():
    for name in ("linear", "scaled_linear", "cosine"):
        found = make_schedule(f"{name}:zero_snr=true")
        assert found.alpha_bar[-1] == 0
        np.testing.assert_array_equal(found.alpha_bar, schedules.zero_terminal_snr(make_schedule(name)).alpha_bar)


def test_consistency_adds_the_noise_above_what_its_network_keeps():
    schedule = schedules.edm(40)
    table = solvers.consistency(schedule, [40, 20, 0], sigma_min=0.002)
    _, sigma = schedule.at(20)
    np.testing.assert_allclose(table.update[0, 0], [0, 1, np.sqrt(sigma**2 - 0.002**2)], rtol=1e-12)
    np.testing.assert_allclose(table.update[1, 0], [0, 1, 0], rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="sigma_min is 90"):
        solvers.consistency(schedule, [40, 0], sigma_min=90.0)
