"""`python -m input_pipeline.prepare --config=FILE --out DIR`: read and check all data once, and write its index."""

import sys


def main(argv: list[str] | None = None) -> int | None:
    # Imported here: spawned data workers import this module again, and they need none of it.
    from input_pipeline.index.command import main

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
