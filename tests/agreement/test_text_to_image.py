"""Text-to-image pipelines of diffusers are read here without torch, and compute and draw the same."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import test_published
from PIL import Image

from diffusion import keys, spaces
from diffusion.commands import prompts, samplers
from diffusion.interop import clip_tokenizer
from diffusion.interop import diffusers as interop
from diffusion.interop.diffusers import clip_text, folders, unet2d, unet2d_condition
from diffusion.interop.diffusers.state import to_params
from diffusion.models import CLIPText, UNet2DCondition, as_apply_fn
from diffusion.sampling import sample

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("torchvision"),
]

SD1 = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
SD2 = {**SD1, "attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True}
UNEVEN = {
    "sample_size": (8, 12),
    "block_out_channels": (16, 24, 24),
    "layers_per_block": (1, 2, 1),
    "transformer_layers_per_block": (1, 2, 1),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 20,
    "attention_head_dim": (2, 3, 4),
    "norm_num_groups": 4,
    "resnet_time_scale_shift": "scale_shift",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
}
PLAIN = {**SD1, "mid_block_type": None, "act_fn": "gelu", "center_input_sample": True, "time_embedding_dim": 24}
CONFIGURATIONS = {"1.5": SD1, "2.1": SD2, "uneven levels": UNEVEN, "no middle": PLAIN}

VIT_L = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
OPENCLIP_H = {**VIT_L, "hidden_act": "gelu", "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 3}
WIDE = {**VIT_L, "layer_norm_eps": 1e-3, "intermediate_size": 40, "num_hidden_layers": 1}
ENCODERS = {"ViT-L": VIT_L, "OpenCLIP-H": OPENCLIP_H, "another eps": WIDE}


def randomised(model):
    """The model with weights none of which is at its start."""
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.15)
        if "norm" in name and name.endswith("weight"):
            weight.data += 1
    return model.eval()


def network(fields):
    torch.manual_seed(0)
    return randomised(diffusers.UNet2DConditionModel(**fields))


def text_network(fields):
    torch.manual_seed(1)
    return randomised(transformers.CLIPTextModel(transformers.CLIPTextConfig(**fields)))


def assert_near(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert np.std(wanted) > 1e-3


def count(model):
    return sum(weight.numel() for weight in model.parameters())


def read_unet(folder):
    """The network of ours, and its parameters."""
    where = str(folder / "config.json")
    fields, found = unet2d_condition.read_fields(where, folders.read_config(folder / "config.json"))
    ours = UNet2DCondition(**fields, out_channels=found["out_channels"])
    x = np.zeros((1, *unet2d.image_shape(where, found, None)), np.float32)
    like = jax.eval_shape(lambda key: ours.init(key, x, np.ones(1))["params"], keys.make(0))
    weights = folders.open_weights(folder, folders.count(jax.tree.leaves(like)))
    return ours, to_params(weights, like, unet2d.name_of)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_network_told_a_text_computes_the_same(name, tmp_path):
    model = network(CONFIGURATIONS[name])
    model.save_pretrained(tmp_path)
    ours, params = read_unet(tmp_path)
    assert folders.count(jax.tree.leaves(params)) == count(model)
    size, rng = model.config.sample_size, np.random.default_rng(1)
    x = rng.standard_normal((2, *(size if isinstance(size, tuple | list) else (size, size)), 4)).astype(np.float32)
    text = rng.standard_normal((2, 7, model.config.cross_attention_dim)).astype(np.float32)
    t = np.array([2, 977])
    with jax.default_matmul_precision("highest"):
        found = jax.jit(as_apply_fn(ours))(params, x, t + 1, text)  # their timesteps count from 0
    with torch.no_grad():
        there = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(t), torch.from_numpy(text))
    assert_near(found, there.sample.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("safe", [True, False])
def test_a_text_encoder_computes_the_same(name, safe, tmp_path):
    model = text_network(ENCODERS[name])
    model.save_pretrained(tmp_path)
    if not safe:  # as in 2022: the same tensors in .bin, under longer names, and one that is not learned
        state = {f"text_model.{name}": weight for name, weight in model.state_dict().items()}
        torch.save(state | {"text_model.embeddings.position_ids": torch.arange(16)}, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    ours = CLIPText(**clip_text.read_fields("", json.loads((tmp_path / "config.json").read_text())))
    like = clip_text.shapes_of(ours)
    weights = clip_text.open_weights(tmp_path, like)
    params = to_params(weights, like, clip_text.name_of)
    assert folders.count(jax.tree.leaves(params)) == count(model)
    tokens = np.random.default_rng(0).integers(0, 600, (3, 16))
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens)).last_hidden_state.numpy()
    with jax.default_matmul_precision("highest"):
        assert_near(jax.jit(ours.apply)({"params": params}, tokens), wanted)


PUBLISHED = Path(__file__).parents[1] / "published"


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_published_network_has_as_many_parameters_there(path):
    config = json.loads(path.read_text())
    with torch.device("meta"):
        if "_class_name" not in config:
            model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
        else:
            kind = getattr(diffusers, config["_class_name"].replace("Transformer2DModel", "DiTTransformer2DModel"))
            model = kind.from_config(config)
    # Each block of DiT stores the embedder of times and classes anew, and only the first one is used.
    once = {
        name: weight.numel()
        for name, weight in model.named_parameters()
        if not re.search(r"\.[1-9]\d*\.norm1\.emb", name)
    }
    assert sum(once.values()) == sum(leaf.size for leaf in jax.tree.leaves(test_published.shapes(config)))


# Tokens.


def byte_letters():
    """The letters that stand for bytes in the vocabularies of GPT-2 and CLIP."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]


MERGES = [
    ("c", "a"),
    ("ca", "t</w>"),
    ("t", "h"),
    ("th", "e</w>"),
    ("Ã", "©</w>"),
    ("!", "!</w>"),
    ("a", "n"),
    ("d", "o"),
]
MERGES += [("do", "g</w>"), ("'", "s</w>"), ("1", "2"), ("s", "t")]
TEXTS = [
    "",
    "the cat",
    "The  CAT's\tdog,\n isn't it?!!",
    "<|endoftext|> in a <|startoftext|>text",
    "<|ENDOFTEXT|>",
    "café CAFÉ cafe\u0301 é",
    "日本語 と 한국어 עברית",
    "👩‍👩‍👧 emoji ﬁ ligature Straße İstanbul ǅ",
    "12 3.14 x² ½ Ⅷ",
    "wow!!! !! ! a!b",
    "\u00a0nbsp\u200bzero\u3000wide \x07bell \x00null",
    "we'll they've I'm you're 'tis 's",
    "the cat " * 30,
    "()[]{}---___###$$$%%%",
]


def save_tokenizer(folder, length=16, **special):
    """A small tokenizer of CLIP's kind, as transformers saves it."""
    letters = byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in MERGES)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    found = transformers.CLIPTokenizer(vocab=vocabulary, merges=MERGES, model_max_length=length, **special)
    found.save_pretrained(folder)
    return found, vocabulary


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("special", [{}, {"pad_token": "!"}])
def test_texts_have_the_same_tokens(parts, special, tmp_path):
    theirs, vocabulary = save_tokenizer(tmp_path, **special)
    if parts:
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES)]))
        theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ours = clip_tokenizer.open_tokenizer(tmp_path, 16, 600)
    wanted = theirs(TEXTS, padding="max_length", max_length=16, truncation=True).input_ids
    np.testing.assert_array_equal(ours.tokens(TEXTS), wanted)


def test_texts_have_the_same_tokens_by_the_config_of_2022(tmp_path):
    """Stable Diffusion 1's says of its special tokens how they are found in a text."""
    _, vocabulary = save_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES)]))

    def token(content):
        ways = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": content, **ways}

    config = {"bos_token": token("<|startoftext|>"), "eos_token": token("<|endoftext|>"), "pad_token": "<|endoftext|>"}
    config |= {"unk_token": token("<|endoftext|>"), "model_max_length": 16, "tokenizer_class": "CLIPTokenizer"}
    config |= {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    wanted = theirs(TEXTS, padding="max_length", max_length=16, truncation=True).input_ids
    np.testing.assert_array_equal(clip_tokenizer.open_tokenizer(tmp_path, 16, 600).tokens(TEXTS), wanted)


def test_a_text_that_is_too_long_says_what_is_left_out(tmp_path):
    save_tokenizer(tmp_path, length=6)
    ours = clip_tokenizer.open_tokenizer(tmp_path, 16, 600)
    assert ours.left_out("the cat the cat") == ""
    assert ours.left_out("The Cat the cat The Dog the cat") == "The Dog the cat"


# A pipeline.


def made_pipeline(kind, folder, unet):
    """A tiny pipeline of Stable Diffusion around a network, saved in a folder."""
    tokenizer, _ = save_tokenizer(folder / "tokens")
    torch.manual_seed(2)
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    unet.conv_out.weight.data *= 0.1
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = kind(
        vae=autoencoder,
        text_encoder=text_network(VIT_L),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "it")
    return pipe, folder / "it"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, torchvision):
    """A tiny pipeline of Stable Diffusion, and its folder."""
    return made_pipeline(diffusers.StableDiffusionPipeline, tmp_path_factory.mktemp("pipeline"), network(SD1))


def test_a_pipeline_draws_the_same_latents(pipeline):
    pipe, folder = pipeline
    trained = interop.load(folder)
    model = trained.model
    texts, negative = ["the cat's dog", "a dog and 12 cats, the cat, the dog, the cat, the dog"], "the dog!"
    z = np.random.default_rng(3).standard_normal((2, *model.image_shape)).astype(np.float32)
    there = pipe(
        texts,
        negative_prompt=[negative] * 2,
        guidance_scale=7.5,
        num_inference_steps=25,
        latents=torch.from_numpy(z.transpose(0, 3, 1, 2).copy()),
        output_type="latent",
    ).images
    settings = trained.config.sample
    assert (settings.sampler, settings.steps, settings.clip) == ("ddim:end=1", 50, "none")
    table = samplers.make_table(model.schedule, settings.sampler, 25, settings.tau)
    cond = model.conditions.encode(texts)
    null = model.conditions.replace(texts, negative).nulls(2)
    with jax.default_matmul_precision("highest"):
        found = sample(
            model.apply_fn,
            trained.params,
            table,
            keys.make(0),
            2,
            model.image_shape,
            prediction=model.prediction,
            clip="none",
            cond=cond,
            null_cond=null,
            guidance_scale=7.5,
            x_init=z,
        )
    wanted = there.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())
    with torch.no_grad():
        images = pipe.vae.decode(there / pipe.vae.config.scaling_factor).sample.numpy().transpose(0, 2, 3, 1)
    wanted = np.clip(images * 127.5 + 127.5, 0, 255)
    assert np.abs(model.space.decode(np.asarray(found)).astype(float) - wanted).max() < 1.5


def test_an_inpainting_pipeline_draws_the_same_latents(tmp_path):
    kind = diffusers.StableDiffusionInpaintPipeline
    pipe, folder = made_pipeline(kind, tmp_path, network({**SD1, "in_channels": 9}))
    # Theirs draws the latents of the picture from a Gaussian; ours takes its mean.
    pipe.vae.quant_conv.weight.data[4:] = 0
    pipe.vae.quant_conv.bias.data[4:] = -30
    pipe.save_pretrained(folder)
    trained = interop.load(folder)
    model, rng = trained.model, np.random.default_rng(4)
    assert model.image_shape == (8, 8, 4)
    picture = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    anew = np.zeros((16, 16, 1), bool)
    anew[3:12, 5:] = True  # no whole places of the latents
    z = rng.standard_normal((1, *model.image_shape)).astype(np.float32)
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    there = pipe(
        "the cat",
        image=Image.fromarray(picture),
        mask_image=Image.fromarray(np.uint8(255 * anew[..., 0])),
        negative_prompt="a dog",
        guidance_scale=7.5,
        strength=1.0,
        num_inference_steps=10,
        height=16,
        width=16,
        latents=torch.from_numpy(z.transpose(0, 3, 1, 2).copy()),
        output_type="latent",
    ).images
    hook.remove()
    told = spaces.with_hole(model.space.autoencoder, picture, anew)
    assert_near(told, seen[0][0, 4:].numpy().transpose(1, 2, 0))
    conditions = prompts.with_picture(model, told).conditions.replace(["the cat"], "a dog")
    table = samplers.make_table(model.schedule, trained.config.sample.sampler, 10, trained.config.sample.tau)
    shared = {"cond": conditions.told([0]), "null_cond": conditions.nulls(1), "guidance_scale": 7.5, "clip": "none"}
    with jax.default_matmul_precision("highest"):
        found = sample(model.apply_fn, trained.params, table, keys.make(0), 1, model.image_shape, x_init=z, **shared)
    wanted = there.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())
