"""No old name of a thing is left: each thing has one name, in code, config keys, flags, scripts, notebooks and docs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("vdm_jax", "configs", "launch", "notebooks", "tests", "docs")
ENDINGS = (".py", ".sh", ".ipynb", ".md", ".json", ".yml", ".cff")
HERE = Path(__file__).name
DIARY = "reference_run.md"  # tells of runs that were made under the old names

OLD = (
    # config keys and flags
    "near_misses", "near_miss", "given_time", "history_fraction", "onward_guidance", "across_guidance", "leap",
    "optimiser", "factorised", "exchange",
    # patterns and tasks
    "image_given", "first_given", "ends_given", "video_given", "audio_given", "carry_on", "roll_out",
    # identifiers
    "near_miss_told", "near_miss_objective", "schedule_matrix", "TokenMixer", "Exchange", "LevelEmbedding",
    "FactorisedConv", "rematerialised", "forms_of", "on_cpu", "give_up", "together_to_the_end", "set_damaged_aside",
    "take_over", "by_rows", "in_parts", "abstract_params", "to_example", "COLOURS", "colour", "load_trained",
    r"generate\.Generator",
    # modules
    r"vdm_jax\.checkpoint", r"vdm_jax\.stages", r"vdm_jax\.generate", r"vdm_jax\.conditioning", r"vdm_jax\.latents",
    r"vdm_jax\.preview", r"vdm_jax\.media", r"vdm_jax\.text", r"vdm_jax\.cli", r"vdm_jax\.flops", r"vdm_jax\.hlo",
    r"vdm_jax\.task_metrics", r"vdm_jax\.run_log", r"data\.pipeline",
)  # fmt: skip
ENGLISH = ("exchange", "leap")  # words that may stand in a sentence: there only `exchange=` and `.exchange` are old


def files():
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in ENDINGS]
    found += [path for path in ROOT.iterdir() if path.suffix in ENDINGS]
    return [path for path in found if path.name not in (HERE, DIARY) and ".cache" not in path.parts]


def pattern(name):
    if name in ENGLISH:
        return rf"(?:\.{name}\b|\b{name}\s*=|[\"']{name}[\"'])"
    return rf"\b{name}\b"


@pytest.mark.parametrize("name", OLD)
def test_an_old_name_is_gone(name):
    wanted = re.compile(pattern(name))
    places = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if wanted.search(line)
    ]
    assert not places, f"{name} is an old name: {', '.join(places[:10])}"


def test_the_search_finds_what_it_looks_for():
    assert re.search(pattern("optimiser"), "config.denoiser.optimiser='adamw'")
    assert re.search(pattern("leap"), "sample.leap = ()") and not re.search(pattern("leap"), "a leap in time")
    assert len(files()) > 100 and any(path.name == "README.md" for path in files())
