"""Makes the tokens of CLIP of texts, by the package `tokenizers`, from the files that transformers saves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from diffusion.errors import InputError, is_whole
from diffusion.files import read_json

VOCABULARY, MERGES, WHOLE = "vocab.json", "merges.txt", "tokenizer.json"
"""What the files are called: the first two hold the parts of the third."""

BEGIN, END = "<|startoftext|>", "<|endoftext|>"

_SPECIAL = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
"""The fields of tokenizer_config.json that name special tokens, and what they are without it."""

_PARTS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What a text is cut into before pairs are merged; from OpenAI's tokenizer."""


class Tokenizer(NamedTuple):
    """Turns texts into tokens of one length.

    Attributes:
      backend: of the package `tokenizers`, without special tokens around a text.
      length: tokens of a text, with one for its begin and one for its end.
      begin, end, pad: the numbers of the special tokens.
    """

    backend: Any
    length: int
    begin: int
    end: int
    pad: int

    def tokens(self, texts: Sequence[str]) -> Int32[np.ndarray, "N length"]:
        """Returns the tokens of texts, with a begin and an end, cut or filled up to one length."""
        result = np.full((len(texts), self.length), self.pad, np.int32)
        for row, found in zip(result, self.backend.encode_batch(list(texts), add_special_tokens=False), strict=True):
            whole = [self.begin, *found.ids[: self.length - 2], self.end]
            row[: len(whole)] = whole
        return result

    def left_out(self, text: str) -> str:
        """Returns the end of a text for which there are too few tokens, or ""."""
        found = self.backend.encode(text, add_special_tokens=False)
        # Offsets count the letters of the text as it was given.
        return "" if len(found.ids) <= self.length - 2 else text[found.offsets[self.length - 2][0] :].strip()


def open_tokenizer(folder: Path, length: int, size: int) -> Tokenizer:
    """Opens the tokenizer in a folder that transformers' save_pretrained wrote.

    Args:
      folder: holds tokenizer.json, or vocab.json and merges.txt; and may hold tokenizer_config.json.
      length: the most tokens that the encoder takes.
      size: how many tokens the encoder knows.

    Raises:
      InputError: the package is not installed; or a file is missing, damaged or does not suit the encoder.
    """
    try:
        import tokenizers
    except ImportError:
        raise InputError(
            "a text needs the package tokenizers, which is not installed: pip install 'jax-fast-diffusion[text]', or "
            "pip install 'tokenizers>=0.21,<0.24'"
        ) from None
    config = _read(folder / "tokenizer_config.json", {})
    special = {name: config.get(name) or default for name, default in _SPECIAL.items()}
    try:
        if (folder / WHOLE).is_file():
            backend = tokenizers.Tokenizer.from_file(str(folder / WHOLE))
        else:
            backend = _from_parts(tokenizers, folder, _content(special["unk_token"]))
        backend.add_special_tokens([_token(tokenizers, value) for value in special.values()])
    except InputError:
        raise
    except Exception as error:  # the package raises plain exceptions
        reason = " ".join(str(error).split())[:100]
        raise InputError(
            f"{folder} holds no tokenizer that can be read ({reason}); get the whole folder again"
        ) from None
    backend.no_truncation()
    backend.no_padding()
    numbers = {name: backend.token_to_id(_content(value)) for name, value in special.items()}
    if (tokens := 1 + max(backend.get_vocab().values())) > size:
        raise InputError(
            f"{folder} holds a tokenizer of {tokens:,} tokens, and its text encoder knows {size:,}; get the whole "
            "folder again"
        )
    given = config.get("model_max_length", length)
    if not is_whole(given) or given < 2:
        raise InputError(f"{folder}: model_max_length is {given!r}; a text has at least 2 tokens")
    return Tokenizer(backend, min(int(given), length), numbers["bos_token"], numbers["eos_token"], numbers["pad_token"])


def _from_parts(tokenizers, folder, unknown):
    """Returns the tokenizer of a vocabulary and a list of merges."""
    for name in (VOCABULARY, MERGES):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds neither {WHOLE} nor {name} of a tokenizer; get the whole folder again")
    if more := [token for token in _read(folder / "added_tokens.json", {}) if token not in _SPECIAL.values()]:
        raise InputError(f"{folder}: added_tokens.json has {more[0][:40]!r}; tokens of one's own are not supported")
    model = tokenizers.models.BPE.from_file(
        str(folder / VOCABULARY),
        str(folder / MERGES),
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
        unk_token=unknown,
    )
    backend, regex = tokenizers.Tokenizer(model), tokenizers.Regex
    normalizers, cutters = tokenizers.normalizers, tokenizers.pre_tokenizers
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = cutters.Sequence(
        [cutters.Split(regex(_PARTS), behavior="removed", invert=True), cutters.ByteLevel(add_prefix_space=False)]
    )
    return backend


def _token(tokenizers, value):
    """Returns a special token, which a config has as a text or with the way it is found in texts."""
    ways = ("lstrip", "rstrip", "single_word", "normalized")
    found = {way: bool(value.get(way, False)) for way in ways} if isinstance(value, Mapping) else {"normalized": False}
    return tokenizers.AddedToken(_content(value), special=True, **found)


def _content(value):
    text = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        raise InputError(f"tokenizer_config.json names a special token {value!r}; get the whole folder again"[:200])
    return text


def _read(path, default):
    """Returns the object in a JSON file, or the default where there is none."""
    if not path.is_file():
        return default
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object; get the whole folder again")
    return found
