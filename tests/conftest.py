"""All tests run on the CPU, cut into eight devices so that every sharding is exercised."""

import gc
import os

# Most of the time of the tests is XLA's: without its fusions and optimisations it compiles four times faster, and
# nothing here runs long. `XLA_FLAGS="" bash launch/test.sh` runs the tests on the code that users run.
FLAGS = "backend_optimization_level=0", "cpu_use_fusion_emitters=false", "cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_{flag}" for flag in FLAGS))
# Each worker has one core. Threads of PyTorch and numpy that wait for a core spin, and take several times the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

# Shared parts whose assertions show their values when they fail, as those of the test files do.
pytest.register_assert_rewrite("tensor_arrays", "token_parts")

# Both must be set before the first array is made: the backend starts with it and keeps what it found.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Files that take a minute or more start first. Otherwise one worker would end long after the other.
LONGEST = ("test_train.py", "test_golden.py", "test_train_step.py", "test_distributed.py", "test_radfm.py")


# A full collection of the objects of JAX takes seconds after some hundred tests, so collections are rarer and skip the
# objects of modules that have ended.
gc.set_threshold(5000, 10, 20)


def pytest_collection_finish():
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def skipped_by_later_collections():
    yield
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
