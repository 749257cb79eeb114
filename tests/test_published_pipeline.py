"""The published text-to-video pipeline against diffusers' TextToVideoSDPipeline, on the same folder and noise."""

import functools
import json
import shutil

import numpy as np
import pytest

from tests.peers import unet3d
from tests.test_tokenizers import write_clip
from vdm_jax import sample
from vdm_jax.data import media
from vdm_jax.errors import UserError
from vdm_jax.system import published, published_denoiser

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPT = "a red circle moving right"
FRAMES, STEPS = 3, 10
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
SCHEDULE |= dict(timestep_spacing="leading")


def pipeline_of(folder):
    """diffusers' pipeline with small random models."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(write_clip(folder), model_max_length=16)
    text = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    text |= dict(num_attention_heads=2, max_position_embeddings=16, hidden_act="gelu")
    vae = dict(block_out_channels=(8, 8), norm_num_groups=4)
    vae |= dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    unet = {**unet3d.TINY, "out_channels": 4, "cross_attention_dim": 16, "sample_size": 8}
    return diffusers.TextToVideoSDPipeline(
        vae=unet3d.randomize(diffusers.AutoencoderKL(**vae), seed=1).eval(),
        text_encoder=unet3d.randomize(transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)), seed=2).eval(),
        tokenizer=tokenizer,
        unet=unet3d.randomize(diffusers.UNet3DConditionModel(**unet)).eval(),
        scheduler=diffusers.DDIMScheduler(**SCHEDULE, set_alpha_to_one=False),
    )


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    pipe = pipeline_of(tmp_path_factory.mktemp("tokenizer") / "tokenizer")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "model"
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return published.load(folder)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", published_denoiser.METHODS)
def test_timesteps_and_noise_levels(name, spacing, tmp_path):
    settings = SCHEDULE | dict(timestep_spacing=spacing)
    if name != "DDIMScheduler":
        del settings["clip_sample"]
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.save_config(tmp_path)
    schedule = published_denoiser.read_schedule(tmp_path / "scheduler_config.json")
    assert (schedule.target, schedule.method) == ("noise", published_denoiser.METHODS[name])
    for steps in (1, 7, 10, 50):
        scheduler.set_timesteps(steps)
        timesteps = schedule.timesteps(steps, schedule.method)
        np.testing.assert_array_equal(timesteps, scheduler.timesteps)
        levels = schedule.levels(steps, schedule.method, 2)["video"]
        assert levels.shape == (steps + 1, 2) and levels[-1, 0] == published_denoiser.CLEAN
        alpha_bar = 1 / (1 + np.exp(-levels[:-1, 0].astype(float)))
        np.testing.assert_allclose(alpha_bar, scheduler.alphas_cumprod[scheduler.timesteps], rtol=1e-4)
        np.testing.assert_array_equal(schedule.timestep_of(levels[:-1, 0]), timesteps)


def write_schedule(folder, **values):
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "DDIMScheduler", **SCHEDULE, **values}))
    return path


@pytest.mark.parametrize(
    "values, said",
    [
        (dict(_class_name="EulerDiscreteScheduler"), "no scheduler 'EulerDiscreteScheduler'"),
        (dict(_class_name=None), "no scheduler None"),
        (dict(beta_schedule="squaredcos_cap_v2"), "no beta_schedule 'squaredcos_cap_v2'"),
        (dict(beta_start="0"), "have no sense"),
        (dict(beta_start=2), "have no sense"),
        (dict(num_train_timesteps=10**9), "have no sense"),
        (dict(steps_offset=1000), "must be from 0 to 999"),
        (dict(prediction_type="flow_prediction"), "no prediction_type"),
        (dict(timestep_spacing="karras"), "no timestep_spacing"),
        (dict(clip_sample=True), "clip_sample is not supported"),
        (dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr=True is not supported"),
        (dict(use_karras_sigmas=True), "use_karras_sigmas=True is not supported"),
        (dict(final_sigmas_type="sigma_min"), "final_sigmas_type='sigma_min' is not supported"),
    ],
)
def test_schedules_that_are_not_supported(values, said, tmp_path):
    with pytest.raises(UserError, match=said) as error:
        published_denoiser.read_schedule(write_schedule(tmp_path, **values))
    assert "\n" not in str(error.value)


def test_end_of_a_schedule_and_its_other_settings(tmp_path):
    schedule = published_denoiser.read_schedule(
        write_schedule(tmp_path, set_alpha_to_one=False, prediction_type="v_prediction")
    )
    assert schedule.target == "v" and schedule.end == schedule.table[0]
    assert schedule.levels(4, "dpmpp_2m", 1)["video"][-1] == published_denoiser.CLEAN
    schedule = published_denoiser.read_schedule(write_schedule(tmp_path, beta_schedule="linear"))
    np.testing.assert_allclose(np.exp(schedule.table[0]), (1 - 0.00085) / 0.00085)
    with pytest.raises(UserError, match="has 1000 levels: give fewer steps"):
        schedule.timesteps(1001, "ddim")


@pytest.mark.parametrize("method", ["ddim", "dpmpp_2m"])
def test_clips_from_the_same_noise(theirs, ours, method):
    noise = np.random.default_rng(0).normal(size=(1, FRAMES, 8, 8, 4)).astype(np.float32)
    if method == "dpmpp_2m":
        theirs = diffusers.TextToVideoSDPipeline(**theirs.components)
        theirs.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
        theirs.set_progress_bar_config(disable=True)
    latents = torch.tensor(noise).permute(0, 4, 1, 2, 3)
    want = theirs(
        PROMPT, num_frames=FRAMES, num_inference_steps=STEPS, guidance_scale=9.0, latents=latents, output_type="np"
    ).frames
    got = ours.clips([PROMPT], seconds=FRAMES / published.FPS, steps=STEPS, method=method, guidance=9.0, noise=noise)
    assert got.shape == want.shape == (1, FRAMES, 16, 16, 3) and got.dtype == np.uint8
    assert want.std() > 0.1 and np.mean((want > 0) & (want < 1)) > 0.5  # it is neither flat nor cut off
    assert np.abs(got / 255 - want).mean() <= 1 / 255


def test_the_command_writes_a_video_without_sound(ours, folder, tmp_path, command, monkeypatch):
    monkeypatch.setattr(published, "load", lambda path, lora: ours)  # it has compiled the program
    out = tmp_path / "clip.mp4"
    options = [f"--weights={folder}", f"--prompt={PROMPT}", "--seconds=0.375", "--steps=10", f"--out={out}"]
    done = command(sample, *options)
    assert done.code == 0, done.err
    assert media.probe(out) == {
        "duration": FRAMES / published.FPS,
        "has_audio": False,
        "size": (256, 256),
        "fps": published.FPS,
    }
    video = media.read_video(out, fps=8, size=16, sample_rate=8000)[0]
    assert video.shape == (FRAMES, 16, 16, 3) and video.std() > 20


@pytest.mark.parametrize(
    "options, said",
    [
        (["--image=x.png"], "--image is not for a published model: leave it out"),
        (["--lag=0"], "--lag is not for a published model"),
        (["--lora=none.safetensors"], "none.safetensors is missing"),
        (["--workdir=x"], "give only one of --workdir and --weights"),
    ],
)
def test_wrong_options_are_one_line(folder, tmp_path, command, options, said):
    done = command(sample, f"--weights={folder}", "--prompt=x", f"--out={tmp_path}/x.mp4", *options)
    assert done.code == 2 and len(done.err) == 1 and said in done.err[0]


def change_json(name, **values):
    def spoil(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return spoil


@pytest.mark.parametrize(
    "fault, said",
    [
        (change_json("model_index.json", _class_name="StableDiffusionPipeline"), "no published pipeline 'Stable"),
        (change_json("unet/config.json", _class_name="UNet2DModel"), "holds a UNet2DModel, where a UNet3DCond"),
        (
            change_json("unet/config.json", cross_attention_dim=12),
            "cross_attention_dim is 12, but the other parts need 16",
        ),
        (change_json("unet/config.json", norm_eps="1"), "unet: norm_eps=1 is no value for UNet3DConditionModel"),
        (change_json("text_encoder/config.json", vocab_size=99), "tokens, but the text encoder only 99"),
        (change_json("text_encoder/config.json", use_attention_mask=True), "use_attention_mask is not supported"),
        (lambda folder: shutil.rmtree(folder / "vae"), "vae has no config.json"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "has no tokenizer"),
        (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler_config.json is missing"),
    ],
)
def test_a_bad_folder_is_one_line(folder, tmp_path, fault, said):
    shutil.copytree(folder, tmp_path / "bad")
    fault(tmp_path / "bad")
    with pytest.raises(UserError, match=said) as error:
        published.load(tmp_path / "bad")
    assert "\n" not in str(error.value)


def test_clips_depend_on_seed_and_number_alone(ours):
    make = functools.partial(ours.clips, seconds=FRAMES / published.FPS, steps=STEPS)
    both = make([PROMPT, PROMPT], seed=1)
    np.testing.assert_array_equal(make([PROMPT], seed=1), both[:1])
    assert np.abs(both[0].astype(int) - both[1]).mean() > 2  # each clip has its own noise


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(size=(15, 16)), r"size=\(15, 16\) must be multiples of 2 pixels"),
        (dict(seconds=float("nan")), "seconds=nan: give a length above 0"),
        (dict(guidance=float("nan")), "guidance=nan must be a finite number"),
        (dict(steps=1001), "has 1000 levels: give fewer steps"),
        (dict(method="euler"), "no method 'euler'"),
    ],
)
def test_options_without_sense(ours, options, said):
    with pytest.raises(UserError, match=said):
        ours.clips([PROMPT], **options)
