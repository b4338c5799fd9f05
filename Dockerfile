# The server in a container.
#
#   docker build -t sd-serve .                            on the CPU
#   docker build -t sd-serve --build-arg DEVICE=cuda .    on NVIDIA GPUs; run with --gpus all
#   docker run -p 127.0.0.1:7860:7860 -e SD_SERVER_API_KEY=... -v ~/models:/models:ro sd-serve
#
# It listens at all addresses of the container, so it needs a key. Nothing is downloaded when it runs.

ARG DEVICE=cpu
ARG PYTHON=python:3.11-slim

FROM ${PYTHON} AS base-cpu
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

# PyTorch's own packages bring the CUDA libraries; Triton compiles its kernels with a C compiler
FROM ${PYTHON} AS base-cuda
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

FROM base-${DEVICE}
ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# the large packages first: they stay in Docker's cache when only the program changes
COPY requirements.txt /build/
RUN pip install -r /build/requirements.txt
COPY setup.py pyproject.toml README.md LICENSE /build/
COPY sd /build/sd
COPY scripts /build/scripts
COPY data /build/data
COPY weights /build/weights
RUN pip install "/build[server]" && rm -rf /build

RUN useradd --uid 10001 --create-home sd \
    && mkdir /models /loras /embeddings /controls /vaes /cache \
    && chown sd:sd /cache
USER sd
WORKDIR /home/sd
VOLUME /cache

# the grace is below the 10 seconds that `docker stop` waits for
ENV XDG_CACHE_HOME=/cache \
    SD_SERVER_HOST=0.0.0.0 \
    SD_SERVER_PORT=7860 \
    SD_SERVER_GRACE=7 \
    SD_SERVER_MODELS=/models \
    SD_SERVER_LORAS=/loras \
    SD_SERVER_EMBEDDINGS=/embeddings \
    SD_SERVER_CONTROLS=/controls \
    SD_SERVER_VAES=/vaes
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --start-interval=1s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"SD_SERVER_PORT\"]}/healthz', timeout=4)"]
CMD ["sd-serve"]
