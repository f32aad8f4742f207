"""`python -m radfm_jax.generate --checkpoint=DIR`: answer questions about scans."""

import sys


def main(argv: list[str] | None = None) -> int | None:
    # Imported here: spawned data workers import this module again, and they need none of it.
    from radfm_jax.inference.command import main

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
