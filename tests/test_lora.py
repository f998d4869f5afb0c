"""A LoRA file changes a model as a folder would whose weights have been changed by its formula."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_text

from diffusion.errors import InputError
from diffusion.interop import diffusers

pytest.importorskip("tokenizers")

RANK, ALPHA = 2, 3.0
LAYERS = {
    "unet": {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (8, 8),
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (8, 8),
    },
    "text_encoder": {"encoder.layers.0.self_attn.v_proj": (8, 8), "encoder.layers.0.mlp.fc1": (16, 8)},
}
FURTHER = {"down_blocks.0.resnets.0.conv1": (8, 8, 3, 3), "down_blocks.0.attentions.0.proj_in": (8, 8, 1, 1)}


def matrices(layers):
    """down and up of each layer."""
    rng = np.random.default_rng(0)
    return {
        name: (
            rng.normal(0, 0.5, (RANK, *shape[1:])).astype(np.float32),
            rng.normal(0, 0.5, (shape[0], RANK, *[1] * (len(shape) - 2))).astype(np.float32),
        )
        for name, shape in layers.items()
    }


def kohya(kind, layer):
    head = "lora_unet_" if kind == "unet" else "lora_te_text_model_"
    name = head + layer.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def peft(kind, layer):
    name = f"unet.{layer}" if kind == "unet" else f"text_encoder.text_model.{layer}"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.alpha"


def own_of_peft(kind, layer):
    name = f"base_model.model.{layer}" if kind == "unet" else f"base_model.model.text_model.{layer}"
    return f"{name}.lora_A.weight", f"{name}.lora_B.default.weight", None


def early(kind, layer):
    if kind == "unet":
        block, _, projection = layer.removesuffix(".0").rpartition(".")
        name = f"unet.{block}.processor.{projection}_lora"
    else:
        name = f"text_encoder.text_model.{layer}.lora_linear_layer"
    return f"{name}.down.weight", f"{name}.up.weight", None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_text.save_pipeline(tmp_path_factory.mktemp("lora") / "sd")


def save_lora(path, named, layers=LAYERS, metadata=None):
    """Writes a file with these names; returns its matrices."""
    tensors, found = {}, {}
    for kind, shapes in layers.items():
        found[kind] = matrices(shapes)
        for layer, (down, up) in found[kind].items():
            *sides, alpha = named(kind, layer)
            tensors |= dict(zip(sides, (down, up), strict=True)) | (
                {alpha: np.array(ALPHA, np.float32)} if alpha else {}
            )
    safetensors.numpy.save_file(tensors, path, metadata)
    return found


def changed(folder, out, found, factor):
    """The folder with the weights that the formula gives."""
    shutil.copytree(folder, out)
    for kind, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = out / kind / f"{stem}.safetensors"
        tensors = safetensors.numpy.load_file(path)
        for layer, (down, up) in found[kind].items():
            added = np.einsum("orab,rikl->oikl", up, down) if down.ndim == 4 else np.einsum("or,ri->oi", up, down)
            weight = tensors[f"{layer}.weight"]
            tensors[f"{layer}.weight"] = weight + np.float32(factor) * added.reshape(weight.shape)
        safetensors.numpy.save_file(tensors, path)
    return diffusers.load(out)


@pytest.mark.parametrize(
    ("named", "alpha", "scale", "metadata"),
    [
        (kohya, ALPHA, 1.0, None),
        (peft, ALPHA, -0.7, None),
        (own_of_peft, 5.0, 0.5, None),
        (early, RANK, 0.5, None),
        (early, 5.0, 1.0, {"unet.lora_alpha": 5, "text_encoder.lora_alpha": 5, "unet.use_dora": False}),
    ],
)
def test_a_lora_is_added_as_its_formula_says_in_every_layout(named, alpha, scale, metadata, folder, tmp_path):
    layers = {**LAYERS, "unet": LAYERS["unet"] | (FURTHER if named is not early else {})}
    written = metadata and {"lora_adapter_metadata": json.dumps(metadata)}
    found = save_lora(tmp_path / "it.safetensors", named, layers, written)
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 5, "use_dora": false}')
    wanted = changed(folder, tmp_path / "changed", found, scale * alpha / RANK)
    trained, plain = diffusers.load(folder, loras=[(tmp_path / "it.safetensors", scale)]), diffusers.load(folder)
    pairs = zip(jax.tree.leaves(trained.params), jax.tree.leaves(wanted.params), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    texts = [model.model.conditions.encode(["a cat"]) for model in (trained, wanted, plain)]
    np.testing.assert_allclose(texts[0], texts[1], rtol=0, atol=1e-5)
    assert np.abs(texts[0] - texts[2]).max() > 1e-2
    assert len({model.model.conditions.encoder.sha256 for model in (trained, plain)}) == 2


def test_two_loras_add_up_and_one_of_scale_0_does_nothing(folder, tmp_path):
    save_lora(tmp_path / "it.safetensors", kohya)
    path = tmp_path / "it.safetensors"
    twice, once = (
        diffusers.load(folder, loras=loras).params for loras in ([(path, 0.5)] * 2, [(path, 1.0), (path, 0.0)])
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), twice, once)


@pytest.mark.parametrize(
    ("layers", "named", "said"),
    [
        (
            {"unet": {"down_blocks.9.attentions.0.proj_in": (8, 8)}},
            peft,
            "another model: it changes unet.down_blocks.9.*has not",
        ),
        (
            {"unet": {"mid_block.attentions.0.proj_in": (8, 12)}},
            kohya,
            r"by \(8, 12\), of shape \(8, 8(, 1, 1)?\) here",
        ),
        ({"text_encoder": {"encoder.layers.5.mlp.fc1": (16, 8)}}, kohya, "layers_5_mlp_fc1 by"),
        (
            {"unet": LAYERS["unet"]},
            lambda kind, layer: ("x.hada_w1_a", "x.hada_w1_b", None),
            "'x.hada_w1_.', which is no part",
        ),
        (
            {"unet": LAYERS["unet"]},
            lambda kind, layer: ("x.lora_A.weight", "x.alpha", None),
            "has only alpha, down of down",
        ),
    ],
)
def test_a_lora_for_another_model_is_refused_by_name(layers, named, said, folder, tmp_path):
    save_lora(tmp_path / "it.safetensors", named, layers)
    with pytest.raises(InputError, match=said):
        diffusers.load(folder, loras=[(tmp_path / "it.safetensors", 1.0)])


def test_a_lora_that_cannot_be_read_or_merged_is_refused(folder, tmp_path):
    path = tmp_path / "it.safetensors"
    with pytest.raises(InputError, match=r"there is no LoRA file .*it.safetensors"):
        diffusers.load(folder, loras=[(path, 1.0)])
    save_lora(path, early, metadata={"lora_adapter_metadata": json.dumps({"unet.use_dora": True})})
    with pytest.raises(InputError, match=r"has unet.use_dora True, which is not supported"):
        diffusers.load(folder, loras=[(path, 1.0)])
    save_lora(path, kohya)
    with pytest.raises(InputError, match=r"scale of LoRA .* is nan"):
        diffusers.load(folder, loras=[(path, float("nan"))])
    with pytest.raises(InputError, match=r"scale of LoRA .* is 1e\+39; give -1000..1000"):
        diffusers.load(folder, loras=[(path, 1e39)])
    save_lora(path, own_of_peft)
    with pytest.raises(InputError, match=r"is of peft, which keeps the alpha in adapter_config.json"):
        diffusers.load(folder, loras=[(path, 1.0)])
    save_lora(path, kohya)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"is damaged"):
        diffusers.load(folder, loras=[(path, 1.0)])


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (f"unet.{LAYER}.lora_A", f"unet.{LAYER}.lora.down", f"has down of unet.{LAYER} twice"),
        (f"unet.{LAYER}.lora_A", f"lora_unet_{LAYER.replace('.', '_')}.lora_down", "changes one layer twice, as "),
        (f"unet.{LAYER}.lora_A", f"{LAYER}.lora_A", "changes one layer twice, as "),
    ],
)
def test_a_layer_in_two_spellings_is_refused_and_not_added_twice(first, second, said, folder, tmp_path):
    down, up, tensors = np.ones((RANK, 8), np.float32), np.ones((8, RANK), np.float32), {}
    for name in (first, second):
        other = name.replace("lora_A", "lora_B").replace("down", "up")
        tensors |= {f"{name}.weight": down, f"{other}.weight": up}
    safetensors.numpy.save_file(tensors, tmp_path / "it.safetensors")
    with pytest.raises(InputError, match=said):
        diffusers.load(folder, loras=[(tmp_path / "it.safetensors", 1.0)])


def test_whole_numbers_are_no_lora(folder, tmp_path):
    down, up = np.ones((RANK, 8), np.int8), np.ones((8, RANK), np.float32)
    tensors = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}
    safetensors.numpy.save_file(tensors, tmp_path / "it.safetensors")
    with pytest.raises(InputError, match=r"lora_A.weight is of int8, and a LoRA is of real numbers"):
        diffusers.load(folder, loras=[(tmp_path / "it.safetensors", 1.0)])
