"""The transformer beside diffusers' DiTTransformer2DModel, with the same random weights."""

import jax
import numpy as np
import pytest

from diffusion.models import Transformer

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def theirs(size, channels, patch, depth, heads, classes):
    torch.manual_seed(0)
    module = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=channels,
        num_layers=depth,
        patch_size=patch,
        sample_size=size,
        num_embeds_ada_norm=classes,
    )
    for weights in module.parameters():  # theirs start at zero in part
        torch.nn.init.normal_(weights, std=0.2)
    blocks = module.transformer_blocks
    for block in blocks[1:]:  # stored for each block, and one embedding in the paper
        block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
    return module.eval()


def params_of(module, channels, patch):
    """Our parameters with their values; theirs are [out, in], and a patch's pixels lie [C, p, p] in theirs."""
    state = {name: np.asarray(value.detach()) for name, value in module.state_dict().items()}

    def dense(name):
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    cut = state["pos_embed.proj.weight"]
    params = {
        "patches": {"kernel": cut.transpose(2, 3, 1, 0).reshape(-1, len(cut)), "bias": state["pos_embed.proj.bias"]}
    }
    told = "transformer_blocks.0.norm1.emb"
    params["time_1"] = dense(f"{told}.timestep_embedder.linear_1")
    params["time_1"]["kernel"] = np.roll(params["time_1"]["kernel"], 128, axis=0)  # they have cosines first
    params["time_2"] = dense(f"{told}.timestep_embedder.linear_2")
    params["class"] = {"embedding": state[f"{told}.class_embedder.embedding_table.weight"]}
    names = {"query": "attn1.to_q", "key": "attn1.to_k", "value": "attn1.to_v", "attention_out": "attn1.to_out.0"}
    names |= {"modulation": "norm1.linear", "mlp_1": "ff.net.0.proj", "mlp_2": "ff.net.2"}
    for i in range(len(module.transformer_blocks)):
        params[f"block_{i}"] = {ours: dense(f"transformer_blocks.{i}.{name}") for ours, name in names.items()}
    return params | {"modulation": dense("proj_out_1"), "out": dense("proj_out_2")}


@pytest.mark.parametrize(
    ("size", "channels", "patch", "depth", "heads", "classes"),
    [(8, 4, 2, 2, 4, 10), (16, 3, 4, 3, 2, 1000), (6, 1, 1, 1, 3, 2)],
)
def test_the_transformer_is_diffusers_dit(torchvision, size, channels, patch, depth, heads, classes):
    module = theirs(size, channels, patch, depth, heads, classes)
    ours = Transformer(patch=patch, width=8 * heads, depth=depth, num_heads=heads, num_classes=classes)
    params = params_of(module, channels, patch)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, size, size, channels)).astype(np.float32)
    t, labels = np.array([0, 417, 999]), np.array([0, classes - 1, classes])
    made = jax.eval_shape(ours.init, jax.random.key(0), x, t, labels)["params"]
    assert jax.tree.map(lambda a: a.shape, made) == jax.tree.map(lambda a: a.shape, params)
    with torch.no_grad():
        wanted = module(
            torch.from_numpy(x).permute(0, 3, 1, 2), timestep=torch.tensor(t), class_labels=torch.tensor(labels)
        ).sample.permute(0, 2, 3, 1)
    with jax.default_matmul_precision("highest"):
        found = ours.apply({"params": params}, x, t, labels)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(abs(wanted).max()))
