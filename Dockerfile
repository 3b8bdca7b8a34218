# The operator's image: docker build -t mcore-finetune/operator:0.1.0 .
# An exact version of Python, with a compatible uvloop wheel for both amd64 and arm64. Give PYTHON_IMAGE a digest for builds that must repeat to the byte.
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG UV_VERSION=0.13.9
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never
RUN python -m pip install --no-cache-dir --disable-pip-version-check "uv==${UV_VERSION}" \
    && uv venv --python /usr/local/bin/python3 /opt/venv
# First what seldom changes. requirements/operator.txt has the exact version of every package.
WORKDIR /source
COPY requirements/operator.txt requirements/dev.txt requirements/
RUN uv pip install --python /opt/venv --no-deps --requirements requirements/operator.txt
COPY pyproject.toml README.md ./
COPY operator operator
COPY trainer_image trainer_image
RUN uv pip install --python /opt/venv --no-deps --build-constraints requirements/dev.txt .

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="mcore-finetune operator" \
    org.opencontainers.image.description="Turns FineTuneJobs into gangs of trainer pods, and tells what becomes of them." \
    org.opencontainers.image.version="0.1.0"
# Nothing can be installed into a running operator.
RUN python -m pip uninstall --yes --quiet pip setuptools wheel
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
USER 65532:65532
ENTRYPOINT ["python", "-m", "finetune_operator"]
