"""The console script `radfm`."""

import pytest

from radfm_jax import cli


def test_usage_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"  {name} " in usage for name in cli.COMMANDS) and "not for clinical use" in usage
    assert cli.main([]) == 2 and capsys.readouterr().out == usage


@pytest.mark.parametrize(
    "name, hint", [("evalute", " (did you mean evaluate?)"), ("Train", " (did you mean train?)"), ("zzz", "")]
)
def test_an_unknown_command_names_the_nearest_one(capsys, name, hint):
    assert cli.main([name, "--help"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.endswith(f"radfm: unknown command {name!r}{hint}\n")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_each_command(capsys, name):
    try:
        code = cli.main([name, "--help"])
    except SystemExit as exit_info:
        code = exit_info.code
    assert code == 0
    assert "usage: python -m " in capsys.readouterr().out
