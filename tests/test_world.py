"""The world against closed forms, its own state and its own promises."""

import itertools

import numpy as np
import pytest

from vdm_jax.data import world as w
from vdm_jax.data.captions import COLORS
from vdm_jax.data.world import PALETTE, World
from vdm_jax.errors import UserError

PLAIN = {"gravity": 0, "occluder": 0, "leave": 0, "pan": 0, "light": 0}


def test_layout_of_an_item():
    item = World(seed=3)[11]
    assert item["video"].shape == (17, 32, 32, 3) and item["video"].dtype == np.uint8
    assert item["audio"].shape == (17000,) and item["audio"].dtype == np.float32
    assert np.abs(item["audio"]).max() <= 1
    count = len(item["state"]["radius"])
    assert item["state"]["position"].shape == item["state"]["velocity"].shape == (17, count, 2)
    assert item["state"]["visible"].shape == (17, count)
    other = World(size=(64, 64), fps=16, frames=9, sample_rate=16000)[0]
    assert other["video"].shape == (9, 64, 64, 3) and other["audio"].shape == (9000,)


def test_an_item_follows_from_seed_and_index_alone():
    first, second = World(seed=5), World(seed=5)
    second[3], second[99]
    for i in (0, 7, 2**31 - 2):
        assert (first[i]["video"] == second[i]["video"]).all() and first[i]["caption"] == second[i]["caption"]
        assert (first[i]["audio"] == second[i]["audio"]).all()
    assert (first[0]["video"] != first[1]["video"]).any()
    assert (first[0]["video"] != World(seed=6)[0]["video"]).any()


def test_more_frames_continue_a_clip():
    chances = {"gravity": 0.5, "pan": 0.5, "light": 0.5, "occluder": 0.5, "leave": 0.5}
    for i in range(12):
        whole = World(seed=1, frames=60, **chances)[i]
        for frames in (1, 17, 43):
            part = World(seed=1, frames=frames, **chances)[i]
            np.testing.assert_array_equal(part["video"], whole["video"][:frames])
            np.testing.assert_array_equal(part["audio"], whole["audio"][: frames * 1000])
            early = [event for event in whole["state"]["events"] if event["time"] < frames / 8]
            assert part["state"]["events"] == early


def test_free_flight_is_the_parabola():
    source = World(seed=2, **{**PLAIN, "gravity": 1})
    for i in range(40):
        state = source[i]["state"]
        first = min([e["time"] for e in state["events"]], default=9)
        assert first > w.FREE
        t = np.arange(17)[np.arange(17) / 8 < first, None, None] / 8
        start, velocity = state["position"][:1], state["velocity"][:1]
        fall = np.array([0, 0.5 * state["gravity"]])
        want = start + velocity * t + fall * t**2
        np.testing.assert_allclose(state["position"][: len(t)], want, atol=1e-5)


def test_energy_is_kept_momentum_is_exchanged_and_nothing_overlaps():
    for features in (PLAIN, {**PLAIN, "gravity": 1}):
        source = World(seed=4, frames=600, fps=60, size=(8, 8), objects=(0, 0.5, 0.5), **features)
        met = 0
        for i in range(12):
            state = source[i]["state"]
            x, v, r = state["position"], state["velocity"], state["radius"]
            energy = (r**2 * (0.5 * (v**2).sum(-1) - state["gravity"] * x[..., 1])).sum(-1)
            np.testing.assert_allclose(energy, energy[0], atol=1e-5)
            assert (x > r[:, None] - 1e-5).all() and (x < 1 - r[:, None] + 1e-5).all()
            for a, b in itertools.combinations(range(len(r)), 2):
                gap = np.linalg.norm(x[:, a] - x[:, b], axis=-1) - r[a] - r[b]
                assert gap.min() > -1e-5
            times = np.array([e["time"] for e in state["events"]])
            for event in state["events"]:
                frame = int(event["time"] * 60)
                alone = np.sum(np.abs(times - event["time"]) < 0.04) == 1
                if event["kind"] == "object" and alone and frame < 598 and features is PLAIN:
                    pair = list(event["objects"])
                    momentum = (r[pair, None] ** 2 * v[:, pair]).sum(1)
                    np.testing.assert_allclose(momentum[frame], momentum[frame + 1], atol=1e-6)
                    met += 1
        assert met > 20 or features is not PLAIN


def test_every_impact_sounds_at_its_time_and_nothing_else_does():
    source = World(seed=8)
    checked = 0
    for i in range(60):
        item = source[i]
        times = [e["time"] for e in item["state"]["events"] if e["kind"] != "turn"]
        ringing = np.zeros(17000, bool)
        for t in times:
            ringing[int(np.ceil(t * 8000)) : int((t + w.TONE_SECONDS) * 8000) + 2] = True
        assert not item["audio"][~ringing].any()
        for before, t in zip([-1, *times], times):
            if t - before > w.TONE_SECONDS + 0.01 and t < 2.1:
                onset = int(np.ceil(t * 8000))
                assert np.abs(item["audio"][onset : onset + 40]).max() > 0.2  # within 5 ms
                checked += 1
    assert checked > 60


def test_tones_tell_size_and_material():
    def peak(wave):
        spectrum = np.abs(np.fft.rfft(wave, 1 << 15))
        return spectrum.argmax() * 8000 / (1 << 15)

    rubber = [peak(w.tone(r, "rubber", 0.0, 8000)) for r in (0.1, 0.13, 0.16, 0.19)]
    assert (np.diff(rubber) < -60).all() and 250 < min(rubber) and max(rubber) < 2000
    metal, thud = w.tone(0.15, "metal", 0.0, 8000), w.tone(0.15, "rubber", 0.0, 8000)
    late = slice(400, 700)  # 50 to 90 ms
    assert np.abs(metal[late]).max() > 10 * np.abs(thud[late]).max()
    assert len(metal) <= w.TONE_SECONDS * 8000 and np.abs(metal[-40:]).max() < 0.03


def test_every_color_word_has_a_paint():
    assert tuple(PALETTE) == COLORS


def test_pixels_show_the_state():
    source = World(seed=9, objects=(1,), gravity=0, occluder=0, leave=0, pan=0.5, light=0.5)
    for i in range(40):
        item = source[i]
        state = item["state"]
        full = np.array(PALETTE[COLORS[state["color"][0]]])
        excess = item["video"].astype(float).max(-1) - item["video"].min(-1)  # gray gives 0
        for frame in np.flatnonzero(state["visible"][:, 0] > 0.97)[::5]:
            mask = excess[frame] > 0.4 * excess[frame].max()
            y, x = (c.mean() + 0.5 for c in np.nonzero(mask))
            at = state["position"][frame, 0] * 32
            sink = (0, 0, 0.25)[state["shape"][0]] * state["radius"][0] * 32  # a triangle's centroid
            assert np.hypot(x - at[0], y - at[1] - sink) < 1.2
            area = w.AREA[state["shape"][0]] * (32 * state["radius"][0]) ** 2
            assert abs(mask.sum() / area - 1) < 0.3
            shown = np.median(item["video"][frame][mask], 0) / 255
            assert np.corrcoef(shown, full)[0, 1] > 0.98


@pytest.mark.parametrize("shape", range(3))
def test_coverage_is_area(shape):
    grid = np.arange(64) + 0.5
    for radius, dx, dy in ((10, 0.0, 0.0), (7.3, 0.4, -0.3), (4, 0.1, 0.7)):
        alpha = w.coverage(shape, grid[None] - 32 - dx, grid[:, None] - 32 - dy, radius)
        assert abs(alpha.sum() / (w.AREA[shape] * radius**2) - 1) < 0.02


def test_renders_of_all_sizes_show_the_same():
    small = World(seed=12)[5]
    for size in (64, 128, 256):
        big = World(seed=12, size=(size, size))[5]
        k = size // 32
        mean = big["video"].reshape(17, 32, k, 32, k, 3).mean((2, 4))
        assert np.abs(mean - small["video"]).mean() < 1.5 and big["video"].shape[1] == size
        np.testing.assert_array_equal(big["state"]["position"], small["state"]["position"])
        np.testing.assert_allclose(big["state"]["visible"], small["state"]["visible"], atol=0.08)


def test_features_do_what_they_say():
    hidden = World(seed=1, **{**PLAIN, "occluder": 1})
    seen = [hidden[i]["state"]["visible"] for i in range(30)]
    assert all((v[0] > 0.97).all() for v in seen) and sum((v < 0.1).any() for v in seen) > 5
    away = World(seed=1, frames=80, objects=(1,), **{**PLAIN, "leave": 1})
    back = 0
    for i in range(30):
        state = away[i]["state"]
        gone = state["visible"][:, 0] == 0
        turns = [e for e in state["events"] if e["kind"] == "turn"]
        for turn in turns:  # out of sight when it turns
            assert gone[min(79, round(turn["time"] * 8))]
        back += bool(gone.any() and not gone[gone.argmax() :].all())
    assert back > 15
    panned = World(seed=1, **{**PLAIN, "pan": 1})[0]["state"]
    np.testing.assert_allclose(np.diff(panned["position"][:3, 0], axis=0) * 8, panned["velocity"][:2, 0], atol=0.02)
    assert np.ptp(panned["camera"], axis=0)[0] > 0.02
    lit = World(seed=1, **{**PLAIN, "light": 1})[0]["state"]["light"]
    assert 0.79 < lit.min() < lit.max() < 1.11


@pytest.mark.parametrize(
    "wrong",
    [
        {"shapes": ("hexagon",)},
        {"colors": ()},
        {"objects": (0.5, 0.6)},
        {"objects": (0, 1), "colors": ("red",)},
        {"frames": 0},
        {"radius": (0.1, 0.4)},
    ],
)
def test_wrong_settings_are_one_clear_line(wrong):
    with pytest.raises(UserError) as error:
        World(**wrong)
    assert "\n" not in str(error.value) and str(error.value).startswith("world: ")


def test_a_crowd_without_room_is_thinned_out():
    source = World(radius=(0.2, 0.2), objects=(0, 0, 1), occluder=1, gravity=1)
    assert all(1 <= len(source[i]["state"]["radius"]) <= 3 for i in range(8))
