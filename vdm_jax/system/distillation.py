"""Distillation: a student learns to make the clips of a teacher in a few steps, without guidance.

The student is a denoiser that also reads the noise level after the step, `cond["next_log_snr"]`. It predicts the x0
that makes one DDIM step end where the teacher would end. There are two kinds of target (shortcut models,
arXiv:2410.12557, as in Dreamer 4, arXiv:2509.24527):

- For the shortest step: the x0 of the teacher, a frozen denoiser. The teacher predicts with guidance, so the student
  needs none.
- For a longer step: the x0 that makes one step end where two steps of half the length end. The student itself takes
  these two steps (arXiv:2202.00512, appendix G).
"""

import functools

import jax
import jax.numpy as jnp

from vdm_jax import diffusion, samplers
from vdm_jax.diffusion import alpha_sigma, broadcast_to_latent
from vdm_jax.errors import UserError


def next_levels(levels, log_snr):
    """Returns the noise level that the next step of each frame goes to, {modality: [B, T]}.

    levels: the scheduling matrix of log_snr, {modality: [S+1, T]}. From row to row log_snr rises: there is less noise.
    log_snr: the noise levels now, {modality: [B, T]}. A frame at its last level stays there.
    """

    def leaf(rows, now):
        higher = jnp.where(rows[:, None] > now, rows[:, None], jnp.inf).min(0)
        return jnp.where(jnp.isinf(higher), now, higher)

    return {name: leaf(levels[name], log_snr[name]) for name in log_snr}


def check(config):
    """Raises UserError for wrong sampling steps, or if teacher_share gives the teacher all clips or none."""
    settings, rows = config.distillation, config.batch_size // config.accumulate
    steps = settings.steps
    if len(steps) < 2 or steps[0] < 1 or any(2 * a != b for a, b in zip(steps, steps[1:])):
        raise UserError(f"denoiser.distillation.steps={steps}: give two or more, each half of the next, such as (4, 8)")
    if not 0 < round(rows * settings.teacher_share) < rows:
        raise UserError(
            f"denoiser.distillation.teacher_share={settings.teacher_share} of {rows} clips must leave clips for the "
            "teacher and for the student: use 0.75 and 4 clips or more"
        )


def loss(student_fn, teacher_fn, key, z, cond, null_cond, config):
    """Returns the loss of the student on clean latents: (float32 scalar, metrics).

    It is the squared error of x0, weighted by 0.9 (1 - t) + 0.1 (arXiv:2509.24527).

    student_fn, teacher_fn: (z_t, log_snr, cond) -> a prediction of config.diffusion.target, like z_t.
    z: clean latents of both modalities, [B, ...].
    cond, null_cond: the encoded text of the clips, and the null text.
    config: config.denoiser.
    """
    settings, diffusion_config = config.distillation, config.diffusion
    t_key, noise_key, guidance_key = jax.random.split(key, 3)
    batch = len(z["video"])
    taught = round(batch * settings.teacher_share)  # the teacher makes the targets of the first `taught` rows
    *fewer, most = settings.steps  # numbers of steps from pure noise to a clean clip
    own_counts = jnp.asarray(fewer)[jnp.arange(batch - taught) % len(fewer)]  # the student itself teaches these rows
    step_count = jnp.concatenate([jnp.full(taught, most), own_counts])[:, None]  # [B, 1]

    # Noising: a step begins at t, and goes to t - 1 / step_count.
    t, context = diffusion.sample_times(t_key, z["video"].shape[:2], diffusion_config.patterns)
    t = {name: jnp.ceil(t[name] * step_count) / step_count for name in z}

    def levels_after(share):  # log_snr when this share of the step is done; context frames are clean
        later = {name: jnp.maximum(t[name] - share / step_count, 0) for name in z}
        levels = {name: diffusion.log_snr_at(later[name], diffusion_config) for name in z}
        return {name: jnp.where(context[name], diffusion_config.log_snr_max, levels[name]) for name in z}

    start, middle, end = (levels_after(share) for share in (0, 0.5, 1))
    z_t = diffusion.add_noise(z, diffusion.noise_like(noise_key, z), start)
    z_t = {name: jnp.where(broadcast_to_latent(context[name], z[name]), z[name], z_t[name]) for name in z}

    # Targets of the teacher, then of the student
    def predict_x0(denoise_fn, z_t, log_snr, cond):
        return diffusion.to_x0(denoise_fn(z_t, log_snr, cond), z_t, log_snr, diffusion_config.target)

    taught_rows = functools.partial(jax.tree.map, lambda x: x[:taught])
    own_rows = functools.partial(jax.tree.map, lambda x: x[taught:])
    noise = diffusion.noise_like(guidance_key, taught_rows(z))
    terms = guidance(settings.guidance, taught_rows(context), noise, null_cond, diffusion_config)
    guided_fn = samplers.guided(teacher_fn, terms)
    by_teacher = predict_x0(guided_fn, taught_rows(z_t), taught_rows(start), taught_rows(cond))

    def student_x0(z_t, now, after, cond):
        return predict_x0(student_fn, z_t, now, {**cond, "next_log_snr": after})

    own_z, own_start, own_middle, own_end, own_cond = map(own_rows, (z_t, start, middle, end, cond))
    z_middle = step(own_z, student_x0(own_z, own_start, own_middle, own_cond), own_start, own_middle)
    z_end = step(z_middle, student_x0(z_middle, own_middle, own_end, own_cond), own_middle, own_end)
    by_student = x0_of_step(own_z, z_end, own_start, own_end)
    target = jax.lax.stop_gradient(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), by_teacher, by_student))

    # The error
    x0 = student_x0(z_t, start, end, cond)
    total, metrics = 0.0, {}
    for name in z:
        error = jnp.square(x0[name] - target[name]).reshape(*t[name].shape, -1).mean(-1)  # [B, T]
        weight = jnp.where(context[name], 0, 0.9 * (1 - t[name]) + 0.1)
        metrics[f"loss_{name}"] = (weight * error).sum() / jnp.maximum((~context[name]).sum(), 1)
        total += diffusion_config.loss_weights[name] * metrics[f"loss_{name}"]
    return total / sum(diffusion_config.loss_weights[name] for name in z), metrics


def guidance(weights, context, noise, null_cond, diffusion_config):
    """Returns the Terms of the teacher's guidance. Each clip has the weights of its task.

    weights: config.denoiser.distillation.guidance.
    context: {modality: bool [B, T]}, True in context frames.
    """
    both = jnp.stack([*context.values()])  # [modalities, B, T]
    continued = both[:, :, :2].all((0, 2))  # [B]; the context has the first two latent frames, so it shows the motion
    given = both.all(2).any(0)  # [B]; the whole of one modality is context
    text = jnp.where(given, weights.text_cross_modal, weights.text)
    text = jnp.where(continued, weights.text_continue, text)[:, None]
    terms = samplers.text_guidance(text, null_cond)
    terms += samplers.history_guidance(weights.history, context, noise, diffusion_config)
    return terms + samplers.modality_guidance(weights.modality, noise, diffusion_config)


def step(z, x0, now, after):
    """Returns z after a DDIM step; now, after: log_snr, {modality: [B, T]}."""
    to_latent = functools.partial(jax.tree.map, broadcast_to_latent)
    return samplers.exact_step(z, x0, to_latent(now, z), to_latent(after, z))


def x0_of_step(z, z_next, now, after):
    """Returns the x0 with which `step` goes from z to z_next. In frames whose level does not change it is z_next."""

    def leaf(z, z_next, now, after):
        now, after = broadcast_to_latent(now, z), broadcast_to_latent(after, z)
        alpha_next, sigma_next = alpha_sigma(after)
        x0_weight = jnp.where(now == after, 1, -alpha_next * jnp.expm1((now - after) / 2))
        return jnp.where(now == after, z_next, (z_next - sigma_next / alpha_sigma(now)[1] * z) / x0_weight)

    return jax.tree.map(leaf, z, z_next, now, after)
