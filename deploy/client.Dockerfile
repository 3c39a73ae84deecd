# A site's client: the link to the server (SuperNode), and the worker that keeps model and data in memory.
#
#   docker build -f deploy/client.Dockerfile -t fedspan-client .
#
# Build arguments: see server.Dockerfile; without any, PyTorch is the build for CUDA.
#
# It runs as any user id with a read-only root, opens outbound connections only and listens on its own loopback alone.
# Places: /etc/fedspan the site file, /certs ca.crt and the site's key, /model the base model, /data the rows (all
# read-only); /var/lib/fedspan, where status.json tells what it does, and /tmp are written to.
ARG BASE=python:3.11-slim-bookworm@sha256:0bee7276f83efd4a1ee05bbbf4281d95ed28e079220a9457f25a93e3f1e3c31b

# Everything that deploy/lock names, each file held against its hash, in /opt/venv. This stage is the same in both
# Dockerfiles, so it is built once.
FROM ${BASE} AS build
ARG TORCH=cuda
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /build
COPY pyproject.toml ./
COPY deploy/lock lock
RUN python -m venv /opt/venv \
 && install() { /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --no-deps \
      --no-build-isolation --use-pep517 "$@"; } \
 && install -r lock/build.txt \
 && install -r lock/packages.txt \
 && if [ "$TORCH" = cpu ] && [ -n "$TORCH_INDEX" ]; then install -r lock/torch-cpu.txt --index-url "$TORCH_INDEX"; \
    else install -r "lock/torch-$TORCH.txt"; fi \
 && /opt/venv/bin/pip check

# What tells the installed version: metadata alone, the code is copied as it is.
FROM build AS metadata
COPY LICENSE fedspan.py ./
RUN touch README.md \
 && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation \
      --target /metadata .

# The same without PyTorch's headers and tests, and without pip: nothing can be installed in a container that runs.
FROM build AS lean
RUN rm -rf /opt/venv/lib/python3.*/site-packages/torch/include /opt/venv/lib/python3.*/site-packages/torch/test \
 && /opt/venv/bin/pip uninstall --quiet --yes pip

FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends tini=0.19.* \
 && rm -rf /var/lib/apt/lists/*
COPY --from=lean /opt/venv /opt/venv
# HOME and USER, because an arbitrary user id has neither; nothing is installed and nobody is called while it runs.
# FLWR_HOME is where `site join` is told to work (--home), so that `site check` looks there.
ENV PATH=/metadata/bin:/opt/venv/bin:$PATH PYTHONPATH=/app:/metadata HOME=/tmp USER=fedspan PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_HOME=/var/lib/fedspan
WORKDIR /app
COPY --from=metadata /metadata /metadata
COPY LICENSE pyproject.toml fedspan.py ./
COPY common common
COPY strategies strategies
COPY client client
COPY deploy/__init__.py deploy/__main__.py deploy/cli.py deploy/completion.py deploy/health.py deploy/
COPY deploy/keys deploy/keys
COPY deploy/invitation deploy/invitation
COPY deploy/model deploy/model
RUN python -m compileall -q . && install -d -m 1777 /var/lib/fedspan
LABEL org.opencontainers.image.title="FedSpan client" \
      org.opencontainers.image.description="Federated fine-tuning in gradient subspaces: one site's link and worker" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:0
HEALTHCHECK --interval=15s --timeout=20s --start-period=120s --retries=4 \
  CMD ["python", "-m", "deploy", "health", "site", "/var/lib/fedspan/status.json", "--linked"]
ENTRYPOINT ["tini", "--", "python", "-m", "deploy"]
CMD ["site", "join", "--help"]
