"""Defines the text encoder of CLIP, under the names that transformers gives its layers, with "_" for "."."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from diffusion.errors import InputError, nearest, require_range
from diffusion.models.layers import DTYPES, Dense

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}
"""The activations by the names that transformers has for them: of OpenAI's models, and of OpenCLIP's."""

_NUMBERS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NUMBERS += ("max_position_embeddings",)


class CLIPText(nn.Module):
    """Turns the tokens of a text into embeddings, each of which knows the tokens before it.

    Fields have the names that transformers gives them. The embeddings are those of the last layer behind a norm; where
    a pipeline takes an earlier layer, as Stable Diffusion 2 does, its encoder has fewer.

    Attributes:
      vocab_size: number of tokens.
      hidden_size: width of the embeddings.
      intermediate_size: width inside each layer's perceptron.
      num_hidden_layers, num_attention_heads: layers, and heads of each.
      max_position_embeddings: most tokens of a text.
      hidden_act: a key of `ACTIVATIONS`.
      layer_norm_eps: of the norms.
      dtype: "float32" or "bfloat16" for the arithmetic; the statistics of norms and of attention are float32.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: Int[Array, "B N"]) -> Float[Array, "B N hidden_size"]:
        """Returns the embeddings in float32."""
        self._check()
        dtype = DTYPES[self.dtype]

        def embedding(rows, name):
            return nn.Embed(rows, self.hidden_size, dtype=dtype, name=name)

        places = jnp.arange(tokens.shape[1])
        h = embedding(self.vocab_size, "token_embedding")(tokens)
        h = h + embedding(self.max_position_embeddings, "position_embedding")(places)[None]
        for i in range(self.num_hidden_layers):
            fields = (self.intermediate_size, self.num_attention_heads, self.hidden_act, self.layer_norm_eps, dtype)
            h = Layer(*fields, name=f"layers_{i}")(h)
        norm = nn.LayerNorm(epsilon=self.layer_norm_eps, dtype=dtype, name="final_layer_norm")
        return norm(h).astype(jnp.float32)

    def _check(self):
        """Raises InputError if the fields allow no network."""
        for name in _NUMBERS:
            require_range(f"text encoder's {name}", getattr(self, name), 1)
        for name, allowed in (("hidden_act", ACTIVATIONS), ("dtype", DTYPES)):
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"text encoder's {name} is {value!r}; {nearest(str(value), allowed)}")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"text encoder's hidden_size is {self.hidden_size}, no multiple of {self.num_attention_heads} heads"
            )


class Layer(nn.Module):
    """Adds to every token what it learns from itself and those before it; keeps the shape [B, N, C]."""

    intermediate_size: int
    num_heads: int
    act: str
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        batch, tokens, channels = x.shape

        def norm(name):
            return nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name=name)

        def dense(features, name):
            return Dense(features, dtype=self.dtype, name=name)

        h = norm("layer_norm1")(x)

        def heads(name):
            return dense(channels, f"self_attn_{name}")(h).reshape(batch, tokens, self.num_heads, -1)

        h = jax.nn.dot_product_attention(heads("q_proj"), heads("k_proj"), heads("v_proj"), is_causal=True)
        x = x + dense(channels, "self_attn_out_proj")(h.reshape(x.shape))
        h = ACTIVATIONS[self.act](dense(self.intermediate_size, "mlp_fc1")(norm("layer_norm2")(x)))
        return x + dense(channels, "mlp_fc2")(h)
