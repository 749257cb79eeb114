"""The command line of sampling: an MP4 with sound, and one clear line for each wrong input."""

import av
import numpy as np
import pytest

from tests import tiny
from tests.conftest import write_run
from tests.helpers import finish, start
from vdm_jax import sample
from vdm_jax.data import media, writing

RATE = {"fps": 8, "sample_rate": 2000}


def streams(path):
    """Codec names, frames and seconds of sound, by PyAV."""
    with av.open(str(path)) as file:
        codecs = {stream.type: stream.codec_context.name for stream in file.streams}
        frames = sum(1 for _ in file.decode(video=0))
    with av.open(str(path)) as file:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)])
        return codecs, frames, len(sound) / file.streams.audio[0].rate, np.abs(sound).max()


def test_a_prompt_becomes_an_mp4_with_sound(tiny_run, tmp_path):
    out = tmp_path / "new folder" / "clip.mp4"
    prompt = "a red circle moving right " + "and right " * 20
    options = [f"--workdir={tiny_run}", f"--prompt={prompt}", "--seconds=1", f"--out={out}"]
    code, _, err = finish(start("-m", "vdm_jax.sample", *options))
    assert code == 0, err
    err = "\n".join(err)
    codecs, frames, seconds, loudness = streams(out)
    assert codecs == {"video": "h264", "audio": "aac"} and frames == 9
    assert 9 / 8 <= seconds < 9 / 8 + 0.1 and loudness > 0.01
    assert "seconds=1 rounded to 1.125 s: 9 frames at 8 fps, 1 and then 2 for each latent frame" in err
    assert "text truncated: kept 94 of its 226 bytes" in err


def test_the_process_says_one_line_and_ends_with_two(tmp_path):
    process = start("-m", "vdm_jax.sample", "--prompt=x", f"--out={tmp_path}/x.mp4", "--method=euler")
    told = "error: flag --method=euler: value should be one of <ddpm|ddim|dpmpp_2m|heun>"
    assert finish(process) == (2, "", [told])


def test_a_file_of_prompts_becomes_a_folder(tiny_run, tmp_path, command):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two\na red circle\n\na blue square ../../etc\n")
    done = command(sample, f"--workdir={tiny_run}", f"--prompts={prompts}", f"--out={tmp_path / 'clips'}", "--steps=2")
    assert done.code == 0
    assert sorted(p.name for p in (tmp_path / "clips").iterdir()) == ["000.mp4", "001.mp4", "contact_sheet.png"]
    first, second = (media.read_video(tmp_path / "clips" / f"00{i}.mp4", size=(16, 24), **RATE)[0] for i in (0, 1))
    assert first.shape == (5, 16, 24, 3) and np.abs(first.astype(int) - second).mean() > 1


def packets(path, kind):
    with av.open(str(path)) as file:
        return [bytes(packet) for packet in file.demux(**{kind: 0}) if packet.size]


def test_a_given_film_or_sound_is_in_the_output_as_it_is(tiny_run, tmp_path, command):
    film, hum = tmp_path / "film.mp4", tmp_path / "hum.wav"
    pixels = np.random.default_rng(0).integers(0, 256, (14, 40, 56, 3), np.uint8)
    writing.write_mp4(film, pixels, np.sin(np.arange(16800) / 9), 12, 12_000)
    writing.write_wav(hum, np.sin(np.arange(4410) / 9), 4410)
    made = {}
    for flag, given in (("video", film), ("audio", film), ("audio", hum)):
        out = tmp_path / f"{flag}_{given.stem}.mp4"
        options = [f"--workdir={tiny_run}", "--prompt=x", f"--{flag}={given}", "--steps=2", f"--out={out}"]
        assert command(sample, *options).code == 0
        made[out.stem] = out
    assert packets(made["video_film"], "video") == packets(film, "video")
    assert packets(made["video_film"], "audio") != packets(film, "audio")
    assert packets(made["audio_film"], "audio") == packets(film, "audio")
    assert streams(made["video_film"])[1:2] == (14,) and streams(made["video_film"])[2] >= 14 / 12
    codecs, frames, seconds, _ = streams(made["audio_hum"])
    assert codecs == {"video": "h264", "audio": "flac"} and frames == 8 and seconds == 1
    np.testing.assert_array_equal(*(media.read_audio(path, 4410, 1) for path in (hum, made["audio_hum"])))


def test_a_clip_becomes_a_sound_or_pictures(tiny_run, tmp_path, command):
    for name in ("clip.mp4", "clip.wav", "clip.png"):
        assert command(sample, f"--workdir={tiny_run}", "--prompt=x", "--steps=2", f"--out={tmp_path / name}").code == 0
    frames = sorted(path.name for path in tmp_path.glob("*.png"))
    assert frames == [f"clip_{number:05d}.png" for number in range(5)]
    assert media.read_image(tmp_path / frames[0]).shape == (16, 24, 3)
    assert media.sound_seconds(tmp_path / "clip.wav") == 0.625


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_run):
    """Names that the wrong inputs below mention."""
    folder = tmp_path_factory.mktemp("files")
    write_run(folder / "begun", tiny.get_config(), names=("video_autoencoder",))
    (folder / "empty.txt").write_text("\n# nothing but this\n")
    (folder / "prompts.txt").write_text("a red circle\n")
    (folder / "text.mp4").write_text("this is no video")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_text('{"data": ')
    return {"files": folder, "run": tiny_run}


WRONG = {
    "no prompt": (["--out={files}/x.mp4"], "give either --prompt"),
    "two prompts": (["--prompt=x", "--prompts={files}/prompts.txt", "--out={files}/x.mp4"], "give either --prompt"),
    "empty prompt file": (["--prompts={files}/empty.txt", "--out={files}/x"], "holds no prompt"),
    "no prompt file": (["--prompts={files}/none.txt", "--out={files}/x"], "No such file"),
    "no out": (["--prompt=x"], "--out is missing"),
    "two sources": (
        ["--workdir={run}", "--weights={run}", "--prompt=x", "--out={files}/x.mp4"],
        "give only one of --workdir and --weights",
    ),
    "not mp4": (["--prompt=x", "--out={files}/x.avi"], "must end in .mp4 or .wav or .png"),
    "out in a file": (["--workdir={run}", "--prompt=x", "--out={files}/text.mp4/x.mp4"], "cannot make the folder"),
    "argument": (["--prompt=x", "--out={files}/x.mp4", "more"], "unexpected argument 'more'"),
    "unknown option": (["--prompt=x", "--out={files}/x.mp4", "--step=3"], "Did you mean: steps"),
    "no steps": (["--prompt=x", "--out={files}/x.mp4", "--steps=0"], "--steps"),
    "seed": (["--prompt=x", "--out={files}/x.mp4", "--seed=4294967296"], "--seed"),
    "guidance": (["--prompt=x", "--out={files}/x.mp4", "--guidance=much"], "--guidance"),
    "no run": (["--workdir={files}/none", "--prompt=x", "--out={files}/x.mp4"], "there is no folder"),
    "unfinished run": (["--workdir={files}/begun", "--prompt=x", "--out={files}/x.mp4"], "stage audio_autoencoder"),
    "damaged run": (["--workdir={files}/damaged", "--prompt=x", "--out={files}/x.mp4"], "config.json is damaged"),
    "negative": (["--workdir={run}", "--prompt=x", "--out={files}/x.mp4", "--seconds=-1"], "seconds=-1"),
    "nan": (["--workdir={run}", "--prompt=x", "--out={files}/x.mp4", "--seconds=nan"], "seconds=nan"),
    "guidance nan": (["--workdir={run}", "--prompt=x", "--out={files}/x.mp4", "--guidance=nan"], "guidance.text=nan"),
    "no video": (["--workdir={run}", "--prompt=x", "--out={files}/x.mp4", "--video={files}/text.mp4"], "text.mp4"),
    "no image": (["--workdir={run}", "--prompt=x", "--out={files}/x.mp4", "--image={files}/text.mp4"], "text.mp4"),
    "no sound": (["--workdir={run}", "--prompt=x", "--out={files}/x.mp4", "--audio={files}/none.wav"], "none.wav"),
    "one between": (["--workdir={run}", "--prompt=x", "--out={files}/x.mp4", "--between={files}/a"], "wants two clips"),
    "long sound": (
        ["--workdir={run}", "--prompt=x", "--out={files}/x.mp4", "--audio={files}/a.wav", "--seconds=9.125"],
        "the clip is as long as the given audio: leave out seconds",
    ),
    "two given": (
        ["--workdir={run}", "--prompt=x", "--out={files}/x.mp4", "--image={files}/a.png", "--audio={files}/a.wav"],
        "only one of image",
    ),
}


@pytest.mark.parametrize("options, told", WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_clear_line(command, files, options, told):
    done = command(sample, *(option.format(**files) for option in options))
    assert done.code == 2 and len(done.err) == 1
    assert done.err[0].startswith("error: ") and told in done.err[0]
    assert not list(files["files"].glob("x*"))


def test_a_clip_is_continued_and_two_are_joined(tiny_run, tmp_path, command):
    ramp = np.arange(9)[:, None, None, None] * 20 + np.zeros((9, 16, 24, 3))
    writing.write_mp4(tmp_path / "a.mp4", ramp.astype(np.uint8), np.sin(np.arange(9 * 250) / 3), **RATE)
    common = [f"--workdir={tiny_run}", "--prompt=a red circle", "--steps=2", f"--out={tmp_path / 'out.mp4'}"]
    done = command(sample, *common, f"--continue={tmp_path / 'a.mp4'}", "--seconds=1.125")
    assert done.code == 0
    before = media.read_video(tmp_path / "a.mp4", size=(16, 24), **RATE)[0]
    after, sound = media.read_video(tmp_path / "out.mp4", size=(16, 24), **RATE)
    assert len(after) == 9 + 9 and np.abs(sound[: 9 * 250]).max() > 0.8
    assert np.abs(after[:9].astype(int) - before).mean() < 6  # H.264 twice
    done = command(sample, *common, f"--between={tmp_path / 'a.mp4'},{tmp_path / 'a.mp4'}")
    assert done.code == 0 and len(media.read_video(tmp_path / "out.mp4", size=(16, 24), **RATE)[0]) == 5
