# RadFM in JAX for TPUs. Build from the repository's root:  docker build -f launch/docker/tpu.Dockerfile -t radfm-tpu .
# The `tpu` extra of JAX installs the matching libtpu. `python -m radfm_jax.plan` needs no TPU.
FROM python:3.12-slim-bookworm
WORKDIR /radfm
# Requirements first: this layer stays cached when only the code changes.
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt "jax[tpu]"
COPY . .
ENV PYTHONPATH=/radfm PYTHONUNBUFFERED=1
# Runs as root, because other users may not exist on a cluster's file system; override with --user or runAsUser.
CMD ["python", "-m", "radfm_jax.train", "--help"]
