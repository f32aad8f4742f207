"""`--config=FILE --config.a.b=value` beside argparse's options: one way for every command that takes a config."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import warnings
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags


def add_config(parser: argparse.ArgumentParser) -> None:
    """Documents the option; `parse` reads it."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        required=True,
        help="configs/*.py, or FILE:NAME for one of its variants; any field is changed with --config.group.field=x",
    )


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """Arguments, and the config with its changes. Exits with a message for a missing file or a misspelt field."""
    spaced = [a for a in argv if a.startswith("--config.") and "=" not in a]
    if spaced:
        parser.error(f"{spaced[0]}: write --config.group.field=value, with an equals sign")
    overrides = [a for a in argv if a.startswith("--config.")]
    args = parser.parse_args([a for a in argv if not a.startswith("--config.")])
    file = args.config if Path(args.config).is_file() else args.config.rpartition(":")[0]
    if not Path(file).is_file():
        parser.error(f"{args.config}: there is no such file; configs/ holds those of the project")
    sys.modules.pop("config_config", None)  # an earlier config of this process: names it had would stand in for ours
    values = flags.FlagValues()
    given = [parser.prog, f"--config={args.config}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=given)
    try:
        # Its messages go to standard output as well as into the exception.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"the load_module\(\) method", DeprecationWarning)  # ml_collections' own
            values(given)
            config = values.config
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError, SyntaxError, ImportError) as error:
        parser.error(f"{args.config}: {_said(error)}")
    if not isinstance(config, ConfigDict):
        parser.error(f"{args.config}: needs a function get_config() that returns a ConfigDict")
    return args, config


def _said(error: Exception) -> str:
    """An error of ml_collections in one line: without the traceback that it puts into its messages, and the quotes and
    line ends of a KeyError that it quotes once more."""
    said = str(error.args[0] if error.args else error).replace("\\n", "\n").replace("\\'", "'").strip()
    if "Traceback (most recent call last)" in said:
        said = said.splitlines()[-1]
    if len(said) > 1 and said[0] == said[-1] and said[0] in "'\"":
        said = said[1:-1]
    if isinstance(error, KeyError | AttributeError) and said.strip("'").isidentifier():
        return f"there is no field {said}"
    return " ".join(said.split()) or type(error).__name__
