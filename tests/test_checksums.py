"""Every changed file is found and named."""

import os

import numpy as np
import pytest

from vdm_jax.run import checksums


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name, size in (("a/large", checksums.CHUNK + 77), ("a/b/small file", 40), ("empty", 0)):
        (tmp_path / name).write_bytes(rng.bytes(size))
    checksums.write(tmp_path)
    return tmp_path


def test_what_is_unchanged_is_good(folder):
    assert checksums.check(folder) == checksums.CHUNK + 77 + 40
    (folder / "more").write_text("of someone else")
    (folder / checksums.LATER[0]).write_text("of Orbax")
    assert checksums.check(folder) == checksums.CHUNK + 77 + 40


def test_a_folder_without_checksums_is_refused(folder):
    (folder / checksums.NAME).unlink()
    for read in (checksums.check, checksums.add_later):
        with pytest.raises(checksums.Unverified, match=f"{folder} has no checksums.txt"):
            read(folder)


def test_what_comes_later_can_be_added(folder):
    whole = (folder / checksums.NAME).read_text()
    checksums.add_later(folder)
    assert (folder / checksums.NAME).read_text() == whole
    for name in checksums.LATER:
        (folder / name).write_text("of Orbax")
    checksums.add_later(folder)
    assert checksums.check(folder) == checksums.CHUNK + 77 + 40 + 16
    (folder / checksums.LATER[1]).write_text("of orbax")
    checksums.add_later(folder)  # does not make good what is damaged
    with pytest.raises(checksums.Damaged, match=f"{checksums.LATER[1]} is damaged"):
        checksums.check(folder)


@pytest.mark.parametrize("name", ["a/large", "a/b/small file", "checksums.txt"])
def test_every_flipped_bit_is_found(folder, name):
    whole = (folder / name).read_bytes()
    for seed in range(20):
        changed = bytearray(whole)
        place, bit = np.random.default_rng(seed).integers([len(whole), 8])
        changed[place] ^= 1 << bit
        (folder / name).write_bytes(changed)
        with pytest.raises(checksums.Damaged, match=f"{name} is damaged"):
            checksums.check(folder)
    (folder / name).write_bytes(whole)
    checksums.check(folder)


def test_what_is_missing_cut_or_longer_is_found(folder):
    path = folder / "a" / "b" / "small file"
    whole = path.read_bytes()
    for content in (whole[:-1], b"", whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(checksums.Damaged, match="small file is damaged"):
            checksums.check(folder)
    path.unlink()
    with pytest.raises(checksums.Damaged, match="small file is missing"):
        checksums.check(folder)
    for make, remove in ((path.mkdir, path.rmdir), (lambda: os.mkfifo(path), path.unlink)):
        make()
        with pytest.raises(checksums.Damaged, match="small file is no file"):
            checksums.check(folder)
        remove()
    path.write_bytes(whole)
    for content in (b"", b"\n", b"\xff\xfe", (folder / "checksums.txt").read_bytes()[:-20]):
        (folder / "checksums.txt").write_bytes(content)
        with pytest.raises(checksums.Damaged, match="checksums.txt is damaged"):
            checksums.check(folder)
    (folder / "checksums.txt").unlink()
    (folder / "checksums.txt").mkdir()
    with pytest.raises(checksums.Damaged, match="checksums.txt is no file: restore this file"):
        checksums.check(folder)


@pytest.mark.parametrize("line", ["00000000 0 ../outside", "00000000 0 /dev/null", "00000000 0", "00000000 much empty"])
def test_a_forged_line_reads_no_file_outside(folder, line):
    (folder.parent / "outside").write_bytes(b"")
    (folder / "checksums.txt").write_text(checksums._sealed(line + "\n"))
    with pytest.raises(checksums.Damaged, match="is no file|checksums.txt is damaged"):
        checksums.check(folder)


def test_files_that_are_needed_must_be_listed(folder):
    checksums.check(folder, ["empty", "a/large"])
    (folder / "more").write_text("not listed")
    with pytest.raises(checksums.Unverified, match="more is not listed in checksums.txt"):
        checksums.check(folder, ["empty", "more"])
