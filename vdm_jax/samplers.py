"""Samplers over schedule matrices, and guidance as a closure. Pure functions; no network, no state.

A task is a matrix of levels: which log_snr each latent frame of each modality has after each step.

    levels = {"video": [N+1, T], "audio": [N+1, T]}     row 0: as z_T is; last row: as z_0 shall be

There is one loop for all tasks and methods. A frame whose level stays between two rows is left as
it is, bit for bit, so a given frame is a column of one value; a frame that reaches log_snr_max
takes the predicted x0 itself. Frames may move in different rows (a pyramid makes earlier ones
first).
See vdm_jax.diffusion for the notation; lambda = log_snr / 2 in papers on solvers.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax.diffusion import (
    MODALITIES,
    add_noise,
    alpha_sigma,
    broadcast_to_latent,
    log_snr_at,
    noise_like,
    to_x0,
)
from vdm_jax.errors import UserError, one_of

METHODS = ("ddpm", "ddim", "dpmpp_2m", "heun")
SPACINGS = ("time", "log_snr", "karras")

# --------------------------------------------------------------------------------------------------
# Schedule matrices


def scheduling_matrix(
    steps, frames, config, given=None, lag=0, spacing="time", rho=7.0, context_noise=0.0, first_step_times=()
):
    """Levels {"video": [N+1, T], "audio": [N+1, T]} from pure noise to clean.

    steps: denoising steps of each frame; frames: T. given: {"video": [T], "audio": [T]} bool
    (either may be left out), frames that are clean from the start; where a modality is given in
    part, to be gone on with, they stay lightly noised at time context_noise (arXiv:2502.06764).
    lag: how many steps each frame is behind the one before it: 0, all together; more, a pyramid of
    N = steps + lag * (frames to make - 1).
    spacing: even in 'time' t, in 'log_snr', or as 'karras' in (sigma / alpha)^(1 / rho).
    first_step_times: times in [0, 1] that the first frames to be made reach in their first step, one for each.
    From pure noise x0 is the mean of what may follow. A short step from there lets the noise draw
    one such future; a first_step_times puts the frame at their mean, which is nearer to what does follow where
    what is given all but settles it: half the squared error, if what the model leaves open is what
    it does not know. Where several futures are likely their mean is a smear, which later steps have
    to settle.
    """
    one_of("spacing", spacing, SPACINGS)
    if steps < 1 or lag < 0:
        raise UserError(f"steps={steps} must be at least 1 and lag={lag} at least 0")
    masks = {}
    for name in ("video", "audio"):
        masks[name] = np.asarray((given or {}).get(name, np.zeros(frames)), bool)
        if masks[name].shape != (frames,):
            raise UserError(f"given[{name!r}] has shape {masks[name].shape}, want ({frames},)")

    high = config["log_snr_max"]

    def ladder(steps, start=1.0):  # [steps + 1], from time `start` to clean
        part, low = np.arange(steps + 1) / steps, float(log_snr_at(start, config))
        if spacing == "time":
            rungs = np.array(log_snr_at(start * (1 - part), config), np.float64)
        elif spacing == "log_snr":
            rungs = low + part * (high - low)
        else:  # arXiv:2206.00364, eq. 5, for sigma / alpha = exp(-log_snr / 2)
            ends = np.exp(-low / 2 / rho), np.exp(-high / 2 / rho)
            rungs = -2 * rho * np.log(ends[0] + part * (ends[1] - ends[0]))
        # No end past its bound by rounding: sample() and guidance intervals compare with them.
        rungs = np.clip(rungs, config["log_snr_min"], high)
        rungs[-1] = high
        return rungs

    # Video and audio of one frame start together, also where one of them is given.
    order = np.maximum(np.cumsum(~(masks["video"] & masks["audio"])) - 1, 0)  # [T]
    ladders = np.tile(ladder(steps), (order[-1] + 1, 1))  # [frames to make, steps + 1]
    for own, start in zip(ladders, first_step_times if steps > 1 else ()):
        own[1:] = ladder(steps - 1, start)
    row = np.arange(steps + lag * order[-1] + 1)[:, None]
    matrix = ladders[order, np.clip(row - lag * order, 0, steps)]  # [N+1, T]
    lightly = float(log_snr_at(context_noise, config)) if context_noise else high
    return {n: jnp.asarray(np.where(mask, high if mask.all() else lightly, matrix)) for n, mask in masks.items()}


# --------------------------------------------------------------------------------------------------
# Steps: z at level `now` -> z at level `after`, for one leaf, given the predicted x0


def _ddim(z, x0, now, after, noise=None, eta=0.0):
    # arXiv:2010.02502, eq. 12 with the standard deviation of eq. 16; eps = (z - alpha x0) / sigma.
    (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(now), alpha_sigma(after)
    ratio = sigma_next / sigma
    if noise is None:
        return ratio * z - alpha_next * jnp.expm1((now - after) / 2) * x0
    # 1 - alpha^2 / alpha_next^2, without the cancellation
    spent = -jnp.expm1(jax.nn.softplus(-after) - jax.nn.softplus(-now))
    deviation = eta * ratio * jnp.sqrt(spent)
    ratio = ratio * jnp.sqrt(jnp.maximum(1 - eta**2 * spent / sigma**2, 0))
    return ratio * z + (alpha_next - ratio * alpha) * x0 + deviation * noise


def _dpmpp_2m(z, x0, x0_before, now, after, h_before):
    # arXiv:2211.01095, Algorithm 2; h_before = 0 where a frame has no step behind it: first order.
    h = (after - now) / 2
    half_over_r = jnp.where(h_before > 0, h / (2 * jnp.where(h_before > 0, h_before, 1)), 0)
    return _ddim(z, x0 + half_over_r * (x0 - x0_before), now, after)


def _heun(z, x0, x0_next, now, after):
    # Heun's trapezoid as in arXiv:2206.00364, Algorithm 1, but on the form whose linear part is solved
    # exactly (arXiv:2211.01095, Proposition 4.1), with x0 linear in lambda over a step: ETD2RK of
    # Cox & Matthews (2002). In the paper's own variable, sigma / alpha, a long first step from pure
    # noise errs by more than the data: 24 against 0.04 in 8 steps even in time.
    h = (after - now) / 2
    large = jnp.maximum(h, 0.05)
    share = -1 / jnp.expm1(-large) - 1 / large  # of x0_next, from 1/2 up to 1
    share = jnp.where(h < 0.05, 0.5 + h / 12, share)  # its series, where the quotient cancels
    return _ddim(z, x0 + share * (x0_next - x0), now, after)


def sample(denoise_fn, key, z_T, cond, levels, method, config, eta=0.0):
    """Walk z_T through the rows of `levels` and return z_0, the same tree.

    denoise_fn(z, log_snr, cond) -> prediction of config.target, parameters closed over (`guided` is
    one too). z_T: {"video": [B, T, h, w, C], "audio": [B, K*T, D]}: standard normal noise in frames
    to make, clean or lightly noised latents in given ones. levels: [N+1, T] per modality, or
    [N+1, B, T] to differ by example; they rise down the rows, and log_snr_max means clean.
    method: 'ddpm' is ancestral; 'ddim' adds a part eta in [0, 1] of its noise; 'dpmpp_2m' is second
    order at one network call a row, 'heun' at two. Of config only `target` and `log_snr_max` count.
    To be wrapped in jit with the arrays as arguments: only new shapes trace it again.
    """
    one_of("method", method, METHODS)
    if eta and method != "ddim":
        raise UserError(f"eta={eta} is for method 'ddim', not {method!r}")
    eta = 1.0 if method == "ddpm" else eta  # arXiv:2010.02502, section 4.1
    z_T = jax.tree.map(lambda z: z.astype(jnp.promote_types(z.dtype, jnp.float32)), z_T)
    names = list(z_T)
    batch = z_T[names[0]].shape[0]

    def expand(row):  # [T] or [B, T] -> [B, T]
        return {name: jnp.broadcast_to(row[name], (batch, row[name].shape[-1])) for name in names}

    def predict(z, level):
        x0 = to_x0(denoise_fn(z, level, cond), z, level, config["target"])
        return {name: x0[name].astype(z[name].dtype) for name in names}

    def each(function, *trees):  # by leaf, with per-frame arrays [B, T] spread to its shape
        def leaf(name):
            arrays = [tree[name] for tree in trees]
            return function(*(broadcast_to_latent(a, z_T[name]) if a.ndim == 2 else a for a in arrays))

        return {name: leaf(name) for name in names}

    def body(carry, step):
        z, before = carry
        key, now, after = step
        now, after = expand(now), expand(after)
        moves = {name: now[name] != after[name] for name in names}
        made = {name: after[name] >= config["log_snr_max"] for name in names}

        def settle(new, x0):  # what a frame becomes: x0 if made now, untouched if it does not move
            return each(jnp.where, moves, each(jnp.where, made, x0, new), z)

        x0 = predict(z, now)
        if method == "dpmpp_2m":
            new = settle(each(_dpmpp_2m, z, x0, before["x0"], now, after, before["h"]), x0)
            h = {name: (after[name] - now[name]) / 2 for name in names}
            h = jax.tree.map(jnp.where, moves, h, before["h"])
            return (new, {"x0": each(jnp.where, moves, x0, before["x0"]), "h": h}), None
        noise = (noise_like(key, z),) if eta else ()
        euler = each(partial(_ddim, eta=eta), z, x0, now, after, *noise)
        new = settle(euler, x0)
        if method == "heun":
            new = settle(each(_heun, z, x0, predict(new, after), now, after), x0)
        return (new, before), None

    before = {}
    if method == "dpmpp_2m":
        first = expand({name: levels[name][0] for name in names})
        before = {"x0": z_T, "h": jax.tree.map(jnp.zeros_like, first)}
    now, after = {n: levels[n][:-1] for n in names}, {n: levels[n][1:] for n in names}
    keys = jax.random.split(key, len(levels[names[0]]) - 1)
    (z, _), _ = jax.lax.scan(body, (z_T, before), (keys, now, after))
    return z


# --------------------------------------------------------------------------------------------------
# Guidance


def guided(denoise_fn, terms, rescale=0.0, interval=(-jnp.inf, jnp.inf)):
    """Guidance of a denoise_fn, as a denoise_fn; any prediction target.

    terms: [(extra, more, less)]: to the prediction from all there is, extra * (more - less) is
    added, where more and less are predictions from other inputs: functions (z, level, cond) ->
    (z, level, cond) of the same shapes, or None for the inputs as they are. extra is a number or
    one for each modality. rescale: share in [0, 1] by which each frame's standard deviation is put
    back to the unguided one's. interval: (low, high) in log_snr; a frame outside it gets the
    unguided prediction. All predictions are one network call of a larger batch.
    """
    low, high = interval

    def denoise(z, level, cond):
        views = [(z, level, cond)]

        def place(view):
            if view is None:
                return 0
            views.append(view(z, level, cond))
            return len(views) - 1

        places = [(place(more), place(less)) for _, more, less in terms]

        def stack(*rows):
            return jnp.concatenate([jnp.broadcast_to(row, rows[0].shape) for row in rows])

        predictions = denoise_fn(*(jax.tree.map(stack, *trees) for trees in zip(*views)))

        def combine(name):
            now, made = level[name], jnp.split(predictions[name], len(views))
            inside = (low <= now) & (now <= high)  # arXiv:2404.07724, by the frame
            plain = guided = made[0]
            active = jnp.zeros_like(inside)
            for (extra, _, _), (more, less) in zip(terms, places):
                extra = jnp.where(inside, extra[name] if isinstance(extra, dict) else extra, 0)
                guided = guided + broadcast_to_latent(extra, guided) * (made[more] - made[less])
                active |= extra != 0
            # arXiv:2305.08891, eq. 14 to 16; a standard deviation per frame, as levels are.
            deviations = [a.reshape(*now.shape, -1).std(-1) for a in (plain, guided)]  # [B, T]
            factor = rescale * deviations[0] / jnp.maximum(deviations[1], 1e-12) + 1 - rescale
            return broadcast_to_latent(jnp.where(active, factor, 1), guided) * guided

        return {name: combine(name) for name in z}

    return denoise


def text_guidance(weight, null_cond):
    """Terms for `guided`: classifier-free guidance by the text, arXiv:2207.12598, eq. 6, whose w is weight - 1.

    weight: 1 adds nothing, 0 leaves the prediction without text, more overshoots. null_cond: the
    tree of cond for no text, batch axis B or 1.
    """
    return [(weight - 1, None, lambda z, level, cond: (z, level, null_cond))]


def history_guidance(weight, given, noise, config, fraction=0.0):
    """Terms for `guided`: guidance by the given frames, arXiv:2502.06764, section 4.

    weight: as in `text_guidance`. given: {modality: bool [T]}; noise: a tree like z that stands in
    for what is given where it is withheld. fraction: 0 is vanilla history guidance; a time t in
    (0, 1) guides by the given frames noised to t instead, fractional guidance: low frequencies only.
    """

    def noised(t):
        to = log_snr_at(t, config)

        def view(z, level, cond):
            mask = {name: jnp.broadcast_to(given[name], level[name].shape) for name in z}
            known = {name: jnp.where(mask[name], to, level[name]) for name in z}
            hidden = add_noise(z, noise, {name: jnp.full_like(level[name], to) for name in z})
            shown = {name: jnp.where(broadcast_to_latent(mask[name], z[name]), hidden[name], z[name]) for name in z}
            return shown, known, cond

        return view

    return [(weight - 1, noised(fraction) if fraction else None, noised(1.0))]


def modality_guidance(weight, noise, config):
    """Terms for `guided`: sound is guided by the picture and the picture by the sound.

    One modality's prediction without the other is that beside its pure noise (UniDiffuser,
    arXiv:2303.06555, section 4.3). weight, noise: as in `history_guidance`.
    """

    def without(other):
        def view(z, level, cond):
            silent = jnp.full_like(level[other], log_snr_at(1.0, config))
            return {**z, other: noise[other]}, {**level, other: silent}, cond

        return view

    return [({m: weight - 1 if m != other else 0.0 for m in MODALITIES}, None, without(other)) for other in MODALITIES]
