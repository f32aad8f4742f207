"""`python -m radfm_jax.summary --runs DIR... --out page.html`: show a chain of training runs on one page."""

import sys


def main(argv: list[str] | None = None) -> int | None:
    from radfm_jax.training.run_summary import main  # spawned data workers import this module again and need no JAX

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
