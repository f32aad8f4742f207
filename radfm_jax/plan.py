"""Plan a run: `python -m radfm_jax.plan --config=configs/x.py --topology=v5p:4x4x2`."""

import sys


def main(argv: list[str] | None = None) -> int | None:
    from radfm_jax.cost.command import main  # spawned data workers import this module again and need no JAX

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
