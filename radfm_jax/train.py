"""`python -m radfm_jax.train --config=configs/x.py --workdir=DIR`: train a model, or resume a run."""

import sys


def main(argv: list[str] | None = None) -> int | None:
    # Imported here: spawned data workers import this module again, and they need none of it.
    from radfm_jax.training.command import main

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
