# Not built by CI.
# docker build -t clipq . && docker run --rm --gpus all --ipc=host -v "$PWD/runs:/clipq/runs" clipq clipq-train experiment=demo
FROM python:3.12-slim-bookworm
# Triton compiles a launcher at run time and needs a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home clipq && mkdir /clipq && chown clipq /clipq
USER clipq
WORKDIR /clipq
ENV PATH=/clipq/.venv/bin:$PATH
RUN python -m venv .venv
# Requirements first: they change more seldom than the sources.
COPY --chown=clipq pyproject.toml README.md LICENSE ./
COPY --chown=clipq clipq/__init__.py clipq/__init__.py
COPY --chown=clipq configs/train.yaml configs/train.yaml
RUN pip install --no-cache-dir -e '.[test]'
COPY --chown=clipq . .
CMD ["clipq-train", "--help"]
