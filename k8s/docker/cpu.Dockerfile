# Every part of a run on machines without a GPU, at the versions of constraints.txt.
# From the project's folder:  docker build -f k8s/docker/cpu.Dockerfile -t gflowvlm-cpu:0.1.0 .
FROM debian:bookworm-slim AS build
# Debian's security updates are wanted, so its packages have no versions here.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3.11 python3.11-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts scripts
# The rooms, and the package that links them under one name.
COPY gflowvlm gflowvlm
COPY shared shared
COPY envs envs
COPY actors actors
COPY learner learner
COPY run run
COPY evaluation evaluation
COPY warm_starts warm_starts
COPY cluster cluster
COPY studies studies
COPY api api
COPY cli cli
RUN --mount=type=cache,target=/root/.cache/pip python3.11 scripts/set_up.py --engine cpu

FROM debian:bookworm-slim
# g++ and Python's headers: vLLM's CPU engine has PyTorch compile kernels at its first request. wget: KubeRay's probes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates g++ libc6-dev libnuma1 python3.11 python3.11-dev wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --user-group --create-home gflowvlm
COPY --from=build /app /app
COPY --chmod=0755 k8s/docker/train-or-resume /usr/local/bin/train-or-resume
# RAY_TRAIN_V2_ENABLED, RAY_SERVE_… and PYTHONSAFEPATH are read when a process starts, so every node of the
# cluster has to have them (cluster/launch/process_environment.py).
ENV PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    RAY_TRAIN_V2_ENABLED=1 \
    RAY_SERVE_THROUGHPUT_OPTIMIZED=1 \
    RAY_SERVE_ENABLE_DIRECT_INGRESS=0
USER 1000:1000
WORKDIR /home/gflowvlm
CMD ["gflowvlm", "--help"]
