"""A command called inside a process, as notebooks do."""

import pytest
from absl import flags

from vdm_jax import overview
from vdm_jax.errors import UserError
from vdm_jax.run import cli

CONFIG = "--config=tests/tiny.py"


def test_a_script_can_be_called_again_and_again(capsys):
    before = set(flags.FLAGS)
    for chips, told in ((2, "mesh     data=2,"), (8, "mesh     data=8,")):
        cli.call(overview, CONFIG, "--stage=clip", f"--chips={chips}")
        assert told in capsys.readouterr().out
    cli.call(overview, CONFIG, "--stage=clip")
    assert "mesh" not in capsys.readouterr().out  # an option of an earlier call is forgotten
    with pytest.raises(UserError, match="--stage"):
        cli.call(overview, CONFIG, "--stage=all_of_them")
    with pytest.raises(UserError, match="nosuch"):
        cli.call(overview, CONFIG, "--config.nosuch=1")
    assert set(flags.FLAGS) == before
