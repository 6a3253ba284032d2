# `pcam serve` as a container. Its twin for clusters is apptainer.def; tests/test_container.py holds the two together.
#
#     docker build -t pcam .
#     docker run --rm -p 127.0.0.1:8000:8000 -e PCAM_TOKEN="$(openssl rand -hex 16)" -v "$PWD/models:/models:ro" pcam \
#         --host 0.0.0.0 --checkpoint /models/NAME.safetensors
#     docker build --build-arg INSTALL="pip install" -t pcam .       # torch with CUDA, as pip finds it
FROM python:3.11-slim

LABEL org.opencontainers.image.title="pcam" \
      org.opencontainers.image.description="Answers for PatchCamelyon patches; research software, no medical device" \
      org.opencontainers.image.licenses="MIT"

# the small build of torch, as in CI: the other one is 3 GB that only a GPU can use
ARG INSTALL="uv pip install --torch-backend=cpu"
ENV UV_SYSTEM_PYTHON=1 UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONNOUSERSITE=1

WORKDIR /opt/pcam
COPY requirements.lock pyproject.toml README.md LICENSE inference.py ./
COPY pcamlib ./pcamlib
# the versions of the lock, of what answering needs: the tools that check and document stay out
RUN python -m pip install uv
RUN $INSTALL --constraint requirements.lock --editable ".[serve]"
RUN python -m pip check
RUN pcam --help > /dev/null
RUN python inference.py --help > /dev/null

RUN useradd --create-home --uid 10001 pcam
USER pcam
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD python -c "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"
ENTRYPOINT ["pcam", "serve"]
CMD ["--help"]
