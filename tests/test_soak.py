"""Short forms of the long tests `python -m tests.soak` and `python -m tests.fuzz`."""

import shutil

import pytest

from tests import damage, fuzz, soak
from tests.helpers import finish, start


def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    counts = soak.kill(3, 0, tmp_path, steps=16)
    assert soak.kills(counts) == 3 and counts["runs brought to their right end"] >= 1


def test_flipped_bits_are_detected_and_the_run_goes_on(tmp_path):
    counts = soak.flips(6, 0, tmp_path)
    assert counts["detected, set aside"] >= 5 and counts["of these, trained on to the right end"] >= 1


def test_damage_of_every_kind_is_refused_or_leads_to_the_same_values(tmp_path):
    counts = damage.trials(100, 1, tmp_path)
    assert counts.total() == 100 and {group for group, _ in counts} == set(damage.GROUPS)
    assert {outcome for _, outcome in counts} == {"the same", "the older checkpoint", "made again", "refused"}


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_a_run_that_is_killed_at_a_system_call_goes_on_to_the_right_end():
    code, out, _ = finish(start("-m", "tests.soak", "calls", "--count=2", "--seed=1"))
    assert code == 0 and "'went on to the right end': 2" in out


def test_wrong_input_is_refused_in_one_line(tmp_path):
    counts, faults, peak = fuzz.fuzz(70)
    assert not faults, "\n".join(faults)
    assert sum(counts.values()) == 70 and peak < fuzz.CAP
    assert {outcome for _, outcome in counts} == {"read", "refused"}
