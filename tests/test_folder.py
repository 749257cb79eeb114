"""What the folder of a run holds comes back as it was, and what is broken or missing is named."""

import errno
import json

import jax
import numpy as np
import pytest

from configs import t2v_pod
from tests import tiny
from vdm_jax.errors import UserError
from vdm_jax.run import folder as run_folder
from vdm_jax.run import record, storage
from vdm_jax.system.layout import layout

PARAMS = {
    "stem": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4) / 7, "bias": np.ones(4, np.float32)},
    "scale": np.float32(0.25),
}
EXPECTED = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_reference_names_the_weights_of_this_package(tmp_path):
    assert run_folder.given("reference") == run_folder.REFERENCE
    assert run_folder.given(str(tmp_path)) == tmp_path


# --------------------------------------------------------------------------------------------------- safetensors


def test_safetensors_come_back(tmp_path):
    path = tmp_path / "w.safetensors"
    run_folder.write_safetensors(path, PARAMS, 7)
    half, step = run_folder.read_safetensors(path, EXPECTED)
    assert step == 7
    equal(half, jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), PARAMS))
    assert {x.dtype for x in jax.tree.leaves(half)} == {np.dtype(np.float32)}


def test_safetensors_of_another_model_are_told(tmp_path):
    path = tmp_path / "w.safetensors"
    stem = PARAMS["stem"]
    for params, words in (
        (
            {**PARAMS, "stem": {**stem, "kernel": stem["kernel"].T}},
            r"stem/kernel is \(4, 3\).*asks for \(3, 4\)",
        ),
        ({"stem": stem}, "has no scale"),
        ({**PARAMS, "more": stem}, "has more/bias, which the config does not"),
    ):
        run_folder.write_safetensors(path, params, 0)
        with pytest.raises(UserError, match=words):
            run_folder.read_safetensors(path, EXPECTED)


def test_damaged_safetensors_are_told(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match="missing"):
        run_folder.read_safetensors(path, EXPECTED)
    for step in ("much", -1, 2**40):
        run_folder.write_safetensors(path, PARAMS, step)
        with pytest.raises(UserError, match="no readable safetensors"):
            run_folder.read_safetensors(path, EXPECTED)
    run_folder.write_safetensors(path, PARAMS, 0)
    whole = path.read_bytes()
    for content in (b"", whole[:5], whole[:40], whole[:-3], whole + b"x", b"\xff" * 64, b"PK\3\4" + whole):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no readable safetensors"):
            run_folder.read_safetensors(path, EXPECTED)


# ------------------------------------------------------------------------------------------ config and statistics


@pytest.mark.parametrize("recipe", [tiny, t2v_pod])
def test_settings_come_back_and_are_locked(tmp_path, recipe):
    config = recipe.get_config()
    record.begin(tmp_path, 3, config)
    back = run_folder.read_config(tmp_path)
    assert back.to_dict() == config.to_dict()
    assert back.is_locked and isinstance(back.denoiser.model.channels, tuple)
    assert layout(back) == layout(config)
    with pytest.raises((AttributeError, KeyError)):
        back.denoiser.stps = 1


def test_statistics_come_back(tmp_path):
    path = tmp_path / "statistics.json"
    statistics = {"video": {"mean": np.array([0.1, -2e-9], np.float32), "std": np.array([1 / 3, 7], np.float32)}}
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), statistics)
    params = {"video_autoencoder": {"x": np.ones(2)}, "clip": {"x": np.ones(3)}}
    run_folder.write_statistics(path, jax.tree.map(np.ones_like, statistics), params)
    run_folder.write_statistics(path, statistics, params, 3)  # over the first
    back, encoders = run_folder.read_statistics(path, expected, 3)
    equal(back, statistics)
    assert encoders == run_folder.encoders_hash(params | {"denoiser": {"x": np.zeros(3)}})
    assert encoders != run_folder.encoders_hash(params | {"clip": {"x": np.zeros(3)}})
    assert encoders != run_folder.encoders_hash(params | {"video_autoencoder": {"x": np.zeros(2)}})
    with pytest.raises(UserError, match="statistics.json is of another run: remove it, and train the denoiser"):
        run_folder.read_statistics(path, expected, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["statistics.json"]


LISTS = {"video": {"mean": [0.1, 0.2], "std": [1.0, 2.0]}}


@pytest.mark.parametrize(
    "changed, words",
    [
        ({}, "has no video/mean"),
        ({"video": 3}, "damaged"),
        ({"video": {"mean": [0.1, 0.2]}}, "has no video/std"),
        (
            {"video": {**LISTS["video"], "std": [1.0]}},
            r"video/std is float32 \(1,\), the config asks for float32 \(2,\)",
        ),
        ({"video": {**LISTS["video"], "std": [1.0, 0.0]}}, "a value of video/std is not possible"),
        ({"video": {**LISTS["video"], "mean": [0.1, None]}}, "a value of video/mean is not possible"),
        ({"video": {**LISTS["video"], "mean": [0.1, np.inf]}}, "damaged .*not JSON compliant"),
        ({"video": {**LISTS["video"], "mean": [0.1, {}]}}, "damaged"),
        ({**LISTS, "audio": LISTS["video"]}, "has audio/mean, which the config does not"),
        ({**LISTS, "crc32": "00000000"}, "differs from its checksum"),
    ],
)
def test_statistics_that_cannot_be_are_told(tmp_path, changed, words):
    path = tmp_path / "statistics.json"
    expected = {"video": dict.fromkeys(("mean", "std"), jax.ShapeDtypeStruct((2,), np.float32))}
    path.write_text(json.dumps(LISTS))  # as exported weights of an earlier version have it
    assert run_folder.read_statistics(path, expected)[1] is None
    with pytest.raises(UserError, match="statistics.json is damaged .it has no checksum.: remove it, .* --unverified"):
        run_folder.read_statistics(path, expected, 3)
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=words):
        run_folder.read_statistics(path, expected)


# --------------------------------------------------------------------------------------------------------------- runs


def test_a_config_that_breaks_the_build_is_named_in_one_line(tmp_path):
    storage.write_json(tmp_path / "config.json", {record.RUN: 3, record.STARTS: 0})

    def build(config):
        raise ZeroDivisionError("integer\nmodulo by zero")

    with pytest.raises(UserError, match=r"config.json does not fit .*\(ZeroDivisionError: integer modulo by zero\)"):
        run_folder.load(tmp_path, build)

    def refuse(config):
        raise UserError("a clear line")

    with pytest.raises(UserError, match="^a clear line$"):
        run_folder.load(tmp_path, refuse)


@pytest.mark.parametrize("number", run_folder.DISK_FAULTS)
def test_a_full_or_broken_disk_ends_in_one_line(tmp_path, number):
    with pytest.raises(UserError, match=r"clip: cannot write in .*: .*; there is no checkpoint"):
        with run_folder.explain_disk_faults(tmp_path, "clip"):
            raise OSError(number, "the fault")
    with pytest.raises(FileNotFoundError), run_folder.explain_disk_faults(tmp_path, "clip"):
        raise OSError(errno.ENOENT, "another fault")
