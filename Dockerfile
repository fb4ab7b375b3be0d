# syntax=docker/dockerfile:1

# Two targets, cpu and cuda; see DOCKER.md.
FROM debian:13.1-slim AS base
# Debian's versions are those of the pinned release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 user \
    && install --directory --mode 1777 /app/logs /cache
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir uv==0.13.9
ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    HF_HOME=/cache \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    PYTHONUNBUFFERED=1 \
    UV_COMPILE_BYTECODE=1 \
    UV_CACHE_DIR=/uv-cache \
    UV_LINK_MODE=copy
WORKDIR /app
COPY requirements.txt requirements-quantization.txt ./

FROM base AS cpu-libraries
RUN --mount=type=cache,target=/uv-cache \
    uv pip install --torch-backend cpu --requirement requirements.txt

# The operators of a CPU, for all processors; the image needs no compiler.
FROM cpu-libraries AS kernels
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY self_speculation self_speculation
RUN mkdir /kernels \
    && python -c "from pathlib import Path; from self_speculation.weights.kernels import build_into; build_into(Path('/kernels'))"

FROM cpu-libraries AS cpu
COPY . .
COPY --from=kernels /kernels/ self_speculation/weights/cpp/
USER 1000
VOLUME ["/cache", "/app/logs"]
CMD ["python", "generate.py", "--help"]

FROM base AS cuda
# Triton builds what launches its kernels: it needs a C compiler, Python's headers, the driver's libcuda, which
# the NVIDIA Container Toolkit mounts, and TRITON_CACHE_DIR to write to.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev \
    && rm -rf /var/lib/apt/lists/*
# uv reads it; cu126: wheels for V100 and for drivers before 580.
ARG UV_TORCH_BACKEND
RUN --mount=type=cache,target=/uv-cache \
    uv pip install --requirement requirements.txt --requirement requirements-quantization.txt
COPY . .
USER 1000
VOLUME ["/cache", "/app/logs"]
CMD ["python", "generate.py", "--help"]
