"""Reads the text encoder of a pipeline, which transformers saved: CLIP's, with its tokenizer."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import keys
from diffusion.conditions import Prompts, TextEncoder
from diffusion.errors import InputError
from diffusion.interop.clip_tokenizer import Tokenizer, open_tokenizer
from diffusion.interop.diffusers import folders, lora
from diffusion.interop.diffusers.state import LEAVES, require, to_params
from diffusion.models import CLIPText
from diffusion.records import readable
from diffusion.sealed import digest
from diffusion.types import Params

ENCODER, TOKENIZER = "text_encoder", "tokenizer"
"""The folders of a pipeline."""

DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""The fields of CLIPTextConfig in transformers that shape the network, and their defaults; no other does."""

_PREFIX = "text_model."
"""What names begin with in files of transformers before version 5."""


def load_text(
    folder: Path, width: int, dtype: str = "float32", variant: str = "", loras: Sequence[lora.Lora] = ()
) -> Prompts:
    """Reads text encoder and tokenizer of a pipeline; it is told no prompts yet.

    Args:
      folder: of the pipeline.
      width: of the embeddings that its network takes.
      dtype: of the arithmetic and of matrices.
      variant: of the weights, see `folders.open_weights`.
      loras: what is added to the weights.

    Raises:
      InputError: something is missing, damaged or not supported, and named.
    """
    at = folder / ENCODER
    where = str(at / folders.CONFIG)
    with readable(where, "text encoder"):
        network = CLIPText(**read_fields(where, folders.read_fields(at / folders.CONFIG)), dtype=dtype)
        like = shapes_of(network)
    if network.hidden_size != width:
        raise InputError(f"{where}: hidden_size is {network.hidden_size}, and the network takes texts of width {width}")
    tokenizer = open_tokenizer(folder / TOKENIZER, network.max_position_embeddings, network.vocab_size)
    weights = lora.merged(open_weights(at, like, variant), lora.TEXT, loras)
    params = to_params(weights, like, name_of, dtype=dtype)
    return Prompts(make_encoder(network, params, tokenizer))


def make_encoder(network: CLIPText, params: Params, tokenizer: Tokenizer) -> TextEncoder:
    """Returns the encoder that a network, its parameters and a tokenizer make."""
    apply = jax.jit(lambda params, tokens: network.apply({"params": params}, tokens))

    def embed(texts):
        with jax.enable_x64(False):
            return np.asarray(apply(params, tokenizer.tokens(texts)))

    return TextEncoder(embed, tokenizer.left_out, digest(params))


def shapes_of(network: CLIPText) -> Params:
    """Returns a tree with the shapes of a network's parameters; raises InputError if its fields allow none."""
    return jax.eval_shape(lambda key: network.init(key, jnp.zeros((1, 2), jnp.int32))["params"], keys.make(0))


def open_weights(folder: Path, like: Params, variant: str = "") -> folders.Weights:
    """Opens the weights of a text encoder with parameters of these shapes, under today's names, as `folders` does."""
    weights = folders.open_weights(folder, folders.count(jax.tree.leaves(like)), variant, folders.TEXT_STEMS)
    # Old files have a table of 0, 1, 2, ... and some the projection to what CLIP compares; neither takes part here.
    used = [name for name in weights.shapes if not name.endswith(("position_ids", "text_projection.weight"))]
    names = {name.removeprefix(_PREFIX): name for name in used}
    shapes = {name: weights.shapes[theirs] for name, theirs in names.items()}
    return folders.Weights(weights.where, shapes, lambda name: weights.read(names[name]))


def read_fields(where: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `models.CLIPText` that a config of CLIPTextModel has.

    Raises:
      InputError: it is of another class, or asks for something that is not supported; both are named.
    """
    kinds = config.get("architectures") or ["CLIPTextModel"]
    require(where, {"architectures": kinds}, {"architectures": (["CLIPTextModel"], ["CLIPTextModelWithProjection"])})
    require(where, config, {"use_attention_mask": (False, None)})
    fields = {name: config.get(name, default) for name, default in DEFAULTS.items()}
    return fields | {"layer_norm_eps": float(fields["layer_norm_eps"])}


def name_of(path: tuple[str, ...]) -> str:
    """Returns what a parameter of `models.CLIPText` is called in a file, without what old files put before it."""
    first, *rest, leaf = path
    if first.endswith("_embedding"):
        return f"embeddings.{first}.weight"
    if not first.startswith("layers_"):
        return f"{first}.{LEAVES[leaf]}"
    layer = re.sub("^(self_attn|mlp)_", r"\1.", rest[0])
    return f"encoder.layers.{first.removeprefix('layers_')}.{layer}.{LEAVES[leaf]}"
