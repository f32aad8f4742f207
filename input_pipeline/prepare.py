"""Entry point of `python -m input_pipeline.prepare`: read and check all data once, and write its index."""

import sys


def main(argv: list[str] | None = None) -> int | None:
    # Imported late: spawned workers import this module again, and do not need the command.
    from input_pipeline.index.command import main

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
