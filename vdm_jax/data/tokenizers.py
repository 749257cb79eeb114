"""Tokenizers of published text encoders, made from the files that come with the weights.

The packages `tokenizers` and `sentencepiece` split the text. The first of these that a folder has counts:

    tokenizer.json                             any tokenizer
    spiece.model, sentencepiece.model          T5: no token before the text, </s> after it
    vocab.json and merges.txt                  CLIP: <|startoftext|> before the text, <|endoftext|> after it
    vocab.txt                                  BERT: [CLS] before the text, [SEP] after it

tokenizer_config.json and special_tokens_map.json may name another padding token and length.
"""

import dataclasses
import importlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from vdm_jax.data import text
from vdm_jax.errors import UserError
from vdm_jax.run import storage

FIX = "download the folder again"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "sentence_bert_config.json")
MAX_BYTES = 1 << 27  # of a file; the largest published ones have 35 MB
LENGTH = 512  # default number of tokens
CLIP_LENGTH = 77
EXTRA_IDS = 100  # tokens after the pieces of T5, numbered from the end
MAX_EXTRA_IDS = 10_000
PROBE = "a \U0010ffff"  # a damaged file may fail at the first unknown character only
CLIP_WORDS = (  # CLIP splits a text into these parts before it merges bytes
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of a published text encoder; `read` makes it."""

    backend: Any  # of the package that splits the text
    pad: int  # the token of padding
    length: int  # default number of tokens of a row
    size: int  # tokens are below it

    def encode(self, texts: Sequence[str], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns (tokens int32 [B, length], mask bool [B, length], False = padding).

        A text with too many tokens is cut, and keeps the tokens that end a text. A warning says how much was kept, once
        for each text. Raises UserError if a row has no room for the tokens that begin and end a text.
        """
        length = self.length if length is None else length
        room = length - self._added()
        if room < 0:
            raise UserError(f"token length {length} has no room for the tokens that begin and end a text: use more")
        tokens = np.full((len(texts), length), self.pad, np.int32)
        mask = np.zeros((len(texts), length), bool)
        for row, row_mask, given in zip(tokens, mask, texts, strict=True):
            # A lone surrogate, which UTF-8 lacks, becomes "?".
            ids, total = self._split(given.encode("utf-8", errors="replace").decode(), room)
            if total > room:
                text.warn_truncated(given, room, total, "tokens")
            row[: len(ids)] = ids
            row_mask[: len(ids)] = True
        return tokens, mask


class _FromTokenizers(Tokenizer):
    def _added(self):
        return self.backend.num_special_tokens_to_add(is_pair=False)

    def _split(self, given, room):
        """Returns (the tokens of a text, cut to `room`, with begin and end; their number before the cut)."""
        encoding = self.backend.encode(given, add_special_tokens=False)
        total = len(encoding)
        encoding.truncate(room)
        return self.backend.post_process(encoding).ids, total


@dataclasses.dataclass(frozen=True)
class _FromSentencePiece(Tokenizer):
    special: dict[str, int]  # tokens that a text may spell

    def _added(self):
        return 1

    def _split(self, given, room):
        parts = re.split(f"({'|'.join(map(re.escape, self.special))})", given)
        ids = [i for part in parts for i in self._part(part)]
        return [*ids[:room], self.backend.eos_id()], len(ids)

    def _part(self, part):
        return [self.special[part]] if part in self.special else self.backend.encode(part)


def read(folder):
    """Returns the Tokenizer of a text encoder.

    folder: the folder with the tokenizer's files, or the folder of a text encoder in a pipeline, such as
        `text_encoder`, with the tokenizer's folder beside it, such as `tokenizer`

    Raises UserError if no tokenizer is there, a file is damaged, or a package is missing.
    """
    path = _find(folder)
    return _READERS[path.name](path, _read_settings(path.parent))


def files(folder):
    """Returns the paths of the files that `read` reads in these folders. Raises UserError if no tokenizer is there."""
    path = _find(folder)
    others = ("merges.txt", *SETTINGS) if path.name == "vocab.json" else SETTINGS
    return [path, *(other for name in others if (other := path.with_name(name)).exists())]


def _find(folder):
    folder = epath.Path(folder)
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    for place in dict.fromkeys((folder, beside)):
        for name in _READERS:
            if (place / name).exists():
                return place / name
    raise UserError(f"{folder} has no tokenizer ({', '.join(_READERS)}): {FIX}, or give the folder that has them")


def _read_settings(folder):
    """Returns {name: value} of what the small files beside a tokenizer say."""

    def read_json(name):
        return storage.read_json(folder / name, FIX, sealed=False) if (folder / name).exists() else {}

    config, special, lengths = SETTINGS
    settings = read_json(config)
    if "added_tokens_decoder" not in settings:  # as in transformers: newer files say all in one
        settings |= read_json(special)
    lengths = settings.get("model_max_length"), read_json(lengths).get("max_seq_length")
    return settings | {"lengths": [n for n in lengths if n is not None]}


def _length(settings, path, largest=LENGTH):
    """Returns the default number of tokens: the smallest that the settings name, at most `largest`."""
    lengths = settings["lengths"]
    if not all(isinstance(n, int | float) and n >= 1 for n in lengths):
        raise UserError(f"{path.parent} names no number of tokens, but {lengths}: {FIX}")
    return int(min([*lengths, largest]))


def _token(settings, name, default):
    """Returns a special token of the settings as text."""
    token = settings.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else default


def _import(package):
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f'package {package} is missing: pip install -e ".[published]"') from None


def _checks_file(read_file):
    """Returns read_file(path, settings) that raises one UserError for whatever a damaged file makes a package raise."""

    def checked(path, settings):
        parts = [path, path.with_name("merges.txt")] if path.name == "vocab.json" else [path]
        for part in parts:
            if not part.is_file() or part.stat().length > MAX_BYTES:
                raise UserError(f"{part} is no file of at most {MAX_BYTES} bytes: {FIX}")
        try:
            tokenizer = read_file(path, settings)
            tokenizer.encode([PROBE], 16)
            return tokenizer
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust, in which `tokenizers` is written, is no Exception
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is no readable tokenizer ({reason}): {FIX}") from None

    return checked


def _finish(backend, settings, path, pads, largest=LENGTH):
    """Returns the Tokenizer with a backend of the package `tokenizers`.

    pads: the possible padding tokens, the most likely first
    """
    backend.no_truncation()
    backend.no_padding()
    known = backend.get_vocab()
    pad = next((pad for pad in pads if pad in known), None)
    if pad is None:
        raise UserError(f"{path} has no padding token ({', '.join(map(repr, pads))}): {FIX}")
    backend.add_special_tokens([pad])  # as in transformers: where a text spells it, this token stands for it
    return _FromTokenizers(backend, known[pad], _length(settings, path, largest), max(known.values()) + 1)


@_checks_file
def _read_json(path, settings):
    backend = _import("tokenizers").Tokenizer.from_file(str(path))
    usual = backend.padding["pad_token"] if backend.padding else "<pad>"
    pads = [_token(settings, "pad_token", usual), "<pad>", "[PAD]", "<|endoftext|>"]
    return _finish(backend, settings, path, pads)


@_checks_file
def _read_clip(path, settings):
    package = _import("tokenizers")
    begin, end = "<|startoftext|>", "<|endoftext|>"
    model = package.models.BPE.from_file(
        str(path), str(path.with_name("merges.txt")), unk_token=end, end_of_word_suffix="</w>"
    )
    backend = package.Tokenizer(model)
    normalizers, splits = package.normalizers, package.pre_tokenizers
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(package.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = splits.Split(package.Regex(CLIP_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = splits.Sequence([words, splits.ByteLevel(add_prefix_space=False)])
    _add_special(backend, path, [begin, end])
    backend.post_processor = package.processors.TemplateProcessing(
        single=[begin, "$A", end], special_tokens=[(name, backend.token_to_id(name)) for name in (begin, end)]
    )
    return _finish(backend, settings, path, [_token(settings, "pad_token", end)], CLIP_LENGTH)


@_checks_file
def _read_bert(path, settings):
    package = _import("tokenizers")
    backend = package.Tokenizer(package.models.WordPiece.from_file(str(path), unk_token="[UNK]"))
    backend.normalizer = package.normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = package.pre_tokenizers.BertPreTokenizer()
    _add_special(backend, path, ["[CLS]", "[SEP]", "[UNK]", "[MASK]"])
    backend.post_processor = package.processors.TemplateProcessing(
        single=["[CLS]", "$A", "[SEP]"],
        special_tokens=[(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return _finish(backend, settings, path, ["[PAD]"])


def _add_special(backend, path, names):
    """Marks tokens of the vocabulary as special. Raises UserError for one that it lacks."""
    for name in names:
        if backend.token_to_id(name) is None:
            raise UserError(f"{path} has no token {name}: {FIX}")
    backend.add_special_tokens(names)


@_checks_file
def _read_sentencepiece(path, settings):
    backend = _import("sentencepiece").SentencePieceProcessor(model_file=str(path))
    size, unknown = backend.get_piece_size(), backend.unk_id()
    if backend.eos_id() < 0:
        raise UserError(f"{path} has no token that ends a text, so it is no tokenizer of T5: {FIX}")
    pad = max(backend.pad_id(), 0)
    special = {backend.id_to_piece(i): i for i in (pad, backend.eos_id(), unknown)}
    extra = settings.get("extra_ids", EXTRA_IDS)
    if extra not in range(MAX_EXTRA_IDS):
        raise UserError(f"{path.parent} names {extra!r} extra_ids: {FIX}")
    if backend.piece_to_id("<extra_id_0>") == unknown:  # newer files have them among their pieces
        special |= {f"<extra_id_{i}>": size + extra - 1 - i for i in range(extra)}
    return _FromSentencePiece(backend, pad, _length(settings, path), max(size - 1, *special.values()) + 1, special)


_READERS = {
    "tokenizer.json": _read_json,
    "spiece.model": _read_sentencepiece,
    "sentencepiece.model": _read_sentencepiece,
    "vocab.json": _read_clip,
    "vocab.txt": _read_bert,
}
