"""Phases of a stage: shares become steps, and a run may move to another machine between two phases."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from tests import tiny
from tests.helpers import digest, final_state
from vdm_jax import train, weights
from vdm_jax.errors import UserError
from vdm_jax.run import folder
from vdm_jax.system import build
from vdm_jax.system.phases import first_params, phases

CONFIG = "--config=tests/tiny.py:phases"


def with_phases(*parts, steps=10):
    config = tiny.get_config()
    config.denoiser.update(phases=parts, steps=steps)
    return build(config)


def test_shares_become_steps_and_settings():
    system = with_phases(
        {"share": 0.25, "data.size": (8, 8)}, {"share": 0.75, "denoiser.diffusion.patterns": {"text": 1.0}}
    )
    first, second = phases(system, "denoiser")
    assert first[:4] == (1, "denoiser, phase 1 of 2", 0, 2)
    assert second[:4] == (2, "denoiser, phase 2 of 2", 2, 10)
    assert [phase.system.config.denoiser.steps for phase in (first, second)] == [2, 8]
    assert (first.system.config.data.size, second.system.config.data.size) == ((8, 8), (16, 24))
    assert second.system.config.denoiser.diffusion.patterns.to_dict() == {"text": 1.0}
    assert system.config.denoiser.diffusion.patterns.text == 0.6  # the recipe itself is as it was


def test_a_stage_without_phases_is_one_phase():
    system = build(tiny.get_config())
    assert phases(system, "clip") == [(1, "clip", 0, 8, system, [system])]


def test_only_positions_may_have_another_shape_and_not_in_the_last_phase():
    config = tiny.get_config()
    config.denoiser.model.update(attention=(False, True))
    small, large = {"share": 0.5, "data.size": (8, 8)}, {"share": 0.5}
    config.denoiser.phases = (small, large)
    assert len(phases(build(config), "denoiser")) == 2
    config.denoiser.phases = (large, small)
    with pytest.raises(UserError, match="phase 2 of 2: it changes denoiser/.*pos_embed from .* keep data.size"):
        phases(build(config), "denoiser")
    config.clip.phases = (small, large)
    with pytest.raises(UserError, match="phase 1 of 2: it changes clip/video_tower/summary/kernel"):
        phases(build(config), "clip")


@pytest.mark.parametrize(
    "parts, message",
    [
        (({"share": 0.5}, {"share": 0.4}), "have the shares [0.5, 0.4]: give numbers above 0 whose sum is 1"),
        (({"share": 1.0}, {}), "have the shares [1.0, 0]"),
        (({"share": 0.01}, {"share": 0.99}), "denoiser.steps=10 leave no step for phase 1 of 2"),
        (
            ({"share": 1, "denoiser.lerning_rate": 1.0},),
            "lerning_rate': did you mean 'denoiser.learning_rate'?",
        ),
        (
            ({"share": 1, "denoiser.model.patch": 2},),
            "phase 1 of 1: denoiser.model.patch cannot change from phase to phase",
        ),
        (({"share": 1, "denoiser.steps": 2},), "denoiser.steps cannot change"),
        (({"share": 1, "denoiser.diffusion.target": "x0"},), "denoiser.diffusion.target cannot change"),
        (({"share": 1, "denoiser.diffusion.log_snr_max": 9.0},), "denoiser.diffusion.log_snr_max cannot change"),
        (({"share": 1, "denoiser.ema": 2.0},), "phase 1 of 1: denoiser.ema=2.0 must be a finite number from 0 to 1"),
        (({"share": 1, "clip.steps": 2},), "phase 1 of 1: no setting 'clip.steps'"),
        (({"share": 1, "data.frames": "x"},), "denoiser, phase 1 of 1: data.frames='x'"),
        (({"share": 1, "data.text_length": 32},), "data.text_length cannot change"),
        ((0.5, 0.5), "0.5 is no phase"),
        (({"share": "0.5"},), "have the shares ['0.5']: give numbers above 0"),
        (
            ({"share": 1, "denoiser.diffusion.patterns": 1.0},),
            "phase 1 of 1: denoiser.diffusion.patterns=1.0: give shares",
        ),
        (({"share": 1, "data.frames": None},), "phase 1 of 1: data.frames=None: give a value"),
        (({"share": 1, "data.frames": 4},), "denoiser, phase 1 of 1: 4 frames do not fill latent frames of 2"),
    ],
)
def test_wrong_phases(parts, message):
    with pytest.raises(UserError, match=re.escape(message)):
        phases(with_phases(*parts), "denoiser")


def test_a_phase_starts_from_rounded_parameters_and_interpolated_positions():
    rng = np.random.default_rng(0)
    ramp = np.broadcast_to(np.arange(4, dtype=np.float32)[:, None, None], (1, 4, 4, 1))
    made = first_params(
        {"kernel": rng.standard_normal(5, np.float32), "pos_embed": ramp},
        {"kernel": jax.ShapeDtypeStruct((5,), np.float32), "pos_embed": jax.ShapeDtypeStruct((1, 8, 4, 1), np.float32)},
    )
    kernel = np.random.default_rng(0).standard_normal(5, np.float32)
    np.testing.assert_array_equal(made["kernel"], kernel.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(made["pos_embed"][0, :, 0, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], atol=1e-6)


def test_a_run_with_phases_is_resumed_and_moved_bit_for_bit(command, tiny_run, tmp_path):
    """Whole; resumed within the second phase; and begun anew from weights exported between the phases."""
    options = (CONFIG, "--config.checkpoint_every=2", "--config.keep.newest=9", "--config.validation.every=0")

    def finish(workdir):
        done = command(train, *options, f"--workdir={workdir}", "--stage=denoiser")
        assert done.code == 0, done.err
        return done.err, digest(final_state(workdir, "denoiser", tiny.get_config("phases")))

    whole = tmp_path / "whole"
    shutil.copytree(tiny_run, whole, ignore=shutil.ignore_patterns("denoiser"))
    err, expected = finish(whole)
    assert any("denoiser, phase 1 of 2: " in line and "0 of 4 steps done" in line for line in err)
    assert any("denoiser, phase 2 of 2: " in line and "4 of 8 steps done" in line for line in err)
    told = [json.loads(line) for line in (whole / "denoiser/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["phase"]) for line in told] == [(n, 1 if n < 5 else 2) for n in range(1, 9)]
    assert any("denoiser, phase 2 of 2 5/8 loss" in line for line in err)
    shutil.copytree(whole, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/denoiser/checkpoints/8")
    assert finish(tmp_path / "resumed")[1] == expected

    shutil.copytree(whole, tmp_path / "border")
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"border/denoiser/checkpoints/{step}")
    assert command(weights, "export", f"--workdir={tmp_path / 'border'}", f"--out={tmp_path / 'out'}").code == 0
    moved = tmp_path / "moved"
    assert command(weights, "import", f"--weights={tmp_path / 'out'}", f"--workdir={moved}").code == 0
    assert folder.newest_step(moved, "denoiser") == 4
    assert finish(moved)[1] == expected
