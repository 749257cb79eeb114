"""The maths of diffusion: noise schedules, noising, prediction targets, loss weights, training patterns, the loss.

All are pure functions. `config` is config.denoiser.diffusion of a recipe (explained in configs/common.py).

The process is variance preserving. Its noise level is log_snr, the natural logarithm of the signal-to-noise ratio: a
higher log_snr means less noise. Time t is in [0, 1]: 0 is clean, 1 is pure noise.

    z_t = alpha x + sigma eps,    alpha^2 = sigmoid(log_snr),    sigma^2 = sigmoid(-log_snr)

Every latent frame of each modality has its own noise level:

    z_t     = {"video": [B, T, h, w, C], "audio": [B, K*T, D]}     K sound tokens per latent frame
    log_snr = {"video": [B, T],          "audio": [B, T]}

x and eps have the shapes of z_t.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax.errors import UserError, one_of

TARGETS = ("noise", "x0", "v")
WEIGHTINGS = ("uniform", "min_snr", "sigmoid")
PATTERNS = ("text", "per_modality", "per_frame", "foley", "audio", "image", "continue", "between", "pyramid")
MODALITIES = ("video", "audio")
NOISE_BINS = 4  # the metrics eps_mse_* split t in [0, 1] into this many equal bins


# ------------------------------------------------------------------------------------------------------- schedules


def log_snr_at(t, config):
    """Returns log_snr at times t in [0, 1], an array like t. It falls as t rises.

    'cosine' and 'sigmoid' use the part of their curve between log_snr_max and log_snr_min, stretched over [0, 1].
    'linear_beta' has the 1000 noise levels of DDPM, clipped to these bounds: step n = 0..999 is t = (n + 1) / 1000.
    'published' has the N noise levels config["table"], falling: level n = 0..N-1 is t from n / N to (n + 1) / N. It has
    no slope.

    The shift multiplies alpha / sigma of the whole curve, before it is limited to the bounds. A shift below 1 gives
    more noise. Use it for larger or more redundant latents (arXiv:2301.11093, section 3.1: 64 / d for images of d x d
    pixels). Raises UserError for wrong settings.
    """
    low, high = config["log_snr_min"], config["log_snr_max"]
    if not low < high:
        raise UserError(f"log_snr_min={low} must be below log_snr_max={high}")
    if not config["shift"] > 0:
        raise UserError(f"shift={config['shift']} must be positive")
    t = jnp.asarray(t) + 0.0  # integers become floats
    if config["schedule"] == PUBLISHED:
        if "table" not in config:
            raise UserError("schedule='published' is that of denoiser.source: name a folder there, or another schedule")
        table = jnp.asarray(config["table"], t.dtype)
        return table[jnp.minimum(jnp.floor(t * len(table)).astype(int), len(table) - 1)]
    schedule = SCHEDULES[one_of("schedule", config["schedule"], SCHEDULES)]
    return schedule(t, low, high, offset=2 * np.log(config["shift"]))


def _cosine(t, low, high, offset):
    """alpha = cos(angle), the angle from 0 to pi / 2: arXiv:2102.09672, eq. 17 with s = 0."""
    cut_clean = np.arctan(np.exp((offset - high) / 2))  # at this angle log_snr has its upper bound
    cut_noisy = np.arctan(np.exp((low - offset) / 2))  # at this distance from pi / 2 it has its lower bound
    width = np.pi / 2 - cut_clean - cut_noisy  # what is left; t runs over it
    angle = cut_clean + t * width
    complement = cut_noisy + (1 - t) * width  # pi / 2 - angle, but more accurate when it is small
    cosine, sine = jnp.sin(complement), jnp.sin(angle)
    return 2 * (jnp.log(cosine) - jnp.log(sine)) + offset  # log_snr = -2 log tan(angle)


def _sigmoid(t, low, high, offset):
    """alpha^2 is a sigmoid, scaled to span [0, 1]: arXiv:2301.10972, Algorithm 1, with start -3, end 3 and tau 1.

    u in [0, 1] is the time on the whole curve. alpha^2 is proportional to sigmoid(3 - 6 u) - sigmoid(-3), and sigma^2
    to sigmoid(3) - sigmoid(3 - 6 u). For any a and b, sigmoid(a) - sigmoid(b) = sinh((a - b) / 2) / (2 cosh(a / 2)
    cosh(b / 2)). In the ratio all cosh cancel: log_snr = log(sinh(3 (1 - u)) / sinh(3 u)).
    """

    def inverse(log_snr):  # u as a function of log_snr
        return np.arctanh(np.sinh(3) / (np.exp(log_snr) + np.cosh(3))) / 3

    cut_clean = inverse(high - offset)  # at this u log_snr has its upper bound
    # At this distance from u = 1 it has its lower bound. The curve is antisymmetric: 1 - inverse(x) = inverse(-x).
    cut_noisy = inverse(offset - low)
    width = 1 - cut_clean - cut_noisy  # what is left; t runs over it
    u = cut_clean + t * width
    complement = cut_noisy + (1 - t) * width  # 1 - u, but more accurate when it is small
    return jnp.log(jnp.sinh(3 * complement)) - jnp.log(jnp.sinh(3 * u)) + offset


def _linear_beta(t, low, high, offset):
    """The noise levels of DDPM, beta from 1e-4 to 0.02, with linear interpolation of log_snr: arXiv:2006.11239."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # arXiv:2006.11239, eq. 4
    table = np.log(alpha_bar) - np.log1p(-alpha_bar)
    # DDPM has no level for t = 0. Here it is log_snr_max. The offset is subtracted now, because the `return` line adds
    # it to every level.
    table = np.concatenate([[max(high - offset, table[0])], table])
    times = jnp.linspace(0, 1, len(table), dtype=t.dtype)
    return jnp.clip(jnp.interp(t, times, jnp.asarray(table, t.dtype)) + offset, low, high)


SCHEDULES = {"cosine": _cosine, "sigmoid": _sigmoid, "linear_beta": _linear_beta}
PUBLISHED = "published"  # the schedule of denoiser.source


# ---------------------------------------------------------------------------------- noising, targets, loss weights


def alpha_sigma(log_snr):
    """Returns (alpha, sigma), arrays like log_snr. Both are accurate for every log_snr; sqrt(1 - alpha^2) is not."""
    return jnp.exp(-jax.nn.softplus(-log_snr) / 2), jnp.exp(-jax.nn.softplus(log_snr) / 2)


def broadcast_to_latent(per_frame, latent):
    """Returns values per latent frame, [B or 1, T], as an array that broadcasts onto a latent [B, K*T, ...].

    K is 1 for a video.
    """
    chex.assert_rank(per_frame, 2)
    chex.assert_is_broadcastable(per_frame.shape[:1], latent.shape[:1])
    chex.assert_is_divisible(latent.shape[1], per_frame.shape[1])
    tokens = jnp.repeat(per_frame, latent.shape[1] // per_frame.shape[1], axis=1)  # [B, K*T]
    return tokens.reshape(tokens.shape + (1,) * (latent.ndim - 2))


def _by_modality(formula, log_snr, *latents):
    """formula(alpha, sigma, *arrays) for the arrays of each modality."""

    def leaf(log_snr, *arrays):
        return formula(*alpha_sigma(broadcast_to_latent(log_snr, arrays[0])), *arrays)

    return jax.tree.map(leaf, log_snr, *latents)


def add_noise(x, eps, log_snr):
    """Returns z_t = alpha x + sigma eps, latents like x: arXiv:2107.00630, eq. 1."""
    return _by_modality(lambda alpha, sigma, x, eps: alpha * x + sigma * eps, log_snr, x, eps)


def to_target(x, eps, log_snr, target):
    """Returns what a network should predict, in the shapes of x. v is defined in arXiv:2202.00512, appendix D."""
    formulas = {
        "noise": lambda alpha, sigma, x, eps: eps,
        "x0": lambda alpha, sigma, x, eps: x,
        "v": lambda alpha, sigma, x, eps: alpha * eps - sigma * x,
    }
    return _by_modality(formulas[one_of("target", target, TARGETS)], log_snr, x, eps)


def to_x0(prediction, z, log_snr, target):
    """Returns the clean latents that a prediction of `target` implies, in the shapes of z.

    With 'noise', the rounding error grows as exp(-log_snr / 2).
    """
    formulas = {
        "noise": lambda alpha, sigma, z, eps: (z - sigma * eps) / alpha,
        "x0": lambda alpha, sigma, z, x: x,
        "v": lambda alpha, sigma, z, v: alpha * z - sigma * v,  # arXiv:2202.00512, appendix D
    }
    return _by_modality(formulas[one_of("target", target, TARGETS)], log_snr, z, prediction)


def eps_error_factor(log_snr, target):
    """Returns the factor that turns a squared error of `target` into one of eps: 1 (noise), snr (x0) or alpha^2 (v).

    At fixed z, d eps = -(alpha / sigma) dx and dv = -dx / sigma. Hence |d eps|^2 = snr |dx|^2 = alpha^2 |dv|^2
    (arXiv:2202.00512, section 4).
    """
    return {"noise": jnp.ones_like, "x0": jnp.exp, "v": jax.nn.sigmoid}[target](log_snr)


def loss_weight(log_snr, slope, config):
    """Returns the weight on the squared error of config.target, an array like log_snr.

    The loss is a weighted error of eps, whatever the target: `eps_error_factor` turns an error of x0 or v into one of
    eps. The weightings are factors of |eps error|^2:
      'uniform'  1, the simple loss: arXiv:2006.11239, eq. 14
      'min_snr'  min(1, gamma / snr), which is min(snr, gamma) for x0: arXiv:2303.09556, section 3.4
      'sigmoid'  sigmoid(bias - log_snr) * slope, slope = -d log_snr / dt: arXiv:2303.00848, section 2, with the
                 sigmoid of arXiv:2410.19324. The slope makes the expected loss an integral over log_snr, the same for
                 every schedule. This is exact for every pattern but 'pyramid', whose t is not uniform.
    """
    name = one_of("weighting", config["weighting"], WEIGHTINGS)
    if name == "uniform":
        weight = jnp.ones_like(log_snr)
    elif name == "min_snr":
        weight = jnp.minimum(1, config["min_snr_gamma"] * jnp.exp(-log_snr))
    else:
        weight = jax.nn.sigmoid(config["sigmoid_bias"] - log_snr) * slope
    return weight * eps_error_factor(log_snr, config["target"])


# ---------------------------------- training patterns: the time t of each latent frame, and which frames are context


def stratified_uniform(key, batch, columns):
    """Returns uniform random numbers [batch, columns]; each column is a shifted even grid in random order.

    The even spacing lowers the variance of the loss: arXiv:2107.00630, appendix I.1.
    """
    offset_key, order_key = jax.random.split(key)
    even = (jnp.arange(batch)[:, None] + jax.random.uniform(offset_key, (columns,))) / batch
    return jax.random.permutation(order_key, even, axis=0, independent=True)


def _patterns(u, T):
    """{pattern: (t of video, t of audio, context of video, context of audio)}; all can be broadcast to [B, T].

    u: {name: uniform random numbers in [0, 1), [B, 1] or [B, T]}; 'other' is a second draw, independent of 't'.
    """
    t = u["t"]
    frame = jnp.arange(T)[None]
    last = T - 1
    beginning = frame < jnp.minimum(1 + jnp.floor(u["head"] * last), last)  # the first n frames, n from 1 to T-1

    # At least one frame at each end is context, and at least one frame between them is not.
    inner = max(T - 2, 0)
    head = jnp.minimum(1 + jnp.floor(u["head"] * inner), inner)
    tail = jnp.minimum(1 + jnp.floor(u["tail"] * (inner + 1 - head)), inner + 1 - head)
    ends = ((frame < head) | (frame >= T - tail)) & (inner > 0)

    # A pyramid: time rises from frame to frame, and is clipped to [0, 1]. Frames at 0 are clean: they are context.
    rise = u["other"]  # from the first frame to the last
    first = u["t"] * (1 + rise) - rise  # time of the first frame, in [-rise, 1]
    pyramid = jnp.clip(first + rise * frame / max(last, 1), 0, 1)
    return {
        "text": (t, t, False, False),
        "per_modality": (t, u["other"], False, False),  # UniDiffuser, arXiv:2303.06555
        "per_frame": (u["video"], u["audio"], False, False),  # Diffusion Forcing, arXiv:2407.01392
        "foley": (t, t, True, False),  # the video is given
        "audio": (t, t, False, True),  # the sound is given
        "image": (t, t, frame < min(1, last), False),  # the first video frame, unless it is the only frame
        "continue": (t, t, beginning, beginning),
        "between": (t, t, ends, ends),
        "pyramid": (pyramid, pyramid, pyramid <= 0, pyramid <= 0),  # each frame lags behind the one before
    }


def sample_times(key, shape, patterns):
    """Returns (t, context) of a batch: times {modality: float [B, T]}, and context masks {modality: bool [B, T]}.

    Each example follows one pattern. Times are 0 in context frames.

    patterns: {pattern: share}. The shares need not sum to 1. A pattern gets its share of the batch, rounded up or down.
    Raises UserError for wrong patterns.
    """
    for name in patterns:
        one_of("pattern", name, PATTERNS)
    names = [name for name in PATTERNS if name in patterns and patterns[name] != 0]
    shares = np.array([patterns[name] for name in names], float)
    if not len(names) or not (shares > 0).all():
        raise UserError(f"patterns={dict(patterns)}: every share must be at least 0, and one of them above 0")
    batch, T = shape
    widths = {"pattern": 1, "t": 1, "other": 1, "head": 1, "tail": 1, "video": T, "audio": T}
    uniforms = stratified_uniform(key, batch, sum(widths.values()))
    u = dict(zip(widths, jnp.split(uniforms, np.cumsum([*widths.values()])[:-1], axis=1)))  # [B, 1] or [B, T] each
    edges = jnp.asarray(np.cumsum(shares)[:-1] / shares.sum())
    chosen = jnp.searchsorted(edges, u["pattern"][:, 0], side="right")  # [B]
    drawn = _patterns(u, T)

    def of_chosen(i):  # entry i of the tuples from `_patterns`; each example takes it from its own pattern
        stack = jnp.stack([jnp.broadcast_to(drawn[name][i], shape) for name in names])  # [patterns, B, T]
        return stack[chosen, jnp.arange(batch)]  # [B, T]

    context = {"video": of_chosen(2), "audio": of_chosen(3)}
    t = {name: jnp.where(context[name], 0.0, of_chosen(i)) for i, name in enumerate(MODALITIES)}
    return t, context


# ------------------------------------------------------------------------------------------------------------ loss


def noise_like(key, z):
    """Returns standard normal noise, a dict like z. The noise of one modality does not depend on the others."""

    def draw(name, x):
        key_of_name = jax.random.fold_in(key, MODALITIES.index(name))
        # normal(key, x.shape) would give the same numbers, but XLA takes half a minute to compile it for a CPU.
        return jax.random.normal(key_of_name, (x.shape[0], x[0].size), x.dtype).reshape(x.shape)

    return {name: draw(name, x) for name, x in z.items()}


class Noised(NamedTuple):
    """A noised batch: what the network reads and what its error needs. Every field is a dict by modality."""

    t: dict  # time in [0, 1], [B, T]; 0 in context frames
    context: dict  # bool [B, T]: True in context frames
    log_snr: dict  # noise level, [B, T]; log_snr_max in context frames
    slope: dict  # -d log_snr / dt, [B, T]
    z_t: dict  # noised latents, like z; context frames are exactly clean
    target: dict  # what the network should predict, like z


def loss(denoise_fn, key, z, cond, config):
    """Returns the weighted denoising loss of clean latents z: (float32 scalar, metrics; see `weighted_error`).

    denoise_fn: (z_t, log_snr, cond) -> a prediction of config.target, a dict like z_t.
    Raises UserError for wrong settings.
    """
    noised = corrupt(key, z, config)
    prediction = denoise_fn(noised.z_t, noised.log_snr, cond)
    return weighted_error(prediction, noised, config)


def corrupt(key, z, config):
    """Returns the Noised batch of clean latents: the first half of `loss`, before the network."""
    time_key, noise_key = jax.random.split(key)
    x = {name: z[name].astype(jnp.promote_types(z[name].dtype, jnp.float32)) for name in z}

    # Noise levels
    t, context = sample_times(time_key, z["video"].shape[:2], config["patterns"])
    minus_one = jax.tree.map(lambda t: -jnp.ones_like(t), t)  # a tangent: with it the jvp gives -d log_snr / dt
    log_snr, slope = jax.jvp(lambda t: {name: log_snr_at(t[name], config) for name in t}, (t,), (minus_one,))
    log_snr = {name: jnp.where(context[name], config["log_snr_max"], log_snr[name]) for name in z}

    # Noising
    eps = noise_like(noise_key, x)
    z_t = add_noise(x, eps, log_snr)
    z_t = {name: jnp.where(broadcast_to_latent(context[name], x[name]), x[name], z_t[name]) for name in z}
    target = to_target(x, eps, log_snr, config["target"])
    return Noised(t, context, log_snr, slope, z_t, target)


def weighted_error(prediction, noised, config):
    """Returns the loss of a prediction: (float32 scalar, metrics). The second half of `loss`, after the network.

    The loss of a modality is the mean of the weighted squared error over all elements but the context frames. The
    total is the mean of the modalities, weighted by config.loss_weights. The metrics are `loss_<modality>` and
    `eps_mse_<modality>_<i>`, the mean squared error of eps in the i-th of NOISE_BINS equal bins of t. It is nan if no
    generated frame is in the bin.
    """
    chex.assert_trees_all_equal_shapes(prediction, noised.target)  # other shapes would broadcast without an error
    total, total_weight, metrics = 0.0, 0.0, {}
    for name, target in noised.target.items():
        log_snr, generated = noised.log_snr[name], ~noised.context[name]  # [B, T]
        squares = jnp.square(prediction[name].astype(target.dtype) - target)
        error = squares.reshape(*log_snr.shape, -1).mean(-1)  # [B, T], a mean over the K tokens of a frame too
        slope = jnp.where(generated, noised.slope[name], 0)  # context frames have t = 0: the slope may be huge there
        weight = loss_weight(log_snr, slope, config)
        mean = jnp.where(generated, weight * error, 0).sum() / jnp.maximum(generated.sum(), 1)
        metrics[f"loss_{name}"] = mean
        total += config["loss_weights"][name] * mean
        total_weight += config["loss_weights"][name]

        eps_mse = jax.lax.stop_gradient(eps_error_factor(log_snr, config["target"]) * error)
        bins = jnp.clip(jnp.floor(noised.t[name] * NOISE_BINS), 0, NOISE_BINS - 1)
        for i in range(NOISE_BINS):
            in_bin = generated & (bins == i)
            metrics[f"eps_mse_{name}_{i}"] = jnp.where(in_bin, eps_mse, 0).sum() / in_bin.sum()
    return total / total_weight, metrics
