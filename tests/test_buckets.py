"""Training on clips of several shapes: which batch is of which bucket, and one parameter tree for all of them."""

import itertools
import shutil

import jax
import numpy as np
import pytest

from tests import tiny
from tests.conftest import write_run
from tests.helpers import digest, final_state, weights
from vdm_jax import train
from vdm_jax.data import batches, buckets, writing
from vdm_jax.data.buckets import Bucket
from vdm_jax.errors import UserError
from vdm_jax.pipeline import Pipeline
from vdm_jax.run import folder, hosts
from vdm_jax.system import build
from vdm_jax.system.layout import STAGES
from vdm_jax.system.losses import encode_batch
from vdm_jax.system.phases import phases

SHAPES = ("5x16x24", "3x24x16", "7x16x16")


@pytest.fixture(scope="module")
def system():
    config = tiny.get_config()
    config.data.buckets = SHAPES
    config.denoiser.model.update(attention=(False, True))  # with a learned embedding of places
    return build(config)


@pytest.mark.parametrize("text", ["", "17", "17x48", "0x16x16", "17x48x64x3", "ax16x16", "17x48x-64"])
def test_a_bucket_that_cannot_be_read_is_one_line(text):
    with pytest.raises(UserError, match="must be frames x height x width, such as 17x48x64"):
        buckets.parse(text)


def test_each_bucket_gets_its_share_and_every_batch_once():
    weights = [50, 1, 149]
    drawn = [buckets.schedule(weights, 7, step) for step in range(303)]
    seen = [0, 0, 0]
    for bucket, before in drawn:
        assert before == seen  # no batch is left out, none comes twice
        seen[bucket] += 1
    assert seen[0] == pytest.approx(303 * 0.25, abs=5) and seen[1] >= 3 and sum(seen) == 303
    assert drawn != [buckets.schedule(weights, 8, step) for step in range(303)]
    assert [buckets.schedule([1], 7, step) for step in (0, 5, 1234)] == [(0, [0]), (0, [5]), (0, [1234])]


@pytest.mark.parametrize(
    "video, expected",
    [
        ((200, 720, 1280), Bucket(33, 96, 160)),
        ((20, 720, 1280), Bucket(17, 48, 64)),  # too short for the long one
        ((200, 1280, 720), Bucket(33, 160, 96)),  # upright
        ((200, 100, 134), Bucket(17, 48, 64)),
        ((3, 720, 1280), Bucket(17, 48, 64)),  # shorter than all
        ((3, 1280, 720), Bucket(17, 64, 48)),  # the same, upright
        ((20, 1280, 720), Bucket(17, 64, 48)),
    ],
)
def test_a_video_goes_to_the_most_similar_bucket(video, expected):
    known = [Bucket(17, 48, 64), Bucket(17, 64, 48), Bucket(33, 96, 160), Bucket(33, 160, 96)]
    assert buckets.nearest(known, *video) == expected


@pytest.mark.parametrize(
    "shapes, words",
    [
        (("5x16x24", "5x16x24"), "names a bucket twice"),
        (("5x16x24", "5x15x24"), r"^data.buckets, 5x15x24: data.size=\(15, 24\) is not a multiple of 4"),
        (("6x16x24",), "^data.buckets, 6x16x24: 6 frames do not fill"),
    ],
)
def test_buckets_that_do_not_fit_are_named(shapes, words):
    config = tiny.get_config("small")
    config.data.buckets = shapes
    with pytest.raises(UserError, match=words):
        build(config).in_buckets("denoiser")


def test_a_size_that_the_models_do_not_take_is_named():
    with pytest.raises(UserError, match=r"^size 25x16: data.size=\(25, 16\) is not a multiple of 4: use \(24, 16\)"):
        Pipeline(build(tiny.get_config("small")), {}).for_size((25, 16))


def test_a_phase_that_changes_what_buckets_replace_is_told():
    config = tiny.get_config("phases")
    config.data.buckets = SHAPES
    with pytest.raises(UserError, match="phase 1 of 2: data.buckets take the place of data.frames"):
        phases(build(config), "denoiser")


def test_only_the_denoiser_sees_the_videos_of_a_bucket_alone(tmp_path):
    writing.write_mp4(tmp_path / "wide.mp4", np.zeros((20, 16, 24, 3), np.uint8), None, 8, 2000)
    config = tiny.get_config()
    config.data.update(source="files", path=str(tmp_path), buckets=("5x16x24", "5x24x16"))
    assert len(batches.source(config, in_bucket=True).videos) == 1
    config.data.size = (24, 16)
    assert len(batches.source(config).videos) == len(batches.source(config, "held_out").videos) == 1
    with pytest.raises(UserError, match="belongs to 5x24x16 of data.buckets: leave this bucket out"):
        batches.source(config, in_bucket=True)


def test_batches_of_a_run_that_resumes_at_any_step(system):
    parts = system.in_buckets("denoiser")
    assert [(part.layout.frames, *part.config.data.size) for part in parts] == [(5, 16, 24), (3, 24, 16), (7, 16, 16)]
    examples = [batches.Examples(batches.source(part.config), part.tokenize) for part in parts]
    options = dict(batch_size=2, seed=3, data=system.config.data)

    def take(start, count):
        return list(itertools.islice(batches.in_buckets(examples, [1, 1, 1], start=start, **options), count))

    whole = take(0, 9)
    assert {number for number, _ in whole} == {0, 1, 2}
    for start in (1, 4, 8):
        for (number, batch), (wanted, clips) in zip(take(start, 9 - start), whole[start:], strict=True):
            assert number == wanted
            jax.tree.map(np.testing.assert_array_equal, batch, clips)
    # A bucket's batches are those of a run on that bucket alone.
    alone = batches.batches(examples[1], start=0, **options)
    for batch, clips in zip([batch for number, batch in whole if number == 1], alone):
        jax.tree.map(np.testing.assert_array_equal, batch, clips)


def test_one_parameter_tree_for_all_buckets(system):
    """Each bucket's loss is that of a system for this bucket alone, where the embedding of places is interpolated."""
    params = weights(system.param_shapes)
    params["statistics"] = jax.tree.map(
        lambda x: np.ones(x.shape, np.float32), system.stages["denoiser"].encoder_shapes["statistics"]
    )
    for part in system.in_buckets("denoiser"):
        assert part.param_shapes == system.param_shapes
        config = system.config.copy_and_resolve_references()
        config.data.update(frames=part.layout.frames, size=part.config.data.size, buckets=())
        alone = build(config)
        clips = batches.Examples(batches.source(part.config), part.tokenize).take([0, 1])
        batch = jax.jit(lambda p, b, s=part: encode_batch(s, p, b))(params, clips)

        def resize(x, want):
            return x if x.shape == want.shape else jax.image.resize(x, want.shape, "linear")

        own = jax.tree.map(resize, params["denoiser"], alone.param_shapes["denoiser"])
        losses = [
            jax.jit(which.stages["denoiser"].loss)(denoiser, jax.random.key(1), batch, params)[0]
            for which, denoiser in ((part, params["denoiser"]), (alone, own))
        ]
        np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_run_compiles_a_step_for_each_bucket_and_resumes_bit_for_bit(command, tmp_path, monkeypatch):
    flags = ["--config=tests/tiny.py:small", f"--config.data.buckets={SHAPES}", "--config.denoiser.cached_clips=0"]
    flags += ["--config.validation.every=0"]
    whole, ended, compiled = tmp_path / "whole", tmp_path / "ended", []
    original = hosts.compiled

    def counted(function, *arguments):
        compiled.append(function.__name__)
        return original(function, *arguments)  # it takes arrays of these shapes alone

    monkeypatch.setattr(hosts, "compiled", counted)
    write_run(whole, tiny.get_config("small"), STAGES[:3])
    assert command(train, *flags, f"--workdir={whole}", "--change").code == 0
    assert sorted(compiled) == ["finite", "step", "step", "step"]
    assert {buckets.schedule([1, 1, 1], 0, step)[0] for step in range(4, 8)} == {0, 1, 2}
    shutil.copytree(whole, ended)  # as if it had ended after step 4
    shutil.rmtree(ended / "denoiser/checkpoints/8")
    assert command(train, *flags, f"--workdir={ended}").code == 0
    states = [final_state(run, "denoiser", folder.read_config(run)) for run in (whole, ended)]
    assert states[0]["step"] == 8 and digest(states[0]) == digest(states[1])
