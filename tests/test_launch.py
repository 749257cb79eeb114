"""The launch scripts: what they show, what they run, and that the commands of this package in them exist."""

import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from tests.helpers import ROOT
from vdm_jax.errors import UserError
from vdm_jax.run import cli

LAUNCH = ROOT / "launch"
CLOUD = ("tpu_vm", "queued", "slurm", "gke")
AT = ["--name=one", "--zone=us-west4-a"]
CODE = "--repository=https://example.com/vdm_jax.git"
TRAINING = ["--", "--config=configs/t2v_pod.py", "--workdir=gs://bucket/a run"]

STAND_IN = """#!/usr/bin/env python3
import json, os, pathlib, sys
arguments = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
given = "" if sys.stdin.isatty() else sys.stdin.read()
files = [a.split("=", 2)[2] for a in arguments if a.startswith("--metadata-from-file=")]
scripts = [pathlib.Path(f).read_text() for f in files]
with open(os.environ["RECORD"], "a") as record:
    record.write(json.dumps({"arguments": arguments, "given": given, "scripts": scripts}) + "\\n")
answers = pathlib.Path(os.environ["RECORD"] + ".states")
if "describe" in arguments and answers.exists():
    first, *later = answers.read_text().split("\\n")
    answers.write_text("\\n".join(later))
    print(first)
"""


@pytest.fixture
def launch(tmp_path):
    """call(script, *arguments) -> (CompletedProcess, what the stand-ins for gcloud, sbatch and kubectl recorded)."""
    places, record = tmp_path / "bin", tmp_path / "record"
    places.mkdir()
    for name in ("gcloud", "sbatch", "kubectl"):
        (places / name).write_text(STAND_IN)
        (places / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{places}:{os.environ['PATH']}", "RECORD": str(record)}
    environment["TMPDIR"] = str(tmp_path)

    def call(script, *arguments):
        record.unlink(missing_ok=True)
        command = [str(LAUNCH / f"{script}.sh"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        lines = record.read_text().splitlines() if record.exists() else []
        return done, [json.loads(line) for line in lines]

    call.states = record.with_name("record.states")
    return call


def is_bash(text):
    return subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0


@pytest.mark.parametrize("script", [*CLOUD, "startup", "demo", "test"])
def test_help(launch, script):
    done, asked = launch(script, "--help")
    assert done.returncode == 0 and f"launch/{script}.sh" in done.stdout and not asked


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(["shellcheck", "-x", *map(str, LAUNCH.glob("*.sh"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ------------------------------------------------------------------------------------- the commands of this package


def commands(text):
    """[(module, flags)] of all `-m vdm_jax.MODULE FLAGS` in shell text, or in a YAML list of words."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if not re.search(r"-m vdm_jax\.\w", line) or line.lstrip().startswith("#"):
            continue
        words = list(shlex.shlex(line, posix=True, punctuation_chars=True))
        if "-m" in words:
            place = words.index("-m") + 1
            options = itertools.takewhile(lambda word: word.startswith("-"), words[place + 1 :])
            found.append((words[place], list(options)))
        else:  # the command is inside a quoted word
            found += [command for word in words for command in commands(word)]
    listed = [json.loads(word) for word in re.findall(r'^ *- (".*")$', text, re.M)]
    if "-m" in listed:
        place = listed.index("-m") + 1
        found.append((listed[place], listed[place + 1 :]))
    return found


def parse(module, options):
    """Reads the flags of a command, and runs nothing. Raises UserError, or ModuleNotFoundError."""
    script = importlib.import_module(module)
    nothing = SimpleNamespace(__name__=module, define_flags=script.define_flags, main=lambda argv: None)
    cli.call(nothing, *options)


def examples(text):
    """[(script, arguments)] of the lines in a usage text that call a launch script."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith("launch/")]
    return [(words[0].removeprefix("launch/").removesuffix(".sh"), words[1:]) for words in map(shlex.split, lines)]


@pytest.mark.parametrize("script", CLOUD)
def test_the_examples_of_the_usage_run_and_their_commands_exist(launch, script, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = examples(launch(script, "--help")[0].stdout)
    assert shown
    found = []
    for name, arguments in shown:
        place = arguments.index("--") if "--" in arguments else len(arguments)
        printed, _ = launch(name, *arguments[:place], "--print", *arguments[place:])
        assert name == script and printed.returncode == 0, printed.stderr
        found += commands(printed.stdout)
    assert found
    for module, options in found:
        assert module == "vdm_jax.train" and any(option.startswith("--workdir=") for option in options)
        parse(module, options)


def test_the_commands_of_the_demo_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands((LAUNCH / "demo.sh").read_text())
    assert [module for module, _ in found] == ["vdm_jax.sample", "vdm_jax.evaluate", "vdm_jax.train"]
    for module, options in found:
        assert len(options) > 1
        parse(module, options)


@pytest.mark.parametrize("module, options", [
    ("vdm_jax.no_such_command", []),
    ("vdm_jax.train", ["--config=configs/none.py"]),
    ("vdm_jax.train", ["--config=configs/world.py", "--config.denoiser.step=1"]),
    ("vdm_jax.evaluate", ["--prompts=3"]),
    ("vdm_jax.evaluate", ["--suite=none"]),
])  # fmt: skip
def test_a_wrong_command_would_be_found(module, options, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((UserError, ModuleNotFoundError)):
        parse(module, options)


def test_the_extras_that_scripts_install_exist():
    known = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.M))
    for path in LAUNCH.glob("*.sh"):
        text = path.read_text()
        for words in re.findall(r"ensure_venv ((?:[a-z]+ ?)+)'", text) + re.findall(r"extras=\((.*)\)", text):
            assert set(words.split()) <= known, path


# ------------------------------------------------------------------------------------------- what the scripts run


@pytest.mark.parametrize("arguments", [
    ("tpu_vm", "create", *AT),
    ("tpu_vm", "setup", *AT, CODE),
    ("tpu_vm", "train", *AT, *TRAINING),
    ("tpu_vm", "delete", *AT),
    ("queued", "create", *AT, CODE, *TRAINING),
    ("queued", "watch", *AT, CODE, *TRAINING),
    ("slurm", *TRAINING),
    ("gke", "--image=a/b", *TRAINING),
])  # fmt: skip
def test_print_shows_what_would_run_and_runs_nothing(launch, arguments):
    script, *options = arguments
    place = options.index("--") if "--" in options else len(options)
    shown, asked = launch(script, *options[:place], "--print", *options[place:])
    assert shown.returncode == 0 and not asked, shown.stderr
    assert is_bash(shown.stdout)
    if "watch" in options:
        return
    # The shown commands, typed into a shell, make the same calls.
    _, direct = launch(script, *options)
    typed = launch.states.parent / "typed.sh"
    typed.write_text(shown.stdout)
    places = launch.states.parent / "bin"
    environment = {
        **os.environ,
        "PATH": f"{places}:{os.environ['PATH']}",
        "RECORD": str(launch.states.parent / "again"),
    }
    subprocess.run(["bash", str(typed)], env=environment, check=True, stdin=subprocess.DEVNULL)
    again = [json.loads(line) for line in (launch.states.parent / "again").read_text().splitlines()]
    assert again == direct and len(direct) == 1


def test_a_tpu_vm_is_made_and_all_its_workers_train(launch):
    _, (made,) = launch("tpu_vm", "create", *AT, "--type=v5litepod-16", "--spot=yes", "--project=p")
    assert made["arguments"] == [
        "gcloud", "compute", "tpus", "tpu-vm", "create", "one", "--zone=us-west4-a", "--project=p", "--spot",
        "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite",
    ]  # fmt: skip
    _, (training,) = launch("tpu_vm", "train", *AT, *TRAINING)
    *command, given = training["arguments"]
    assert command[4:] == ["ssh", "one", "--zone=us-west4-a", "--worker=all"]
    words = given.removeprefix("--command=")
    assert is_bash(words)
    assert "vdm_jax.train --distributed=yes --config=configs/t2v_pod.py '--workdir=gs://bucket/a run' " in words
    _, (setup,) = launch("tpu_vm", "setup", *AT, CODE)
    assert "git clone --depth=1 --branch main https://example.com/vdm_jax.git" in setup["arguments"][-1]
    assert is_bash(setup["arguments"][-1].removeprefix("--command="))


def test_a_queued_resource_is_created_again_after_a_loss(launch):
    launch.states.write_text("ACTIVE\nSUSPENDED\nWAITING_FOR_RESOURCES\n")
    done, asked = launch("queued", "watch", *AT, CODE, "--spot=yes", "--every=0.1", *TRAINING)
    assert done.returncode == 0, done.stderr
    did = [call["arguments"][4] for call in asked]
    assert did == ["create", "describe", "describe", "delete", "create", "describe", "describe"]
    create = asked[0]
    assert "--spot" in create["arguments"] and "--node-id=one" in create["arguments"]
    assert asked[4]["arguments"] == create["arguments"] and "--force" in asked[3]["arguments"]
    assert create["scripts"][0].startswith("#! /bin/bash") and is_bash(create["scripts"][0])


def test_the_start_up_script_trains_until_it_succeeds(launch, tmp_path):
    """The script runs with stand-ins for git, python and sleep. Training fails twice, as if a process was lost."""
    _, (made,) = launch("queued", "create", *AT, CODE, *TRAINING)
    home, places = tmp_path / "home", tmp_path / "bin"
    (home / "vdm_jax" / ".venv" / "bin").mkdir(parents=True)
    (home / "vdm_jax" / "launch").mkdir()
    (home / "vdm_jax" / "launch" / "env.sh").write_text("ensure_venv() { echo installs $1; }\n")
    python = home / "vdm_jax" / ".venv" / "bin" / "python"
    python.write_text('#!/bin/bash\necho "$@"\necho x >>$HOME/times\n[ $(wc -l <$HOME/times) -gt 2 ] || exit 75\n')
    for path, text in ((python, None), (places / "git", "#!/bin/bash\n"), (places / "sleep", "#!/bin/bash\n")):
        if text:
            path.write_text(text)
        path.chmod(0o755)
    script = made["scripts"][0].replace("HOME=/root", f"HOME={home}").replace("/root/train.log", f"{home}/train.log")
    environment = {**os.environ, "PATH": f"{places}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, timeout=60)
    log = (home / "train.log").read_text()
    assert done.returncode == 0 and "installs tpu" in log
    assert log.count("-m vdm_jax.train --distributed=yes --config=configs/t2v_pod.py --workdir=gs://bucket/a run") == 3
    assert log.count("exit code 75: it starts again") == 2


def test_a_slurm_job_comes_back(launch, tmp_path):
    _, (made,) = launch("slurm", "--nodes=4", "--gpus=0", *TRAINING)
    job = made["given"]
    assert made["arguments"] == ["sbatch"] and is_bash(job) and "#SBATCH --nodes=4" in job and "gpus" not in job
    # The job runs with stand-ins: srun for the training, and scontrol, which prints its arguments.
    for name, text in (("srun", "exit $CODE"), ("scontrol", "echo $@")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for code, told in ((0, ""), (1, ""), (2, ""), (75, "requeue 7\n"), (134, "requeue 7\n")):
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        done = subprocess.run(
            ["bash", "-c", job], env={**environment, "CODE": str(code)}, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (code, told), done.stderr


def test_a_job_set_is_applied(launch):
    _, (made,) = launch("gke", "--image=a/b", "--hosts=4", "--topology=4x4", "--", '--config=a "b"')
    assert made["arguments"] == ["kubectl", "apply", "-f", "-"]
    text = made["given"]
    assert "parallelism: 4" in text and "gke-tpu-topology: 4x4" in text and 'image: "a/b"' in text
    assert '- "--config=a \\"b\\""' in text and "google.com/tpu: 8" in text


@pytest.mark.parametrize("script, arguments, told", [
    ("tpu_vm", [], "an action is missing"),
    ("tpu_vm", ["make", *AT], "unknown action 'make'"),
    ("tpu_vm", ["create", "--name=one"], "--zone is missing"),
    ("tpu_vm", ["create", *AT, "--kind=x"], "unknown option --kind"),
    ("queued", ["create", *AT, CODE], "training arguments are missing"),
    ("queued", ["create", *AT, *TRAINING], "--repository is missing"),
    ("slurm", ["--nodes=2"], "training arguments are missing"),
    ("gke", TRAINING, "--image is missing"),
    ("gke", ["--image"], "unexpected argument '--image'"),
])  # fmt: skip
def test_wrong_input_is_one_clear_line(launch, script, arguments, told):
    done, asked = launch(script, *arguments)
    assert done.returncode == 2 and not asked
    assert done.stderr.startswith("error: ") and told in done.stderr and done.stderr.count("\n") == 1


def test_the_demo_makes_videos_first_and_says_where_they_are(tmp_path):
    """demo.sh runs with a stand-in for Python, which writes the files that demo.sh lists at the end."""
    places, out = tmp_path / "launch", tmp_path / "my videos"
    places.mkdir()
    shutil.copy(LAUNCH / "demo.sh", places)
    python = places / "python"
    python.write_text(f'#!/bin/bash\necho "runs $2"\nmkdir -p "{out}/report"\n')
    for name in ("000.mp4", "contact_sheet.png", "report/report.html"):
        python.write_text(python.read_text() + f'touch "{out}/{name}"\n')
    python.chmod(0o755)
    (places / "env.sh").write_text(f'ROOT="{tmp_path}"\nPY="{python}"\nensure_venv() {{ echo installs; }}\n')
    done = subprocess.run([places / "demo.sh", out], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if line.startswith(("installs", "==", "runs vdm", str(out)))]
    patterns = [
        "installs",
        "== 1 of 3: .* 1 min.*", "runs vdm_jax.sample",
        f"{out}/000.mp4 is the first video, made \\d+ s after the installation.*", f"{out}/contact_sheet.png shows .*",
        "== 2 of 3: .* min.*", "runs vdm_jax.evaluate",
        "== 3 of 3: .* min.*", "runs vdm_jax.train",
        f"{out}/000.mp4", f"{out}/contact_sheet.png", f"{out}/report/report.html",
    ]  # fmt: skip
    assert len(steps) == len(patterns) and all(map(re.fullmatch, patterns, steps)), steps
    assert len((out / "prompts.txt").read_text().splitlines()) == 4
