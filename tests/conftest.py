"""All tests run on the CPU, cut into eight devices so that every sharding is exercised."""

import jax

# Both must be set before the first array is made: the backend starts with it and keeps what it found.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
