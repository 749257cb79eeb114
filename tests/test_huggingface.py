"""Folders in the layout of Hugging Face: a good one gives its parameters, and a bad one gives one clear line.

Two tests run this file in a process of its own: python tests/test_huggingface.py slices|FOLDER
"""

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the process with 8 devices

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests.helpers import finish, start, weights
from vdm_jax import sharding
from vdm_jax.errors import UserError
from vdm_jax.models import layers
from vdm_jax.models.published import naming
from vdm_jax.run import huggingface

NAME = "diffusion_pytorch_model.safetensors"
INDEX = f"{NAME}.index.json"


class Model(layers.Layer):
    width: int = 8
    depth: int = 2
    scale: float | None = None
    sizes: tuple[int, ...] = (3,)

    def example(self):
        return (jnp.zeros((1, 2, 4, 4, self.width)),)

    @nn.compact
    def __call__(self, x):
        x = layers.Conv(self.width, (3, 3), name="conv")(x)
        for i in range(self.depth):
            x = layers.Dense(self.width, name=f"layers.{i}.0")(x)
        return x


CONFIG = {"_class_name": "Model", "width": 8, "depth": 2, "sizes": [3], "unknown": {}}
NAMES = {"conv.weight": (8, 8, 3, 3), "conv.bias": (8,)}
NAMES |= {f"layers.{i}.0.{part}": shape for i in (0, 1) for part, shape in (("weight", (8, 8)), ("bias", (8,)))}


def tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in NAMES.items()}


def load(folder):
    name, config = huggingface.read_config(folder)
    assert name == "Model"
    model = naming.from_config(Model, config)
    return naming.to_params(huggingface.read_tensors(folder), model, source=folder)


def write_shards(folder):
    """A folder whose tensors are in two files, with an index -> the index."""
    whole, index = tensors(), {}
    for part in (0, 1):
        file = f"diffusion_pytorch_model-0000{part + 1}-of-00002.safetensors"
        names = sorted(whole)[part::2]
        safetensors.numpy.save_file({name: whole[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


@pytest.fixture
def folder(tmp_path):
    """A good folder with one file."""
    huggingface.write(tmp_path / "model", CONFIG, tensors())
    return tmp_path / "model"


def test_one_file_and_several_give_the_same_parameters(folder, tmp_path):
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards")
    params = load(folder)
    assert naming.tensor_shapes(Model()) == NAMES
    assert params["conv"]["kernel"].shape == (3, 3, 8, 8)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "shards"), params)
    jax.tree.map(np.testing.assert_array_equal, naming.to_tensors(params), tensors())


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16])
def test_all_floats_become_float32(folder, dtype):
    huggingface.write(folder, CONFIG, tensors(dtype))
    kernel = load(folder)["layers.0.0"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel.T, tensors(dtype)["layers.0.0.weight"].astype(np.float32))


def test_links_to_files_elsewhere_are_followed(folder, tmp_path):  # as in the cache of huggingface_hub
    (folder / NAME).rename(tmp_path / "blob")
    (folder / NAME).symlink_to("../blob")
    assert load(folder)


def test_half_precision_beside_is_not_read(folder):
    safetensors.numpy.save_file(tensors(np.float16), folder / "diffusion_pytorch_model.fp16.safetensors")
    np.testing.assert_array_equal(load(folder)["conv"]["bias"], tensors()["conv.bias"])


# ----------------------------------------------------------------------------------------------------- bad folders


def rewrite(change):
    """A fault: the file's bytes become change(bytes)."""

    def spoil(folder):
        (folder / NAME).write_bytes(change((folder / NAME).read_bytes()))

    return spoil


def header(change):
    """A fault: the header, a dict, is changed in place; the data stay."""

    def changed(content):
        end = 8 + int.from_bytes(content[:8], "little")
        values = json.loads(content[8:end])
        change(values)
        text = json.dumps(values).encode()
        return len(text).to_bytes(8, "little") + text + content[end:]

    return rewrite(changed)


def config(content):
    return lambda folder: (folder / "config.json").write_bytes(content)


def settings(**values):
    return config(json.dumps(CONFIG | values).encode())


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def replace(name, make):
    """A fault: make(path) in place of a file."""

    def spoil(folder):
        (folder / name).unlink()
        make(folder / name)

    return spoil


def overlap(values):
    values["conv.bias"]["data_offsets"] = values["layers.0.0.bias"]["data_offsets"]


def add_tensor(name, shape):
    """A fault: the header has one more tensor, without data."""
    return header(lambda values: values.update({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}))


def nested(depth):
    return json.loads("[" * depth + "]" * depth)


def add(name, dtype=np.float32):
    return lambda folder: safetensors.numpy.save_file(tensors(dtype), folder / name)


FAULTS = {  # name: (what is done to a good folder, a part of the line)
    "no config": (remove("config.json"), "has no config.json: give the folder of a published model"),
    "a pipeline": (
        lambda folder: (folder / "config.json").rename(folder / "model_index.json"),
        r"\(is it one of its subfolders\?\)",
    ),
    "empty config": (config(b""), "config.json is damaged"),
    "config of nothing": (config(b"{}"), "config.json names no class"),
    "config of a list": (config(b"[1]"), "holds no mapping"),
    "config not UTF-8": (config(b'{"a": "\xff"}'), "no UTF-8 text"),
    "deep config": (config(b"[" * 100_000), "config.json is damaged"),
    "config is a folder": (replace("config.json", Path.mkdir), "config.json is no file"),
    "config is a pipe": (replace("config.json", os.mkfifo), "config.json is no file"),
    "config is a dangling link": (replace("config.json", lambda path: path.symlink_to("none")), "has no config.json"),
    "config links to itself": (replace("config.json", lambda path: path.symlink_to(path)), "has no config.json"),
    "large config": (config(b'{"a": "' + b"a" * huggingface.MAX_BYTES + b'"}'), "config.json is damaged .over"),
    "long class": (settings(_class_name="a" * 1000), "names no class"),
    "deep setting": (settings(sizes=nested(900)), "is no value for Model"),
    "class of another type": (settings(_class_name=7), "names no class"),
    "setting of another type": (settings(width="8"), "width=8 is no value for Model, which takes int"),
    "setting is a truth": (settings(width=True), "width=True is no value"),
    "setting is null": (settings(width=None), "width=None is no value"),
    "list of another type": (settings(sizes=["3"]), "is no value for Model"),
    "huge setting": (settings(width=10**12), r"tensor conv.bias has shape \(8,\), but"),
    "too huge setting": (settings(width=10**30), "cannot have these settings"),
    "negative setting": (settings(width=-8), "Model"),
    "zero": (settings(width=0), "Model"),
    "very many layers": (settings(depth=10**12), "more layers in its config than in its 6 tensors"),
    "one layer more": (settings(depth=3), "tensor layers.2.0.bias is missing"),
    "one layer less": (settings(depth=1), "has no tensor layers.1.0.bias"),
    "empty file": (rewrite(lambda content: b""), "no readable safetensors file"),
    "short file": (rewrite(lambda content: content[:5]), "no readable safetensors file"),
    "truncated header": (rewrite(lambda content: content[:50]), "no readable safetensors file"),
    "truncated data": (rewrite(lambda content: content[:-4]), "no readable safetensors file"),
    "more data": (rewrite(lambda content: content + b"more"), "no readable safetensors file"),
    "huge header": (rewrite(lambda content: b"\xff" * 7 + b"\x00" + content[8:]), "no readable safetensors file"),
    "long header": (
        rewrite(lambda content: (huggingface.MAX_BYTES + 1).to_bytes(8, "little") + content[8:].ljust(1 << 23)),
        "its header has 4194305 bytes",
    ),
    "name of two lines": (add_tensor("a\nb", [0]), "has control characters in its name"),
    "long name": (header(lambda values: values.update({"a" * 9999: 7})), "no readable safetensors file"),
    "tensor without data": (add_tensor("more", [0, 1 << 60]), "has no tensor more"),
    "shape past all numbers": (add_tensor("more", [1 << 40, 1 << 40]), "no readable safetensors file"),
    "header not UTF-8": (rewrite(lambda content: content[:9] + b"\xff" + content[10:]), "no readable safetensors"),
    "another name": (rewrite(lambda content: content.replace(b"conv.bias", b"conv.bibs")), "conv.bias is missing"),
    "another type": (rewrite(lambda content: content.replace(b"F32", b"I32")), "has type I32: give one of F64"),
    "unknown type": (rewrite(lambda content: content.replace(b"F32", b"X32")), "no readable safetensors file"),
    "half the type": (rewrite(lambda content: content.replace(b"F32", b"F16")), "no readable safetensors file"),
    "another shape": (rewrite(lambda content: content.replace(b"[8,8,3,3]", b"[8,3,8,3]")), r"\(8, 3, 8, 3\)"),
    "overlapping tensors": (header(overlap), "no readable safetensors file"),
    "offsets past the end": (
        header(lambda values: values["conv.bias"].update(data_offsets=[0, 1 << 60], shape=[1 << 58])),
        "no readable safetensors file",
    ),
    "header of a list": (header(lambda values: values.update({"conv.bias": [1]})), "no readable safetensors file"),
    "file is a folder": (replace(NAME, Path.mkdir), "is missing or no file"),
    "file is a pipe": (replace(NAME, os.mkfifo), "is missing or no file"),
    "file links to itself": (replace(NAME, lambda path: path.symlink_to(path)), "is missing or no file"),
    "file is a dangling link": (replace(NAME, lambda path: path.symlink_to("none")), "is missing or no file"),
    "no weights": (remove(NAME), "has no safetensors file: download the folder again"),
    "two files": (add("model.safetensors"), "several files of weights"),
    "two unusual files": (
        lambda folder: [(folder / NAME).rename(folder / "a.safetensors"), add("b.safetensors")(folder)],
        r"several files of weights \(a.safetensors, b.safetensors\): keep one",
    ),
}


def test_good_folder_of_the_faults(folder):
    assert load(folder)["conv"]["bias"].shape == (8,)


def expect_one_line(folder, said):
    with pytest.raises(UserError, match=said) as error:
        load(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("fault, said", FAULTS.values(), ids=FAULTS)
def test_bad_folder(folder, fault, said):
    fault(folder)
    expect_one_line(folder, said)


def test_a_flipped_bit_in_the_header_is_never_another_model(folder):
    """Every byte of the length and of the header, with one bit of it flipped."""
    good, want, refused = (folder / NAME).read_bytes(), load(folder), 0
    end = 8 + int.from_bytes(good[:8], "little")
    for at in range(end):
        spoilt = bytearray(good)
        spoilt[at] ^= 1 << at % 8
        (folder / NAME).write_bytes(spoilt)
        try:
            huggingface.read_tensors(folder)
            jax.tree.map(np.testing.assert_array_equal, load(folder), want)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 0.9 * end


def index_of(change):
    """A fault of the index: change(weight_map) in place."""

    def spoil(folder):
        values = json.loads((folder / INDEX).read_text())
        change(values["weight_map"])
        (folder / INDEX).write_text(json.dumps(values))

    return spoil


def in_all(name):
    return index_of(lambda files: files.update(dict.fromkeys(files, name)))


FIRST, SECOND = (f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX_FAULTS = {
    "missing file": (remove(SECOND), f"{SECOND} is missing or no file"),
    "index links to itself": (replace(INDEX, lambda path: path.symlink_to(path)), f"{INDEX} is missing"),
    "missing index": (remove(INDEX), r"but no \*.safetensors.index.json"),
    "parent folder": (in_all("../x.safetensors"), "which is no safetensors file in this folder"),
    "absolute path": (in_all("/etc/x.safetensors"), "which is no safetensors file in this folder"),
    "another file": (in_all("config.json"), "which is no safetensors file in this folder"),
    "control characters": (in_all("a\n\0.safetensors"), r"'a\\n\\x00.safetensors', which is no"),
    "no map": (lambda folder: (folder / INDEX).write_text("{}"), "has no weight_map"),
    "map of numbers": (in_all(1), "has no weight_map"),
    "no mapping": (lambda folder: (folder / INDEX).write_text("7"), "holds no mapping"),
    "only in the index": (index_of(lambda files: files.update(more=FIRST)), "tensor more is only in the index"),
    "only in the file": (index_of(lambda files: files.pop("conv.bias")), "tensor conv.bias is only in the file"),
    "in the other file": (
        index_of(lambda files: files.update({"conv.bias": SECOND})),
        "tensor conv.bias is only in the file",
    ),
    "in both files": (
        lambda folder: (folder / SECOND).write_bytes((folder / FIRST).read_bytes()),
        f"{SECOND} differ: tensor",
    ),
}


@pytest.mark.parametrize("fault, said", INDEX_FAULTS.values(), ids=INDEX_FAULTS)
def test_bad_index(tmp_path, fault, said):
    write_shards(tmp_path)
    fault(tmp_path)
    expect_one_line(tmp_path, said)


def test_a_config_without_sense_takes_no_memory(tmp_path):
    size = 512
    wide = {name: np.zeros([size if n == 8 else n for n in shape], np.float32) for name, shape in NAMES.items()}
    huggingface.write(tmp_path, CONFIG | {"width": size}, wide)
    bytes_of_file = (tmp_path / NAME).stat().st_size
    del wide
    for change in (dict(width=10**9), dict(width=size, depth=10**9)):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
        tracemalloc.start()
        expect_one_line(tmp_path, "Model")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.2 * bytes_of_file


def test_pickled_weights_can_be_converted_by_the_line(folder):
    torch = pytest.importorskip("torch")
    (folder / NAME).unlink()
    whole = {name: torch.tensor(x) for name, x in tensors().items()}
    whole["conv.weight"] = whole["conv.weight"].transpose(2, 3).contiguous().transpose(2, 3)  # not contiguous
    for part in (1, 2):
        names = sorted(whole)[part - 1 :: 2]
        torch.save({name: whole[name] for name in names}, folder / f"model it's-0000{part}-of-00002.bin")
    expect_one_line(folder, "is a pickle, which can run code")
    with pytest.raises(UserError) as error:
        huggingface.read_tensors(folder)
    line = re.search(r"python (-c .*)", str(error.value)).group(1)
    subprocess.run(f"{sys.executable} {line}", shell=True, cwd=folder, check=True)
    jax.tree.map(np.testing.assert_array_equal, naming.to_tensors(load(folder)), tensors())


# -------------------------------------------------------------------------------------------------------- 8 devices


class Counting(np.ndarray):
    """An array that notes how many of its elements each reading takes."""

    def __getitem__(self, index):
        part = np.asarray(self)[index]
        self.taken.append(part.size)
        return part


def read_by_slices():
    model = Model(width=64, sizes=())
    want = weights(naming.param_shapes(model))
    mesh = sharding.make_mesh(dict(data=1, fsdp=8, sequence=1, tensor=1))
    counting = {name: x.view(Counting) for name, x in naming.to_tensors(want).items()}
    for x in counting.values():
        x.taken = []
    got = naming.to_params(counting, model, mesh)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.map(lambda x: x.sharding, got) == sharding.state_shardings(want, mesh)
    split = [name for name, x in counting.items() if max(x.taken) < x.size]
    assert {"conv.weight", "layers.0.0.weight"} <= set(split)
    for name in split:
        assert counting[name].taken == [counting[name].size // 8] * 8, name


def test_each_device_reads_its_slices():
    code, _, err = finish(start(__file__, "slices", XLA_FLAGS="--xla_force_host_platform_device_count=8"))
    assert code == 0, err


# ----------------------------------------------------------------------------------------------------------- memory


def write_sparse(folder, more=(), length=None, name=NAME):
    """A folder of 185 MB that takes no place on the disk, with further entries of the header. Returns its size."""
    width, at, values = 2048, 0, {}
    for tensor, shape in NAMES.items():
        shape = [width if n == 8 else n for n in shape]
        values[tensor] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at := at + 4 * int(np.prod(shape))]}
    text = json.dumps(values | dict(more)).encode()
    with open(folder / name, "wb") as file:
        file.write((length or len(text)).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"width": width}))
    return 8 + len(text) + at


def refuse_in_little_memory(folder):
    none = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    many = {f"{i:x}": none for i in range(60_000)}  # near the largest header
    huge = none | {"shape": [1 << 30, 1 << 30], "data_offsets": [0, 1 << 62]}
    hostile = (
        ("has no tensor", dict(more=many)),
        ("a long name", dict(more={"a" * 4_000_000: none})),
        ("many dimensions", dict(more={"a": none | {"shape": [0] * 1_000_000}})),
        ("no readable", dict(more={"a": huge})),
        ("no readable", dict(more={"conv.bias": huge})),
        ("its header has", dict(length=100_000_000)),
        ("its header has", dict(length=1 << 63)),
    )
    write_sparse(folder)
    naming.param_shapes(naming.from_config(Model, huggingface.read_config(folder)[1]))
    assert huggingface.read_tensors(folder).keys() == NAMES.keys()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for said, case in hostile:
        size = write_sparse(folder, **case)
        expect_one_line(folder, said)
        used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024  # on Linux it is in KiB
        print(f"{size / 1e6:.0f} MB of files, {used / 1e6:.0f} MB of memory", file=sys.stderr)
        assert used < 1.2 * size


def test_hostile_headers_take_little_memory(tmp_path):
    code, _, err = finish(start(__file__, tmp_path))
    assert code == 0 and len(err) == 7, "\n".join(err)


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    huggingface.write(tmp_path, {"_class_name": "Any"}, {"x": np.zeros(3, np.float32)})
    hashed, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: hashed.append(file.name) or digest(file, kind))
    before = huggingface.fingerprint(tmp_path)
    assert huggingface.fingerprint(tmp_path) == before and len(hashed) == 2
    huggingface.write(tmp_path, {"_class_name": "Any"}, {"x": np.ones(3, np.float32)})
    assert huggingface.fingerprint(tmp_path) != before


if __name__ == "__main__":
    if sys.argv[1] == "slices":
        assert jax.device_count() == 8
        read_by_slices()
    else:
        refuse_in_little_memory(Path(sys.argv[1]))
