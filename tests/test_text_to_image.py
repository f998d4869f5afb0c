"""Laws of text-to-image models that need no torch; tests/agreement compares with diffusers itself."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_text
from commands import error_line, run
from PIL import Image

from diffusion import keys, solvers, timesteps
from diffusion.commands import prompts, rollouts
from diffusion.conditions import Prompts, TextEncoder
from diffusion.errors import InputError
from diffusion.evaluation import load_samples
from diffusion.guidance import Guidance
from diffusion.interop import diffusers
from diffusion.interop.clip_tokenizer import open_tokenizer
from diffusion.models import unet2d_cross
from diffusion.pretrained import weights
from diffusion.sampling import sample

needs_tokenizers = pytest.mark.skipif(
    "not __import__('importlib').util.find_spec('tokenizers')", reason="pip install tokenizers"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_text.save_pipeline(tmp_path_factory.mktemp("text") / "sd")


def letters(texts):
    """Embeddings that say which letters a text begins with."""
    codes = np.array([[ord(letter) for letter in text.ljust(3)[:3]] for text in texts], np.float32)
    return np.repeat(codes[:, :, None] / 128, 2, axis=2)


def test_prompts_are_told_by_their_numbers_whatever_the_batch():
    texts = tuple(f"{i:03}" for i in range(150))  # more than are kept
    told = Prompts(TextEncoder(letters, lambda text: "", "0" * 64)).replace(texts, "no")
    for labels in (range(150), [5], [7, 7, 149, 0]):
        np.testing.assert_array_equal(told.told(np.asarray(labels)), letters([texts[i] for i in labels]))
    np.testing.assert_array_equal(told.nulls(4), letters(["no"] * 4))


def test_attention_in_parts_is_attention(monkeypatch):
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 15, 2, 4)).astype(np.float32)
    wanted = jax.nn.dot_product_attention(query, key, value)
    for pairs in (1, 40, 75, 224):
        monkeypatch.setattr(unet2d_cross, "PAIRS", pairs)
        np.testing.assert_allclose(unet2d_cross.attend_in_parts(query, key, value), wanted, rtol=0, atol=1e-6)


@needs_tokenizers
def test_guidance_away_from_the_prompt_itself_changes_nothing(folder):
    trained = diffusers.load(folder)
    model = trained.model
    table = solvers.ddim(model.schedule, timesteps.uniform(model.schedule, 2))

    def drawn(prompt, **options):
        cond = model.conditions.encode([prompt] * 2)
        shared = {"prediction": model.prediction, "clip": "none", "cond": cond}
        return sample(model.apply_fn, trained.params, table, keys.make(0), 2, model.image_shape, **shared, **options)

    null = model.conditions.replace([], "cat").nulls(2)
    alone = drawn("cat")
    np.testing.assert_allclose(drawn("cat", null_cond=null, guidance_scale=7.5), alone, atol=1e-4)
    assert np.abs(drawn("dog") - alone).max() > 1e-3
    assert np.abs(drawn("dog", null_cond=null, guidance_scale=7.5) - drawn("dog")).max() > 1e-3


@needs_tokenizers
def test_half_precision_keeps_matrices_in_half_and_draws_nearly_the_same(folder):
    full, half = diffusers.load(folder), diffusers.load(folder, dtype="bfloat16")
    for leaf in jax.tree.leaves(half.params):
        assert leaf.dtype == (jnp.bfloat16 if leaf.ndim > 1 else jnp.float32)
    x = np.random.default_rng(0).standard_normal((1, *full.model.image_shape)).astype(np.float32)
    wanted, found = (
        jax.jit(trained.model.apply_fn)(trained.params, x, np.array([500]), trained.model.conditions.encode(["a cat"]))
        for trained in (full, half)
    )
    assert found.dtype == jnp.float32
    assert 0 < np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


@needs_tokenizers
def test_a_table_is_learned_from_the_prompts_in_turn(folder):
    model = diffusers.load(folder).model
    model = dataclasses.replace(model, conditions=model.conditions.replace(["cat", "dog", "cow"], "no"))
    for scale in (1.0, 7.5):
        drawn = rollouts.batches(model, Guidance(scale=scale), (0, 1, 2), keys.make(0), range(4, 8), 4)[0]
        np.testing.assert_array_equal(drawn.cond, model.conditions.encode(["dog", "cow", "cat", "dog"]))
        assert (drawn.null is None) == (scale == 1)
    np.testing.assert_array_equal(drawn.null, model.conditions.encode(["no"] * 4))


@needs_tokenizers
def test_what_no_file_and_no_folder_of_ours_holds_is_refused(folder, tmp_path):
    trained = diffusers.load(folder)
    with pytest.raises(InputError, match="no file holds its text encoder"):
        weights.save(tmp_path / "it.safetensors", trained)
    with pytest.raises(InputError, match="not written; copy that folder"):
        diffusers.save(trained, tmp_path / "out")
    with pytest.raises(InputError, match="cond is None; this network is told a text"):
        trained.model.apply_fn(trained.params, np.zeros((1, 4, 4, 4), np.float32), np.ones(1))
    assert not list(tmp_path.iterdir())


@needs_tokenizers
def test_a_size_is_that_of_the_images(folder):
    assert diffusers.load(folder).model.space.image_shape == (8, 8, 3)
    trained = diffusers.load(folder, image_size=(16, 12))
    assert trained.model.space.image_shape == (16, 12, 3)
    assert trained.model.image_shape == (8, 6, 4)
    with pytest.raises(InputError, match="image_size is 15 x 16; the autoencoder takes multiples of 2"):
        diffusers.load(folder, image_size=(15, 16))


def test_prompts_come_from_a_file_with_one_in_each_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat\n\n  ein Hündchen \r\n")
    assert prompts.read(str(path)) == ("a cat", "ein Hündchen")
    for content, said in (
        (b"\n \n", "holds no prompt"),
        (b"\xff\xfe\x00", "is no text in UTF-8"),
        (None, "cannot be read"),
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=f"--prompts=.*prompts.txt {said}"):
            prompts.read(str(path))
        path.touch()


def test_without_the_package_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    tiny_text.save_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"needs the package tokenizers.*pip install 'jax-fast-diffusion\[text\]'"):
        open_tokenizer(tmp_path, 8, 600)


@needs_tokenizers
@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("unet/config.json", {"only_cross_attention": True}, "only_cross_attention is True, which is not supported"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
        ("unet/config.json", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "has 'AttnDownBlock2D'"),
        ("unet/config.json", {"attention_head_dim": 3}, "must be a multiple of norm_num_groups, 4, and of .* 3 heads"),
        ("unet/config.json", {"cross_attention_dim": 12}, "hidden_size is 8, and the network takes texts of width 12"),
        ("unet/config.json", {"in_channels": 5}, "out_channels is 4, of 5 in_channels; supported: as many"),
        ("unet/config.json", {"in_channels": 9}, r"conv_in.weight has shape \(8, 4, 3, 3\), and its config wants .*9"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "architectures is .*T5EncoderModel"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("text_encoder/config.json", {"num_hidden_layers": 2}, "lacks encoder.layers.1"),
        ("text_encoder/config.json", {"vocab_size": 500}, "a tokenizer of 514 tokens, and its text encoder knows 500"),
        ("tokenizer/added_tokens.json", {"<cat-toy>": 514}, "tokens of one's own are not supported"),
        ("tokenizer/merges.txt", None, "holds neither tokenizer.json nor merges.txt"),
        ("tokenizer/tokenizer.json", {"x": 1}, "holds no tokenizer that can be read"),
        ("text_encoder/model.safetensors", None, "holds no weights model.safetensors"),
        ("text_encoder/config.json", None, "config.json cannot be read"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_by_name(file, change, said, tmp_path):
    path = tiny_text.save_pipeline(tmp_path / "sd") / file
    if change is None:
        path.unlink()
    else:
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**found, **change}))
    with pytest.raises(InputError, match=said):
        diffusers.load(tmp_path / "sd")


# The program.

SD = ("--workdir=sd", "--steps=2", "--guidance_scale=3")


@pytest.fixture(scope="module")
def place(folder):
    (folder.parent / "prompts.txt").write_text("".join(f"cat {i}\n\n" for i in range(12)))
    return folder.parent


@needs_tokenizers
@pytest.mark.usefixtures("compile_once")
def test_prompts_of_a_file_are_drawn_one_each_and_a_job_goes_on(place):
    asked = (*SD, "--prompts=prompts.txt", "--out=out", "--negative_prompt=dog")
    first = run("sample.py", *asked, cwd=place)
    assert first.returncode == 0, first.stderr
    assert "12 images of 12 prompts in turn" in first.stdout
    images = load_samples(place / "out").images
    assert images.shape == (12, 8, 8, 3)
    assert len(np.unique(images.reshape(12, -1), axis=0)) == 12
    (place / "out/samples-00001-of-00002.npz").unlink()
    again = run("sample.py", *asked, cwd=place)
    assert "10 of 12 images are there already" in again.stdout
    np.testing.assert_array_equal(load_samples(place / "out").images, images)
    # Image 3 depends on the seed, its number and its prompt only.
    alone = run("sample.py", *asked, "--seeds=3", "--out=alone", cwd=place)
    assert alone.returncode == 0, alone.stderr
    np.testing.assert_array_equal(load_samples(place / "alone").images[0], images[3])
    assert json.loads((place / "out/sampling.json").read_text())["prompts"][11] == "cat 11"
    other = run("sample.py", *asked[:-1], "--negative_prompt=cow", cwd=place)
    assert "holds images of another job (negative_prompt is cow, there dog)" in error_line(other)


@needs_tokenizers
@pytest.mark.usefixtures("compile_once")
def test_a_picture_is_changed_by_a_prompt_and_kept_by_a_mask(place):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(picture).save(place / "init.png")
    Image.fromarray(np.repeat([[255] * 4 + [0] * 4], 8, axis=0).astype(np.uint8)).save(place / "mask.png")
    asked = (*SD, "--prompt=a very long prompt", "--num=2", "--init=init.png", "--mask=mask.png", "--out=masked")
    found = run("sample.py", *asked, cwd=place)
    assert found.returncode == 0, found.stderr
    assert (
        'note: the prompt "a very long prompt" is longer than the text encoder takes; its end is cut: "' in found.stdout
    )
    images = load_samples(place / "masked").images
    np.testing.assert_array_equal(images[:, :, 4:], np.stack([picture[:, 4:]] * 2))
    assert np.any(images[0, :, :4] != images[1, :, :4])


@needs_tokenizers
@pytest.mark.usefixtures("compile_once")
def test_an_inpainting_network_is_told_the_picture_and_the_mask(tmp_path):
    tiny_text.save_pipeline(tmp_path / "fill", in_channels=9)
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "one.png")
    drawn = []
    for white, sampler in ((4, "ddim"), (6, "ddim"), (6, "adaptive:order=2,rtol=1,atol=1")):
        mask = np.repeat([[255] * white + [0] * (8 - white)], 8, axis=0).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / "mask.png")
        steps = ("--steps=2",) if sampler == "ddim" else ()
        asked = ("--workdir=fill", f"--sampler={sampler}", *steps, "--guidance_scale=3", "--prompt=a cat")
        found = run("sample.py", *asked, "--out=drawn", "--init=one.png", "--mask=mask.png", cwd=tmp_path)
        assert found.returncode == 0, found.stderr
        drawn.append(load_samples(tmp_path / "drawn").images[0])
        np.testing.assert_array_equal(drawn[-1][:, white:], picture[:, white:])
    assert np.any(drawn[0][:, :4] != drawn[1][:, :4])  # from the same noise: the network is told the mask
    # The folder's own grid, leading, starts where its number of steps says, which this sampler has not.
    assert json.loads((tmp_path / "drawn" / "sampling.json").read_text())["tau"] == [1000, 0]
    for program, arguments, said in (
        ("sample.py", ["--init=one.png"], "draws a part of a picture anew: draw with sample.py, and give --init"),
        ("sample.py", ["--init=one.png", "--mask=mask.png", "--resample=3"], "--resample is for models that"),
        ("learn.py", ["--calls=3"], "draws a part of a picture anew: draw with sample.py"),
    ):
        assert said in error_line(run(program, "--workdir=fill", "--prompt=a cat", *arguments, cwd=tmp_path))
    trained = diffusers.load(tmp_path / "fill")
    with pytest.raises(InputError, match="must be \\(embeddings of texts, a picture of shape"):
        jax.eval_shape(trained.model.apply_fn, trained.params, np.zeros((1, 4, 4, 4)), np.ones(1), np.zeros((1, 8, 8)))


@needs_tokenizers
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], 'draws what a text says; give --prompt="TEXT"'),
        (["--prompt=cat", "--lora=none.safetensors:0.5"], "there is no LoRA file none.safetensors"),
        (["--prompt=cat", "--lora="], "lora is ''; give files"),
        (["--prompt=cat", "--labels=1"], "--labels names classes, and this model is told prompts"),
        (["--prompt=cat", "--size=8x"], "size is '8x'; write 512, or HEIGHTxWIDTH"),
        (["--prompt=cat", "--size=9"], "image_size is 9 x 9; the autoencoder takes multiples of 2 pixels: give 8 x 8"),
        (["--prompt=cat", "--lora=one.safetensors:1e39"], "the scale of LoRA one.safetensors is 1e+39; give -1000"),
        (["--prompts=sd"], "--prompts=sd is a folder; name a file of text in it"),
        (["--prompt=cat", "--workdir=sd/unet"], "sd/unet is a part of the pipeline in sd; name that folder instead"),
        (["--workdir=sd/scheduler"], "sd/scheduler is a part of the pipeline in sd; name that folder instead"),
        (["--workdir=sd/vae"], "sd/vae is a part of the pipeline in sd; name that folder instead"),
        (["--prompt=cat", "--guidance_scale=1", "--negative_prompt=no"], "does nothing without guidance by the prompt"),
    ],
)
def test_wrong_flags_of_text_to_image_end_in_one_line(arguments, said, place):
    assert said in error_line(run("sample.py", *SD, *arguments, "--out=none", cwd=place))
    assert not (place / "none").exists()
