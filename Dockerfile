# syntax=docker/dockerfile:1
# Koine for the CPU, or for CUDA with the drivers of the host (docs/how-to/install.md):
#
#     docker build --tag koine .
#     docker build --tag koine:cu130 --build-arg TORCH=cu130 .
ARG PYTHON=3.13

FROM python:${PYTHON}-slim-trixie AS wheel
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:${PYTHON}-slim-trixie
# Name of PyTorch's index: cpu, cu126, cu130, ...
ARG TORCH=cpu
ARG EXTRAS=hf,grammar,gguf
# Debian packages; `g++` if you want torch.compile.
ARG PACKAGES=""
ENV PATH=/opt/koine/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# hadolint ignore=DL3008
RUN if [ -n "${PACKAGES}" ]; then \
        apt-get update && apt-get install --yes --no-install-recommends ${PACKAGES} && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --create-home --uid 1000 koine && python -m venv /opt/koine

# From the layer that changes least to the one that changes most: torch, the other packages, Koine.
WORKDIR /opt
COPY constraints.txt pyproject.toml /opt/
RUN pip install --no-deps --index-url "https://download.pytorch.org/whl/${TORCH}" \
        "$(grep '^torch==' constraints.txt)"
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [name for name in '${EXTRAS}'.split(',') if name]; \
print(*project['dependencies'], *(line for name in extras for line in project['optional-dependencies'][name]), sep='\n')" \
        > requirements.txt && \
    pip install --constraint constraints.txt --requirement requirements.txt \
        --extra-index-url "https://download.pytorch.org/whl/${TORCH}"
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip install --no-deps /dist/*.whl && pip check

USER 1000
WORKDIR /work
ENTRYPOINT ["koine"]
CMD ["--help"]
