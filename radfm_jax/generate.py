"""`python -m radfm_jax.generate --checkpoint=DIR`: answer questions about scans."""

import sys


def main(argv: list[str] | None = None) -> int | None:
    # Spawned data workers import this module again and must not import JAX.
    from radfm_jax.inference.command import main

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
