"""A Gaussian over clips with sound. Its best denoiser and its conditional distributions have closed forms."""

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax import diffusion

FRAMES = 3  # latent frames
TOKENS = 2  # sound tokens per latent frame


def flat(z):
    """Returns clips as vectors [B, 12]: six numbers of video, then six of audio."""
    return jnp.concatenate([z[name].reshape(len(z[name]), -1) for name in ("video", "audio")], 1)


def unflat(x):
    """Returns vectors [B, 12] as clips: the inverse of `flat`."""
    return {
        "video": x[:, : 2 * FRAMES].reshape(-1, FRAMES, 1, 1, 2),
        "audio": x[:, 2 * FRAMES :].reshape(-1, TOKENS * FRAMES, 1),
    }


def prediction_of(x0, z, log_snr, target):
    """Returns the prediction of `target` that implies the clean latents x0 in z."""

    def eps(log_snr, z, x0):
        alpha, sigma = diffusion.alpha_sigma(diffusion.broadcast_to_latent(log_snr, z))
        return (z - alpha * x0) / sigma

    return diffusion.to_target(x0, jax.tree.map(eps, log_snr, z, x0), log_snr, target)


def exact(mean, covariance, target="v"):
    """Returns the best denoise_fn for a mixture of M Gaussians of equal weight, where all examples have equal levels.

    mean: [M, 12].
    covariance: [12, 12], the same for all.
    target: what denoise_fn predicts.
    """

    def to_elements(log_snr, z):  # [B, T] -> one number per element of the first example, [1, ...]
        return jnp.broadcast_to(diffusion.broadcast_to_latent(log_snr[:1], z), (1, *z.shape[1:]))

    def denoise(z, log_snr, cond):
        alpha, sigma = diffusion.alpha_sigma(flat(jax.tree.map(to_elements, log_snr, z))[0])  # [12]
        noisy = alpha[:, None] * covariance * alpha + jnp.diag(sigma**2)
        off = flat(z)[:, None] - alpha * mean  # [B, M, 12]
        solved = off @ jnp.linalg.inv(noisy)
        share = jax.nn.softmax(-(off * solved).sum(-1) / 2)  # [B, M]
        each = mean + (solved * alpha) @ covariance
        x0 = unflat((share[..., None] * each).sum(1))
        return prediction_of(x0, z, log_snr, target)

    return denoise


def gaussian(seed=0):
    """Returns a mean [1, 12] and a covariance [12, 12]. Frames and modalities depend on each other."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(12, 12)) / np.sqrt(12)
    return rng.normal(size=(1, 12)), factor @ factor.T + 0.1 * np.eye(12)


def conditioned(mean, covariance, x, made):
    """Returns the mean and covariance of some coordinates of a Gaussian, if the others are known.

    mean, covariance: of the Gaussian, [1, 12] and [12, 12].
    x: [12], with the known coordinates.
    made: numbers of the coordinates that are not known.
    """
    known = np.setdiff1d(np.arange(len(x)), made)
    gain = covariance[np.ix_(made, known)] @ np.linalg.inv(covariance[np.ix_(known, known)])
    rest = covariance[np.ix_(made, made)] - gain @ covariance[np.ix_(known, made)]
    return mean[0, made] + gain @ (x[known] - mean[0, known]), rest
