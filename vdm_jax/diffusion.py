"""Diffusion maths: noise schedules, noising, prediction targets, loss weights, patterns, losses.

Pure functions of arrays, explicit keys and a config mapping; no network, no state. The process is
variance preserving,

    z = alpha x + sigma eps,    alpha^2 = sigmoid(log_snr),    sigma^2 = sigmoid(-log_snr),

and the level log_snr = log(alpha^2 / sigma^2) (natural log) is an array: one number per latent
frame and modality.

    z       = {"video": [B, T, h, w, C], "audio": [B, K*T, D]}     x, eps, predictions alike
    log_snr = {"video": [B, T],          "audio": [B, T]}

Every function of a latent takes such trees or single arrays. Time t is in [0, 1]: 0 is clean, 1 is
noise. The config (a dict or ConfigDict) holds: schedule, log_snr_min, log_snr_max, shift, target,
weighting, min_snr_gamma, sigmoid_bias, patterns (name -> share), loss_weights (modality -> weight).
"""

import difflib
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax.errors import UserError

SCHEDULES = ("cosine", "sigmoid", "linear_beta")
TARGETS = ("noise", "x0", "v")
WEIGHTINGS = ("uniform", "min_snr", "sigmoid")
MODALITIES = ("video", "audio")
NOISE_BINS = 4  # metrics: quarters of t in [0, 1]


def one_of(what, name, known):
    """Return `name` if it is in `known`; else raise a UserError that names the nearest one."""
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
        raise UserError(f"no {what} {name!r}: did you mean {near!r}? (known: {', '.join(known)})")
    return name


# --------------------------------------------------------------------------------------------------
# Schedules: t in [0, 1] -> log_snr


def log_snr(t, config):
    """Level at time t: same shape, decreasing, from log_snr_max at t = 0 to log_snr_min at t = 1.

    `shift` (1 = none) multiplies alpha / sigma: below 1 there is more noise everywhere, which
    larger or more redundant latents need (64 / resolution in arXiv:2301.11093, section 3.1).
    'linear_beta' is DDPM's 1000 levels, timestep n = 0..999 exactly at t = (n + 1) / 1000, as long
    as shift is 1 and the range holds them (-10.12 to 9.21); it ends there, not at log_snr_min.
    """
    low, high = config["log_snr_min"], config["log_snr_max"]
    if not low < high:
        raise UserError(f"log_snr_min={low} must be below log_snr_max={high}")
    if not config["shift"] > 0:
        raise UserError(f"shift={config['shift']} must be positive")
    offset = 2 * np.log(config["shift"])  # log_snr + 2 log(64 / d): arXiv:2301.11093, section 3.1
    name = one_of("schedule", config["schedule"], SCHEDULES)
    t = jnp.asarray(t) + 0.0  # float also when given as int
    # cosine and sigmoid reach infinity at t = 0 and 1, so t is mapped onto the part inside the
    # bounds, without a kink: from the time `start` of the upper one to `rest` before the end at the
    # lower one. What is left, 1 - t, is summed from its own end: in float32 a difference of nearly
    # equal numbers would lose the noisy levels.
    if name == "cosine":
        # alpha = cos(angle): arXiv:2102.09672, eq. 17 (s = 0); log_snr = -2 log tan(angle)
        start, rest = np.arctan(np.exp((offset - high) / 2)), np.arctan(np.exp((low - offset) / 2))
        width = np.pi / 2 - start - rest
        sines = jnp.sin(rest + (1 - t) * width), jnp.sin(start + t * width)
        return 2 * (jnp.log(sines[0]) - jnp.log(sines[1])) + offset
    if name == "sigmoid":
        # arXiv:2301.10972, Algorithm 1 (start -3, end 3, tau 1): alpha^2 is a sigmoid of t scaled
        # to span [0, 1]; as sigmoid(a) - sigmoid(b) = sinh((a - b)/2) / (2 cosh(a/2) cosh(b/2)),
        # log_snr = log(sinh(3 (1 - t)) / sinh(3 t)), met by t = arctanh(...) / 3 at a bound.
        def bound(level):
            return np.arctanh(np.sinh(3) / (np.exp(level) + np.cosh(3))) / 3

        start, rest = bound(high - offset), bound(offset - low)
        width = 1 - start - rest
        sines = jnp.sinh(3 * (rest + (1 - t) * width)), jnp.sinh(3 * (start + t * width))
        return jnp.log(sines[0]) - jnp.log(sines[1]) + offset
    table = _linear_beta_table()
    table = np.concatenate([[max(high - offset, table[0])], table])  # t = 0 is clean
    grid = jnp.linspace(0, 1, len(table), dtype=t.dtype)
    return jnp.clip(jnp.interp(t, grid, jnp.asarray(table, t.dtype)) + offset, low, high)


@cache
def _linear_beta_table():
    """[1000] log_snr of DDPM: beta linear from 1e-4 to 0.02, arXiv:2006.11239, section 4."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # arXiv:2006.11239, eq. 4
    return np.log(alpha_bar) - np.log1p(-alpha_bar)


# --------------------------------------------------------------------------------------------------
# Noising and prediction targets


def alpha_sigma(level):
    """(alpha, sigma) of a level, exact to rounding at both extremes, where 1 - alpha^2 is not."""
    return jnp.exp(-jax.nn.softplus(-level) / 2), jnp.exp(-jax.nn.softplus(level) / 2)


def broadcast_to_latent(level, leaf):
    """[B, T] per-frame values -> [B, K*T, 1, ...], to broadcast onto a leaf [B, K*T, ...]."""
    frames, length = level.shape[1], leaf.shape[1]
    if length % frames or level.shape[0] not in (1, leaf.shape[0]):
        raise ValueError(f"levels {level.shape} for {leaf.shape}: want [B, T] for [B, K*T, ...]")
    level = jnp.repeat(level, length // frames, axis=1)  # [B, K*T]
    return level.reshape(level.shape + (1,) * (leaf.ndim - 2))


def add_noise(x, eps, level):
    """z = alpha x + sigma eps: arXiv:2107.00630, eq. 1. x, eps: latents; level: [B, T] each."""

    def leaf(level, x, eps):
        alpha, sigma = alpha_sigma(broadcast_to_latent(level, x))
        return alpha * x + sigma * eps

    return jax.tree.map(leaf, level, x, eps)


def to_target(x, eps, level, target):
    """What a network of this `target` is to predict; v as in arXiv:2202.00512, appendix D."""
    one_of("target", target, TARGETS)

    def leaf(level, x, eps):
        alpha, sigma = alpha_sigma(broadcast_to_latent(level, x))
        return {"noise": eps, "x0": x, "v": alpha * eps - sigma * x}[target]

    return jax.tree.map(leaf, level, x, eps)


def to_x0(prediction, z, level, target):
    """x as a prediction implies it. From noise, rounding grows as exp(-log_snr / 2)."""
    one_of("target", target, TARGETS)

    def leaf(level, prediction, z):
        alpha, sigma = alpha_sigma(broadcast_to_latent(level, z))
        return {
            "x0": prediction,
            "noise": (z - sigma * prediction) / alpha,
            "v": alpha * z - sigma * prediction,  # arXiv:2202.00512, appendix D
        }[target]

    return jax.tree.map(leaf, level, prediction, z)


def to_eps(prediction, z, level, target):
    """eps as a prediction implies it. From x0, rounding grows as exp(log_snr / 2)."""
    one_of("target", target, TARGETS)

    def leaf(level, prediction, z):
        alpha, sigma = alpha_sigma(broadcast_to_latent(level, z))
        return {
            "x0": (z - alpha * prediction) / sigma,
            "noise": prediction,
            "v": sigma * z + alpha * prediction,  # arXiv:2202.00512, appendix D
        }[target]

    return jax.tree.map(leaf, level, prediction, z)


# --------------------------------------------------------------------------------------------------
# Loss weights


def eps_error(level, target):
    """Factor from a squared error of `target` to that of eps: 1 (noise), snr (x0), alpha^2 (v).

    At fixed z, d eps = -(alpha / sigma) dx and dv = -dx / sigma, hence
    |d eps|^2 = snr |dx|^2 = alpha^2 |dv|^2 (arXiv:2202.00512, section 4).
    """
    one_of("target", target, TARGETS)
    return {"noise": jnp.ones_like, "x0": jnp.exp, "v": jax.nn.sigmoid}[target](level)


def loss_weight(level, slope, config):
    """Weight on the squared error of config.target; the same loss of x0 whatever the target.

    level: log_snr; slope: -d log_snr / dt >= 0, same shape; t is taken as uniform. The weights,
    as said of |eps error|^2 (times snr for |x0 error|^2, times alpha^2 for |v error|^2):
      'uniform'  1, the simple loss: arXiv:2006.11239, eq. 14
      'min_snr'  min(1, gamma / snr), so min(snr, gamma) of x0: arXiv:2303.09556, section 3.4
      'sigmoid'  sigmoid(b - log_snr) * slope: the weighted loss of arXiv:2303.00848, section 2, an
                 integral over log_snr that no schedule changes, with the w of arXiv:2410.19324
    """
    name = one_of("weighting", config["weighting"], WEIGHTINGS)
    if name == "uniform":
        weight = jnp.ones_like(level)
    elif name == "min_snr":
        weight = jnp.minimum(1, config["min_snr_gamma"] * jnp.exp(-level))
    else:
        weight = jax.nn.sigmoid(config["sigmoid_bias"] - level) * slope
    return weight * eps_error(level, config["target"])


# --------------------------------------------------------------------------------------------------
# Training patterns: which frames of which modality are how noisy


def _strata(key, batch, columns):
    """[batch, columns] uniforms; down each column they are evenly spaced, in random order.

    The spacing lowers the loss's variance: arXiv:2107.00630, appendix I.1.
    """
    offset_key, order_key = jax.random.split(key)
    even = (jnp.arange(batch)[:, None] + jax.random.uniform(offset_key, (columns,))) / batch
    return jax.random.permutation(order_key, even, axis=0, independent=True)


def _text(u, frames):
    return u["one"], u["one"], False, False


def _per_modality(u, frames):  # UniDiffuser, arXiv:2303.06555
    return u["one"], u["other"], False, False


def _per_frame(u, frames):  # Diffusion Forcing, arXiv:2407.01392
    return u["video"], u["audio"], False, False


def _foley(u, frames):
    return u["one"], u["one"], True, False


def _audio(u, frames):
    return u["one"], u["one"], False, True


def _image(u, frames):  # the first video frame only: a still to animate, without sound
    return u["one"], u["one"], frames < min(1, frames.shape[1] - 1), False


def _continue(u, frames):  # a prefix of 1 .. T-1 frames of both modalities
    last = frames.shape[1] - 1
    given = frames < jnp.minimum(1 + jnp.floor(u["head"] * last), last)
    return u["one"], u["one"], given, given


def _between(u, frames):  # a prefix and a suffix, at least one frame each and one left between
    inner = max(frames.shape[1] - 2, 0)
    head = jnp.minimum(1 + jnp.floor(u["head"] * inner), inner)
    tail = jnp.minimum(1 + jnp.floor(u["tail"] * (inner + 1 - head)), inner + 1 - head)
    given = ((frames < head) | (frames >= frames.shape[1] - tail)) & (inner > 0)
    return u["one"], u["one"], given, given


def _rollout(u, frames):  # t rises with the frame, at a random slope, and is clipped; t = 0: given
    rise = u["other"]
    t = -rise + u["one"] * (1 + rise) + rise * frames / max(frames.shape[1] - 1, 1)
    return jnp.clip(t, 0, 1), jnp.clip(t, 0, 1), t <= 0, t <= 0


PATTERNS = {
    "text": _text,
    "per_modality": _per_modality,
    "per_frame": _per_frame,
    "foley": _foley,
    "audio": _audio,
    "image": _image,
    "continue": _continue,
    "between": _between,
    "rollout": _rollout,
}


def sample_levels(key, shape, patterns):
    """Draw times for a batch: each example gets one of the patterns, in proportion to its share.

    shape: (B, T), static. patterns: {name of PATTERNS: share >= 0}, of any sum; counts within a
    batch are as even as they can be. Returns (t, given): trees {"video", "audio"} of [B, T], float
    in [0, 1] and bool. A given frame is an input: t = 0, and no loss. Raises UserError for an
    unknown pattern or senseless shares.
    """
    for name in patterns:
        one_of("pattern", name, tuple(PATTERNS))
    names = [name for name in PATTERNS if name in patterns and patterns[name] != 0]
    shares = np.array([patterns[name] for name in names], float)
    if not len(names) or not (shares > 0).all():
        raise UserError(f"patterns={dict(patterns)}: shares must be at least 0, one of them more")
    batch, T = shape
    widths = {"pattern": 1, "one": 1, "other": 1, "head": 1, "tail": 1, "video": T, "audio": T}
    uniforms = jnp.split(_strata(key, batch, 5 + 2 * T), np.cumsum([*widths.values()])[:-1], axis=1)
    u = dict(zip(widths, uniforms))  # [B, 1] or [B, T] each
    # Per pattern: times of video and of audio, given frames of video and of audio.
    drawn = [PATTERNS[name](u, jnp.arange(T)[None]) for name in names]
    edges = jnp.asarray(np.cumsum(shares)[:-1] / shares.sum())
    chosen = jnp.searchsorted(edges, u["pattern"][:, 0], side="right")  # [B]

    def pick(i):
        stack = jnp.stack([jnp.broadcast_to(one[i], shape) for one in drawn])  # [P, B, T]
        return stack[chosen, jnp.arange(batch)]  # [B, T]

    given = {"video": pick(2), "audio": pick(3)}
    return {name: jnp.where(given[name], 0.0, pick(i)) for i, name in enumerate(MODALITIES)}, given


# --------------------------------------------------------------------------------------------------
# Loss


def noise_like(key, z):
    """Standard normal noise, a tree like z; a modality's noise does not depend on the others."""

    def draw(name, x):
        key_of_name = jax.random.fold_in(key, MODALITIES.index(name))
        return jax.random.normal(key_of_name, (x.shape[0], x[0].size), x.dtype).reshape(x.shape)

    # Drawn flat: the same numbers, and XLA takes half a minute to compile a five-axis draw for a CPU.
    return {name: draw(name, x) for name, x in z.items()}


def loss(denoise_fn, key, z, cond, config, *others):
    """Weighted denoising loss of a batch of clean latents: `objective`, below.

    denoise_fn(z_t, log_snr, cond) -> prediction of config.target, the tree of z_t; its parameters
    are closed over. z: {"video": [B, T, h, w, C], "audio": [B, K*T, D]}, or the video alone. cond:
    passed on untouched; beside others a tree of arrays [B, ...], like theirs. others: objectives such
    as `hard_negative_objective`'s, each of rows of its own, whose losses are added. Returns (scalar
    float32, metrics of all).

    The network is called once, for all of them: a program with two calls takes twice as long to compile.
    """
    inputs, measures = zip(objective(key, z, cond, config), *others)
    if not others:
        return measures[0](denoise_fn(*inputs[0]))
    rows = [one[0]["video"].shape[0] for one in inputs]
    groups = math.gcd(*rows)  # dealt out by turns, so that on a mesh each device keeps its own
    ends = np.cumsum([n // groups for n in rows])

    def join(*parts):
        parts = [x.reshape(groups, -1, *x.shape[1:]) for x in parts]
        return jnp.concatenate(parts, 1).reshape(-1, *parts[0].shape[2:])

    def part(x, start, end):
        return x.reshape(groups, ends[-1], *x.shape[1:])[:, start:end].reshape(-1, *x.shape[1:])

    prediction = denoise_fn(*jax.tree.map(join, *inputs))
    total, metrics = 0.0, {}
    for measure, start, end in zip(measures, (0, *ends), ends):
        value, found = measure(jax.tree.map(lambda x, span=(start, end): part(x, *span), prediction))
        total, metrics = total + value, metrics | found
    return total, metrics


def objective(key, z, cond, config):
    """What the denoiser is asked of a batch of clean latents, and the loss of its answer: (inputs, measure).

    z: {"video": [B, T, h, w, C], "audio": [B, K*T, D]}, or the video alone. inputs: (z_t, log_snr,
    cond). measure(prediction of config.target) -> (scalar float32, metrics). Given frames are shown
    exactly clean, at log_snr_max, and take no part in the loss: the mean over all other elements of
    each modality, then the mean of the modalities weighed by config.loss_weights. Metrics:
    `loss_<modality>`, and `eps_mse_<modality>_<i>`, the error of eps for t in [i/4, (i+1)/4), nan
    where nothing fell.
    """
    level_key, noise_key = jax.random.split(key)
    t, given = sample_levels(level_key, z["video"].shape[:2], config["patterns"])
    t, given = {name: t[name] for name in z}, {name: given[name] for name in z}

    def leveled(t):
        return {name: log_snr(t[name], config) for name in z}

    level, slope = jax.jvp(leveled, (t,), (jax.tree.map(lambda t: -jnp.ones_like(t), t),))
    level = {name: jnp.where(given[name], config["log_snr_max"], level[name]) for name in z}

    x = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), z)
    eps = noise_like(noise_key, x)
    z_t = add_noise(x, eps, level)
    z_t = {name: jnp.where(broadcast_to_latent(given[name], x[name]), x[name], z_t[name]) for name in z}
    target = to_target(x, eps, level, config["target"])

    def measure(prediction):
        total, weights, metrics = 0.0, 0.0, {}
        for name in z:
            error = jnp.square(prediction[name].astype(x[name].dtype) - target[name])
            error = error.reshape(*t[name].shape, -1).mean(-1)  # [B, T]: also over an audio frame's K
            made = ~given[name]
            weight = loss_weight(level[name], jnp.where(made, slope[name], 0), config)
            mean = jnp.where(made, weight * error, 0).sum() / jnp.maximum(made.sum(), 1)
            metrics[f"loss_{name}"] = mean
            total += config["loss_weights"][name] * mean
            weights += config["loss_weights"][name]
            eps_mse = jax.lax.stop_gradient(eps_error(level[name], config["target"]) * error)
            bins = jnp.clip(jnp.floor(t[name] * NOISE_BINS), 0, NOISE_BINS - 1)
            for i in range(NOISE_BINS):
                here = made & (bins == i)
                metrics[f"eps_mse_{name}_{i}"] = jnp.where(here, eps_mse, 0).sum() / here.sum()
        return total / weights, metrics

    return (z_t, level, cond), measure


def hard_negative_objective(key, z, right, wrong, target, config):
    """Has the denoiser tell a clip's caption from one that is nearly right, as a classifier of the two would.

    The squared error of eps by a caption stands for -log p(clip | caption), as in arXiv:2303.16203, section 3; here
    that of the picture, summed, at one level a clip, even over config.log_snr, with the same noise for both. With
    logit = error by the wrong caption - error by the right one, the loss is

        weight * mean of softplus(-logit)  +  anchor * mean of the right one's error.

    z: latents as for `objective`, of P clips; right, wrong: conditions of P rows; rows where they are the same count
    for the anchor alone. target: what the denoiser predicts. Returns (inputs, measure) as there, of 2 P rows: each clip
    by the right caption, then by the wrong one. Metrics: `hard_negative_loss`, the mean of softplus(-logit), and
    `hard_negative_accuracy`, the share with logit > 0; nan where no caption has a hard negative.
    """
    level_key, noise_key = jax.random.split(key)
    rows, frames = z["video"].shape[:2]
    low, high = config["log_snr"]
    one = low + (high - low) * _strata(level_key, rows, 1)  # [P, 1]
    level = {name: jnp.broadcast_to(one, (rows, frames)) for name in z}

    x = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), z)
    eps = noise_like(noise_key, x)
    z_t, wanted = add_noise(x, eps, level), to_target(x, eps, level, target)["video"]

    def both(a, b):  # [2 P, ...]: one after the other, so that on a mesh each device keeps its own
        return jnp.stack([a, b], 1).reshape(-1, *a.shape[1:])

    def measure(prediction):
        prediction = prediction["video"].reshape(rows, 2, -1).astype(wanted.dtype)
        squares = jnp.square(prediction - wanted.reshape(rows, 1, -1)).sum(2)
        by_right, by_wrong = (eps_error(one, target) * squares).T
        pairs = zip(jax.tree.leaves(right), jax.tree.leaves(wrong))
        differ = [jnp.any((a != b).reshape(rows, -1), 1) for a, b in pairs]
        differ = jnp.any(jnp.stack(differ), 0)
        logit = by_wrong - by_right
        told = jnp.where(differ, jax.nn.softplus(-logit), 0).sum()
        total = config["weight"] * told / jnp.maximum(differ.sum(), 1) + config["anchor"] * by_right.mean()
        share = (differ & (logit > 0)).sum() / differ.sum()
        return total, {"hard_negative_loss": told / differ.sum(), "hard_negative_accuracy": share}

    return (*jax.tree.map(lambda x: both(x, x), (z_t, level)), jax.tree.map(both, right, wrong)), measure
