"""The student of few steps: its targets against closed forms of Gaussian clips, and a tiny student from end to end."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import tiny
from tests.gaussian import prediction_of
from vdm_jax import sample, train, weights
from vdm_jax.diffusion import alpha_sigma, broadcast_to_latent
from vdm_jax.errors import UserError
from vdm_jax.pipeline import load
from vdm_jax.system import build, distillation

MEAN, SPREAD = 0.7, 0.4  # of every element of a clip
LEVELS = {"video": jnp.asarray([[-9.0, -9.0, 3.0], [-2.0, -9.0, 3.0], [12.0, 1.0, 3.0], [12.0, 12.0, 3.0]])}


def settings(**changes):
    config = tiny.get_config().denoiser
    config.distillation.update(teacher="reference", steps=(4, 8, 16, 32, 64), teacher_share=0.5)
    config.distillation.guidance.update(text=1.0, text_cross_modal=1.0, history=1.0, modality=1.0)
    config.distillation.update(changes)
    return config


def normal_clips(batch):
    keys = jax.random.split(jax.random.key(5))
    shapes = {"video": (batch, 3, 2, 2, 4), "audio": (batch, 6, 5)}
    return {m: MEAN + SPREAD * jax.random.normal(key, shape) for key, (m, shape) in zip(keys, shapes.items())}


def exact_x0(z, now):
    """The mean of clean clips, given noisy ones."""

    def leaf(now, z):
        alpha, sigma = alpha_sigma(broadcast_to_latent(now, z))
        return MEAN + SPREAD**2 * alpha / (alpha**2 * SPREAD**2 + sigma**2) * (z - alpha * MEAN)

    return jax.tree.map(leaf, now, z)


def teacher_fn(z, now, cond):
    return prediction_of(exact_x0(z, now), z, now, "v")


def perfect_student(z, now, cond):
    """Arrives where the exact solution of the process without noise arrives."""

    def leaf(now, after, z):
        def moments(level):
            alpha, sigma = alpha_sigma(broadcast_to_latent(level, z))
            return alpha * MEAN, jnp.sqrt(alpha**2 * SPREAD**2 + sigma**2)

        (mean, deviation), (mean_after, deviation_after) = moments(now), moments(after)
        return mean_after + deviation_after / deviation * (z - mean)

    after = cond["next_log_snr"]
    x0 = distillation.x0_of_step(z, jax.tree.map(leaf, now, after, z), now, after)
    return prediction_of(x0, z, now, "v")


def test_the_next_level_is_the_first_higher_one():
    now = {"video": jnp.asarray([[-9.0, -9.0, 3.0], [-2.0, 1.0, 3.0], [12.0, 12.0, 3.0]])}
    expected = [[-2.0, 1.0, 3.0], [12.0, 12.0, 3.0], [12.0, 12.0, 3.0]]
    np.testing.assert_array_equal(distillation.next_levels(LEVELS, now)["video"], expected)


def test_the_x0_of_a_step_makes_that_step():
    z, x0 = normal_clips(4), normal_clips(4)
    now = {m: jnp.linspace(-8.0, 4.0, 12).reshape(4, 3) for m in z}
    after = {m: now[m] + jnp.asarray([0.5, 3.0, 0.0]) for m in z}
    z_next = distillation.step(z, x0, now, after)
    found = distillation.x0_of_step(z, z_next, now, after)
    for m in z:
        found_by_frame, x0_by_frame = (np.asarray(x[m]).reshape(4, 3, -1) for x in (found, x0))
        np.testing.assert_allclose(found_by_frame[:, :2], x0_by_frame[:, :2], atol=2e-4)
        still = np.asarray(z_next[m]).reshape(4, 3, -1)[:, 2]
        np.testing.assert_array_equal(found_by_frame[:, 2], still)
        np.testing.assert_allclose(still, np.asarray(z[m]).reshape(4, 3, -1)[:, 2], atol=1e-6)


@pytest.mark.parametrize("steps", [(4, 8, 16, 32, 64), (4, 64)])
def test_a_perfect_student_meets_its_targets_and_a_copy_of_the_teacher_does_not(steps):
    z, config = normal_clips(64), settings(steps=steps)
    cond = {"states": jnp.ones((64, 1, 1))}

    @jax.jit
    def loss(key):
        arguments = (teacher_fn, key, z, cond, {"states": jnp.zeros((1, 1, 1))}, config)
        return [distillation.loss(student, *arguments)[0] for student in (perfect_student, teacher_fn)]

    perfect, copy = loss(jax.random.key(0))
    assert perfect < 0.2 * copy


@pytest.mark.parametrize(
    "changes, message",
    [(dict(steps=(4,)), "steps=(4,)"), (dict(steps=(4, 12)), "steps=(4, 12)"), (dict(steps=(8, 4)), "steps=(8, 4)")]
    + [(dict(teacher_share=share), f"teacher_share={share} of 4 clips") for share in (0.0, 1.0)],
)
def test_settings_that_leave_a_target_out(changes, message):
    config = tiny.get_config("student")
    config.denoiser.distillation.update(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        build(config)


def test_guidance_follows_the_task_of_each_clip():
    """Clips 0 to 2: nothing given; both beginnings; all of the sound."""
    weights = ConfigDict(dict(text=4.0, text_continue=1.0, text_cross_modal=2.5, history=1.5, modality=1.0))
    video = jnp.asarray([[0, 0, 0], [1, 1, 0], [0, 0, 0]], bool)
    audio = jnp.asarray([[0, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
    process = tiny.get_config().denoiser.diffusion
    z = normal_clips(3)
    text, history, *_ = distillation.guidance(weights, {"video": video, "audio": audio}, z, None, process)
    np.testing.assert_allclose(text.extra, [[3.0], [0.0], [1.5]])
    level = {m: jnp.full((3, 3), 5.0) for m in z}
    _, hidden, _ = history.less_inputs(z, level, None)
    np.testing.assert_array_equal(hidden["video"] != 5.0, video)


def test_a_student_is_trained_from_a_teacher_and_sampled(command, tiny_run, tmp_path):
    teacher, run = str(tmp_path / "teacher"), str(tmp_path / "run")
    recipe = ["--config=tests/tiny.py:student", f"--config.denoiser.distillation.teacher={teacher}"]
    assert command(weights, "export", f"--workdir={tiny_run}", f"--out={teacher}").code == 0
    made = command(weights, "import", f"--weights={teacher}", f"--workdir={run}", *recipe)
    assert made.code == 0 and "denoiser restarts at step 0: 4 parameters are freshly initialized" in made.out

    # Before any training the student predicts what the teacher predicts.
    clip = ["--prompt=a red circle", "--method=ddim", "--steps=2", "--guidance=1"]
    assert command(sample, f"--weights={teacher}", *clip, f"--out={tmp_path}/a.mp4").code == 0
    assert command(sample, f"--workdir={run}", *clip, f"--out={tmp_path}/b.mp4").code == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()

    # Trained and beside its teacher, it makes the clips of few steps.
    assert command(train, *recipe, f"--workdir={run}", "--stage=denoiser").code == 0
    assert command(weights, "export", f"--workdir={run}", f"--out={teacher}/student").code == 0
    for name, more, maker in (("c", [], "student"), ("d", ["--teacher"], None)):
        made = command(sample, f"--weights={teacher}", *clip, *more, f"--out={tmp_path}/{name}.mp4")
        assert made.code == 0 and any(f"the {maker} makes the clips" in line for line in made.err) == bool(maker)
    teachers, students, told = ((tmp_path / f"{name}.mp4").read_bytes() for name in "acd")
    assert teachers == told != students
    pipe = load(teacher)
    assert pipe.for_steps(5) is pipe.for_steps(1, student=False) is pipe
    assert pipe.for_steps() is pipe.for_steps(4) is pipe.for_steps(9, student=True) is pipe.student
    made = command(sample, f"--weights={teacher}", *clip, "--student", "--teacher", f"--out={tmp_path}/g.mp4")
    assert made.code == 2 and "only one of --student and --teacher" in made.err[-1]
    with pytest.raises(UserError, match="have no student"):
        pipe.student("a red circle", student=True)


def test_a_student_without_its_teacher_is_told_so(command, tiny_run, tmp_path):
    recipe = ["--config=tests/tiny.py:student", f"--config.denoiser.distillation.teacher={tmp_path}/none"]
    run = tmp_path / "run"
    for stage in ("video_autoencoder", "audio_autoencoder", "clip"):
        shutil.copytree(tiny_run / stage, run / stage)
    shutil.copy(tiny_run / "config.json", run)
    told = command(train, *recipe, f"--workdir={run}", "--stage=denoiser")
    assert told.code == 2 and "none" in told.err[-1]
    told = command(train, recipe[0], f"--workdir={run}", "--stage=denoiser", "--config.denoiser.distillation.teacher=")
    assert told.code == 2 and "a student needs a teacher" in told.err[-1]
