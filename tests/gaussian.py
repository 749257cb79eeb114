"""A Gaussian of clips with sound, whose best denoiser and whose conditionals are known."""

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax import diffusion

FRAMES, TOKENS = 3, 2  # latent frames; audio tokens a frame


def flat(z):  # [B, 12]: all of a clip as one vector
    return jnp.concatenate([z[name].reshape(len(z[name]), -1) for name in ("video", "audio")], 1)


def unflat(x):
    return {
        "video": x[:, : 2 * FRAMES].reshape(-1, FRAMES, 1, 1, 2),
        "audio": x[:, 2 * FRAMES :].reshape(-1, TOKENS * FRAMES, 1),
    }


def exact(mean, covariance, target="v"):
    """The best denoise_fn for equally likely Gaussians: mean [M, 12], covariance [12, 12]."""

    def denoise(z, level, cond):
        spread = {n: jnp.broadcast_to(diffusion.spread(level[n][:1], z[n]), (1, *z[n].shape[1:])) for n in z}
        alpha, sigma = diffusion.alpha_sigma(flat(spread)[0])  # [12], one for all examples
        noisy = alpha[:, None] * covariance * alpha + jnp.diag(sigma**2)
        off = flat(z)[:, None] - alpha * mean  # [B, M, 12]
        solved = off @ jnp.linalg.inv(noisy)
        share = jax.nn.softmax(-(off * solved).sum(-1) / 2)  # [B, M]
        each = mean + (solved * alpha) @ covariance
        x0 = unflat((share[..., None] * each).sum(1))
        return diffusion.to_target(x0, diffusion.to_eps(x0, z, level, "x0"), level, target)

    return denoise


def gaussian(seed=0):
    """A mean [1, 12] and covariance [12, 12] that tie frames and modalities to each other."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(12, 12)) / np.sqrt(12)
    return rng.normal(size=(1, 12)), factor @ factor.T + 0.1 * np.eye(12)


def conditioned(mean, covariance, x, made):
    """Mean and covariance of coordinates `made` of a Gaussian, the others being those of `x`."""
    known = np.setdiff1d(np.arange(len(x)), made)
    gain = covariance[np.ix_(made, known)] @ np.linalg.inv(covariance[np.ix_(known, known)])
    rest = covariance[np.ix_(made, made)] - gain @ covariance[np.ix_(known, made)]
    return mean[0, made] + gain @ (x[known] - mean[0, known]), rest
