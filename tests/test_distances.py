"""Distances between sets of clips: closed forms, another implementation, and networks in their own runtimes."""

import numpy as np
import pytest
import scipy.linalg

from vdm_jax.errors import UserError
from vdm_jax.metrics import av_align, distances, features, frechet

RATE = 8000


def exactly(mean, root, count, seed=0):
    """Rows whose sample mean is `mean`, and whose sample covariance is root @ root.T."""
    x = np.random.default_rng(seed).normal(size=(count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ root.T + mean


def test_the_distance_of_gaussians_in_closed_form():
    """Covariances that commute: |mu_a - mu_b|^2 + sum of (sd_a - sd_b)^2, here 14 + 1 + 0 + 4."""
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    a = exactly(np.zeros(3), turn @ np.diag([1.0, 2.0, 3.0]), 50)
    b = exactly(np.array([1.0, 2.0, 3.0]), turn @ np.diag([2.0, 2.0, 1.0]), 70, seed=2)
    np.testing.assert_allclose(frechet.distance(a, b), 19, rtol=1e-9)
    np.testing.assert_allclose(frechet.distance(b, a), 19, rtol=1e-9)
    assert frechet.distance(a, a) < 1e-9


@pytest.mark.parametrize("counts", [(200, 300), (200, 5), (5, 7)])  # more and fewer rows than columns
def test_the_distance_of_another_implementation(counts):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(count, 12)) @ rng.normal(size=(12, 12)) + rng.normal(size=12) for count in counts)
    s_a, s_b = (np.cov(x, rowvar=False) for x in (a, b))
    # Adding a little of the identity makes covariances of few rows regular, as other implementations do.
    root = scipy.linalg.sqrtm((s_a + 1e-9 * np.eye(12)) @ (s_b + 1e-9 * np.eye(12))).real
    want = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s_a + s_b - 2 * root)
    np.testing.assert_allclose(frechet.distance(a, b), want, rtol=1e-3)


def test_a_distance_needs_two_rows():
    with pytest.raises(ValueError, match="two rows"):
        frechet.distance(np.zeros((1, 3)), np.zeros((4, 3)))


# ------------------------------------------------------------------------------------------------------- networks

VIDEOS = np.random.default_rng(0).integers(0, 256, (3, 4, 16, 24, 3), np.uint8)


def means(videos):
    """What the networks below compute: the mean of each channel, of pixels in [-1, 1]."""
    return videos.mean((1, 2, 3)) / 127.5 - 1


@pytest.fixture
def torchscript(tmp_path):
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3, 4))

    class Published(torch.nn.Module):
        def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
            assert rescale and resize and return_features
            return x.mean((2, 3, 4)) / 127.5 - 1

    class Maps(torch.nn.Module):
        def forward(self, x):
            return x

    for name, net in (("net", Net()), ("published", Published()), ("maps", Maps())):
        torch.jit.script(net).save(str(tmp_path / f"{name}.pt"))
    return tmp_path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name, tolerance", [("net", 0.02), ("published", 1e-5)])
def test_a_torchscript_network_gets_what_it_was_made_for(torchscript, name, tolerance):
    found = features.video_network(str(torchscript / f"{name}.pt"))(VIDEOS)
    np.testing.assert_allclose(found, means(VIDEOS), atol=tolerance)  # the first sees resized frames


def test_an_onnx_network(tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    kind, make = onnx.TensorProto.FLOAT, onnx.helper
    node = make.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)
    axes = make.make_tensor("axes", onnx.TensorProto.INT64, [3], [2, 3, 4])
    x, y = (
        make.make_tensor_value_info("x", kind, [1, 3, None, 224, 224]),
        make.make_tensor_value_info("y", kind, [1, 3]),
    )
    opset = [make.make_opsetid("", 18)]
    model = make.make_model(make.make_graph([node], "g", [x], [y], [axes]), opset_imports=opset, ir_version=9)
    onnx.save(model, tmp_path / "net.onnx")
    found = features.video_network(str(tmp_path / "net.onnx"))(VIDEOS)
    np.testing.assert_allclose(found, means(VIDEOS), atol=0.02)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name, told",
    [
        ("none.pt", "is no file"),
        ("text.pt", "is no TorchScript file"),
        ("pickled.pt", "is no TorchScript file"),
        ("text.onnx", "is no ONNX file"),
        ("maps.pt", r"gave \(1, 3, 4, 224, 224\) for one clip"),
    ],
)
def test_a_network_that_does_not_fit_is_one_line(torchscript, name, told):
    import torch

    if name.endswith(".onnx"):
        pytest.importorskip("onnxruntime")
    for path in ("text.pt", "text.onnx"):
        (torchscript / path).write_text("no network")
    torch.save(torch.nn.Linear(2, 2), torchscript / "pickled.pt")  # a pickle of classes is not loaded
    with pytest.raises(UserError, match=told) as error:
        features.video_network(str(torchscript / name))(VIDEOS)
    assert "\n" not in str(error.value)


def test_efficientnet_lite0_knows_photographs_from_noise():
    """A photograph is nearer to its mirror image than to noise."""
    if not features.has_packages(*distances.FRAME_PACKAGES):
        pytest.skip("the packages of the extra `metrics` are not installed")
    from PIL import Image

    photograph = pytest.importorskip("sklearn.datasets").load_sample_image("flower.jpg")
    frames = [photograph, photograph[:, ::-1], np.random.default_rng(0).integers(0, 256, photograph.shape, np.uint8)]
    frames = np.stack([np.asarray(Image.fromarray(frame).resize((224, 224))) for frame in frames])
    lite0 = features.efficientnet_lite0()
    same, mirrored, noise = lite0(frames)
    assert lite0(frames).shape == (3, 1280)
    assert np.linalg.norm(same - mirrored) < 0.7 * np.linalg.norm(same - noise)


# ------------------------------------------------------------------------------------------------------- AV-Align


def film(seconds, beats, sound_at, fps=16):
    """A textured disc that jumps to a new place at each beat (s), and clicks at other times (s)."""
    rng, count = np.random.default_rng(0), int(seconds * fps)
    texture = rng.integers(80, 256, (24, 24, 3), np.uint8)
    video, audio = np.zeros((count, 64, 64, 3), np.uint8), np.zeros(int(seconds * RATE), np.float32)
    for frame in range(count):
        x = 10 + 4 * sum(beat <= frame / fps for beat in beats)
        video[frame, 20:44, x : x + 24] = texture
    for time in sound_at:
        start = int(time * RATE)
        audio[start : start + 400] += np.exp(-np.arange(400) / 80) * rng.normal(size=400) * 0.3
    return video, audio.clip(-1, 1), fps, RATE


def test_av_align_is_one_in_sync_and_falls_with_each_fault():
    pytest.importorskip("cv2")
    beats = [0.5, 1.0, 1.5, 2.0]
    assert av_align.score(*film(2.5, beats, beats)) == 1
    assert av_align.score(*film(2.5, beats, beats[:2])) == 0.5
    assert av_align.score(*film(2.5, beats, [time + 0.25 for time in beats])) == 0
    assert av_align.score(*film(2.5, beats, [])) == 0
    assert np.isnan(av_align.score(*film(2.5, [], [])))


def test_a_peak_of_motion_is_above_its_neighbors_and_the_least_flow():
    np.testing.assert_allclose(av_align.motion_peaks(np.array([0, 0.05, 0, 2, 1, 1, 3, 3, 0.2, 0.3]), 10), [0.3])


def test_counts_stand_beside_the_distances(torchscript):
    pytest.importorskip("cv2")
    clips = [film(1, [0.5], [0.5]), film(1, [], []), film(1, [0.25], [])]
    truth = {"video": np.stack([clip[0] for clip in clips]), "audio": np.stack([clip[1] for clip in clips])}
    measure = distances.Distances(truth, 16, RATE, str(torchscript / "published.pt")).measure
    found = measure(**truth)
    assert found["clips"] == 3 and found["frames"] == 48
    assert found["av_align"] == 0.5 and found["av_align_clips"] == 2
    assert abs(found["frechet_video"]) < 1e-6 and found.get("frechet_frames_lite0", 0) < 1e-3
    darker = measure(truth["video"] // 2, truth["audio"])
    shift = np.square((truth["video"].mean((1, 2, 3)) - (truth["video"] // 2).mean((1, 2, 3))).mean(0) / 127.5).sum()
    assert darker["frechet_video"] >= shift > 0
    assert measure(truth["video"][:1], truth["audio"][:1])["frechet_video"] is None
