"""The denoiser: which outputs depend on each noise level, text and modality, and what each setting changes."""

import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.helpers import init_weights, names
from vdm_jax.data import text
from vdm_jax.models.clip import TextEncoder
from vdm_jax.models.ops import backend
from vdm_jax.models.unet import CrossModalAttention, NoiseEmbedding, SpaceTimeAttention, TextRefiner, UNet
from vdm_jax.system.losses import drop_conditions

SETTINGS = dict(
    patch=1,
    channels=(8, 16),
    audio_channels=(),
    blocks=(1, 1),
    attention=(False, True),
    cross_modal=(False, True),
    time_strides=(2,),
    factorized=True,
    head_dim=8,
    embedding=16,
    text_layers=1,
    groups=2,
    latent_fps=2.0,
    places=(4, 4),
)
LENGTH = 12  # byte tokens


def inputs(frames=3, batch=1, seed=0):
    """(z, log_snr, cond) with K = 4; all examples of the batch are equal."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return np.repeat(rng.normal(size=(1, *shape)).astype(np.float32), batch, 0)

    z = {"video": normal(frames, 4, 4, 3), "audio": normal(4 * frames, 5)}
    log_snr = {"video": 3 * normal(frames), "audio": 3 * normal(frames)}
    mask = np.arange(LENGTH) < 7
    cond = {"states": normal(LENGTH, 16), "mask": np.tile(mask, (batch, 1)), "pooled": normal(16)}
    return z, log_snr, cond


@pytest.fixture(scope="module")
def denoise():
    """A function (z, log_snr, cond) -> (prediction, embeddings [B, T, E] of both modalities), with random weights."""
    model = UNet(**SETTINGS)
    params = init_weights(model, *inputs())

    @jax.jit
    def run(z, log_snr, cond):
        out, kept = model.apply(
            {"params": params},
            z,
            log_snr,
            cond,
            capture_intermediates=lambda module, _: isinstance(module, NoiseEmbedding),
            mutable=["intermediates"],
        )
        kept = {m: kept["intermediates"][f"embedding_{m}"]["__call__"][0] for m in ("video", "audio")}
        return out, kept

    return run


def changed(rows, base=0, tolerance=1e-5):
    """[B, N]: where each row of [B, N, ...] differs from row `base`."""
    return np.abs(rows - rows[base]).reshape(*rows.shape[:2], -1).max(-1) > tolerance


def test_one_noise_level_changes_the_embedding_of_its_frame_only(denoise):
    z, log_snr, cond = inputs(batch=8)
    log_snr["video"][1, 1] += 0.05
    log_snr["audio"][2, 2] -= 4
    cond["pooled"][3] += 1
    out, embedding = denoise(z, log_snr, cond)
    # Three frames are padded to four. Frame 3 repeats frame 2.
    assert changed(embedding["video"])[:3].tolist() == [[False] * 4, [False, True, False, False], [False] * 4]
    assert changed(embedding["audio"])[:3].tolist() == [[False] * 4, [False] * 4, [False, False, True, True]]
    for m in ("video", "audio"):
        assert out[m].shape == z[m].shape and out[m].dtype == np.float32
        assert changed(embedding[m])[3].all()  # the text reaches all frames
        # All frames of both modalities depend on it.
        assert changed(out[m])[1:4].all()
    # At equal noise levels the embeddings of two frames differ, by their times.
    same = {m: np.zeros_like(x) for m, x in log_snr.items()}
    embedding = denoise(z, same, cond)[1]
    assert (changed(embedding["video"][0][:3, None]).sum() == 2) and changed(embedding["audio"][0][:3, None]).sum() == 2


def test_modalities_and_text_reach_both_outputs(denoise):
    z, log_snr, cond = inputs(batch=8)
    z["video"][1, 0, 0, 0, 0] += 1
    z["audio"][2, 0, 0] += 1
    cond["states"][3, 2] += 1  # a word
    cond["states"][4, 9] += 1  # padding
    cond["mask"][5, 6] = False
    out, _ = denoise(z, log_snr, cond)
    for m in ("video", "audio"):
        assert changed(out[m]).any(1).tolist() == [False, True, True, True, False, True, False, False]


def test_dropped_text_is_the_null_text(denoise):
    encoder = TextEncoder(text.VOCAB_SIZE, LENGTH, 16, layers=1, heads=2)
    tokens = text.encode(["a red one", "blue", "", "x" * 50], LENGTH)
    params = init_weights(encoder, tokens, tokens > 0)

    @jax.jit
    def encode(tokens):
        states, pooled = encoder.apply({"params": params}, tokens, text.mask(tokens))
        return {"states": states, "pooled": pooled, "mask": text.mask(tokens)}

    words, null = encode(tokens), encode(text.encode([text.NULL_TEXT], LENGTH))
    dropped = drop_conditions(jax.random.key(0), words, null, 1.0)
    kept = drop_conditions(jax.random.key(0), words, null, 0.0)
    cond = {k: np.concatenate([dropped[k], kept[k]]) for k in words}
    z, log_snr, _ = inputs(batch=8)
    out, _ = denoise(z, log_snr, cond)
    # The text of rows 0 to 3 is dropped, and row 6 has the empty text. Rows 4, 5 and 7 have a text.
    for m in ("video", "audio"):
        assert changed(out[m], base=6).any(1).tolist() == [False] * 4 + [True, True, False, True]


def test_fewer_and_more_frames_than_in_initialization(denoise):
    for frames in (1, 8):
        z, log_snr, cond = inputs(frames, seed=1)
        out, _ = denoise(z, log_snr, cond)
        for m in ("video", "audio"):
            assert out[m].shape == z[m].shape and np.isfinite(out[m]).all()
            assert changed(np.asarray(out[m][0])[:, None]).sum() == len(out[m][0]) - 1  # no frame equals frame 0


def test_starts_as_zero():
    z, log_snr, cond = inputs()
    one_resolution = dict(channels=(8,), blocks=(1,), attention=(True,), cross_modal=(True,), time_strides=())
    model = UNet(**{**SETTINGS, **one_resolution})
    out, variables = jax.jit(lambda key: model.init_with_output(key, z, log_snr, cond))(jax.random.key(0))
    for m in ("video", "audio"):
        assert out[m].shape == z[m].shape and (np.asarray(out[m]) == 0).all()
    assert (np.asarray(variables["params"]["stem_video"]["kernel"]) != 0).all()


def parameters(**changes):
    """{path: shape} of the denoiser with other settings."""
    model = UNet(**{**SETTINGS, **changes})
    return names(jax.eval_shape(model.init, jax.random.key(0), *inputs())["params"])


def modules(tree, word):
    """The modules at the top of the tree whose names contain `word`."""
    return sorted({path.split("/")[0] for path in tree if word in path.split("/")[0]})


def both(*prefixes):
    return sorted(f"{prefix}_{m}" for prefix in prefixes for m in ("audio", "video"))


def test_attention_is_chosen_by_resolution():
    for on, low in (((False, False), []), ((False, True), ["1"]), ((True, True), ["0", "1"])):
        tree = parameters(attention=on, cross_modal=(False, False))
        places = ["middle", *(f"{way}_{i}" for i in low for way in ("down", "up"))]
        assert modules(tree, "attention") == both(*(f"{place}_attention" for place in places))
        assert modules(tree, "cross_modal") == ["middle_cross_modal"]
        tree = parameters(attention=(False, False), cross_modal=on)
        assert modules(tree, "cross_modal") == sorted(f"{place}_cross_modal" for place in places)
        assert modules(tree, "attention") == both("middle_attention")
    # The bottleneck attends to itself and to the text. The keys of the text have its width as input.
    tree = parameters()
    for m in ("video", "audio"):
        assert tree[f"middle_attention_{m}/self/key/kernel"] == (16, 2, 8)
        assert tree[f"middle_attention_{m}/cross/key/kernel"] == (16, 2, 8)


def test_sound_may_have_fewer_channels_and_video_may_have_patches():
    changes = dict(audio_channels=(4, 8), patch=2)
    tree = parameters(**changes)
    assert tree["stem_video/kernel"] == (1, 3, 3, 12, 8) and tree["head_video/kernel"] == (1, 3, 3, 8, 12)
    assert tree["stem_audio/kernel"] == (3, 5, 4) and tree["middle_in_audio/conv_in/time/kernel"] == (3, 8, 8)
    assert tree["middle_cross_modal/to_video/key/kernel"] == (
        8,
        2,
        8,
    )  # 8 channels of sound -> 2 heads
    model, arguments = UNet(**{**SETTINGS, **changes}), inputs()
    params = init_weights(model, *arguments)
    run = jax.jit(lambda z: model.apply({"params": params}, z, *arguments[1:]))
    out, z = run(arguments[0]), arguments[0]
    assert all(out[m].shape == z[m].shape and np.abs(out[m]).min() > 0 for m in z)
    other = {**z, "video": z["video"] + np.eye(4, dtype=np.float32)[:1, :, None]}  # the top left latent of each frame
    assert np.abs(run(other)["video"] - out["video"]).max((0, 1, 4))[:2, :2].min() > 1e-4


def test_resolutions_blocks_and_strides_are_chosen():
    tree = parameters(
        channels=(8, 12, 16), blocks=(1, 0, 2), attention=(False,) * 3, cross_modal=(False,) * 3, time_strides=(1, 2)
    )
    blocks = ["down_0_0", "down_2_0", "down_2_1", "middle_in", "middle_out", "up_0_0", "up_2_0", "up_2_1"]
    with_film = sorted({path.split("/")[0] for path in tree if path.split("/")[1] == "film"})
    assert with_film == both(*blocks)  # the noise level enters every residual block
    assert tree["downsample_0_video/kernel"] == (1, 2, 2, 8, 8) and tree["downsample_1_video/kernel"] == (
        2,
        2,
        2,
        8,
        12,
    )
    assert tree["downsample_0_audio/kernel"] == (2, 8, 8)
    assert modules(tree, "upsample") == both("upsample_1", "upsample_2")
    assert tree["up_0_0_video/conv_in/space/kernel"] == (1, 3, 3, 16, 8)  # skips are concatenated
    assert tree["up_0_0_video/skip/kernel"] == (16, 8) and "down_0_0_video/skip/kernel" not in tree
    assert tree["head_video/kernel"][-1] == 3 and tree["head_audio/kernel"][-1] == 5


def test_convolutions_are_factorized_or_full():
    factorized, full = parameters(), parameters(factorized=False)
    assert factorized["middle_in_video/conv_in/space/kernel"] == (1, 3, 3, 16, 16)
    assert factorized["middle_in_video/conv_in/time/kernel"] == (3, 1, 1, 16, 16)
    assert full["middle_in_video/conv_in/full/kernel"] == (3, 3, 3, 16, 16)
    sound = {path: shape for path, shape in full.items() if "_audio" in path}
    assert sound == {path: shape for path, shape in factorized.items() if "_audio" in path}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_without_biases_the_model_is_the_one_whose_biases_are_zero(platform):
    z, log_snr, cond = inputs()
    lean = UNet(**SETTINGS, use_bias=False)
    params = init_weights(lean, z, log_snr, cond)
    kept = {path.rsplit("/", 2)[-2] for path in names(params) if path.endswith("/bias")}
    assert kept == {"norm_in", "film", "norm_video", "norm_audio"}

    full = UNet(**SETTINGS)
    shapes = names(jax.eval_shape(full.init, jax.random.key(0), z, log_snr, cond)["params"])
    assert len(names(params)) < 0.6 * len(shapes)
    neutral = {path: np.full(shape, path.endswith("/scale"), np.float32) for path, shape in shapes.items()}
    given = traverse_util.flatten_dict(params, sep="/")
    filled = traverse_util.unflatten_dict({**neutral, **given}, sep="/")
    with backend(platform):
        expected = jax.jit(full.apply)({"params": filled}, z, log_snr, cond)
        out = jax.jit(lean.apply)({"params": params}, z, log_snr, cond)
    for m in z:
        assert np.std(out[m]) > 0
        np.testing.assert_allclose(out[m], expected[m], atol=1e-5)


def test_full_convolutions_run_where_time_does_not_shrink():
    z, log_snr, cond = inputs()
    model = UNet(**{**SETTINGS, "factorized": False, "time_strides": (1,), "attention": (False, False)})
    params = init_weights(model, z, log_snr, cond)
    out = jax.jit(model.apply)({"params": params}, z, log_snr, cond)
    assert all(np.isfinite(out[m]).all() and np.std(out[m]) > 0 for m in z)


def test_compute_in_half_precision_keeps_float32_parameters_and_output():
    model = UNet(**SETTINGS, dtype=jax.numpy.bfloat16)
    out, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs())
    assert {x.dtype for x in jax.tree.leaves((out, variables))} == {np.dtype(np.float32)}
    halves = str(jax.make_jaxpr(model.apply)(variables, *inputs())).count("bf16[")
    assert halves > 100  # the arrays in between are bfloat16


def test_cross_modal_attention_reads_both_streams_before_it_changes_them():
    rng = np.random.default_rng(0)
    video = rng.normal(size=(1, 2, 2, 2, 16)).astype(np.float32)
    audio = rng.normal(size=(1, 8, 8)).astype(np.float32)
    times = np.repeat([0.0, 0.5], 4), np.arange(8) / 8
    module = CrossModalAttention(head_dim=8)
    start = jax.jit(module.init)(jax.random.key(0), video, audio, *times)
    run = jax.jit(lambda params, *x: module.apply({"params": params}, *x))
    for x, y in zip(run(start["params"], video, audio, *times), (video, audio)):
        np.testing.assert_array_equal(x, y)  # the streams start independent

    params = init_weights(module, video, audio, *times)
    to_video, to_audio = run(params, video, audio, *times)
    assert to_video.shape == video.shape and to_audio.shape == audio.shape
    for name, kept, silenced in (("to_video", 1, 0), ("to_audio", 0, 1)):
        silent = {**params, name: {**params[name], "out": jax.tree.map(np.zeros_like, params[name]["out"])}}
        out = run(silent, video, audio, *times)
        # Without the other direction, this direction gives the same.
        np.testing.assert_array_equal(out[kept], (to_video, to_audio)[kept])
        np.testing.assert_array_equal(out[silenced], (video, audio)[silenced])
    # Only time differences between video and sound matter.
    for x, y in zip(run(params, video, audio, times[0] + 2, times[1] + 2), (to_video, to_audio)):
        np.testing.assert_allclose(x, y, atol=1e-4)
    for x, y in zip(run(params, video, audio, times[0] + 2, times[1]), (to_video, to_audio)):
        assert np.abs(x - y).max() > 1e-3


def test_space_time_attention_depends_on_positions_and_times():
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(1, 3, 1, 1, 16)), 4, 2).astype(np.float32)  # four equal places
    _, _, cond = inputs()
    module = SpaceTimeAttention(head_dim=8, places=(4, 1))
    times = np.repeat([0.0, 0.5, 1.0], 4)
    params = init_weights(module, x, times, cond)
    run = jax.jit(functools.partial(module.apply, {"params": params}))
    out = np.asarray(run(x, times, cond))
    assert out.shape == x.shape and np.abs(out[0, :, 1:] - out[0, :, :1]).max() > 1e-3
    np.testing.assert_allclose(run(x, times + 4, cond), out, atol=1e-4)
    assert np.abs(run(x, times * 2, cond) - out).max() > 1e-3


def test_the_text_refiner_takes_states_of_any_width():
    """Those of MiniLM have 384 channels: 13 heads of 29.5 channels."""
    refiner = TextRefiner(1, 28)
    made = jax.eval_shape(refiner.init, jax.random.key(0), np.zeros((1, LENGTH, 384)), np.ones((1, LENGTH), bool))
    assert made["params"]["attention_0"]["query"]["kernel"].shape == (384, 13, 30)


def test_the_text_refiner_changes_nothing_at_first():
    z, log_snr, cond = inputs()
    plain, refined = UNet(**{**SETTINGS, "text_layers": 0}), UNet(**{**SETTINGS, "text_layers": 2})
    assert modules(parameters(text_layers=0), "text") == [] and modules(parameters(text_layers=2), "text") == ["text"]
    params = init_weights(plain, z, log_snr, cond)
    start = jax.jit(lambda key: refined.init(key, z, log_snr, cond)["params"]["text"])(jax.random.key(0))
    outs = [
        jax.jit(m.apply)({"params": p}, z, log_snr, cond)
        for m, p in ((plain, params), (refined, {**params, "text": start}))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *outs)
    random = init_weights(refined, z, log_snr, cond)["text"]
    run = jax.jit(lambda cond: refined.apply({"params": {**params, "text": random}}, z, log_snr, cond))
    assert np.abs(run(cond)["video"] - outs[0]["video"]).max() > 1e-4
    # Words that the mask hides have no effect.
    hidden = {**cond, "states": np.where(cond["mask"][..., None], cond["states"], 9.0)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run(hidden), run(cond))
