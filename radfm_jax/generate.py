"""`python -m radfm_jax.generate --checkpoint=DIR`: answer questions about scans."""

import sys


def main(argv: list[str] | None = None) -> int | None:
    from radfm_jax.inference.command import main  # spawned data workers import this module again and need no JAX

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
