"""`--config=FILE --config.a.b=value` alongside argparse options, for every command that takes a config."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import warnings
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from input_pipeline.messages import printable


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the option --config, which `parse` reads."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        required=True,
        help="configs/*.py, or FILE:NAME for one of its variants; --config.group.field=x overrides a field",
    )


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """Return the arguments and the config with its overrides; exit with a message if either has an error.

    If the config file has a function `resolve`, its result is the config. It is called as resolve(config, names of the
    overridden fields).
    """
    spaced = [a for a in argv if a.startswith("--config.") and "=" not in a]
    if spaced:
        parser.error(f"{spaced[0]}: write --config.group.field=value, with an equals sign")
    overrides = [a for a in argv if a.startswith("--config.")]
    args = parser.parse_args([a for a in argv if not a.startswith("--config.")])
    config_file = _find(args.config)
    if config_file is None:
        parser.error(f"{args.config}: no such file; the project's configs are in configs/")
    # ml_collections loads every config under this name, so names of an earlier one would remain in it.
    sys.modules.pop("config_config", None)
    values = flags.FlagValues()
    flag_argv = [parser.prog, f"--config={config_file}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=flag_argv)
    try:
        # ml_collections prints its messages in addition to raising them.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"the load_module\(\) method", DeprecationWarning)  # ml_collections
            values(flag_argv)
            config = values.config
            # A config may depend on values of the command line, such as the checkpoint to start from.
            resolve = getattr(sys.modules.get("config_config"), "resolve", None)
            if resolve is not None:
                config = resolve(config, {a.partition("=")[0].removeprefix("--config.") for a in overrides})
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError, SyntaxError, ImportError) as error:
        parser.error(printable(f"{args.config}: {_message(error)}"))
    if not isinstance(config, ConfigDict):
        parser.error(f"{args.config}: define a function get_config() that returns a ConfigDict")
    return args, config


def _find(config: str) -> str | None:
    """Return FILE or FILE:NAME if the file exists, else that of the installed configs/, else None."""
    for file, name in ((config, ""), config.rpartition(":")[::2]):
        installed = [Path(__file__).parents[1] / file] if file.startswith("configs/") else []
        for path in (Path(file), *installed):
            if path.is_file():
                return f"{path}:{name}" if name else str(path)
    return None


def _message(error: Exception) -> str:
    """Return the message of an ml_collections error in one line, without the traceback and quotes that it adds."""
    message = str(error.args[0] if error.args else error).replace("\\n", "\n").replace("\\'", "'").strip()
    if "Traceback (most recent call last)" in message:
        message = message.splitlines()[-1]
    if len(message) > 1 and message[0] == message[-1] and message[0] in "'\"":
        message = message[1:-1]
    if isinstance(error, KeyError | AttributeError) and message.strip("'").isidentifier():
        return f"unknown field {message}"
    return " ".join(message.split()) or type(error).__name__
