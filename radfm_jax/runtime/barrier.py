"""A barrier of all processes that also exchanges results and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

import jax

from radfm_jax.runtime import compat

T = TypeVar("T")


def barrier(key: str, work: Callable[[], T] = lambda: None, timeout: float = 1800) -> list[T]:
    """Run `work` in every process, wait for all of them, and return their results by process number.

    The processes wait through the coordination service, not through a device collective: a background thread that
    starts a collective would interleave with those of training. Orbax's process barriers exchange no error, so a disk
    that is full on one machine would go unnoticed, and the others would treat the step as saved.

    Args:
      key: unique name of this barrier, the same in every process.
      work: returns a JSON value.
    Raises:
      Exception: what `work` raised in this process.
      ValueError, OSError: `work` failed only in other processes; names each process and its error. ValueError if all
        of them raised ValueError.
    """
    if jax.process_count() == 1:
        return [work()]
    client, failure = compat.coordination_client(), None
    try:
        result = {"value": work()}
    except Exception as e:
        result, failure = {"error": describe(e), "mistake": isinstance(e, ValueError)}, e
    prefix = f"radfm_jax/{key}/"
    client.key_value_set(f"{prefix}{jax.process_index()}", json.dumps(result))
    client.wait_at_barrier(prefix[:-1], int(timeout * 1000))
    if failure is not None:
        raise failure
    results = {int(k.removeprefix(prefix)): json.loads(v) for k, v in client.key_value_dir_get(prefix)}
    if failed := {p: r for p, r in sorted(results.items()) if "error" in r}:
        error = ValueError if all(r["mistake"] for r in failed.values()) else OSError
        raise error("; ".join(f"process {p}: {r['error']}" for p, r in failed.items()))
    return [results[p]["value"] for p in range(jax.process_count())]


def forget(key: str) -> None:
    """Delete the results of finished barriers whose keys start with `key/` from the coordination service."""
    if jax.process_count() > 1:
        compat.coordination_client().key_value_delete(f"radfm_jax/{key}/")


def describe(e: BaseException) -> str:
    """Return type and message of an exception, without the C++ source locations that tensorstore adds."""
    text = str(e).partition(" [source locations=")[0].strip()
    return f"{type(e).__name__}: {text}" if text else type(e).__name__
