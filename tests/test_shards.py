"""Tar archives of clips."""

import io
import tarfile

import av
import numpy as np
import pytest
from PIL import Image

from tests.test_listing import CLIP
from vdm_jax.data import shards, writing
from vdm_jax.data.files import Files
from vdm_jax.errors import UserError


def write(path, members, **options):
    """members: {name: bytes, or the target of a link}"""
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname, content = tarfile.SYMTYPE, content, b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_lie_where_they_are_said_to(tmp_path, format):
    long = "x" * 90 + "/" + "y" * 60  # PAX and GNU have a header of their own for it
    content = {"./a.txt": b"one", long: b"two" * 400, "../out.txt": b"3", ".h/b": b"4", "l.mp4": "/etc/passwd"}
    write(tmp_path / "a.tar", content, format=format)
    found, left_out = shards.members(str(tmp_path / "a.tar"))
    assert list(found) == ["a.txt", long]
    assert left_out == {"../out.txt": shards.OUTSIDE, ".h/b": shards.HIDDEN, "l.mp4": left_out["l.mp4"]}
    assert "link" in left_out["l.mp4"]
    for name, expected in {"a.txt": b"one", long: b"two" * 400}.items():
        part = shards.Part(str(tmp_path / "a.tar"), name, *found[name])
        with part.open() as file:
            assert file.read() == expected and file.seek(-2, io.SEEK_END) == len(expected) - 2
            assert file.read(100) == expected[-2:] and file.read(1) == b""


def test_clips_of_an_archive_are_those_of_its_files(put, clip, tmp_path):
    folder, data = put("k1.mp4", "k2.mp4"), clip.read_bytes()
    (folder / "k1.txt").write_text("one")
    (folder / "k2.json").write_text('{"caption": "two"}')
    packed = tmp_path / "packed"
    packed.mkdir()
    members = {"k1.mp4": data, "k1.txt": b"one", "k2.left.mp4": data, "k2.json": b'{"caption": "two"}', "k2.cls": b"3"}
    write(packed / "a.TAR", members)
    loose, source = Files(folder, **CLIP), Files(packed, **CLIP)
    assert [video.name for video in source.videos] == ["a.TAR/k1.mp4", "a.TAR/k2.left.mp4"]
    for i in range(4):
        assert source[i]["caption"] == loose[i]["caption"]
        np.testing.assert_array_equal(source[i]["video"], loose[i]["video"])
        np.testing.assert_array_equal(source[i]["audio"], loose[i]["audio"])
    crcs = [row[2] for row in source.fingerprint({}).values()]
    assert crcs == [row[2] for row in loose.fingerprint({}).values()]
    assert source.summary.left_out == {"no video": {"count": 1, "first": ["a.TAR/k2.cls"]}}
    assert [video.name for video in Files(packed, **CLIP).videos] == [video.name for video in source.videos]


def test_images_and_damaged_clips_of_an_archive(put, tmp_path, caplog):
    folder, image = put(), io.BytesIO()
    folder.mkdir()
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    Image.fromarray(pixels).save(image, "PNG")
    writing.write_mp4(tmp_path / "k.mp4", np.zeros((60, 32, 32, 3), np.uint8), None, 8, 8000)
    with av.open(str(tmp_path / "k.mp4")) as container:
        packet = [packet for packet in container.demux() if packet.size][40]
    data = bytearray((tmp_path / "k.mp4").read_bytes())
    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    heic = b"\0\0\0\x18ftypheic" + bytes(20)
    write(folder / "a.tar", {"k.mp4": bytes(data), "x.png": image.getvalue(), "x.heic": heic})
    source = Files(folder, **CLIP | {"frames": 60})
    assert source.summary.left_out["cannot be read"]["first"][0].startswith("a.tar/x.heic (it is a HEIC image")
    items = [source[i]["video"] for i in range(4)]
    assert sum((item == pixels).all() for item in items) == 2
    assert [line for line in caplog.messages if "damaged packets" in line] == [
        "'a.tar/k.mp4': its picture has damaged packets, which are left out: 1 so far"
    ]


def octal(number):
    return b"%011o\0" % number


@pytest.mark.parametrize(
    "size, kind", [(b"\xff" * 12, b"0"), (b"\xff" * 12, b"x"), (octal(1 << 30), b"x"), (octal(1 << 30), b"L")]
)
def test_sizes_that_cannot_be_end_at_once(tmp_path, size, kind):
    member = tarfile.TarInfo("a.mp4").tobuf(tarfile.USTAR_FORMAT)
    header = bytearray(member[:124] + size + member[136:156] + kind + member[157:])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) * 4 + bytes(4096))
    with pytest.raises(UserError, match="no whole tar archive"):
        shards.members(str(tmp_path / "a.tar"))


def test_an_archive_that_is_cut_off_is_left_out_and_said(put, clip):
    folder = put("k.mp4")
    write(folder / "a.tar", {"a.mp4": clip.read_bytes() * 20})
    data = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(data[: len(data) // 2])
    (told,) = Files(folder, **CLIP).summary.left_out["cannot be read"]["first"]
    assert told.startswith("a.tar (no whole tar archive: ")
