"""The page to try tasks: what a filled form means, and the page itself in a browser."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import socket
import threading
import time
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest

import vdm_jax
from tests import tiny
from tests.helpers import finish, start
from vdm_jax import app, sample
from vdm_jax.data import media, writing
from vdm_jax.errors import UserError

CONFIG = tiny.get_config()
RATES = dict(fps=8, size=(16, 24), sample_rate=2000)  # of CONFIG; a clip in training has 5 frames, 0.625 s
FORM = dict.fromkeys(app.FIELDS) | dict(task="text", prompt="a red circle", seconds=0.625, seed=3, steps=4, guidance=4)
LAST = vdm_jax.Clip(np.zeros((5, 16, 24, 3), np.uint8), None, 8, 2000, scene="the state of a scene")


# -------------------------------------------------------------------------------------------- what a form means


def test_words_become_arguments_and_a_command():
    arguments, command = app.request(FORM, CONFIG, {"workdir": "my runs/tiny"})
    assert arguments == dict(prompt="a red circle", seconds=0.625, seed=3, steps=4, guidance={"text": 4.0})
    assert command == (
        "python -m vdm_jax.sample --workdir='my runs/tiny' --prompt='a red circle' "
        "--seconds=0.625 --seed=3 --steps=4 --guidance=4.0 --save-state=scene.state --out=clip.mp4"
    )


@pytest.mark.parametrize(
    "task, files, argument, flag, weights",
    [
        ("image", {"picture": "/x/a,b.png"}, {"image": "/x/a,b.png"}, "--image=a,b.png", ["text"]),
        ("continue", {"clip": "/x/a.mp4"}, {"clip": "/x/a.mp4"}, "--continue=a.mp4", ["text", "text_continue"]),
        (
            "between", {"clip": "/x/a,.mp4", "second_clip": "/y/b.mp4"}, {"between": ["/x/a,.mp4", "/y/b.mp4"]},
            '--between="a,.mp4","b.mp4"', ["text", "text_continue"],
        ),
        ("foley", {"clip": "/x/a.mp4"}, {"video": "/x/a.mp4"}, "--video=a.mp4", ["text", "text_cross_modal"]),
        ("audio", {"sound": "/x/a.wav"}, {"audio": "/x/a.wav"}, "--audio=a.wav", ["text", "text_cross_modal"]),
    ],
)  # fmt: skip
def test_files_become_arguments_and_flags(task, files, argument, flag, weights):
    """Files of other tasks do not count, and a flag holds the name that the user's file has."""
    others = {field: "/z/other" for field in app.FILES}
    arguments, command = app.request(FORM | others | files | {"task": task}, CONFIG, {})
    assert {key: arguments[key] for key in argument} == argument
    numbers = {"seed", "steps", *({"seconds"} if task not in ("foley", "audio") else ())}
    assert set(arguments) == {"prompt", "guidance", *numbers, *argument}
    assert arguments["guidance"] == dict.fromkeys(weights, 4.0)
    words = shlex.split(command)
    assert flag in words and "other" not in command
    assert [w for w in words if w.startswith("--guidance")] == [
        "--guidance=4.0", *(f"--guidance.{name}=4.0" for name in weights[1:])
    ]  # fmt: skip


def test_the_command_of_every_task_has_flags_that_sample_knows(command):
    """vdm_jax.sample refuses a command line only because of the file that is missing."""
    for task in app.TASKS:
        form = FORM | {field: f"/nowhere/{field}" for field in app.FILES} | {"task": task, "seconds": 1.5}
        words = shlex.split(app.request(form, CONFIG, {"workdir": "/nowhere"}, LAST)[1])
        done = command(sample, *words[3:])
        assert done.code == 2 and "/nowhere" in done.err[-1] and "flag" not in done.err[-1], done.err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"task": "picture"}, "no task 'picture'"),
        ({"seconds": None}, "seconds is None: enter a number from 0.1 to 60"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"seconds": 61}, "seconds is 61"),
        ({"seed": -1}, "seed is -1: enter a number from 0 to 2147483647"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance": 21}, "guidance is 21"),
        ({"task": "rollout"}, "a long clip has more than 0.625 s: enter more, or choose 'A clip from words'"),
        ({"task": "go_on"}, "there is no result to go on with: make a clip first"),
        ({"task": "image"}, "the picture is missing: choose a file"),
        ({"task": "between", "clip": "a.mp4"}, "the second clip is missing: choose a file"),
    ],
)
def test_wrong_forms(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        app.request(FORM | change, CONFIG, {})


def test_every_task_begins_with_a_form_that_is_right():
    assert tuple(app.TASKS) == ("text", "image", "continue", "between", "foley", "audio", "rollout", "go_on")
    for task in app.TASKS:
        seconds, guidance = app.defaults(task, CONFIG)
        files = {field: "x" for field in app.TASKS[task].files}
        app.request(FORM | files | {"task": task, "seconds": seconds, "guidance": guidance}, CONFIG, {}, LAST)
    assert app.defaults("text", CONFIG) == (0.625, 4.0) and app.defaults("continue", CONFIG) == (0.625, 1.0)


# ------------------------------------------------------------------------------------------------ while it works


@pytest.fixture(scope="module")
def pipe(tiny_run):
    return app.WatchedPipeline(vdm_jax.load(tiny_run))


def test_a_long_clip_is_watched(pipe, monkeypatch):
    """Windows are counted, the levels are of the last window, and its context frames are light from the start."""
    shares = []
    inner = type(pipe.sampler).window

    def sampled(self, *arguments, **options):
        shares.append((pipe.message, pipe.share()))
        return inner(self, *arguments, **options)

    monkeypatch.setattr(type(pipe.sampler), "window", sampled)
    arguments = app.request(FORM | {"task": "rollout", "seconds": 1.0}, CONFIG, {})[0]
    pipe.begin()
    clip = pipe.make(arguments)
    # 9 frames: a window of 5, and two windows that each add 2.
    assert len(clip.video) == 9
    assert [message for message, _ in shares] == [f"generating part {i} of 3" for i in (1, 2, 3)]
    assert [share for _, share in shares] == pytest.approx([0, 1 / 3, 2 / 3], abs=0.01) and pipe.share() == 1
    assert pipe.levels["video"].shape == (5, 3)
    assert pipe.levels["video"][0, 0] > 0 > pipe.levels["video"][0, 2]
    assert "seconds=1 rounded to 1.125 s" in pipe.notes[0]
    assert pipe.handler not in app.logger.handlers


def test_the_page_goes_on_with_its_newest_clip(pipe):
    pipe.begin()
    first = pipe.make(app.request(FORM, CONFIG, {})[0])
    arguments, command = app.request(FORM | {"task": "go_on"}, CONFIG, {}, first)
    pipe.begin()
    whole = pipe.make(arguments)
    np.testing.assert_array_equal(whole.video[:5], first.video)
    assert len(whole.video) == 10 and "--resume-state=scene.state" in command
    without = dataclasses.replace(first, scene=None)  # as a clip has it whose sound was given
    assert "--continue=clip.mp4" in app.request(FORM | {"task": "go_on"}, CONFIG, {}, without)[1]


def test_a_clip_that_is_too_long(pipe, tmp_path, monkeypatch):
    video = np.zeros((20, 16, 24, 3), np.uint8)
    writing.write_mp4(tmp_path / "long.mp4", video, None, 8, 2000)
    monkeypatch.setattr(app, "MAX_SECONDS", 2)
    for form in [
        {"task": "foley", "clip": tmp_path / "long.mp4"},
        {"task": "continue", "clip": tmp_path / "long.mp4"},
        {"task": "between", "clip": tmp_path / "long.mp4", "second_clip": tmp_path / "long.mp4"},
    ]:
        with pytest.raises(UserError, match="'long.mp4' lasts 2 s: cut it to 2 s|'long.mp4' lasts 3 s: cut it to 2 s"):
            pipe.make(app.request(FORM | form, CONFIG, {})[0])


# ---------------------------------------------------------------------------------------------- the page itself


def wait(condition, what, seconds=300):
    """What `condition` returns, as soon as that is true."""
    until = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < until, f"no {what} after {seconds} s"
        time.sleep(0.2)
    return result


@pytest.fixture(scope="module")
def site(tiny_run, tmp_path_factory):
    """The page of the tiny run: its address, its process, and the folder for temporary files."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("temporary")
    own = dict(TMPDIR=str(folder), XDG_CACHE_HOME=str(tmp_path_factory.mktemp("cache")), no_proxy="127.0.0.1")
    process = start("-m", "vdm_jax.app", f"--workdir={tiny_run}", f"--port={port}", **own)
    too_late = threading.Timer(300, process.kill)
    too_late.start()
    try:
        assert any("in a browser" in line for line in process.stderr), "the page does not start"
        too_late.cancel()
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", process=process, folder=folder, port=port)
    finally:
        too_late.cancel()
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser is driven by selenium")
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        pytest.skip("there is no chromium, or no chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


def test_the_page_in_a_browser(site, browser, tiny_run, tmp_path, command):
    def find(selector):
        return browser.find_elements("css selector", selector)

    def click(element):  # by script: the page may still be moving into place
        browser.execute_script("arguments[0].click()", element)

    def generate(expected):
        click(find("#generate")[0])
        wait(lambda: any(line.text.startswith(expected) for line in find("#message p")), expected)

    # 1. A prompt becomes a clip: the same as by the API, and the same as by the command that the page shows.
    browser.get(site.url)
    wait(lambda: find("#generate"), "page")
    generate("0.625 s, 5 frames.")
    video = wait(lambda: find("#result video[src]"), "video")[0]
    duration = wait(lambda: browser.execute_script("return arguments[0].duration", video), "duration")
    assert 0.625 <= duration < 0.7
    assert wait(lambda: find("#levels img"), "matrix")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(video.get_attribute("src")) as answer:
        (tmp_path / "page.mp4").write_bytes(answer.read())
    pixels, sound = media.read_video(tmp_path / "page.mp4", **RATES)
    assert pixels.shape == (5, 16, 24, 3) and np.abs(sound).max() > 0.01

    clip = vdm_jax.load(tiny_run)("a red circle moving right", seed=0)
    clip.save(tmp_path / "api.mp4")
    expected = media.read_video(tmp_path / "api.mp4", **RATES)
    np.testing.assert_array_equal(pixels, expected[0])
    np.testing.assert_array_equal(sound, expected[1])

    words = shlex.split(find("#command textarea")[0].get_attribute("value"))
    assert words[:3] == ["python", "-m", "vdm_jax.sample"] and words[-1] == "--out=clip.mp4"
    assert command(sample, *words[3:-1], f"--out={tmp_path / 'command.mp4'}").code == 0
    assert (tmp_path / "command.mp4").read_bytes() == (tmp_path / "page.mp4").read_bytes()

    # 2. A file that is something else gives one clear line. The file of one task does not disturb another task.
    for name, task, field, shown in [
        ("text.mp4", "Continue a clip", "#clip", "video"),
        ("text.png", "Animate a picture", "#picture", "img"),
    ]:
        (tmp_path / name).write_text("this is only text")
        click(next(label for label in find("label") if label.text == task))
        wait(lambda: find(f"{field} input[type=file]"), "place")[0].send_keys(str(tmp_path / name))  # noqa: B023
        wait(lambda: find(f"{field} {shown}"), "upload")  # noqa: B023
        generate(f"Error: cannot read '{name}': ")
        assert not find("#result video[src]")

    # 3. The page fits a phone.
    phone = dict(width=390, height=844, deviceScaleFactor=1, mobile=True)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390

    # 4. The page asked for nothing from other machines, and could not.
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    local = (site.url, "data:", "blob:", "chrome:")
    assert len(asked) > 10 and not [url for url in asked if not url.startswith(local)]
    blocked = browser.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "document.addEventListener('securitypolicyviolation', e => done(e.blockedURI));"
        "fetch('http://localhost:1/').catch(() => setTimeout(() => done('not blocked'), 1000));"
    )
    assert blocked.startswith("http://localhost:1")


def test_the_page_is_for_this_machine_alone_and_leaves_nothing(site, tiny_run):
    with socket.socket() as other, pytest.raises(OSError):
        other.connect(("127.0.0.2", site.port))  # an address of this machine that the page does not listen on
    assert len(list(site.folder.iterdir())) == 1
    code, _, err = finish(start("-m", "vdm_jax.app", f"--workdir={tiny_run}", f"--port={site.port}"))
    assert code == 2 and err[-1].startswith(f"error: cannot use port {site.port}")
    os.kill(site.process.pid, signal.SIGTERM)
    site.process.communicate(timeout=60)
    assert list(site.folder.iterdir()) == []
