"""`python -m radfm_jax.evaluate`: exact match on test rows; RadBench; ratings by human raters."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from input_pipeline.files import nearest
from radfm_jax.evaluate import exact_match, radbench_command, ratings

COMMANDS = {"radbench": radbench_command.main, "ratings": ratings.main}
USAGE = """\
commands:
  radbench  RadBench: questions, answers, scores, report
  ratings   read the grades of a rating sheet
`python -m radfm_jax.evaluate COMMAND --help` lists the options of a command. Without a command:
"""


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    if argv and not argv[0].startswith("-"):
        hint = nearest(argv[0], COMMANDS)
        print(f"error: unknown command {argv[0]!r}{hint}: use radbench, ratings, or no command", file=sys.stderr)
        return 2
    if {"-h", "--help"} & set(argv):
        print(USAGE)
    return exact_match.main(argv)


if __name__ == "__main__":
    sys.exit(main())
