"""The maths of diffusion against closed forms."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.gaussian import prediction_of
from tests.helpers import enable_x64
from vdm_jax import diffusion
from vdm_jax.errors import UserError


def make_config(**different):
    base = dict(
        schedule="cosine",
        log_snr_min=-12.0,
        log_snr_max=12.0,
        shift=1.0,
        target="v",
        weighting="uniform",
        min_snr_gamma=5.0,
        sigmoid_bias=-1.0,
        patterns=dict(text=1.0),
        loss_weights=dict(video=1.0, audio=0.5),
    )
    return ConfigDict({**base, **different})


def latents(batch=16, frames=5, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return {
        "video": jax.random.normal(keys[0], (batch, frames, 2, 2, 3)),
        "audio": jax.random.normal(keys[1], (batch, 4 * frames, 2)),
    }


# --------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize("shift", [1.0, 0.5])
@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_schedule_falls_within_bounds_and_has_a_finite_slope(schedule, shift):
    config = make_config(schedule=schedule, shift=shift)
    t = jnp.linspace(0, 1, 1001)
    log_snr, slope = jax.jvp(lambda t: diffusion.log_snr_at(t, config), (t,), (jnp.ones_like(t),))
    assert log_snr.dtype == jnp.float32 and log_snr.shape == t.shape
    assert (jnp.diff(log_snr) < 0).all()
    assert jnp.isfinite(slope).all() and (slope[1:-1] < 0).all()
    np.testing.assert_allclose(log_snr[0], 12.0, atol=1e-4)
    if schedule != "linear_beta":  # DDPM ends before pure noise
        np.testing.assert_allclose(log_snr[-1], -12.0, atol=1e-4)


def test_cosine_and_sigmoid_are_the_published_curves():
    with enable_x64(True):
        t = np.linspace(0.01, 0.99, 99)
        config = make_config(log_snr_min=-60.0, log_snr_max=60.0)  # wide enough that the bounds do not act
        alpha, _ = diffusion.alpha_sigma(diffusion.log_snr_at(t, config))
        np.testing.assert_allclose(alpha, np.cos(np.pi * t / 2), rtol=1e-9)
        config.shift = 0.25
        shifted = diffusion.log_snr_at(t, config)
        expected = -2 * np.log(np.tan(np.pi * t / 2)) + 2 * np.log(0.25)
        np.testing.assert_allclose(shifted, expected, rtol=1e-9)

        config = make_config(schedule="sigmoid", log_snr_min=-60.0, log_snr_max=60.0)
        alpha, _ = diffusion.alpha_sigma(diffusion.log_snr_at(t, config))

        def sigmoid(a):
            return 1 / (1 + np.exp(-a))

        expected = (sigmoid(3) - sigmoid(6 * t - 3)) / (sigmoid(3) - sigmoid(-3))
        np.testing.assert_allclose(alpha**2, expected, rtol=1e-9)


def test_linear_beta_is_the_product_of_one_minus_beta():
    log_snr = diffusion.log_snr_at(jnp.arange(1, 1001) / 1000, make_config(schedule="linear_beta"))
    alpha_bar, expected = 1.0, []
    for i in range(1000):
        alpha_bar *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        expected.append(alpha_bar)
    alpha, sigma = diffusion.alpha_sigma(log_snr)
    np.testing.assert_allclose(alpha, np.sqrt(expected), atol=1e-6)
    np.testing.assert_allclose(sigma, np.sqrt(1 - np.array(expected)), atol=1e-6)


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_float32_log_snr_is_exact_at_both_ends(schedule):
    t = np.concatenate([np.linspace(0, 0.01, 50), np.linspace(0.99, 1, 50)]).astype(np.float32)
    config = make_config(schedule=schedule)
    with enable_x64(True):
        exact = np.array(diffusion.log_snr_at(t.astype(np.float64), config))
    # Near t = 1, float32 numbers are 6e-8 apart, and cosine falls by 1256 per unit of t.
    np.testing.assert_allclose(diffusion.log_snr_at(t, config), exact, atol=3e-4)


# --------------------------------------------------------------------------------------------------
# Noising and targets


def test_alpha_sigma_at_extremes():
    alpha, sigma = diffusion.alpha_sigma(jnp.array([-60.0, -12.0, 0.0, 12.0, 60.0]))
    expected = np.exp(np.array([-60, -12, 0, 12, 60]) / 2.0)
    np.testing.assert_allclose(alpha / sigma, expected, rtol=1e-5)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)


def test_noise_follows_only_the_noise_level_of_its_own_frame():
    x, eps = latents(), latents(seed=1)
    log_snr = {"video": jnp.zeros((16, 5)), "audio": jnp.zeros((16, 5))}
    base = diffusion.add_noise(x, eps, log_snr)
    np.testing.assert_allclose(base["video"], (x["video"] + eps["video"]) / np.sqrt(2), atol=1e-6)
    moved = diffusion.add_noise(x, eps, {**log_snr, "audio": log_snr["audio"].at[1, 3].set(4.0)})
    np.testing.assert_array_equal(moved["video"], base["video"])
    changed = np.argwhere((moved["audio"] != base["audio"]).any(-1))
    assert changed.tolist() == [[1, token] for token in (12, 13, 14, 15)]  # the 4 tokens of frame 3
    alpha, sigma = diffusion.alpha_sigma(4.0)
    expected = alpha * x["audio"][1, 12:16] + sigma * eps["audio"][1, 12:16]
    np.testing.assert_allclose(moved["audio"][1, 12:16], expected, atol=1e-6)
    with pytest.raises(AssertionError, match="divisible"):
        diffusion.add_noise(x["audio"][:, :7], eps["audio"][:, :7], log_snr["audio"])


@pytest.mark.parametrize("target", diffusion.TARGETS)
def test_targets_invert(target):
    with enable_x64(True):
        log_snr = np.linspace(-20, 20, 41)[None]  # one frame per noise level
        x, eps = (np.random.default_rng(i).normal(size=(1, 41, 3)) for i in range(2))
        z = diffusion.add_noise(x, eps, log_snr)
        prediction = diffusion.to_target(x, eps, log_snr, target)
        np.testing.assert_allclose(diffusion.to_x0(prediction, z, log_snr, target), x, atol=1e-9)


@pytest.mark.parametrize("target", diffusion.TARGETS)
def test_float32_conversions_stay_finite(target):
    log_snr = jnp.array([[-60.0, -12.0, 12.0, 60.0]])
    z, prediction = jnp.ones((1, 4, 2)), jnp.full((1, 4, 2), 0.5)
    assert jnp.isfinite(diffusion.to_x0(prediction, z, log_snr, target)).all()


# --------------------------------------------------------------------------------------------------
# Weights


def test_weights_are_the_published_ones():
    log_snr, slope = jnp.linspace(-8, 8, 17), jnp.linspace(1, 3, 17)
    snr, alpha2 = np.exp(log_snr), 1 / (1 + np.exp(-log_snr))

    def weight(**different):
        return diffusion.loss_weight(log_snr, slope, make_config(**different))

    np.testing.assert_allclose(weight(weighting="uniform", target="noise"), 1)
    np.testing.assert_allclose(weight(weighting="uniform", target="x0"), snr, rtol=1e-5)
    np.testing.assert_allclose(weight(weighting="uniform", target="v"), alpha2, rtol=1e-5)
    least = np.minimum(snr, 5)
    np.testing.assert_allclose(weight(weighting="min_snr", target="x0"), least, rtol=1e-5)
    np.testing.assert_allclose(weight(weighting="min_snr", target="noise"), least / snr, rtol=1e-5)
    np.testing.assert_allclose(weight(weighting="min_snr", target="v"), least / (snr + 1), rtol=1e-5)
    expected = slope / (1 + np.exp(log_snr + 1))  # bias -1
    np.testing.assert_allclose(weight(weighting="sigmoid", target="noise"), expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
@pytest.mark.parametrize("weighting", diffusion.WEIGHTINGS)
def test_loss_depends_on_the_x0_error_alone(weighting, schedule):
    z, seen = latents(), []
    with enable_x64(True):
        z = jax.tree.map(lambda z: jnp.asarray(z, jnp.float64), z)
        for target in diffusion.TARGETS:
            config = make_config(
                target=target,
                weighting=weighting,
                schedule=schedule,
                patterns={"per_frame": 1.0, "continue": 1.0},
            )

            def denoise(z_t, log_snr, cond, target=target):  # a poor guess of x0, as a prediction of `target`
                x0 = jax.tree.map(jnp.tanh, z_t)
                return prediction_of(x0, z_t, log_snr, target)

            seen.append(diffusion.loss(denoise, jax.random.key(1), z, {}, config))
        for (value, metrics), (first, first_metrics) in zip(seen[1:], [seen[0]] * 2):
            np.testing.assert_allclose(value, first, rtol=1e-9)
            for name in metrics:
                np.testing.assert_allclose(metrics[name], first_metrics[name], rtol=1e-9)


def test_sigmoid_weight_makes_the_loss_independent_of_the_schedule():
    # For every schedule, the integral of weight over t equals the integral of sigmoid(b - log_snr) over log_snr.
    with enable_x64(True):
        t = (1 - jnp.cos(jnp.linspace(0, jnp.pi, 20001))) / 2  # denser at the ends, where the schedule is steep
        for schedule in ("cosine", "sigmoid"):
            config = make_config(schedule=schedule, weighting="sigmoid", target="noise")
            log_snr = diffusion.log_snr_at(t, config)
            slope = -jax.vmap(jax.grad(lambda t: diffusion.log_snr_at(t, config)))(t)  # noqa: B023
            integral = np.trapezoid(diffusion.loss_weight(log_snr, slope, config), t)
            expected = np.log1p(np.exp(-1 + 12)) - np.log1p(np.exp(-1 - 12))
            np.testing.assert_allclose(integral, expected, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Patterns


def draw(batch=512, frames=6, seed=0, **patterns):
    t, context = diffusion.sample_times(jax.random.key(seed), (batch, frames), patterns)
    t, context = jax.tree.map(np.array, t), jax.tree.map(np.array, context)
    for name in ("video", "audio"):
        assert t[name].shape == context[name].shape == (batch, frames)
        assert (t[name] >= 0).all() and (t[name] <= 1).all()
        assert (t[name][context[name]] == 0).all()
    return t["video"], t["audio"], context["video"], context["audio"]


def test_text_is_one_time_evenly_spaced_over_the_batch():
    video, audio, context_video, context_audio = draw(text=1)
    assert (video == video[:, :1]).all() and (audio == video).all()
    assert not context_video.any() and not context_audio.any()
    assert sorted(np.floor(video[:, 0] * 512).astype(int)) == list(range(512))  # one in each 512th
    assert (np.diff(video[:, 0]) < 0).any()  # in random order


def test_per_modality_and_per_frame_are_independent():
    video, audio, *_ = draw(per_modality=1)
    assert (video == video[:, :1]).all() and (audio == audio[:, :1]).all()
    assert abs(np.corrcoef(video[:, 0], audio[:, 0])[0, 1]) < 0.15
    video, audio, *_ = draw(per_frame=1)
    off_diagonal = np.corrcoef(np.concatenate([video, audio], 1).T) - np.eye(12)
    assert abs(off_diagonal).max() < 0.2
    np.testing.assert_allclose(video.mean(0), 0.5, atol=0.002)  # stratified in every frame


def test_one_modality_is_context():
    video, audio, context_video, context_audio = draw(foley=1)
    assert context_video.all() and not context_audio.any() and (audio > 0).all()
    video, audio, context_video, context_audio = draw(audio=1)
    assert context_audio.all() and not context_video.any() and (video > 0).all()


def test_first_and_last_frames_are_context():
    _, audio, context_video, context_audio = draw(image=1)
    assert context_video.sum(1).tolist() == [1] * 512 and context_video[:, 0].all()
    assert not context_audio.any()
    _, _, context, context_audio = draw(**{"continue": 1})
    assert (context == context_audio).all() and set(context.sum(1)) == {1, 2, 3, 4, 5}
    assert (np.diff(context.astype(int), axis=1) <= 0).all()  # the first frames
    _, _, context, context_audio = draw(between=1)
    assert (context == context_audio).all() and context[:, 0].all() and context[:, -1].all()
    assert set(context.sum(1)) == {2, 3, 4, 5}
    assert (np.abs(np.diff(context.astype(int), axis=1)).sum(1) == 2).all()  # one gap
    for name in ("image", "continue", "between"):  # too short for context frames
        assert not draw(batch=8, frames=1, **{name: 1})[2].any()


def test_a_pyramid_rises_from_frame_to_frame():
    video, audio, context, context_audio = draw(pyramid=1)
    assert (video == audio).all() and (context == context_audio).all()
    assert (np.diff(video, axis=1) >= 0).all() and (video[:, -1] > 0).all()
    rise = np.diff(video, axis=1)
    inside = (video[:, :-1] > 0) & (video[:, 1:] < 1)
    for row, ok in zip(rise, inside):
        assert np.ptp(row[ok]) < 1e-5 if ok.any() else True  # one slope per example
    assert context.any() and (video == 1).any()


def test_shares_and_keys():
    _, _, context_video, context_audio = draw(batch=100, text=3, foley=1, audio=0)
    assert context_video.all(1).sum() == 25 and not context_audio.any()
    everything = dict.fromkeys(diffusion.PATTERNS, 1.0)
    first, again, other = (draw(seed=seed, **everything)[0] for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    jitted = jax.jit(lambda key: diffusion.sample_times(key, (512, 6), everything))
    np.testing.assert_allclose(jitted(jax.random.key(1))[0]["video"], first, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Loss


def test_loss_by_hand():
    z, seen = latents(), {}
    config = make_config(target="noise", patterns=dict(per_frame=1.0, between=1.0))

    def denoise(z_t, log_snr, cond):
        seen.update(z_t=z_t, log_snr=log_snr, cond=cond)
        return jax.tree.map(jnp.zeros_like, z_t)  # the error is eps itself

    value, metrics = diffusion.loss(denoise, jax.random.key(0), z, "cond", config)
    assert seen["cond"] == "cond" and value.dtype == jnp.float32
    means = {}
    for name, tokens in (("video", 1), ("audio", 4)):
        log_snr = np.repeat(seen["log_snr"][name], tokens, 1)
        generated = log_snr < 12.0
        z_t, x = np.array(seen["z_t"][name]), np.array(z[name])
        assert 0 < generated.sum() < generated.size
        np.testing.assert_array_equal(z_t[~generated], x[~generated])  # context frames are exactly clean
        shape = (-1,) + (1,) * (x.ndim - 2)
        alpha, sigma = (np.reshape(a, shape) for a in diffusion.alpha_sigma(log_snr[generated]))
        eps = (z_t[generated] - alpha * x[generated]) / sigma
        means[name] = np.square(eps).mean()
        np.testing.assert_allclose(metrics[f"loss_{name}"], means[name], rtol=1e-3)
        assert abs(means[name] - 1) < 0.2
    np.testing.assert_allclose(value, (means["video"] + 0.5 * means["audio"]) / 1.5, rtol=1e-3)


def test_a_prediction_of_another_shape_is_an_error():
    halved = lambda z_t, log_snr, cond: {**z_t, "video": z_t["video"][..., :1]}  # noqa: E731
    with pytest.raises(AssertionError, match="shape"):
        diffusion.loss(halved, jax.random.key(0), latents(), {}, make_config())


def test_noise_bins_hold_their_part_of_t():
    z = latents()
    config = make_config(target="noise", patterns=dict(per_frame=1.0))

    def denoise(z_t, log_snr, cond):  # eps is off by t, so the error of a bin is its mean square of t
        t = jax.tree.map(lambda log_snr: 2 / jnp.pi * jnp.arctan(jnp.exp(-log_snr / 2)), log_snr)
        eps = prediction_of(z, z_t, log_snr, "noise")
        return jax.tree.map(lambda t, eps: eps + diffusion.broadcast_to_latent(t, eps), t, eps)

    _, metrics = diffusion.loss(denoise, jax.random.key(0), z, {}, config)
    for i in range(4):  # mean of t^2 over [i/4, (i+1)/4)
        expected = ((i + 1) ** 3 - i**3) / 48
        for name in ("video", "audio"):
            np.testing.assert_allclose(metrics[f"eps_mse_{name}_{i}"], expected, rtol=0.1, atol=2e-3)


def test_nothing_to_learn_is_no_loss():
    config = make_config(patterns=dict(foley=1.0), loss_weights=dict(video=1.0, audio=0.0))
    identity = lambda z_t, log_snr, cond: z_t  # noqa: E731
    value, metrics = diffusion.loss(identity, jax.random.key(0), latents(), {}, config)
    assert value == 0 and metrics["loss_video"] == 0 and metrics["loss_audio"] > 0
    assert all(np.isnan(metrics[f"eps_mse_video_{i}"]) for i in range(4))


@pytest.mark.parametrize("ends", [(-20.0, -19.0), (19.0, 20.0), (-12.0, 12.0)])
@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_gradient_is_finite_at_both_extremes(schedule, ends):
    z = latents()
    for weighting in diffusion.WEIGHTINGS:
        for target in diffusion.TARGETS:
            config = make_config(
                schedule=schedule,
                log_snr_min=ends[0],
                log_snr_max=ends[1],
                weighting=weighting,
                target=target,
                patterns=dict.fromkeys(diffusion.PATTERNS, 1.0),
            )

            def value(scale, config=config):
                def denoise(z_t, log_snr, cond):
                    return jax.tree.map(lambda z: (scale * z).astype(jnp.bfloat16), z_t)

                return diffusion.loss(denoise, jax.random.key(0), z, {}, config)[0]

            number, gradient = jax.value_and_grad(value)(0.3)
            assert number.dtype == jnp.float32 and jnp.isfinite(number) and jnp.isfinite(gradient)


@pytest.mark.parametrize(
    "different, message",
    [
        (dict(schedule="cosin"), "'cosine'"),
        (dict(target="eps"), "no target"),
        (dict(weighting="minsnr"), "'min_snr'"),
        (dict(patterns=dict(texts=1.0)), "'text'"),
        (dict(patterns=dict(text=0.0)), "share"),
        (dict(patterns=dict(text=1.0, per_frame=-1.0)), "share"),
        (dict(log_snr_min=12.0), "below"),
        (dict(shift=0.0), "positive"),
    ],
)
def test_wrong_settings_are_one_clear_line(different, message):
    with pytest.raises(UserError, match=message) as error:
        identity = lambda z_t, log_snr, cond: z_t  # noqa: E731
        diffusion.loss(identity, jax.random.key(0), latents(), {}, make_config(**different))
    assert "\n" not in str(error.value)


DRAW = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from vdm_jax import diffusion

def draw(key):
    times = diffusion.sample_times(key, (8, 4), dict.fromkeys(diffusion.PATTERNS, 1.0))
    z = {"video": jnp.zeros((8, 4, 2, 2, 3)), "audio": jnp.zeros((8, 16, 2))}
    return times, diffusion.noise_like(key, z)

plain = jax.jit(draw)(jax.random.key(0))
for shape in ((8, 1), (2, 4)):
    mesh = jax.make_mesh(shape, ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    split = jax.jit(draw, out_shardings=NamedSharding(mesh, P("data", "sequence")))(jax.random.key(0))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(split)):
        assert len(b.sharding.device_set) == 8
        np.testing.assert_array_equal(a, b)
print("equal")
"""


def test_times_and_noise_are_the_same_on_any_mesh():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run([sys.executable, "-c", DRAW], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr
