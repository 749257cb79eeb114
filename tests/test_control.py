"""Control: what a file of buttons says, that it reaches the output, and that it changes nothing at initialization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.conftest import write_run
from tests.helpers import init_weights
from tests.test_unet import SETTINGS, inputs
from vdm_jax import sample
from vdm_jax.data import control
from vdm_jax.errors import UserError
from vdm_jax.models.unet import UNet
from vdm_jax.pipeline import load
from vdm_jax.system import build, losses

NAMES = ("left", "fire")


def config_with_control():
    config = tiny.get_config("small")
    config.unlock()
    config.data.control = NAMES
    config.denoiser.control_dropout = 0.25
    return config.lock()


@pytest.fixture(scope="module")
def system():
    return build(config_with_control())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("control") / "run", config_with_control())


@pytest.fixture(scope="module")
def pipe(run):
    return load(run)


def test_a_file_of_buttons(tmp_path):
    path = tmp_path / "buttons.csv"
    path.write_text("fire, left\n1,0\n\n0.5,1\n")
    np.testing.assert_array_equal(control.read(path, NAMES), np.float32([[0, 1], [1, 0.5]]))
    path.write_text("fire\n1\n")
    np.testing.assert_array_equal(control.read(path, NAMES), np.float32([[0, 1]]))


WRONG = {
    "unknown name": ("fire,lift\n1,0\n", "no button 'lift': did you mean 'left'"),
    "name twice": ("fire,fire\n1,0\n", "names a button twice"),
    "too few values": ("fire,left\n1,0\n1\n", "frame 2: 1 values for 2 buttons"),
    "no number": ("fire,left\n1,no\n", "frame 1, left: 'no' must be a number from 0 to 1"),
    "nan": ("fire\nnan\n", "'nan' must be a number from 0 to 1"),
    "too large": ("fire\n2\n", "'2' must be a number from 0 to 1"),
    "empty": ("\n", "is empty: its first row names buttons"),
    "no CSV": ("fire\n" + "1" * 200_000 + "\n", "is not CSV"),
    "wrong count": ("fire\n1\n", "control has 1 rows, but 5 frames are made"),
}


@pytest.mark.parametrize("content, told", WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_one_clear_line(run, tmp_path, command, content, told):
    (tmp_path / "x.csv").write_text(content)
    out = tmp_path / "x.mp4"
    done = command(sample, f"--workdir={run}", "--prompt=x", f"--out={out}", f"--control={tmp_path}/x.csv")
    assert done.code == 2 and len(done.err) == 1 and told in done.err[0] and not out.exists()


def test_weights_without_control_take_none(tiny_run):
    with pytest.raises(UserError, match="these weights were trained without control"):
        load(tiny_run)("x", control=np.zeros((5, 2)))


@pytest.mark.parametrize(
    "given, told",
    [
        (np.zeros((5, 3)), r"must be numbers \[frames, 2\]: left, fire"),
        (np.zeros((4, 2)), "control has 4 rows, but 5 frames"),
        (np.full((5, 2), np.nan), "from 0"),
        ([["a", "b"]] * 5, "must be numbers"),
    ],
)
def test_a_wrong_array_is_one_clear_line(pipe, given, told):
    with pytest.raises(UserError, match=told):
        pipe("x", control=given)


def test_a_new_control_changes_nothing():
    """With initial weights: the same bits as a network without it, whatever is held."""
    z, log_snr, cond = inputs(batch=2)
    held = {"control": jnp.array(np.random.default_rng(0).random((2, 3, 4)), jnp.float32)}
    plain, steered = UNet(**SETTINGS), UNet(**SETTINGS, control=4)
    params = steered.init(jax.random.key(0), z, log_snr, cond | held)["params"]
    embeddings = {name: params[name] for name in ("embedding_video", "embedding_audio")}
    new = {name: {k: v for k, v in tree.items() if not k.startswith("control")} for name, tree in embeddings.items()}
    assert all(len(embeddings[name]) == len(new[name]) + 2 for name in new)
    head = {f"head_{m}": jax.tree.map(lambda x: x + 0.1, params[f"head_{m}"]) for m in ("video", "audio")}
    a = plain.apply({"params": params | new | head}, z, log_snr, cond)
    b = steered.apply({"params": params | head}, z, log_snr, cond | held)
    for m in ("video", "audio"):
        assert np.asarray(a[m]).any()
        np.testing.assert_array_equal(a[m], b[m])


def test_the_control_of_a_frame_reaches_both_outputs():
    z, log_snr, cond = inputs(batch=3)
    held = np.zeros((3, 3, 4), np.float32)
    held[1, 1, 2] = 1
    model = UNet(**SETTINGS, control=4)
    params = init_weights(model, z, log_snr, cond | {"control": held})
    out = model.apply({"params": params}, z, log_snr, cond | {"control": held})
    for m in ("video", "audio"):
        assert np.abs(out[m][1] - out[m][0]).max() > 1e-4
        np.testing.assert_array_equal(out[m][2], out[m][0])


def test_a_latent_frame_has_the_mean_of_its_frames(system):
    held = np.float32([[[0, 1], [1, 0], [0, 0], [1, 1], [1, 1]]])  # f_t = 2: frame 0, frames 1 and 2, frames 3 and 4
    np.testing.assert_array_equal(system.pool_control(held), [[[0, 1], [0.5, 0], [1, 1]]])


def test_half_of_the_clips_without_text_lose_their_control():
    rows = 20_000
    cond = {"pooled": np.ones((rows, 1)), "control": np.ones((rows, 3, 2))}
    null = {"pooled": np.zeros((1, 1)), "control": np.full((1, 3, 2), -1.0)}
    dropped = losses.drop_conditions(jax.random.key(0), cond, null, 0.2, 0.3)
    text, held = dropped["pooled"][:, 0] == 0, dropped["control"][:, 0, 0] == -1
    np.testing.assert_allclose([text.mean(), held.mean(), (text & held).mean()], [0.2, 0.3, 0.1], atol=0.01)
    assert set(np.unique(dropped["control"])) == {-1, 1}


def batch_of(system, rows=4):
    rng, layout = np.random.default_rng(0), system.layout
    return {
        "video": rng.integers(0, 256, (rows, layout.frames, 16, 24, 3), np.uint8),
        "audio": rng.normal(size=(rows, layout.samples)).astype(np.float32),
        "tokens": system.tokenize(["a red circle"] * rows),
        "control": rng.integers(0, 2, (rows, layout.frames, 2)).astype(np.float32),
    }


def test_the_loss_reads_the_control_of_clips_and_of_what_they_encode_to(system, pipe):
    params = jax.device_get(pipe.params)
    clips = batch_of(system)
    encoded = losses.encode_batch(system, params, clips)
    assert encoded["control"].shape == (4, 3, 2)
    loss = jax.jit(lambda batch: losses.denoiser_loss(system, params["denoiser"], jax.random.key(0), batch, params)[0])
    np.testing.assert_allclose(loss(clips), loss(encoded), rtol=1e-5)
    assert abs(loss(encoded) - loss(encoded | {"control": 1 - encoded["control"]})) > 1e-6
    abstract = system.stages["denoiser"].batch
    assert abstract["control"].shape == (4, 3, 2)  # of cached clips


def test_control_steers_clips_and_not_knowing_differs_from_holding_nothing(pipe):
    options = dict(steps=2, guidance=1.0)
    unknown, nothing = pipe("x", **options), pipe("x", control=np.zeros((5, 2)), **options)
    again, fire = (pipe("x", control=np.tile(held, (5, 1)), **options) for held in ([0, 0], [0, 1]))
    np.testing.assert_array_equal(nothing.video, again.video)
    for other in (unknown, fire):
        assert np.abs(other.video.astype(int) - nothing.video).max() > 0
        assert np.abs(other.audio - nothing.audio).max() > 0


def test_guidance_is_by_text_and_control(pipe):
    """With the text's weight at 0 only the unconditional row is left: it knows neither."""
    options = dict(steps=2, guidance=0.0)
    a = pipe("x", control=np.zeros((5, 2)), **options)
    b = pipe("a red circle", control=np.ones((5, 2)), **options)
    np.testing.assert_allclose(a.audio, b.audio, atol=1e-4)
    c = pipe("a red circle", control=np.ones((5, 2)), steps=2, guidance=1.0)
    assert np.abs(b.audio - c.audio).max() > 1e-3


def test_each_window_of_a_long_clip_has_its_own_control(pipe, monkeypatch):
    seen = []
    original = pipe.sampler.arguments

    def watch(params, **options):
        seen.append(options["control"])
        return original(params, **options)

    monkeypatch.setattr(pipe.sampler, "arguments", watch)
    held = np.linspace(0, 1, 9)[:, None] * [1, 0]  # 1.125 s; windows of 5 frames, 3 of them context
    clip = pipe("x", control=held, seconds=9 / 8, steps=1)
    assert len(clip.video) == 9
    np.testing.assert_allclose([part[0, :, 0] for part in seen], [held[:5, 0], held[2:7, 0], held[4:9, 0]], rtol=1e-6)
    seen.clear()
    pipe.extend(clip, "x", control=held[:3] + [0.5, 0], seconds=3 / 8, steps=1)  # 3 frames more
    first, second, _ = held[:3, 0] + 0.5
    np.testing.assert_allclose(seen[0][0, :, 0], [first, first, first, first, second], rtol=1e-6)
