# RadFM in JAX for NVIDIA GPUs:  docker build -f launch/docker/gpu.Dockerfile -t radfm-gpu .     (from the repository's root)
# CUDA, cuDNN and NCCL come with JAX's own wheels; of the machine only the driver is needed (580 or newer for CUDA 13).
FROM python:3.12-slim-bookworm
WORKDIR /radfm
# First what seldom changes: a change of the code does not install again.
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt "jax[cuda13]"
COPY . .
ENV PYTHONPATH=/radfm PYTHONUNBUFFERED=1
# No user but root can be assumed to exist on a cluster's file system; whoever runs it decides: --user, runAsUser.
CMD ["python", "-m", "radfm_jax.train", "--help"]
