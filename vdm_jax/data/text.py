"""Text files, and byte-level tokens: they need no vocabulary file and can spell any text of any language.

Token 0 is padding, 1 begins a text, 2 ends it, and byte b is token b + 3. The null text, which stands for a dropped
condition, is the empty string: begin, end, padding.
"""

import functools
import logging
import os
from collections.abc import Sequence

import numpy as np

from vdm_jax.data.shards import Part, open_file
from vdm_jax.errors import UserError

logger = logging.getLogger("vdm_jax")

PAD, BEGIN, END = 0, 1, 2
OFFSET = 3
VOCAB_SIZE = 256 + OFFSET
NULL_TEXT = ""
MAX_TEXT_BYTES = 1_000_000  # of a file of prompts or a caption


@functools.lru_cache(maxsize=4096)  # one warning for a text, not one in each epoch
def warn_truncated(text: str, kept: int, total: int, unit: str) -> None:
    """Logs that `kept` of the `total` bytes or tokens of a text are used."""
    logger.warning("text truncated: kept %d of its %d %s: %.40r", kept, total, unit, text)


def encode(texts: Sequence[str], length: int) -> np.ndarray:
    """Returns the tokens of texts, int32 [B, length]: begin, UTF-8 bytes, end, padding.

    A text of more than length - 2 bytes is cut after a whole character and still ends with the end token. A warning
    says how much was kept, once for each text. Raises UserError if a row has no room for the begin and end tokens.
    """
    if length < 2:
        raise UserError(f"token length {length} has no room for the begin and end tokens: use at least 2")
    tokens = np.full((len(texts), length), PAD, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        kept = data = text.encode("utf-8", errors="replace")  # a lone surrogate, which UTF-8 lacks, becomes "?"
        if len(data) > length - 2:
            # The cut may split a character. Decoding with "ignore" drops its first half.
            kept = data[: length - 2].decode("utf-8", errors="ignore").encode("utf-8")
            warn_truncated(text, len(kept), len(data), "bytes")
        row[0] = BEGIN
        row[1 : 1 + len(kept)] = np.frombuffer(kept, np.uint8).astype(np.int32) + OFFSET
        row[1 + len(kept)] = END
    return tokens


def mask(tokens):
    """Returns bool [B, L], False where tokens [B, L] (NumPy or JAX) are padding."""
    return tokens != PAD


def read_text(path: str | os.PathLike | Part, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Returns the content of a file. Raises UserError if it cannot be read, is too large or is not UTF-8 text."""
    name = repr(path.name if isinstance(path, Part) else os.fspath(path))
    try:
        with open_file(path) as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: the name holds a NUL character
        raise UserError(f"cannot read {name}: {getattr(error, 'strerror', error)}") from error
    if len(data) > max_bytes:
        raise UserError(f"{name} is over {max_bytes} bytes: split it, or move it away if it is the wrong file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def read_prompts(path: str | os.PathLike) -> list[str]:
    """Returns the prompts of a text file, one from each line. It skips blank lines and lines that begin with #.

    Raises UserError if `read_text` does, or if the file holds no prompt.
    """
    content = read_text(path)
    if "\0" in content:
        raise UserError(f"prompt file {os.fspath(path)!r} holds NUL characters: it is not a text file")
    lines = map(str.strip, content.splitlines())
    if prompts := [line for line in lines if line and not line.startswith("#")]:
        return prompts
    raise UserError(f"prompt file {os.fspath(path)!r} holds no prompt: write one on each line")
