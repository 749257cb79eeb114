"""Our schedule and samplers against the schedulers of diffusers, on the same inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdm_jax import diffusion, samplers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STEPS = 20
NAMES = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}
CONFIG = dict(schedule="linear_beta", log_snr_min=-12.0, log_snr_max=12.0, shift=1.0)


# Both sides use this function as their network.
def denoise(z, log_snr, cond):
    return jax.tree.map(lambda z: 0.8 * jnp.tanh(z) + 0.1, z)


def prediction(z):
    return 0.8 * torch.tanh(z) + 0.1


def walk_ours(timesteps, target, method, **more):
    """Returns z_T and z_0 of our sampler, with the noise levels of the timesteps of diffusers."""
    levels = diffusion.log_snr_at((jnp.asarray(timesteps) + 1) / 1000, CONFIG)
    levels = jnp.append(levels, CONFIG["log_snr_max"])[:, None]  # [N+1, 1]
    levels = {"video": levels, "audio": levels}
    keys = jax.random.split(jax.random.key(0))
    z_T = {
        "video": jax.random.normal(keys[0], (2, 1, 4, 4, 3)),
        "audio": jax.random.normal(keys[1], (2, 3, 5)),
    }

    config, key = {**CONFIG, "target": target}, jax.random.key(1)
    return z_T, samplers.sample(denoise, key, z_T, {}, levels, method, config, **more)


def walk_theirs(scheduler, z, **noise):
    z = torch.tensor(np.array(z))
    scheduler.set_timesteps(STEPS)
    for i, timestep in enumerate(scheduler.timesteps):
        step_noise = {name: torch.tensor(np.array(n[i])) for name, n in noise.items()}
        eta = {"eta": 1.0} if noise else {}
        z = scheduler.step(prediction(z), timestep, z, **eta, **step_noise).prev_sample
    return z.numpy()


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_linear_beta_alphas(scheduler):
    theirs = getattr(diffusers, scheduler)().alphas_cumprod.numpy()
    log_snr = diffusion.log_snr_at(jnp.arange(1, 1001) / 1000, CONFIG)
    alpha, sigma = diffusion.alpha_sigma(log_snr)
    np.testing.assert_allclose(alpha**2, theirs, atol=1e-6)
    np.testing.assert_allclose(alpha, np.sqrt(theirs), atol=1e-6)
    np.testing.assert_allclose(sigma, np.sqrt(1 - theirs.astype(np.float64)), atol=2e-6)


@pytest.mark.parametrize("target", NAMES)
def test_ddim(target):
    scheduler = diffusers.DDIMScheduler(prediction_type=NAMES[target], clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    z_T, z_0 = walk_ours(scheduler.timesteps.numpy(), target, "ddim")
    for name in z_T:
        theirs = walk_theirs(scheduler, z_T[name])
        np.testing.assert_allclose(z_0[name], theirs, atol=3e-5 * np.abs(theirs).max())


def test_ddim_step():
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    config, key = {**CONFIG, "target": "noise"}, jax.random.key(0)
    z = jax.random.normal(key, (2, 1, 8))
    for timestep in (900, 500, 100):  # each step ends at the timestep - 100
        z_torch = torch.tensor(np.array(z))
        theirs = scheduler.step(prediction(z_torch), timestep, z_torch).prev_sample
        ends = jnp.array([timestep + 1, timestep - 99]) / 1000
        levels = {"video": diffusion.log_snr_at(ends, CONFIG)[:, None]}
        ours = samplers.sample(denoise, key, {"video": z}, {}, levels, "ddim", config)
        np.testing.assert_allclose(ours["video"], theirs, atol=2e-5)


def test_ancestral_with_the_same_noise():
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    z_T, z_0 = walk_ours(scheduler.timesteps.numpy(), "v", "ddpm")
    keys = jax.random.split(jax.random.key(1), STEPS)
    noise = jax.vmap(lambda key: diffusion.noise_like(key, z_T))(keys)
    for name in z_T:
        theirs = walk_theirs(scheduler, z_T[name], variance_noise=noise[name])
        np.testing.assert_allclose(z_0[name], theirs, atol=3e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("target", NAMES)
def test_dpmpp_2m(target):
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type=NAMES[target], timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    z_T, z_0 = walk_ours(scheduler.timesteps.numpy(), target, "dpmpp_2m")
    for name in z_T:
        theirs = walk_theirs(scheduler, z_T[name])
        np.testing.assert_allclose(z_0[name], theirs, atol=1e-4 * np.abs(theirs).max())
