import numpy as np
import pytest

from vdm_jax.data import text
from vdm_jax.errors import UserError


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    text.warn_truncated.cache_clear()
    monkeypatch.setattr(text.logger, "warning", lambda message, *args: lines.append(message % args))
    return lines


def test_layout_of_a_row():
    tokens = text.encode(["ab", ""], 6)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, [[1, ord("a") + 3, ord("b") + 3, 2, 0, 0], [1, 2, 0, 0, 0, 0]])
    np.testing.assert_array_equal(text.mask(tokens), [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    assert text.mask(tokens).dtype == bool


def test_every_byte_stays_in_the_vocabulary():
    tokens = text.encode(["\x00\x7f\u00ff\uffff\U0010ffff"], 32)
    assert tokens.min() >= 0 and tokens.max() < text.VOCAB_SIZE == 259


def test_a_row_holds_the_bytes_of_its_text(warnings):
    for given in ("a red circle moves right", "ein grüner Würfel", "赤い丸", "🙂 tab\tand\nline"):
        data = given.encode()
        row = [text.BEGIN, *(byte + text.OFFSET for byte in data), text.END]
        np.testing.assert_array_equal(text.encode([given], len(row)), [row])  # exactly full
    assert warnings == []
    assert text.encode([], 8).shape == (0, 8)


def test_truncation_keeps_whole_characters_and_the_end(warnings):
    tokens = text.encode(["aé" * 4], 7)  # 12 bytes, room for 5: a é a, then the first half of é is dropped
    np.testing.assert_array_equal(tokens, text.encode(["aéa"], 7))
    assert tokens[0].tolist().index(text.END) == 5 and tokens[0, 6] == text.PAD
    assert len(warnings) == 1 and "4 of its 12 bytes" in warnings[0]
    text.encode(["aé" * 4], 7)
    assert len(warnings) == 1  # once per text
    text.encode(["aé" * 5], 7)
    assert len(warnings) == 2


def test_lone_surrogates_and_bad_lengths():
    np.testing.assert_array_equal(text.encode(["a\ud800b"], 8), text.encode(["a?b"], 8))
    with pytest.raises(UserError):
        text.encode(["a"], 1)


def test_read_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# comment\r\n\r\n  a red circle \r\nzwei Würfel\n".encode())
    assert text.read_prompts(path) == ["a red circle", "zwei Würfel"]


@pytest.mark.parametrize(
    "content, fault",
    [
        (b"", "no prompt"),
        (b"\n# only a comment\n", "no prompt"),
        (b"caf\xe9", "UTF-8"),
        (b"a\0b", "NUL"),
        (b"a" * (text.MAX_TEXT_BYTES + 1), "over"),
    ],
)
def test_read_prompts_faults(tmp_path, content, fault):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as error:
        text.read_prompts(path)
    assert "\n" not in str(error.value) and "prompts.txt" in str(error.value)


def test_read_prompts_missing_or_a_folder(tmp_path):
    for path in [tmp_path / "absent.txt", tmp_path, "a\0b"]:
        with pytest.raises(UserError, match="cannot read"):
            text.read_prompts(path)
