# RadFM in JAX for NVIDIA GPUs. Build from the repository's root:  docker build -f launch/docker/gpu.Dockerfile -t radfm-gpu .
# JAX's wheels include CUDA, cuDNN and NCCL; the host only needs the driver (580 or newer for CUDA 13).
FROM python:3.12-slim-bookworm
WORKDIR /radfm
# Requirements first: this layer stays cached when only the code changes.
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt "jax[cuda13]"
COPY . .
ENV PYTHONPATH=/radfm PYTHONUNBUFFERED=1
# Runs as root, because other users may not exist on a cluster's file system; override with --user or runAsUser.
CMD ["python", "-m", "radfm_jax.train", "--help"]
