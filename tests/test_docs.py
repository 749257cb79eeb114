"""The README and docs/: their commands run, their links and names exist, their tables follow from the source.

A ```sh block runs line by line, at a tiny setting, unless an HTML comment `<!-- not run: reason -->` stands above it.
Of a block that is not run, the flags of our commands are parsed, and the cloud scripts print what they would run.
"""

import ast
import functools
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.helpers import ROOT
from vdm_jax.data import media, writing
from vdm_jax.run import cli
from vdm_jax.settings import flat, setting

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run: ([^>]+) -->\n)?```(\w*)\n(.*?)^```$", re.M | re.S)
COMMANDS = ("train", "sample", "evaluate", "weights", "bench", "dry_run", "overview", "app", "prepare")
CLOUD = ("tpu_vm", "queued", "slurm", "gke")
SHELL = ("export", ".", "pip", "hf", "apt-get")  # first words of lines that are no command of ours
WORDS = {  # of training: the data and the machine of a user, which the tiny run has not
    "--config.denoiser.steps", "--config.denoiser.batch_size", "--config.data.size", "--config.data.buckets",
    "--profile",
}  # fmt: skip


def blocks(page, language):
    """[(its lines, the reason why it is not run or None)] of the fenced blocks of a page."""
    found = [(text, reason) for reason, name, text in BLOCK.findall(page.read_text()) if name == language]
    return [(text.replace("\\\n", " ").splitlines(), reason or None) for text, reason in found]


def commands(page):
    """[(words of a command line, reason why it is not run or None)] of the sh blocks of a page."""
    lines = [(shlex.split(line, comments=True), why) for part, why in blocks(page, "sh") for line in part]
    return [(words, why) for words, why in lines if words]


def all_commands():
    return [(page, words, why) for page in PAGES for words, why in commands(page)]


def ours(words):
    """-> (name of a command of this package, its arguments), or None."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[:2] == ["python", "-m"] and words[2].startswith("vdm_jax."):
        return words[2].removeprefix("vdm_jax."), words[3:]
    return None


def parse(name, arguments):
    """Parses the flags of a command and runs nothing. Raises UserError, or a SystemExit."""
    script = importlib.import_module(f"vdm_jax.{name}")
    cli.call(SimpleNamespace(__name__=name, define_flags=script.define_flags, main=lambda argv: None), *arguments)


def unique(rows):
    """The rows without repetitions, in order, with readable ids for pytest."""
    rows = list(dict.fromkeys(rows))
    return [pytest.param(*row, id=" ".join(row[0])[:90]) for row in rows]


def run_here():
    """[(command, arguments)] of our commands in blocks that are run."""
    found = [ours(words) for _, words, why in all_commands() if not why and ours(words)]
    return unique([((name, *arguments),) for name, arguments in found])


def parsed():
    """[(command, arguments)] of all our commands in blocks and in inline code."""
    found = [ours(words) for _, words, _ in all_commands()]
    for page in PAGES:
        for code in re.findall(r"`(python -m vdm_jax\.[^`]+)`", BLOCK.sub("", page.read_text())):
            if "..." not in code:
                found.append(ours(shlex.split(code)))
    return unique([((name, *arguments),) for name, arguments in filter(None, found)])


# ------------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def desk(tiny_run, tmp_path_factory):
    """A folder with the files that the commands name, and a finished run in it."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(tiny_run, folder / "run")
    size, fps, rate, frames = (tiny.get_config().data[key] for key in ("size", "fps", "sample_rate", "frames"))
    video = np.random.default_rng(0).integers(0, 256, (2 * frames, *size, 3), np.uint8)
    audio = np.zeros(int(2 * frames * rate / fps), np.float32)
    for name in ("old.mp4", "a.mp4", "b.mp4", "silent.mp4"):
        writing.write_mp4(folder / name, video, audio, fps, rate)
    (folder / "films").mkdir()
    shutil.copyfile(folder / "old.mp4", folder / "films" / "film.mp4")
    Image.fromarray(video[0]).save(folder / "first.png")
    write_wav(folder / "taps.wav", audio, rate)
    (folder / "prompts.txt").write_text("a red circle moving right\n")
    return folder


def write_wav(path, audio, rate):
    import wave

    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((audio * 32767).astype("<i2").tobytes())


def at_tiny_setting(name, arguments, desk):
    """The arguments of a command as the docs have them -> those that run it in seconds, in the folder `desk`."""
    given = dict(word.partition("=")[::2] for word in arguments if word.startswith("--"))
    words = [word for word in arguments if not word.startswith("--")]
    if "--config" in given:
        given["--config"] = str(ROOT / "tests" / "tiny.py")
    for key in WORDS & set(given):
        del given[key]
    if name == "train":  # the stage that compiles fastest takes one step more than the run has
        given |= {"--workdir": str(desk / "run"), "--stage": "audio_autoencoder", "--config.validation.every": "0"}
        given["--config.audio_autoencoder.steps"] = "9"
    if name in ("sample", "evaluate") and "--films" not in given:
        given |= {"--workdir": str(desk / "run"), "--steps": "2"}
        given.pop("--weights", None)
    if name == "sample" and "--seconds" in given:
        given["--seconds"] = "1"
    if name == "evaluate" and "--films" not in given:
        given |= {"--suite": given.get("--suite", "prompts"), "--count": "2", "--lengths": "1,2"}
    if name == "weights" and words[0] == "import":
        given["--workdir"] = str(desk / "imported")
        shutil.rmtree(desk / "imported", ignore_errors=True)
    if name == "weights" and words[0] == "export":
        given["--workdir"] = str(desk / "run")
    if name == "weights" and words[0] == "verify":
        words = ["verify", str(desk / ("run" if words[1].startswith("runs/") else words[1]))]
    if name == "prepare":
        pytest.importorskip("apache_beam")
    if name == "bench":
        given |= {"--repeats": "1", "--stage": "audio_autoencoder"}
        given |= {"--steps": "2"} if given.get("--part") == "sample" else {}
    return [*words, *(f"{key}={value}" for key, value in given.items())]


@pytest.mark.parametrize("line", parsed())
def test_the_flags_of_a_command_exist(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    parse(line[0], line[1:])


@pytest.mark.parametrize("line", run_here())
def test_a_command_runs(line, command, desk, monkeypatch):
    monkeypatch.chdir(desk)
    name, *arguments = line
    script = importlib.import_module(f"vdm_jax.{name}")
    done = command(script, *at_tiny_setting(name, arguments, desk))
    assert done.code == 0, done.err
    out = dict(word.partition("=")[::2] for word in arguments).get("--out")
    assert out is None or (desk / out).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_that_are_not_run_are_marked_and_hold(page):
    """Other lines: scripts exist, and the cloud scripts print; extras are in setup.py."""
    for words, why in commands(page):
        if ours(words):
            continue
        first = words[0]
        assert why, f"{page.name}: mark this block with <!-- not run: reason -->: {' '.join(words)}"
        if first.startswith("launch/"):
            name = Path(first).stem
            place = words.index("--") if "--" in words else len(words)
            asked = [*words[1:place], "--print", *words[place:]] if name in CLOUD else ["--help"]
            done = subprocess.run([ROOT / first, *asked], capture_output=True, text=True, stdin=subprocess.DEVNULL)
            assert done.returncode == 0 and done.stdout, done.stderr
        elif words[:2] == ["python", "-m"]:
            source = (ROOT / f"{words[2].replace('.', '/')}.py").read_text()
            if "cli.define_config()" in source:
                source += (ROOT / "vdm_jax" / "run" / "cli.py").read_text()
            for flag in re.findall(r"--(\w+)", " ".join(words[3:])):
                assert re.search(rf'"(--)?{flag}"', source), f"{page.name}: {words[2]} has no --{flag}"
        elif first == "python":
            assert (ROOT / words[1]).exists()
        elif first == "pip":
            for extra in re.findall(r"\[(\w+)\]", words[-1]):
                assert f'"{extra}": [' in (ROOT / "setup.py").read_text()
        else:
            assert first in SHELL, f"{page.name}: {' '.join(words)}"


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    """As it stands, with the shipped weights; in two steps of sampling, as the code is little optimized in tests."""
    import vdm_jax

    def load_for_two_steps(*arguments, load=vdm_jax.load):
        pipe = load(*arguments)
        pipe.config.sample.steps = 2
        return pipe

    monkeypatch.setattr(vdm_jax, "load", load_for_two_steps, raising=False)
    monkeypatch.chdir(tmp_path)
    ((lines, why),) = blocks(ROOT / "README.md", "python")
    assert not why and len([line for line in lines if line]) <= 15
    exec("\n".join(lines), {"__name__": "readme"})
    for name in ("clip.mp4", "longer.mp4", "dubbed.mp4"):
        assert media.probe(tmp_path / name)["has_audio"]


def test_the_python_of_the_pages_is_of_names_that_exist():
    """Blocks of the pages use no more than the README's block, which is run, and what the API page promises."""
    import vdm_jax

    for page in PAGES:
        for lines, _ in blocks(page, "python"):
            for node in ast.walk(ast.parse("\n".join(lines))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vdm_jax":
                    assert hasattr(vdm_jax, node.attr)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pipe":
                    assert hasattr(vdm_jax.Pipeline, node.attr)


# ---------------------------------------------------------------------------------------------------- names and text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_pictures_and_paths_exist(page):
    text = BLOCK.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in link or (page.parent / link).exists(), link
    for path in re.findall(r"`((?:vdm_jax|configs|launch|tests|docs|notebooks)/[\w/.*]+)`", text):
        assert list(ROOT.glob(path.rstrip("/"))), path


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_citation_has_the_version_of_the_package():
    version = re.search(r'version="([^"]+)"', (ROOT / "setup.py").read_text())[1]
    assert re.findall(r"^\s*version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M) == [version, version]
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text()


def hooks():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return importlib.import_module("hooks")
    finally:
        sys.path.remove(str(ROOT / "docs"))


def test_the_reference_has_every_setting_with_its_comment():
    rows = {key: (value, comment) for key, value, comment in hooks().settings()}
    config = tiny.common.get_config()
    assert {key: value for key, (value, _) in rows.items() if value is not None} == flat(config.to_dict())
    source = (ROOT / "configs" / "common.py").read_text()
    # Beside the key; of the keys that all stages share; above the key, on two lines; of a group.
    for key in ("data.fps", "denoiser.learning_rate", "sample.context_noise", "mesh"):
        comment = rows[key][1]
        assert len(comment) > 8 and comment in source.replace("\n            # ", " "), key


def test_the_reference_has_the_rules_of_every_setting():
    lines = hooks().settings_tables().splitlines()
    for key in flat(tiny.common.get_config().to_dict()):
        (line,) = [line for line in lines if line.startswith(f"| `{key}` |")]
        assert line.endswith(f" | {setting(key).allowed.words} | {setting(key).rule} |")


def test_the_figure_of_noise_levels_is_what_its_script_draws(tmp_path):
    pytest.importorskip("matplotlib")
    script = ROOT / "docs" / "noise_levels.py"
    subprocess.run([sys.executable, script, tmp_path / "drawn.png"], check=True)
    stored, drawn = (np.asarray(Image.open(path)) for path in (ROOT / "docs/noise_levels.png", tmp_path / "drawn.png"))
    assert stored.shape == drawn.shape and np.abs(stored.astype(int) - drawn).mean() < 5  # fonts differ by machine
    assert (ROOT / "docs" / "noise_levels.png").stat().st_size < 150_000


@functools.cache
def messages():
    """[the string literals of the package, with … for what an f-string fills in]."""
    found = []
    for path in sorted((ROOT / "vdm_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.BinOp) or not isinstance(node, ast.JoinedStr | ast.Constant):
                continue
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
            found.append(" ".join(text.split()))
    return found


def listed():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    return re.findall(r"^\| `([^`]+)` \|", text, re.M)


@pytest.mark.parametrize("message", listed())
def test_a_message_of_the_troubleshooting_page_is_one_of_the_package(message):
    pieces = [piece.strip() for piece in message.split("…") if len(piece.strip()) > 3]
    assert pieces and any(all(piece in text for piece in pieces) for text in messages()), message
