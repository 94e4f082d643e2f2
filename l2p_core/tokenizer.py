"""A text encoder's tokenizer, read by the package tokenizers. Nothing of its folder is run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .files.header import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How Qwen's tokenizers cut a text into words, before each is cut into tokens.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def find_tokenizer(encoder: Path, tokenizer: str | Path | None) -> Path:
    """The tokenizer's folder: the one given, else `tokenizer/` in or beside the encoder. Raises
    CheckpointError."""
    inside = [encoder, encoder / "tokenizer", encoder.parent / "tokenizer"]
    candidates = [Path(tokenizer)] if tokenizer else inside
    for folder in candidates:
        if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
            return folder
    raise CheckpointError(
        f"no tokenizer in {' or '.join(map(str, candidates))}: expected a folder with"
        " tokenizer.json. Give the tokenizer/ folder of Tongyi-MAI/Z-Image-Turbo or Qwen/Qwen3-4B"
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of tokenizer.json, or else of vocab.json and merges.txt. Raises
    CheckpointError."""
    from tokenizers import Tokenizer

    settings = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = read_json(folder / "tokenizer_config.json")
    if "auto_map" in settings:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'} names Python code of its own (auto_map), which"
            " this program never runs. Use the tokenizer/ folder of Tongyi-MAI/Z-Image-Turbo"
        )
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            tokenizer = from_vocabulary(folder, settings)
    except Exception as error:  # whatever tokenizers makes of a damaged file
        raise CheckpointError(
            f"{folder} holds no tokenizer that can be read: {error}. Use the tokenizer/ folder of"
            " Tongyi-MAI/Z-Image-Turbo"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def from_vocabulary(folder: Path, settings: Mapping) -> Tokenizer:
    """The byte-level BPE of a folder's vocab.json and merges.txt.

    settings: those of tokenizer_config.json, which lists the special tokens. Raises ValueError
    where they get other ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer = Tokenizer(models.BPE.from_file(*files))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    special = settings.get("added_tokens_decoder", {})
    for number in sorted(special, key=int):
        content = special[number]["content"]
        tokenizer.add_tokens([AddedToken(content, normalized=False)])
        if tokenizer.token_to_id(content) != int(number):
            raise ValueError(f"its token {content} should have the id {number}")
    return tokenizer


def read_json(file: Path) -> dict:
    """The table that a JSON file holds. Raises CheckpointError."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError("it is no table")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} can't be read: {error}. Get the file again") from None
    return table
