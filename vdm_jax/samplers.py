"""Samplers: from noise to clean latents along a scheduling matrix; guidance. All work with any network.

The scheduling matrix says which noise level each latent frame has before the first step and after each step:

    levels = {"video": [S+1, T], "audio": [S+1, T]}     log_snr; row 0 is the start, row S the end

One loop serves all tasks and methods. Frames may change in different steps: in a pyramid, earlier frames become clean
first. If the level of a frame does not change in a step, its latents do not change, bit for bit. So context frames
never change. A frame that reaches log_snr_max becomes the predicted x0 itself. The notation is that of
vdm_jax.diffusion. Papers on solvers write lambda for log_snr / 2.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from vdm_jax.diffusion import add_noise, alpha_sigma, broadcast_to_latent, log_snr_at, noise_like, to_x0
from vdm_jax.errors import one_of

# ---------------------------------------- methods: step_fn(z, x0, past, step) -> (z at the next noise level, past)
#
# All dicts are by modality. The arrays of Past.h and Step broadcast onto z: [B, T, 1, 1, 1] and [B, K*T, 1].


class Past(NamedTuple):
    """What a multistep method remembers of each frame: x0 and h of the last step that changed the frame."""

    x0: dict  # like z
    h: dict  # the size of that step in lambda, half the difference in log_snr; 0 before a frame's first step


class Step(NamedTuple):
    """What every method is told about one step of the loop."""

    now: dict  # log_snr before the step
    after: dict  # log_snr after the step
    key: jax.Array  # for the noise of this step
    predict_next_x0: Callable  # z after the step -> its x0; one more call of the network


def ddpm(z, x0, past, step):
    """Ancestral sampling, DDIM with eta = 1: arXiv:2010.02502, eq. 12, with the standard deviation of eq. 16."""

    def leaf(z, x0, now, after, noise):
        alpha, sigma = alpha_sigma(now)
        alpha_next, sigma_next = alpha_sigma(after)
        ratio = sigma_next / sigma
        beta = -jnp.expm1(jax.nn.softplus(-after) - jax.nn.softplus(-now))  # 1 - alpha^2 / alpha_next^2, accurate
        deviation = ratio * jnp.sqrt(beta)
        kept = ratio * jnp.sqrt(jnp.maximum(1 - beta / sigma**2, 0))  # share of the old noise
        return kept * z + (alpha_next - kept * alpha) * x0 + deviation * noise

    return jax.tree.map(leaf, z, x0, step.now, step.after, noise_like(step.key, z)), past


def ddim(z, x0, past, step):
    """DDIM without noise, eta = 0: arXiv:2010.02502, eq. 12."""
    return exact_step(z, x0, step.now, step.after), past


def dpmpp_2m(z, x0, past, step):
    """DPM-Solver++(2M), second order with one network call per step: arXiv:2211.01095, Algorithm 2."""

    def extrapolate(x0, h, past_x0, past_h):
        # 1 / (2 r), with r = past_h / h. A frame's first step has no step before it: its order is 1.
        half_over_r = jnp.where(past_h > 0, h / (2 * jnp.where(past_h > 0, past_h, 1)), 0)
        return x0 + half_over_r * (x0 - past_x0)

    h = jax.tree.map(lambda now, after: (after - now) / 2, step.now, step.after)
    z_next = exact_step(z, jax.tree.map(extrapolate, x0, h, past.x0, past.h), step.now, step.after)
    changes = jax.tree.map(jnp.not_equal, step.now, step.after)
    new_where_changed = functools.partial(jax.tree.map, jnp.where, changes)
    return z_next, Past(x0=new_where_changed(x0, past.x0), h=new_where_changed(h, past.h))


def heun(z, x0, past, step):
    """Heun's method, second order with two network calls per step: ETD2RK of Cox and Matthews (2002).

    It solves the linear part of the equation exactly (arXiv:2211.01095, Proposition 4.1), and takes x0 as linear in
    lambda over a step. The form in EDM (arXiv:2206.00364, Algorithm 1) has a large error in a long first step.
    """

    def average(x0, x0_next, now, after):
        h = (after - now) / 2
        not_small = jnp.maximum(h, 0.05)
        # The weight of x0_next, from 1/2 to 1. The formula loses digits if h is small. There its Taylor series is used.
        next_weight = -1 / jnp.expm1(-not_small) - 1 / not_small
        next_weight = jnp.where(h < 0.05, 0.5 + h / 12, next_weight)
        return x0 + next_weight * (x0_next - x0)

    x0_next = step.predict_next_x0(exact_step(z, x0, step.now, step.after))
    x0 = jax.tree.map(average, x0, x0_next, step.now, step.after)
    return exact_step(z, x0, step.now, step.after), past


METHODS = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m, "heun": heun}


def exact_step(z, x0, now, after):
    """Returns z after a step without noise, exact if x0 is constant.

    arXiv:2010.02502, eq. 12, with eps written in z and x0.

    now, after: log_snr before and after the step, with the axes of z.
    """

    def leaf(z, x0, now, after):
        sigma = alpha_sigma(now)[1]
        alpha_next, sigma_next = alpha_sigma(after)
        return sigma_next / sigma * z - alpha_next * jnp.expm1((now - after) / 2) * x0

    return jax.tree.map(leaf, z, x0, now, after)


# -------------------------------------------------------------------------------------------------------- the loop


def sample(denoise_fn, key, z_T, cond, levels, method, config):
    """Returns latents like z_T: generated frames are clean, and context frames are as in z_T.

    denoise_fn: (z, log_snr, cond) -> prediction of config.target, such as the function that `guided` returns.
    z_T: the start, at the noise levels of row 0: standard normal noise in frames to generate; clean or noised latents
        in context frames.
    levels: the scheduling matrix, or one per example, [S+1, B, T]. No frame's log_snr falls from row to row.
    method: one of METHODS; else a UserError is raised. Only ddpm adds noise.
    """
    step_fn = METHODS[one_of("method", method, METHODS)]
    z_T = jax.tree.map(lambda z: z.astype(jnp.promote_types(z.dtype, jnp.float32)), z_T)
    batch = len(z_T["video"])
    to_latent = functools.partial(jax.tree.map, broadcast_to_latent)  # [B, T] -> [B, K*T, 1, ...]
    to_batch = functools.partial(jax.tree.map, lambda x: jnp.broadcast_to(x, (batch, x.shape[-1])))  # -> [B, T]

    def predict_x0(log_snr, z):
        prediction = denoise_fn(z, log_snr, cond)
        chex.assert_trees_all_equal_shapes(prediction, z)  # other shapes would broadcast without an error
        x0 = to_x0(prediction, z, log_snr, config["target"])
        return jax.tree.map(lambda x0, z: x0.astype(z.dtype), x0, z)

    def body(carry, row):
        z, past = carry
        key, now, after = row
        now, after = to_batch(now), to_batch(after)
        x0 = predict_x0(now, z)
        now_of_z, after_of_z = to_latent(now, z), to_latent(after, z)  # log_snr with the axes of z

        def settle(z_next):
            """Returns z_next. Frames that are clean after the step get x0, and frames that do not change keep z."""

            def leaf(z_next, z, x0, now, after):
                return jnp.where(now != after, jnp.where(after >= config["log_snr_max"], x0, z_next), z)

            return jax.tree.map(leaf, z_next, z, x0, now_of_z, after_of_z)

        step = Step(now_of_z, after_of_z, key, lambda z_next: predict_x0(after, settle(z_next)))
        z_next, past = step_fn(z, x0, past, step)
        return (settle(z_next), past), None

    first_levels = to_latent(to_batch(jax.tree.map(lambda x: x[0], levels)), z_T)
    past = Past(x0=z_T, h=jax.tree.map(jnp.zeros_like, first_levels))
    now = jax.tree.map(lambda x: x[:-1], levels)
    after = jax.tree.map(lambda x: x[1:], levels)
    keys = jax.random.split(key, len(now["video"]))
    (z_0, _), _ = jax.lax.scan(body, (z_T, past), (keys, now, after))
    return z_0


# -------------------------------------------------------------------------------------------------------- guidance


class Term(NamedTuple):
    """One kind of guidance. It adds extra * (prediction with more of a condition - prediction with less of it)."""

    extra: float | dict  # the guidance weight - 1; a number, an array [B, 1], or a dict of these by modality
    # more_inputs and less_inputs take (z, log_snr, cond). They return other inputs for the network, of the same shapes
    # or of batch size 1.
    more_inputs: Callable | None  # None: the inputs as they are
    less_inputs: Callable


def guided(denoise_fn, terms, rescale=0.0, interval=(-jnp.inf, jnp.inf)):
    """Returns denoise_fn with guidance by a list of Terms. All predictions are one network call with a larger batch.

    rescale: share in [0, 1]. With rescale = 1, each frame gets the standard deviation of the unguided prediction
        (arXiv:2305.08891, eq. 14 to 16, but by frame, because each has its own noise level).
    interval: (low, high) in log_snr. Frames outside it get the unguided prediction (arXiv:2404.07724).
    """
    low, high = interval

    def concatenate(first, *others):  # inputs of batch size 1 are repeated
        return jnp.concatenate([first, *(jnp.broadcast_to(x, first.shape) for x in others)])

    def guided_fn(z, log_snr, cond):
        views = [(z, log_snr, cond)]  # what the network reads; the first view is for the unguided prediction
        for term in terms:
            views += [view(z, log_snr, cond) for view in (term.more_inputs, term.less_inputs) if view is not None]
        predictions = denoise_fn(*jax.tree.map(concatenate, *views))

        def combine(name):
            inside = (low <= log_snr[name]) & (log_snr[name] <= high)  # [B, T]
            parts = iter(jnp.split(predictions[name], len(views)))
            plain = total = next(parts)
            active = jnp.zeros_like(inside)
            for term in terms:
                more = plain if term.more_inputs is None else next(parts)
                less = next(parts)
                extra = jnp.where(inside, term.extra[name] if isinstance(term.extra, dict) else term.extra, 0)
                total = total + broadcast_to_latent(extra, total) * (more - less)
                active |= extra != 0
            plain_deviation = plain.reshape(*inside.shape, -1).std(-1)  # [B, T]
            deviation = total.reshape(*inside.shape, -1).std(-1)
            factor = rescale * plain_deviation / jnp.maximum(deviation, 1e-12) + 1 - rescale
            return broadcast_to_latent(jnp.where(active, factor, 1), total) * total

        return {name: combine(name) for name in z}

    return guided_fn


# Arguments of the three functions below:
# weight: 1 adds nothing. Above 1 the text, the context or the other modality has more influence than in training.
# noise: standard normal, like z.
# null_cond: the encoded null text, with unknown control where cond has control; with batch size B or 1. What only cond
#     has stays.


def text_guidance(weight, null_cond):
    """Returns Terms: classifier-free guidance by text and control, arXiv:2207.12598, eq. 6, whose w is weight - 1."""
    return [Term(weight - 1, None, lambda z, log_snr, cond: (z, log_snr, cond | null_cond))]


def history_guidance(weight, masks, noise, config, history_noise=0.0):
    """Returns Terms: guidance by the context frames, arXiv:2502.06764, section 4.

    masks: {modality: bool [T] or [B, T]}, True in context frames.
    history_noise: a time t. The Term is the difference of two predictions: the first reads the context noised to t, the
        second reads pure noise in place of the context. 0 leaves the context as it is (vanilla history guidance). Above
        0 the noise hides all but the low frequencies, so only these guide (fractional history guidance).
    """

    def context_at(t, z, log_snr, cond):
        level = log_snr_at(t, config)
        mask = {name: jnp.broadcast_to(masks[name], log_snr[name].shape) for name in z}  # [B, T]
        # The context in z may be lightly noised already. Then it gets slightly noisier than `level`.
        noised = add_noise(z, noise, {name: jnp.full_like(log_snr[name], level) for name in z})
        z = {name: jnp.where(broadcast_to_latent(mask[name], z[name]), noised[name], z[name]) for name in z}
        log_snr = {name: jnp.where(mask[name], level, log_snr[name]) for name in z}
        return z, log_snr, cond

    noisy_context = functools.partial(context_at, history_noise) if history_noise else None
    return [Term(weight - 1, noisy_context, functools.partial(context_at, 1.0))]


def modality_guidance(weight, noise, config):
    """Returns Terms: the video guides the audio, and the audio the video.

    For the prediction without a modality the network reads noise in its place (arXiv:2303.06555, section 4.3).
    """

    def without(other, z, log_snr, cond):
        pure_noise = jnp.full_like(log_snr[other], log_snr_at(1.0, config))
        return {**z, other: noise[other]}, {**log_snr, other: pure_noise}, cond

    return [
        Term({name: weight - 1, other: 0.0}, None, functools.partial(without, other))
        for name, other in (("audio", "video"), ("video", "audio"))
    ]
