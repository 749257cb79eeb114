"""Samplers and guidance against the exact denoisers of a Gaussian and of a mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.gaussian import FRAMES, TOKENS, conditioned, exact, flat, gaussian, unflat
from tests.helpers import enable_x64
from vdm_jax import diffusion, samplers, tasks
from vdm_jax.diffusion import MODALITIES
from vdm_jax.errors import UserError

DRAWS = 10000
DETERMINISTIC = ("ddim", "dpmpp_2m", "heun")
CONFIG = ConfigDict(dict(schedule="cosine", log_snr_min=-12.0, log_snr_max=12.0, shift=1.0, target="v"))


def noise(batch, seed=0):
    shapes = {"video": (batch, FRAMES, 1, 1, 2), "audio": (batch, TOKENS * FRAMES, 1)}
    keys = jax.random.split(jax.random.key(seed))
    return {n: jax.random.normal(k, shape) for k, (n, shape) in zip(keys, shapes.items())}


def run(denoise, z, levels, method, target="v"):
    config = {**CONFIG, "target": target}
    walk = jax.jit(lambda key, z, levels: samplers.sample(denoise, key, z, {}, levels, method, config))
    return walk(jax.random.key(7), z, levels)


# --------------------------------------------------------------------------------------------------
# Moments. The Monte-Carlo error is 0.015 for means and up to 0.05 for covariances, which are up to 2.3.
# The rest of each tolerance is the error of the method at this number of steps.


@pytest.mark.parametrize(
    "method, target, steps, spacing, tolerance",
    [
        ("ddpm", "v", 128, "time", 0.12),
        ("ddim", "noise", 128, "time", 0.08),
        ("dpmpp_2m", "v", 24, "time", 0.08),
        ("dpmpp_2m", "x0", 64, "karras", 0.08),
        ("heun", "noise", 32, "log_snr", 0.08),
    ],
)
def test_gaussian_moments(method, target, steps, spacing, tolerance):
    mean, covariance = gaussian()
    levels = tasks.scheduling_matrix(steps, FRAMES, CONFIG, spacing=spacing)
    z = run(exact(mean, covariance, target), noise(DRAWS), levels, method, target)
    np.testing.assert_allclose(flat(z).mean(0), mean[0], atol=0.04)
    np.testing.assert_allclose(np.cov(flat(z).T), covariance, atol=tolerance)


@pytest.mark.parametrize("method, steps", [("ddpm", 128), ("ddim", 64), ("dpmpp_2m", 32), ("heun", 32)])
def test_mixture_moments(method, steps):
    mean = np.stack([np.ones(12), -0.5 * np.ones(12)])
    covariance = 0.1 * np.eye(12)
    levels = tasks.scheduling_matrix(steps, FRAMES, CONFIG)
    x = flat(run(exact(mean, covariance), noise(DRAWS), levels, method))
    near = (x.mean(1) > 0.25).astype(float)  # which of the two; 8 standard deviations apart
    assert abs(near.mean() - 0.5) < 0.02
    np.testing.assert_allclose(x.mean(0), mean.mean(0), atol=0.04)
    spread = np.outer(mean[0] - mean[1], mean[0] - mean[1]) / 4
    np.testing.assert_allclose(np.cov(x.T), covariance + spread, atol=0.04)
    for i, mask in enumerate((near == 1, near == 0)):
        np.testing.assert_allclose(x[mask].mean(0), mean[i], atol=0.02)
        np.testing.assert_allclose(np.cov(x[mask].T), covariance, atol=0.015)


@pytest.mark.parametrize("lag", [0, 5])
@pytest.mark.parametrize("method, steps", [("ddpm", 128), ("dpmpp_2m", 32)])
def test_context_frames_condition_the_rest(method, steps, lag):
    # Context: the audio and the first video frame. The generated frames follow the exact conditional Gaussian.
    mean, covariance = gaussian()
    masks = {"video": np.array([True, False, False]), "audio": np.ones(3, bool)}
    z = noise(DRAWS)
    clean = {"video": z["video"].at[:, 0].set(0.5), "audio": jnp.full_like(z["audio"], -0.5)}
    levels = tasks.scheduling_matrix(steps, FRAMES, CONFIG, masks, lag)
    x = run(exact(mean, covariance), clean, levels, method)
    for name in ("video", "audio"):
        kept = np.repeat(masks[name], x[name].shape[1] // FRAMES)
        np.testing.assert_array_equal(x[name][:, kept], clean[name][:, kept])
    generated = np.r_[2:6]
    expected, rest = conditioned(mean, covariance, flat(clean)[0], generated)
    np.testing.assert_allclose(flat(x)[:, generated].mean(0), expected, atol=0.04)
    np.testing.assert_allclose(np.cov(flat(x)[:, generated].T), rest, atol=0.03)


def test_a_long_first_step_puts_frames_at_the_mean_of_what_may_follow():
    mean, covariance = gaussian()
    masks = dict.fromkeys(("video", "audio"), np.array([True, False, False]))
    clean = {name: z.at[:, : z.shape[1] // FRAMES].set(0.5) for name, z in noise(DRAWS).items()}
    generated = np.r_[2:6, 8:12]
    expected, rest = conditioned(mean, covariance, flat(clean)[0], generated)
    shares = []
    for first_step_times in ((), (0.4, 0.4), (0.2, 0.2), (0.0, 0.0)):
        levels = tasks.scheduling_matrix(32, FRAMES, CONFIG, masks, first_step_times=first_step_times)
        x = flat(run(exact(mean, covariance), clean, levels, "dpmpp_2m"))[:, generated]
        np.testing.assert_allclose(x.mean(0), expected, atol=0.04)
        shares.append((x.var(0) / np.diag(rest)).mean())  # of the conditional variance
    assert abs(shares[0] - 1) < 0.05 and shares[0] > 1.1 * shares[1] > 1.2 * shares[2] and shares[3] < 1e-3


# --------------------------------------------------------------------------------------------------
# Order of accuracy


def errors(method, spacing, counts):
    """Root mean square distance to the exact end of the probability-flow path, per step count."""
    mean, covariance = gaussian()
    config = {**CONFIG, "log_snr_min": -16.0, "log_snr_max": 16.0}
    variance, basis = np.linalg.eigh(covariance)
    z = jax.tree.map(lambda z: jnp.asarray(z, jnp.float64), noise(64))
    alpha, sigma = diffusion.alpha_sigma(jnp.float64(-16.0))
    # In the eigenbasis, the path scales each coordinate by its standard deviation at each noise level.
    scale = np.sqrt(variance / (alpha**2 * variance + sigma**2))
    end = mean + ((flat(z) - alpha * mean) @ basis * scale) @ basis.T
    denoise, key, found = exact(mean, covariance), jax.random.key(0), []
    for steps in counts:
        levels = tasks.scheduling_matrix(steps, FRAMES, config, spacing=spacing)
        x = samplers.sample(denoise, key, z, {}, levels, method, config)
        found.append(float(jnp.sqrt(jnp.square(flat(x) - end).mean())))
    return np.array(found)


@pytest.mark.parametrize("method, factor", [("ddim", 2), ("dpmpp_2m", 4), ("heun", 4)])
def test_doubling_steps_divides_the_error(method, factor):
    with enable_x64(True):
        found = errors(method, "log_snr", (96, 192))
        few = errors(method, "time", (16,))
    np.testing.assert_allclose(found[:-1] / found[1:], factor, rtol=0.06)
    assert few[0] < (0.1 if method == "ddim" else 0.02)  # the default spacing is accurate with few steps


# --------------------------------------------------------------------------------------------------
# Scheduling matrices with context frames and pyramids


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_pyramid_equals_the_plain_run_for_unrelated_frames(method):
    # Independent frames take the same steps whenever their turn comes.
    mean, covariance = gaussian()[0], np.eye(12) * 0.5
    z = noise(32)
    plain, again, rising = (
        run(exact(mean, covariance), z, tasks.scheduling_matrix(8, FRAMES, CONFIG, lag=lag), method)
        for lag in (0, 0, 3)
    )
    for name in z:
        np.testing.assert_array_equal(plain[name], again[name])
        np.testing.assert_allclose(plain[name], rising[name], atol=2e-5)


def test_a_pyramid_can_be_walked_in_parts():
    mean, covariance = gaussian()
    levels = tasks.scheduling_matrix(8, FRAMES, CONFIG, lag=4)
    whole = run(exact(mean, covariance), noise(32), levels, "ddim")
    first, second = ({n: levels[n][part] for n in levels} for part in (np.s_[:9], np.s_[8:]))
    middle = run(exact(mean, covariance), noise(32), first, "ddim")
    parts = run(exact(mean, covariance), middle, second, "ddim")
    for name in whole:
        np.testing.assert_array_equal(middle[name][:, : len(middle[name][0]) // FRAMES],
                                      whole[name][:, : len(whole[name][0]) // FRAMES])  # fmt: skip
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-5)


@pytest.mark.parametrize("method", samplers.METHODS)
def test_context_frames_stay_bitwise_and_the_network_sees_them_unchanged(method):
    masks = {"video": np.array([True, False, True]), "audio": np.array([False, False, True])}
    levels = tasks.scheduling_matrix(5, FRAMES, CONFIG, masks, lag=1)
    levels["video"] = levels["video"].at[:, 2].set(3.0)  # context with a little noise
    z = noise(4)

    def denoise(z_t, log_snr, cond):
        off = (z_t["video"][:, [0, 2]] - z["video"][:, [0, 2]]) ** 2
        return jax.tree.map(lambda a: jnp.where(off.max() > 0, jnp.nan, a), z_t)

    x = run(denoise, z, levels, method)
    np.testing.assert_array_equal(x["video"][:, [0, 2]], z["video"][:, [0, 2]])
    np.testing.assert_array_equal(x["audio"][:, 4:], z["audio"][:, 4:])
    assert jnp.isfinite(x["video"]).all() and (x["video"][:, 1] != z["video"][:, 1]).all()


def test_the_last_step_returns_x0_itself():
    for method in samplers.METHODS:
        levels = tasks.scheduling_matrix(3, FRAMES, CONFIG)
        constant = lambda z, log_snr, cond: jax.tree.map(lambda z: jnp.full_like(z, 0.3), z)  # noqa: E731
        x = run(constant, noise(2), levels, method, "x0")
        assert all((a == np.float32(0.3)).all() for a in x.values())


def test_levels_may_differ_by_example():
    mean, covariance = np.zeros((1, 12)), np.eye(12) * 0.5

    def denoise(z, log_snr, cond):  # exact for independent data, with any log_snr per example
        def leaf(log_snr, z):
            alpha, sigma = diffusion.alpha_sigma(diffusion.broadcast_to_latent(log_snr, z))
            return 0.5 * alpha / (0.5 * alpha**2 + sigma**2) * z

        return jax.tree.map(leaf, log_snr, z)

    z, masks = noise(2), {"video": [True, False, False]}
    plain = tasks.scheduling_matrix(6, FRAMES, CONFIG)
    image = tasks.scheduling_matrix(6, FRAMES, CONFIG, masks)
    both = {name: jnp.stack([plain[name], image[name]], 1) for name in plain}  # [N+1, B, T]
    x = run(denoise, z, both, "dpmpp_2m", "x0")
    for i, levels in enumerate((plain, image)):
        alone = run(exact(mean, covariance, "x0"), z, levels, "dpmpp_2m", "x0")
        for name in x:
            np.testing.assert_allclose(x[name][i], alone[name][i], atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Guidance


def conditional(z, log_snr, cond):  # a prediction that depends on everything
    return {
        name: jnp.tanh(z[name] + 0.1 * diffusion.broadcast_to_latent(log_snr[name], z[name]))
        * cond["text"].reshape(-1, *[1] * (z[name].ndim - 1))
        for name in z
    }


def test_guidance_mixes_the_two_predictions():
    z, cond, null = noise(4), {"text": jnp.array([1.0, 2.0, 3.0, 4.0])}, {"text": jnp.array([0.5])}
    log_snr = {"video": jnp.linspace(-6, 6, 12).reshape(4, 3), "audio": jnp.zeros((4, 3))}
    with_text, without = (
        conditional(z, log_snr, cond),
        conditional(z, log_snr, {"text": jnp.full(4, 0.5)}),
    )
    calls = []

    def counted(*args):
        calls.append(args[0]["video"].shape)
        return conditional(*args)

    def guided(weight, **more):
        return samplers.guided(counted, samplers.text_guidance(weight, null), **more)(z, log_snr, cond)

    for name in z:
        np.testing.assert_array_equal(guided(1.0)[name], with_text[name])
        np.testing.assert_allclose(guided(0.0)[name], without[name], atol=1e-6)
        expected = without[name] + 3 * (with_text[name] - without[name])
        np.testing.assert_allclose(guided(3.0)[name], expected, atol=1e-5)
    assert set(calls) == {(8, FRAMES, 1, 1, 2)}  # one call for both predictions

    inside = np.array((log_snr["video"] >= -2) & (log_snr["video"] <= 2))
    limited, full = guided(3.0, interval=(-2.0, 2.0))["video"], guided(3.0)["video"]
    np.testing.assert_array_equal(limited[inside], full[inside])
    np.testing.assert_array_equal(limited[~inside], with_text["video"][~inside])

    scaled, half = guided(3.0, rescale=1.0), guided(3.0, rescale=0.5)
    for name in z:
        frames = {k: v[name].reshape(4, FRAMES, -1).std(-1) for k, v in
                  dict(scaled=scaled, text=with_text).items()}  # fmt: skip
        np.testing.assert_allclose(frames["scaled"], frames["text"], rtol=1e-4)
        mid = (scaled[name] + guided(3.0)[name]) / 2
        np.testing.assert_allclose(half[name], mid, atol=1e-5)


def test_guidance_moves_a_gaussian_to_its_condition():
    # Guidance of p(z | y) over p(z) with weight w has the score w s(z | y) + (1 - w) s(z). For Gaussians with the same
    # covariance and means m and 0, this is the score of a Gaussian with mean w m at every noise level.
    covariance = 0.5 * np.eye(12)

    def denoise(z, log_snr, cond):
        shift = unflat(cond["mean"])
        alpha = {n: diffusion.alpha_sigma(diffusion.broadcast_to_latent(log_snr[n], z[n]))[0] for n in z}
        centred = {n: z[n] - alpha[n] * shift[n] for n in z}
        x0 = exact(np.zeros((1, 12)), covariance, "x0")(centred, log_snr, {})
        return {n: x0[n] + shift[n] for n in z}

    cond, null = {"mean": jnp.full((2000, 12), 0.4)}, {"mean": jnp.zeros((1, 12))}
    config = {**CONFIG, "target": "x0"}
    levels = tasks.scheduling_matrix(32, FRAMES, CONFIG)
    guided = samplers.guided(denoise, samplers.text_guidance(3.0, null))
    x = flat(samplers.sample(guided, jax.random.key(0), noise(2000), cond, levels, "dpmpp_2m", config))
    np.testing.assert_allclose(x.mean(0), 1.2, atol=0.1)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.1)


def by_example(mean, covariance):
    """The exact denoise_fn of a Gaussian. Every example may have its own noise levels."""
    denoise = exact(mean, covariance)

    def single(z, log_snr):
        return jax.tree.map(lambda x: x[0], denoise(*(jax.tree.map(lambda x: x[None], t) for t in (z, log_snr)), {}))

    return lambda z, log_snr, cond: jax.vmap(single)(z, log_snr)


def untied(covariance, group):
    """The covariance, but with zeros between entries of different groups. group: [12]."""
    return np.where(group[:, None] == group, covariance, 0)


def assert_close(a, b, where):
    for name in a:
        mask = np.broadcast_to(np.repeat(where[name], a[name].shape[1] // FRAMES)[None], a[name].shape[:2])
        np.testing.assert_allclose(np.asarray(a[name])[mask], np.asarray(b[name])[mask], atol=0.02)


@pytest.mark.parametrize("history_noise", [0.0, 0.4])
def test_history_guidance_withholds_the_context(history_noise):
    # Closed forms for a Gaussian. Without the context, only the other frames are predicted. With a noised context, all
    # frames are predicted, the context at its new noise level.
    mean, covariance = gaussian()
    masks = {"video": np.array([True, False, False]), "audio": np.array([True, True, False])}
    generated = {name: ~mask for name, mask in masks.items()}
    z, other = noise(4), noise(4, 1)
    log_snr = {name: jnp.where(mask, 12.0, 0.3) + jnp.zeros((4, FRAMES)) for name, mask in masks.items()}
    tied = by_example(mean, covariance)
    group = np.asarray(
        flat({n: diffusion.broadcast_to_latent(jnp.array(masks[n])[None], x) | (x < -99) for n, x in noise(1).items()})
    )[0]
    full, alone = tied(z, log_snr, {}), by_example(mean, untied(covariance, group))(z, log_snr, {})
    more = full
    if history_noise:
        to = float(diffusion.log_snr_at(history_noise, CONFIG))
        noisy = diffusion.add_noise(z, other, {n: jnp.full((4, FRAMES), to) for n in z})
        hazy = {
            n: jnp.where(diffusion.broadcast_to_latent(jnp.asarray(masks[n])[None], z[n]), noisy[n], z[n]) for n in z
        }
        more = tied(hazy, {n: jnp.where(masks[n], to, log_snr[n]) for n in z}, {})
    terms = samplers.history_guidance(2.5, masks, other, CONFIG, history_noise)
    guided = samplers.guided(tied, terms)(z, log_snr, {})
    assert_close(guided, {n: full[n] + 1.5 * (more[n] - alone[n]) for n in z}, generated)
    none = samplers.guided(tied, samplers.history_guidance(1.0, masks, other, CONFIG, history_noise))(z, log_snr, {})
    assert_close(none, full, generated)
    assert np.abs(guided["video"] - full["video"]).max() > 0.1


def test_modality_guidance_withholds_the_other_modality():
    mean, covariance = gaussian()
    z, other = noise(4), noise(4, 1)
    log_snr = {"video": jnp.full((4, FRAMES), 0.3), "audio": jnp.full((4, FRAMES), -0.5)}
    tied = by_example(mean, covariance)
    group = np.arange(12) < 2 * FRAMES  # video
    full, alone = tied(z, log_snr, {}), by_example(mean, untied(covariance, group))(z, log_snr, {})
    guided = samplers.guided(tied, samplers.modality_guidance(3.0, other, CONFIG))(z, log_snr, {})
    everywhere = dict.fromkeys(z, np.ones(FRAMES, bool))
    assert_close(guided, {n: full[n] + 2 * (full[n] - alone[n]) for n in z}, everywhere)
    assert all(np.abs(guided[n] - full[n]).max() > 0.1 for n in z)


def test_all_guidance_is_one_call():
    mean, covariance = gaussian()
    calls, denoise = [], by_example(mean, covariance)

    def counted(z, log_snr, cond):
        calls.append((len(z["video"]), cond["text"].shape))
        return denoise(z, log_snr, cond)

    masks = {"video": np.array([True, False, False]), "audio": np.zeros(FRAMES, bool)}
    terms = samplers.text_guidance(4.0, {"text": jnp.zeros((1, 2))})
    terms += samplers.history_guidance(2.0, masks, noise(2, 1), CONFIG, 0.5)
    terms += samplers.modality_guidance(2.0, noise(2, 1), CONFIG)
    log_snr = {name: jnp.zeros((2, FRAMES)) for name in MODALITIES}
    guided = samplers.guided(counted, terms)(noise(2), log_snr, {"text": jnp.ones((2, 2))})
    # Six views: plain, without text, with noised context, without context, without audio, without video.
    assert calls == [(2 * 6, (2 * 6, 2))]
    assert guided["video"].shape == (2, FRAMES, 1, 1, 2)


# --------------------------------------------------------------------------------------------------
# The rest


def test_a_second_call_does_not_trace_again():
    mean, covariance = gaussian()
    traces = []

    @jax.jit
    def walk(scale, weight, key, z, cond, levels):
        traces.append(1)

        def denoise(z, log_snr, cond):
            return jax.tree.map(lambda a: scale * a, exact(mean, covariance)(z, log_snr, cond))

        guided = samplers.guided(denoise, samplers.text_guidance(weight, {"text": jnp.zeros((1, 2))}))
        return samplers.sample(guided, key, z, cond, levels, "dpmpp_2m", CONFIG)

    outputs = []
    for seed in range(2):
        cond = {"text": jnp.full((2, 2), float(seed))}
        masks = {"video": np.arange(FRAMES) < seed}
        levels = tasks.scheduling_matrix(4, FRAMES, CONFIG, masks)
        outputs.append(walk(1.0 + seed, 2.0 + seed, jax.random.key(seed), noise(2, seed), cond, levels))
    assert len(traces) == 1 and (outputs[0]["video"] != outputs[1]["video"]).all()


def test_ancestral_noise_depends_on_the_key_alone():
    mean, covariance = gaussian()
    levels = tasks.scheduling_matrix(4, FRAMES, CONFIG)

    def walker(method):
        def walk(seed):
            args = jax.random.key(seed), noise(2), {}, levels, method, CONFIG
            return flat(samplers.sample(exact(mean, covariance), *args))

        return jax.jit(walk)

    ddpm, ddim = walker("ddpm"), walker("ddim")
    assert (ddpm(1) == ddpm(1)).all() and (ddpm(1) != ddpm(2)).all()
    assert (ddim(1) == ddim(2)).all()


def test_an_unknown_method_is_one_clear_line():
    with pytest.raises(UserError, match="dpmpp_2m") as error:
        samplers.sample(None, None, noise(1), {}, tasks.scheduling_matrix(2, FRAMES, CONFIG), "dpm2m", CONFIG)
    assert "\n" not in str(error.value)
