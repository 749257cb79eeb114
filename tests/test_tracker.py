"""The tracker on true renders, whose state is known, and on pictures that it must not take for objects."""

import numpy as np
import pytest
from scipy import ndimage

from vdm_jax.data.captions import COLORS, DIRECTIONS, SHAPES, asked
from vdm_jax.data.world import PALETTE, World
from vdm_jax.errors import UserError
from vdm_jax.metrics.tracker import VISIBLE, impacts, measure, onsets, summarize, track

FPS, RATE = 8, 8000
PLAIN = {"gravity": 0, "occluder": 0, "leave": 0, "pan": 0, "light": 0}


def ask(item):
    return asked(item["state"])


@pytest.fixture(scope="module")
def clips():
    """150 clips of the default world, none of which set a threshold, and their tracks."""
    source = World(seed=7001)
    items = [source[i] for i in range(150)]
    return items, [track(item["video"]) for item in items]


@pytest.fixture(scope="module")
def easy():
    source = World(seed=7002, objects=(1,), **PLAIN)
    return [source[i] for i in range(12)]


def seen_frames(items, tracks):
    for item, rows in zip(items, tracks):
        state = item["state"]
        for o, color in enumerate(state["color"]):
            for f in np.flatnonzero(state["visible"][:, o] >= VISIBLE):
                yield state, o, f, rows.get(COLORS[color])


def test_color_shape_position_and_radius_of_true_renders(clips):
    right, errors, radii = [], [], []
    for state, o, f, row in seen_frames(*clips):
        found = row is not None and row["present"][f]
        right.append(found and row["shape"][f] == state["shape"][o])
        if found:
            errors.append(32 * np.hypot(*(row["position"][f] - state["position"][f, o])))
            radii.append(32 * abs(row["radius"][f] - state["radius"][o]))
    assert len(right) > 3000 and np.mean(right) >= 0.99
    assert np.mean(errors) < 0.1 and np.percentile(errors, 99) < 0.5 and max(errors) < 1.5  # px
    assert np.mean(radii) < 0.1


def test_no_object_is_seen_that_is_not_there(clips):
    for item, rows in zip(*clips):
        names = {COLORS[c] for c in item["state"]["color"]}
        assert {name for name, row in rows.items() if row["present"].any()} <= names
        assert not any(row["extra"].any() for row in rows.values())


def test_what_is_mostly_hidden_is_known_to_be(clips):
    hidden = []
    for item, rows in zip(*clips):
        state = item["state"]
        for o, color in enumerate(state["color"]):
            row = rows.get(COLORS[color])
            if row is not None:
                of = row["present"] & (state["visible"][:, o] < 0.6)
                hidden += list(row["visible"][of] < VISIBLE)
    assert len(hidden) > 30 and np.mean(hidden) > 0.9


def test_onsets_of_true_sound(clips):
    close, false, total = [], 0, 0
    for item in clips[0]:
        times = onsets(item["audio"], RATE)
        true = np.array([e["time"] for e in item["state"]["events"] if e["kind"] != "turn"])
        for t in true:
            alone = np.sort(np.abs(true - t))[1:2].min(initial=9) > 3 / FPS
            if alone and t < 17 / FPS - 0.02:  # later ones are cut off before they can be heard
                close.append(len(times) > 0 and np.abs(times - t).min() <= 0.5 / FPS)
        total += len(times)
        false += sum(len(true) == 0 or np.abs(true - t).min() > 0.02 for t in times)
    assert len(close) > 80 and np.mean(close) >= 0.98
    assert false <= 0.01 * total


def test_onsets_are_sharp_and_bear_noise_and_softness():
    source, rng = World(seed=7003), np.random.default_rng(0)
    for i in range(20):
        item = source[i]
        true = np.array([e["time"] for e in item["state"]["events"] if e["kind"] != "turn"])
        clean = onsets(item["audio"], RATE)
        for t in clean:
            assert np.abs(true - t).min() < 0.008
        for worse in (
            item["audio"] + rng.normal(0, 0.02, 17000),
            0.4 * ndimage.gaussian_filter1d(item["audio"], 1.3),
        ):
            heard = onsets(worse, RATE)
            missed = sum(not len(heard) or np.abs(heard - t).min() > 0.01 for t in clean)
            assert missed <= 0.2 * len(clean) and len(heard) <= len(clean) + 1


def test_silence_hum_and_noise_have_no_onsets():
    t = np.arange(17000) / RATE
    assert not len(onsets(np.zeros(17000), RATE)) and not len(onsets(np.zeros(5), RATE))
    assert not len(onsets(0.5 * np.sin(2 * np.pi * 440 * t), RATE))
    beating = 0.3 * (np.sin(2 * np.pi * 440 * t) + np.sin(2 * np.pi * 446 * t))
    assert not len(onsets(beating, RATE))
    assert len(onsets(np.random.default_rng(0).normal(0, 0.05, 17000), RATE)) <= 1


def test_impacts_are_those_of_the_world(clips):
    false, found, true, errors = 0, 0, 0, []
    for item, rows in zip(*clips):
        state = item["state"]
        kinks = impacts(rows, FPS)
        for t, name, _ in kinks:
            own = [
                abs(e["time"] - t) for e in state["events"] if COLORS.index(name) in state["color"][list(e["objects"])]
            ]
            false += min(own, default=9) > 1 / FPS
            errors.append(min(own, default=9))
        for event in state["events"]:
            if event["kind"] == "turn" or not 1 / FPS <= event["time"] <= 15 / FPS:
                continue
            for o in event["objects"]:
                f = int(event["time"] * FPS)
                if state["visible"][max(0, f - 1) : f + 3, o].min() > 0.8:
                    name = COLORS[state["color"][o]]
                    true += 1
                    found += any(abs(t - event["time"]) <= 1 / FPS and n == name for t, n, _ in kinks)
    assert true > 250 and found / true > 0.9 and false / len(errors) < 0.02
    assert np.median(errors) < 0.01  # s


def test_true_clips_measure_right(clips):
    """The ceilings: what a perfect generator would get."""
    pooled = summarize([measure(i["video"], i["audio"], FPS, RATE, ask(i)) for i in clips[0][:80]])
    assert pooled["one_object"] > 0.96 and pooled["two_objects"] > 0.9
    assert pooled["direction"] > 0.96 and pooled["count"] > 0.96 and pooled["permanence"] > 0.85
    assert pooled["size_drift"] < 0.02 and pooled["color_drift"] < 0.01
    assert pooled["sync_impacts"] > 0.96 and pooled["sync_onsets"] > 0.93


def test_wrong_shape_color_direction_and_count_fail(easy):
    for item in easy[:5]:
        (true,) = ask(item)

        def result(objects, item=item):
            return measure(item["video"], item["audio"], FPS, RATE, objects)

        good = result([true])
        assert good["right"] and good["count_right"] and good["objects"][0]["direction_right"]
        for shape in set(SHAPES) - {true["shape"]}:
            wrong = result([{**true, "shape": shape}])
            assert not wrong["right"] and wrong["objects"][0]["shape_right_share"] < 0.1
        for color in set(COLORS) - {true["color"]}:
            wrong = result([{**true, "color": color}])
            assert not wrong["right"] and wrong["objects"][0]["present_share"] == 0
        for direction in set(DIRECTIONS) - {true["direction"]}:
            wrong = result([{**true, "direction": direction}])
            assert wrong["right"] and not wrong["objects"][0]["direction_right"]
        other = {**true, "color": COLORS[COLORS.index(true["color"]) - 1]}
        both = result([true, other])
        assert not both["right"] and not both["count_right"]


def test_a_second_object_of_the_asked_color_is_counted(easy):
    item = next(i for i in easy if i["state"]["radius"][0] < 0.13)
    twice = np.maximum(item["video"], item["video"][:, ::-1, ::-1])  # its mirror image as well
    apart = np.abs(item["state"]["position"][:, 0] - 0.5).max(1) > 0.2
    rows = track(twice)[ask(item)[0]["color"]]
    assert (rows["extra"][apart] == 1).mean() > 0.9


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda v: ndimage.gaussian_filter(v, (0, 2.5, 2.5, 0)), id="blurred"),
        pytest.param(lambda v: 0.5 * v + 0.5 * np.median(v, 0), id="ghost"),
        pytest.param(lambda v: ndimage.uniform_filter1d(v, 7, 0), id="smeared"),
        pytest.param(lambda v: ndimage.uniform_filter1d(v, 11, 2), id="stretched"),
        pytest.param(lambda v: v.mean(-1, keepdims=True) + 0 * v, id="gray"),
    ],
)
def test_spoilt_objects_are_not_called_right(easy, spoil):
    right = 0
    for item in easy:
        video = np.clip(spoil(item["video"].astype(np.float32)) + 0.5, 0, 255).astype(np.uint8)
        right += measure(video, item["audio"], FPS, RATE, ask(item))["right"]
    assert right == 0


def test_what_an_autoencoder_does_to_a_clip_is_borne(easy):
    rng, right, rows = np.random.default_rng(1), 0, []
    for item in easy:
        video = ndimage.gaussian_filter(item["video"].astype(np.float32), (0, 0.6, 0.6, 0))
        video = np.clip(video + rng.normal(0, 6, video.shape), 0, 255).astype(np.uint8)
        rows.append(measure(video, item["audio"], FPS, RATE, ask(item)))
        right += rows[-1]["right"]
    assert right >= 11
    assert summarize(rows)["size_drift"] < 0.05 and summarize(rows)["direction"] > 0.9


def test_noise_and_nothing_hold_no_objects():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (17, 32, 32, 3), dtype=np.uint8)
    assert not any(row["present"].any() for row in track(noise).values())
    assert track(np.full((17, 32, 32, 3), 31, np.uint8)) == {}
    result = measure(noise, np.zeros(17000), FPS, RATE, [{"color": "red", "shape": "circle", "direction": "up"}])
    assert not result["right"] and result["sync_impacts"] == result["sync_onsets"] == (0, 0)


def test_blots_have_no_shape():
    rng = np.random.default_rng(3)
    soft = ndimage.gaussian_filter(rng.normal(size=(17, 32, 32, 3)), (0, 1.2, 1.2, 0))
    blots = np.clip(soft * 500 + 60, 0, 255).astype(np.uint8)
    rows = track(blots)
    assert rows and sum((row["shape"] >= 0).sum() for row in rows.values()) <= 2


def test_drifts_are_seen(easy):
    item = next(i for i in easy if 0.12 < i["state"]["radius"][0] < 0.16)
    start = item["video"][0]
    zoomed = []
    for k in range(17):  # the first frame, magnified by up to 1.4 about the object
        scale = 1 + 0.4 * k / 16
        y, x = np.mgrid[:32, :32] + 0.5
        cx, cy = item["state"]["position"][0, 0] * 32
        at = [(y - cy) / scale + cy - 0.5, (x - cx) / scale + cx - 0.5]
        zoomed.append(np.stack([ndimage.map_coordinates(start[..., c], at, order=1) for c in range(3)], -1))
    drift = measure(np.stack(zoomed), item["audio"], FPS, RATE, ask(item))["objects"][0]
    assert 0.15 < drift["size_drift"] < 0.4 and drift["color_drift"] < 0.05
    turned = item["video"].astype(float)
    amount = np.linspace(0, 0.25, 17)[:, None, None]
    channels = [turned[..., c] for c in range(3)]
    for c in range(3):  # each channel leaks into the next: the hue turns
        turned[..., c] = channels[c] * (1 - amount) + amount * channels[c - 1]
    drift = measure(turned.astype(np.uint8), item["audio"], FPS, RATE, ask(item))["objects"][0]
    assert drift["color_drift"] > 0.1


@pytest.fixture(scope="module")
def hidden():
    """Clips of four seconds with a bar and open sides, where objects leave sight and come back."""
    source = World(seed=7005, frames=33, **{**PLAIN, "occluder": 1, "leave": 1})
    return [source[i] for i in range(60)]


def test_true_renders_of_the_full_world_reach_the_ceiling(clips):
    rows = [measure(i["video"], i["audio"], FPS, RATE, ask(i)) for i in clips[0]]
    found = summarize(rows)
    assert np.mean([row["right"] for row in rows]) >= 0.99
    names = ("direction", "count", "permanence", "sync_impacts", "sync_onsets")
    assert all(found[name] >= 0.99 for name in names), found
    assert found["size_drift"] < 0.01 and found["empty"] == 0


def test_what_is_out_of_sight_is_not_missing_but_must_come_back(hidden):
    found = [measure(i["video"], i["audio"], FPS, RATE, ask(i)) for i in hidden]
    assert summarize(found)["permanence"] > 0.99 and summarize(found)["returns"] > 0.95
    lost = []
    for item in hidden:
        visible = item["state"]["visible"][:, 0]
        gone = np.flatnonzero(visible < 0.3)
        if len(item["state"]["color"]) > 1 or not len(gone):
            continue
        video = item["video"].copy()
        video[gone[0] :] = 31  # background: the object never comes back
        lost.append(measure(video, item["audio"], FPS, RATE, ask(item)))
    judged = [row["returns"] for m in lost for row in m["objects"] if row["returns"] is not None]
    assert len(judged) > 5 and np.mean(judged) < 0.1


def test_a_ghost_at_the_edge_does_not_have_to_come_back(easy):
    """A faint blob that touches the edge is no object, in any frame."""
    item = next(i for i in easy if COLORS[i["state"]["color"][0]] == "red")
    video = np.full((17, 32, 32, 3), 31, np.uint8)
    video[:4, 8:20, :5] = (90, 31, 31)
    found = measure(video, item["audio"], FPS, RATE, ask(item))["objects"][0]
    assert found["returns"] is None and found["present_share"] == 0
    video[8:, 10:20, 10:20] = PALETTE["red"]  # later there is one
    assert measure(video, item["audio"], FPS, RATE, ask(item))["objects"][0]["returns"] is None


def test_an_object_that_another_swallows_is_missing(easy):
    """Only an occluder or the edge of the frame hides an object, and not another object."""
    item = next(i for i in easy if COLORS[i["state"]["color"][0]] != "cyan")
    video = item["video"].copy()
    x = int(item["state"]["position"][7, 0, 0] * 32)
    video[7, :, x:][video[7, :, x:].max(-1) - video[7, :, x:].min(-1) > 40] = PALETTE["cyan"]
    video[8:] = 31  # background
    found = measure(video, item["audio"], FPS, RATE, ask(item))["objects"][0]
    assert found["present_share"] < 0.5 and not found["right"]


def test_sound_out_of_time_is_out_of_sync(clips):
    true, late = [], []
    for item in clips[0][:40]:
        true.append(measure(item["video"], item["audio"], FPS, RATE, ask(item)))
        audio = np.roll(item["audio"], 3 * RATE // FPS)
        late.append(measure(item["video"], audio, FPS, RATE, ask(item)))
    assert summarize(late)["sync_impacts"] < summarize(true)["sync_impacts"] - 0.4
    assert summarize(late)["sync_onsets"] < summarize(true)["sync_onsets"] - 0.3


def test_larger_frames_and_other_rates():
    for size, fps, rate in ((64, 8, 16000), (100, 12, 24000), (128, 16, 44100)):
        source = World(seed=7004, size=(size, size), fps=fps, sample_rate=rate, frames=25, **PLAIN)
        rows = []
        for i in range(4):
            item = source[i]
            rows.append(measure(item["video"], item["audio"], fps, rate, ask(item)))
        assert all(row["right"] and row["count_right"] for row in rows)
        assert summarize(rows)["sync_impacts"] > 0.9


def test_one_frame_can_be_read(easy):
    item = easy[0]
    result = measure(item["video"][:1], item["audio"][:1000], FPS, RATE, ask(item))
    assert result["right"] and result["objects"][0]["size_drift"] is None


def test_summary_of_nothing_and_of_unknown_names():
    assert set(summarize([]).values()) == {None}
    video = np.zeros((5, 32, 32, 3), np.uint8)
    with pytest.raises(UserError, match="no shape 'hexagon'"):
        measure(video, np.zeros(5000), FPS, RATE, [dict(color="red", shape="hexagon", direction="up")])
