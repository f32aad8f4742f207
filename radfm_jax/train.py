"""`python -m radfm_jax.train --config=configs/x.py --workdir=DIR`: train a model, or resume a run."""

import sys


def main(argv: list[str] | None = None) -> int | None:
    from radfm_jax.training.command import main  # spawned data workers import this module again and need no JAX

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
