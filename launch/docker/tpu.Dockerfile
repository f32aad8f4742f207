# RadFM in JAX for TPUs:  docker build -f launch/docker/tpu.Dockerfile -t radfm-tpu .     (from the repository's root)
# libtpu comes with JAX's extra, in the release that fits. `python -m radfm_jax.plan` runs in it without a TPU.
FROM python:3.12-slim-bookworm
WORKDIR /radfm
# First what seldom changes: a change of the code does not install again.
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt "jax[tpu]"
COPY . .
ENV PYTHONPATH=/radfm PYTHONUNBUFFERED=1
# No user but root can be assumed to exist on a cluster's file system; whoever runs it decides: --user, runAsUser.
CMD ["python", "-m", "radfm_jax.train", "--help"]
