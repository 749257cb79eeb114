"""Byte-level tokens: no vocabulary file, any language, and nothing is ever unknown.

Token ids: 0 padding, 1 begin, 2 end, byte b -> b + 3. The null text (a dropped condition) is the
empty string, that is begin, end, padding.
"""

import functools
import logging
import os
from collections.abc import Sequence

import numpy as np

from vdm_jax.errors import UserError

logger = logging.getLogger("vdm_jax")

PAD, BEGIN, END = 0, 1, 2
OFFSET = 3
VOCAB_SIZE = 256 + OFFSET
NULL_TEXT = ""
MAX_PROMPT_FILE_BYTES = 1_000_000


@functools.lru_cache(maxsize=4096)  # one warning per text, not one per epoch
def _warn_truncated(text: str, kept: int, total: int) -> None:
    shown = text if len(text) <= 40 else text[:37] + "..."
    logger.warning("text truncated: kept %d of its %d bytes: %r", kept, total, shown)


def encode(texts: Sequence[str], length: int) -> np.ndarray:
    """Texts -> tokens int32 [B, length]: begin, UTF-8 bytes, end, padding.

    A text of more than length - 2 bytes is cut at a character boundary and keeps its end token; a
    warning, once per text, says how much was kept.
    """
    if isinstance(texts, str):
        raise TypeError("encode takes a list of texts, not one text")
    if length < 2:
        raise UserError(f"token length {length} has no room for the begin and end tokens: use at least 2")
    tokens = np.full((len(texts), length), PAD, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        data = text.encode("utf-8", errors="replace")  # only lone surrogates need replacing
        kept = data
        if len(data) > length - 2:
            # Cutting bytes may split a character: decoding with "ignore" drops the torn one.
            kept = data[: length - 2].decode("utf-8", errors="ignore").encode("utf-8")
            _warn_truncated(text, len(kept), len(data))
        row[0] = BEGIN
        row[1 : 1 + len(kept)] = np.frombuffer(kept, np.uint8).astype(np.int32) + OFFSET
        row[1 + len(kept)] = END
    return tokens


def mask(tokens):
    """Tokens [B, L] (NumPy or JAX) -> bool [B, L], True where there is a token and not padding."""
    return tokens != PAD


def decode(tokens) -> list[str]:
    """Tokens int [B, L] -> B texts, each up to its end token; what is not UTF-8 becomes U+FFFD."""
    texts = []
    for row in np.asarray(tokens):
        ends = np.flatnonzero(row == END)
        row = row[: ends[0]] if len(ends) else row
        texts.append(bytes((row[row >= OFFSET] - OFFSET).astype(np.uint8)).decode("utf-8", errors="replace"))
    return texts


def read_prompts(path: str | os.PathLike) -> list[str]:
    """One prompt per line of a UTF-8 text file; blank lines and lines after # are skipped.

    Raises UserError if the file cannot be read, is too big, is not UTF-8 text or holds no prompt.
    """
    name = repr(os.fspath(path))
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_PROMPT_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read the prompt file {name}: {reason}") from error
    if len(data) > MAX_PROMPT_FILE_BYTES:
        raise UserError(f"prompt file {name} is over {MAX_PROMPT_FILE_BYTES} bytes: split it")
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {name} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    if "\0" in content:
        raise UserError(f"prompt file {name} holds NUL characters: it is not a text file")
    lines = [line.strip() for line in content.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"prompt file {name} holds no prompt: write one per line")
    return prompts
