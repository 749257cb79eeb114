"""Samplers against the exact denoisers of a Gaussian and of a mixture, and schedule matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.gaussian import FRAMES, TOKENS, conditioned, exact, flat, gaussian, unflat
from tests.helpers import enable_x64
from vdm_jax import diffusion, samplers
from vdm_jax.diffusion import MODALITIES
from vdm_jax.errors import UserError

DRAWS = 10000
DETERMINISTIC = ("ddim", "dpmpp_2m", "heun")
CONFIG = ConfigDict(dict(schedule="cosine", log_snr_min=-12.0, log_snr_max=12.0, shift=1.0, target="v"))


def noise(batch, seed=0):
    shapes = {"video": (batch, FRAMES, 1, 1, 2), "audio": (batch, TOKENS * FRAMES, 1)}
    keys = jax.random.split(jax.random.key(seed))
    return {n: jax.random.normal(k, shape) for k, (n, shape) in zip(keys, shapes.items())}


def run(denoise, z, levels, method, target="v", **more):
    config = {**CONFIG, "target": target}
    walk = jax.jit(lambda key, z, levels: samplers.sample(denoise, key, z, {}, levels, method, config, **more))
    return walk(jax.random.key(7), z, levels)


# --------------------------------------------------------------------------------------------------
# Moments. Monte-Carlo error of the draws: 0.015 for means, up to 0.05 for covariances (up to 2.3);
# the rest of the tolerance is the error of the first-order methods at that many steps


@pytest.mark.parametrize(
    "method, target, steps, spacing, tolerance, more",
    [
        ("ddpm", "v", 128, "time", 0.12, {}),
        ("ddim", "noise", 128, "time", 0.08, {}),
        ("ddim", "v", 128, "time", 0.12, dict(eta=0.5)),
        ("dpmpp_2m", "v", 24, "time", 0.08, {}),
        ("dpmpp_2m", "x0", 64, "karras", 0.08, {}),
        ("heun", "noise", 32, "log_snr", 0.08, {}),
    ],
)
def test_gaussian_moments(method, target, steps, spacing, tolerance, more):
    mean, covariance = gaussian()
    levels = samplers.scheduling_matrix(steps, FRAMES, CONFIG, spacing=spacing)
    z = run(exact(mean, covariance, target), noise(DRAWS), levels, method, target, **more)
    np.testing.assert_allclose(flat(z).mean(0), mean[0], atol=0.04)
    np.testing.assert_allclose(np.cov(flat(z).T), covariance, atol=tolerance)


@pytest.mark.parametrize("method, steps", [("ddpm", 128), ("ddim", 64), ("dpmpp_2m", 32), ("heun", 32)])
def test_mixture_moments(method, steps):
    mean = np.stack([np.ones(12), -0.5 * np.ones(12)])
    covariance = 0.1 * np.eye(12)
    levels = samplers.scheduling_matrix(steps, FRAMES, CONFIG)
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
def test_given_frames_condition_the_rest(method, steps, lag):
    # Sound given, and the first picture: what is made follows the exact conditional Gaussian.
    mean, covariance = gaussian()
    given = {"video": np.array([True, False, False]), "audio": np.ones(3, bool)}
    z = noise(DRAWS)
    clean = {"video": z["video"].at[:, 0].set(0.5), "audio": jnp.full_like(z["audio"], -0.5)}
    levels = samplers.scheduling_matrix(steps, FRAMES, CONFIG, given, lag)
    x = run(exact(mean, covariance), clean, levels, method)
    for name in ("video", "audio"):
        kept = np.repeat(given[name], x[name].shape[1] // FRAMES)
        np.testing.assert_array_equal(x[name][:, kept], clean[name][:, kept])
    made = np.r_[2:6]
    expected, rest = conditioned(mean, covariance, flat(clean)[0], made)
    np.testing.assert_allclose(flat(x)[:, made].mean(0), expected, atol=0.04)
    np.testing.assert_allclose(np.cov(flat(x)[:, made].T), rest, atol=0.03)


def test_a_leap_puts_frames_at_the_mean_of_what_may_follow():
    mean, covariance = gaussian()
    given = dict.fromkeys(("video", "audio"), np.array([True, False, False]))
    clean = {name: z.at[:, : z.shape[1] // FRAMES].set(0.5) for name, z in noise(DRAWS).items()}
    made = np.r_[2:6, 8:12]
    expected, rest = conditioned(mean, covariance, flat(clean)[0], made)
    shares = []
    for first_step_times in ((), (0.4, 0.4), (0.2, 0.2), (0.0, 0.0)):
        levels = samplers.scheduling_matrix(32, FRAMES, CONFIG, given, first_step_times=first_step_times)
        x = flat(run(exact(mean, covariance), clean, levels, "dpmpp_2m"))[:, made]
        np.testing.assert_allclose(x.mean(0), expected, atol=0.04)
        shares.append((x.var(0) / np.diag(rest)).mean())  # of what is left once the rest is known
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
    # In the eigenbasis the path scales each coordinate by its standard deviation at each level.
    scale = np.sqrt(variance / (alpha**2 * variance + sigma**2))
    end = mean + ((flat(z) - alpha * mean) @ basis * scale) @ basis.T
    denoise, key, found = exact(mean, covariance), jax.random.key(0), []
    for steps in counts:
        levels = samplers.scheduling_matrix(steps, FRAMES, config, spacing=spacing)
        x = samplers.sample(denoise, key, z, {}, levels, method, config)
        found.append(float(jnp.sqrt(jnp.square(flat(x) - end).mean())))
    return np.array(found)


@pytest.mark.parametrize("method, factor", [("ddim", 2), ("dpmpp_2m", 4), ("heun", 4)])
def test_doubling_steps_divides_the_error(method, factor):
    with enable_x64(True):
        found = errors(method, "log_snr", (96, 192))
        few = errors(method, "time", (16,))
    np.testing.assert_allclose(found[:-1] / found[1:], factor, rtol=0.06)
    assert few[0] < (0.1 if method == "ddim" else 0.02)  # the default spacing is good from the start


# --------------------------------------------------------------------------------------------------
# Schedule matrices


def test_schedule_matrix_rows():
    given = {"video": [True, False, False, False], "audio": [True, False, False, True]}
    flat_levels = samplers.scheduling_matrix(4, 4, CONFIG, given)
    ladder = [-12, *np.array(diffusion.log_snr_at(jnp.array([0.75, 0.5, 0.25]), CONFIG)), 12]
    for name in ("video", "audio"):
        assert flat_levels[name].shape == (5, 4) and flat_levels[name].dtype == jnp.float32
        for frame in range(4):
            expected = [12] * 5 if given[name][frame] else ladder
            np.testing.assert_allclose(flat_levels[name][:, frame], expected, atol=1e-4)
    rising = samplers.scheduling_matrix(4, 4, CONFIG, given, lag=3)
    for name in ("video", "audio"):  # frames 1, 2, 3 are made, each 3 rows after the one before
        assert rising[name].shape == (4 + 3 * 2 + 1, 4)
        for frame in range(1, 4):
            if not given[name][frame]:
                start = 3 * (frame - 1)
                np.testing.assert_allclose(rising[name][start : start + 5, frame], ladder, atol=1e-4)
                assert (rising[name][:start, frame] == rising[name][0, frame]).all()
                assert (rising[name][start + 4 :, frame] == 12).all()
    leaping = samplers.scheduling_matrix(4, 4, CONFIG, given, lag=3, first_step_times=(0.3, 0.6))
    for name in ("video", "audio"):
        for frame, start in ((1, 0.3), (2, 0.6)):
            rest = np.array(diffusion.log_snr_at(start * jnp.array([1, 2 / 3, 1 / 3]), CONFIG))
            column = leaping[name][3 * (frame - 1) :, frame]
            np.testing.assert_allclose(column[:5], [-12, *rest, 12], atol=1e-4)
        np.testing.assert_array_equal(leaping[name][:, [0, 3]], rising[name][:, [0, 3]])
    one = samplers.scheduling_matrix(1, 4, CONFIG, given, first_step_times=(0.3,))
    np.testing.assert_array_equal(one["video"], samplers.scheduling_matrix(1, 4, CONFIG, given)["video"])
    for schedule in diffusion.SCHEDULES:
        for low, high in ((-12.0, 12.0), (-9.7, 11.3)):
            config = {**CONFIG, "schedule": schedule, "log_snr_min": low, "log_snr_max": high}
            for spacing in samplers.SPACINGS:
                levels = samplers.scheduling_matrix(7, 1, config, spacing=spacing)["video"][:, 0]
                assert levels[0] >= low and levels[-1] == high and (jnp.diff(levels) > 0).all()
    even = samplers.scheduling_matrix(6, 2, CONFIG, spacing="log_snr")["audio"][:, 1]
    np.testing.assert_allclose(even, np.linspace(-12, 12, 7), atol=1e-4)
    karras = samplers.scheduling_matrix(6, 2, CONFIG, spacing="karras")["video"][:, 0]
    root = np.exp(-np.array(karras) / 14)  # (sigma / alpha)^(1/7) is even
    np.testing.assert_allclose(np.diff(root), (root[-1] - root[0]) / 6, rtol=1e-3)


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_pyramid_equals_the_plain_run_for_unrelated_frames(method):
    # With independent frames each walks the same ladder whenever its turn comes.
    mean, covariance = gaussian()[0], np.eye(12) * 0.5
    z = noise(32)
    plain, again, rising = (
        run(exact(mean, covariance), z, samplers.scheduling_matrix(8, FRAMES, CONFIG, lag=lag), method)
        for lag in (0, 0, 3)
    )
    for name in z:
        np.testing.assert_array_equal(plain[name], again[name])
        np.testing.assert_allclose(plain[name], rising[name], atol=2e-5)


def test_a_pyramid_can_be_walked_in_parts():
    mean, covariance = gaussian()
    levels = samplers.scheduling_matrix(8, FRAMES, CONFIG, lag=4)
    whole = run(exact(mean, covariance), noise(32), levels, "ddim")
    first, second = ({n: levels[n][part] for n in levels} for part in (np.s_[:9], np.s_[8:]))
    middle = run(exact(mean, covariance), noise(32), first, "ddim")
    parts = run(exact(mean, covariance), middle, second, "ddim")
    for name in whole:
        np.testing.assert_array_equal(middle[name][:, : len(middle[name][0]) // FRAMES],
                                      whole[name][:, : len(whole[name][0]) // FRAMES])  # fmt: skip
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-5)


@pytest.mark.parametrize("method", samplers.METHODS)
def test_given_frames_stay_bitwise_and_are_seen_as_they_are(method):
    given = {"video": np.array([True, False, True]), "audio": np.array([False, False, True])}
    levels = samplers.scheduling_matrix(5, FRAMES, CONFIG, given, lag=1)
    levels["video"] = levels["video"].at[:, 2].set(3.0)  # given with a little noise
    z = noise(4)

    def denoise(z_t, level, cond):
        off = (z_t["video"][:, [0, 2]] - z["video"][:, [0, 2]]) ** 2
        return jax.tree.map(lambda a: jnp.where(off.max() > 0, jnp.nan, a), z_t)

    x = run(denoise, z, levels, method)
    np.testing.assert_array_equal(x["video"][:, [0, 2]], z["video"][:, [0, 2]])
    np.testing.assert_array_equal(x["audio"][:, 4:], z["audio"][:, 4:])
    assert jnp.isfinite(x["video"]).all() and (x["video"][:, 1] != z["video"][:, 1]).all()


def test_the_last_step_returns_x0_itself():
    for method in samplers.METHODS:
        levels = samplers.scheduling_matrix(3, FRAMES, CONFIG)
        constant = lambda z, level, cond: jax.tree.map(lambda z: jnp.full_like(z, 0.3), z)  # noqa: E731
        x = run(constant, noise(2), levels, method, "x0")
        assert all((a == np.float32(0.3)).all() for a in x.values())


def test_levels_may_differ_by_example():
    mean, covariance = np.zeros((1, 12)), np.eye(12) * 0.5

    def denoise(z, level, cond):  # exact for unit-free independent data, any level per example
        def leaf(level, z):
            alpha, sigma = diffusion.alpha_sigma(diffusion.broadcast_to_latent(level, z))
            return 0.5 * alpha / (0.5 * alpha**2 + sigma**2) * z

        return jax.tree.map(leaf, level, z)

    z, given = noise(2), {"video": [True, False, False]}
    one = samplers.scheduling_matrix(6, FRAMES, CONFIG)
    two = samplers.scheduling_matrix(6, FRAMES, CONFIG, given)
    both = {name: jnp.stack([one[name], two[name]], 1) for name in one}  # [N+1, B, T]
    x = run(denoise, z, both, "dpmpp_2m", "x0")
    for i, levels in enumerate((one, two)):
        alone = run(exact(mean, covariance, "x0"), z, levels, "dpmpp_2m", "x0")
        for name in x:
            np.testing.assert_allclose(x[name][i], alone[name][i], atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Guidance


def conditional(z, level, cond):  # a prediction that depends on everything
    return {
        name: jnp.tanh(z[name] + 0.1 * diffusion.broadcast_to_latent(level[name], z[name]))
        * cond["text"].reshape(-1, *[1] * (z[name].ndim - 1))
        for name in z
    }


def test_guidance_mixes_the_two_predictions():
    z, cond, null = noise(4), {"text": jnp.array([1.0, 2.0, 3.0, 4.0])}, {"text": jnp.array([0.5])}
    level = {"video": jnp.linspace(-6, 6, 12).reshape(4, 3), "audio": jnp.zeros((4, 3))}
    with_text, without = (
        conditional(z, level, cond),
        conditional(z, level, {"text": jnp.full(4, 0.5)}),
    )
    calls = []

    def counted(*args):
        calls.append(args[0]["video"].shape)
        return conditional(*args)

    def guided(weight, **more):
        return samplers.guided(counted, samplers.text_guidance(weight, null), **more)(z, level, cond)

    for name in z:
        np.testing.assert_array_equal(guided(1.0)[name], with_text[name])
        np.testing.assert_allclose(guided(0.0)[name], without[name], atol=1e-6)
        expected = without[name] + 3 * (with_text[name] - without[name])
        np.testing.assert_allclose(guided(3.0)[name], expected, atol=1e-5)
    assert set(calls) == {(8, FRAMES, 1, 1, 2)}  # one call, of both

    inside = np.array((level["video"] >= -2) & (level["video"] <= 2))
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
    # Guiding p(z | y) over p(z) by w makes the score w s(z | y) + (1 - w) s(z): for Gaussians of
    # one covariance and means m and 0, at every level that of the mean w m.
    covariance = 0.5 * np.eye(12)

    def denoise(z, level, cond):
        shift = unflat(cond["mean"])
        alpha = {n: diffusion.alpha_sigma(diffusion.broadcast_to_latent(level[n], z[n]))[0] for n in z}
        centred = {n: z[n] - alpha[n] * shift[n] for n in z}
        x0 = exact(np.zeros((1, 12)), covariance, "x0")(centred, level, {})
        return {n: x0[n] + shift[n] for n in z}

    cond, null = {"mean": jnp.full((2000, 12), 0.4)}, {"mean": jnp.zeros((1, 12))}
    config = {**CONFIG, "target": "x0"}
    levels = samplers.scheduling_matrix(32, FRAMES, CONFIG)
    guided = samplers.guided(denoise, samplers.text_guidance(3.0, null))
    x = flat(samplers.sample(guided, jax.random.key(0), noise(2000), cond, levels, "dpmpp_2m", config))
    np.testing.assert_allclose(x.mean(0), 1.2, atol=0.1)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.1)


def by_example(mean, covariance):
    """The exact denoise_fn of a Gaussian where every example has levels of its own."""
    denoise = exact(mean, covariance)

    def one(z, level):
        return jax.tree.map(lambda x: x[0], denoise(*(jax.tree.map(lambda x: x[None], t) for t in (z, level)), {}))

    return lambda z, level, cond: jax.vmap(one)(z, level)


def untied(covariance, group):
    """The covariance without what ties the entries of `group` [12] to the others."""
    return np.where(group[:, None] == group, covariance, 0)


def assert_close(a, b, where):
    for name in a:
        mask = np.broadcast_to(np.repeat(where[name], a[name].shape[1] // FRAMES)[None], a[name].shape[:2])
        np.testing.assert_allclose(np.asarray(a[name])[mask], np.asarray(b[name])[mask], atol=0.02)


@pytest.mark.parametrize("fraction", [0.0, 0.4])
def test_history_guidance_withholds_what_is_given(fraction):
    # Of a Gaussian the prediction without the given frames is that of the others alone, and from
    # frames noised to t that of the whole with those frames at that level: both in closed form.
    mean, covariance = gaussian()
    given = {"video": np.array([True, False, False]), "audio": np.array([True, True, False])}
    made = {name: ~mask for name, mask in given.items()}
    z, other = noise(4), noise(4, 1)
    level = {name: jnp.where(mask, 12.0, 0.3) + jnp.zeros((4, FRAMES)) for name, mask in given.items()}
    tied = by_example(mean, covariance)
    group = np.asarray(
        flat({n: diffusion.broadcast_to_latent(jnp.array(given[n])[None], x) | (x < -99) for n, x in noise(1).items()})
    )[0]
    full, alone = tied(z, level, {}), by_example(mean, untied(covariance, group))(z, level, {})
    more = full
    if fraction:
        to = float(diffusion.log_snr_at(fraction, CONFIG))
        noisy = diffusion.add_noise(z, other, {n: jnp.full((4, FRAMES), to) for n in z})
        hazy = {
            n: jnp.where(diffusion.broadcast_to_latent(jnp.asarray(given[n])[None], z[n]), noisy[n], z[n]) for n in z
        }
        more = tied(hazy, {n: jnp.where(given[n], to, level[n]) for n in z}, {})
    terms = samplers.history_guidance(2.5, given, other, CONFIG, fraction)
    guided = samplers.guided(tied, terms)(z, level, {})
    assert_close(guided, {n: full[n] + 1.5 * (more[n] - alone[n]) for n in z}, made)
    none = samplers.guided(tied, samplers.history_guidance(1.0, given, other, CONFIG, fraction))(z, level, {})
    assert_close(none, full, made)
    assert np.abs(guided["video"] - full["video"]).max() > 0.1


def test_modality_guidance_withholds_the_other_modality():
    mean, covariance = gaussian()
    z, other, level = noise(4), noise(4, 1), {"video": jnp.full((4, FRAMES), 0.3), "audio": jnp.full((4, FRAMES), -0.5)}
    tied = by_example(mean, covariance)
    group = np.arange(12) < 2 * FRAMES  # video
    full, alone = tied(z, level, {}), by_example(mean, untied(covariance, group))(z, level, {})
    guided = samplers.guided(tied, samplers.modality_guidance(3.0, other, CONFIG))(z, level, {})
    everywhere = dict.fromkeys(z, np.ones(FRAMES, bool))
    assert_close(guided, {n: full[n] + 2 * (full[n] - alone[n]) for n in z}, everywhere)
    assert all(np.abs(guided[n] - full[n]).max() > 0.1 for n in z)


def test_all_guidance_is_one_call():
    mean, covariance = gaussian()
    calls, denoise = [], by_example(mean, covariance)

    def counted(z, level, cond):
        calls.append((len(z["video"]), cond["text"].shape))
        return denoise(z, level, cond)

    given = {"video": np.array([True, False, False]), "audio": np.zeros(FRAMES, bool)}
    terms = samplers.text_guidance(4.0, {"text": jnp.zeros((1, 2))})
    terms += samplers.history_guidance(2.0, given, noise(2, 1), CONFIG, 0.5)
    terms += samplers.modality_guidance(2.0, noise(2, 1), CONFIG)
    level = {name: jnp.zeros((2, FRAMES)) for name in MODALITIES}
    guided = samplers.guided(counted, terms)(noise(2), level, {"text": jnp.ones((2, 2))})
    assert calls == [(2 * 6, (2 * 6, 2))]  # as is; without text; history noised, none; no sound, no picture
    assert guided["video"].shape == (2, FRAMES, 1, 1, 2)


def test_frames_to_go_on_from_may_be_lightly_noised():
    given = {"video": np.array([True, False, False]), "audio": np.ones(FRAMES, bool)}
    levels = samplers.scheduling_matrix(4, FRAMES, CONFIG, given, context_noise=0.02)
    np.testing.assert_allclose(levels["video"][:, 0], diffusion.log_snr_at(0.02, CONFIG), rtol=1e-6)
    assert levels["video"][0, 0] < 12 and (levels["video"][-1, 1:] == 12).all()
    assert (levels["audio"] == 12).all()  # given whole: exact


# --------------------------------------------------------------------------------------------------
# The rest


def test_a_second_call_does_not_trace_again():
    mean, covariance = gaussian()
    traces = []

    @jax.jit
    def walk(scale, weight, key, z, cond, levels):
        traces.append(1)

        def denoise(z, level, cond):
            return jax.tree.map(lambda a: scale * a, exact(mean, covariance)(z, level, cond))

        guided = samplers.guided(denoise, samplers.text_guidance(weight, {"text": jnp.zeros((1, 2))}))
        return samplers.sample(guided, key, z, cond, levels, "dpmpp_2m", CONFIG)

    outputs = []
    for seed in range(2):
        cond = {"text": jnp.full((2, 2), float(seed))}
        given = {"video": np.arange(FRAMES) < seed}
        levels = samplers.scheduling_matrix(4, FRAMES, CONFIG, given)
        outputs.append(walk(1.0 + seed, 2.0 + seed, jax.random.key(seed), noise(2, seed), cond, levels))
    assert len(traces) == 1 and (outputs[0]["video"] != outputs[1]["video"]).all()


def test_ancestral_noise_depends_on_the_key_alone():
    mean, covariance = gaussian()
    levels = samplers.scheduling_matrix(4, FRAMES, CONFIG)

    def walker(method, **more):
        def walk(seed):
            args = jax.random.key(seed), noise(2), {}, levels, method, CONFIG
            return flat(samplers.sample(exact(mean, covariance), *args, **more))

        return jax.jit(walk)

    ddpm, ddim, full = walker("ddpm"), walker("ddim"), walker("ddim", eta=1.0)
    assert (ddpm(1) == ddpm(1)).all() and (ddpm(1) != ddpm(2)).all()
    assert (ddim(1) == ddim(2)).all()
    np.testing.assert_allclose(full(1), ddpm(1), atol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda z, levels: samplers.sample(None, None, z, {}, levels, "dpm2m", CONFIG), "dpmpp_2m"),
        (lambda z, levels: samplers.sample(None, None, z, {}, levels, "heun", CONFIG, 1.0), "eta"),
        (lambda z, levels: samplers.scheduling_matrix(0, 3, CONFIG), "steps"),
        (lambda z, levels: samplers.scheduling_matrix(4, 3, CONFIG, spacing="times"), "'time'"),
        (lambda z, levels: samplers.scheduling_matrix(4, 3, CONFIG, {"video": [True]}), "shape"),
    ],
)
def test_wrong_settings_are_one_clear_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call(noise(1), samplers.scheduling_matrix(2, FRAMES, CONFIG))
    assert "\n" not in str(error.value)
