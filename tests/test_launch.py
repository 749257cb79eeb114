"""The launch scripts: what they show, and what they ask of a stand-in for gcloud, sbatch and kubectl."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
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
    """call(script, *arguments) -> (CompletedProcess, what the stand-ins recorded)."""
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

    call.states = Path(f"{record}.states")
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
    # Typed as shown, it asks for the same.
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
    assert "git clone --branch main https://example.com/vdm_jax.git" in setup["arguments"][-1]
    assert is_bash(setup["arguments"][-1].removeprefix("--command="))


def test_a_queued_resource_takes_itself_up_again(launch):
    launch.states.write_text("ACTIVE\nSUSPENDED\nWAITING_FOR_RESOURCES\n")
    done, asked = launch("queued", "watch", *AT, CODE, "--spot=yes", "--every=0.1", *TRAINING)
    assert done.returncode == 0, done.stderr
    did = [one["arguments"][4] for one in asked]
    assert did == ["create", "describe", "describe", "delete", "create", "describe", "describe"]
    create = asked[0]
    assert "--spot" in create["arguments"] and "--node-id=one" in create["arguments"]
    assert asked[4]["arguments"] == create["arguments"] and "--force" in asked[3]["arguments"]
    assert create["scripts"][0].startswith("#! /bin/bash") and is_bash(create["scripts"][0])


def test_the_start_up_script_goes_on_until_training_has_ended_well(launch, tmp_path):
    """Run for real, with stand-ins for git, python and sleep; training fails twice, as when a peer is lost."""
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
    assert log.count("exit code 75: once more") == 2


def test_a_slurm_job_comes_back(launch, tmp_path):
    _, (made,) = launch("slurm", "--nodes=4", "--gpus=0", *TRAINING)
    job = made["given"]
    assert made["arguments"] == ["sbatch"] and is_bash(job) and "#SBATCH --nodes=4" in job and "gpus" not in job
    # Run for real: srun stands in for training, scontrol tells what it was asked.
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
