# The pipeline in a container: `docker build -t convoy .`, then `docker run --rm --gpus all convoy` (or without
# --gpus all, on the CPU). The torch wheel contains the CUDA libraries; the host needs only NVIDIA's driver and container toolkit.
FROM python:3.12-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home convoy
USER convoy
RUN mkdir /home/convoy/pipeline
WORKDIR /home/convoy/pipeline
ENV VENV=/home/convoy/venv PATH=/home/convoy/venv/bin:$PATH UV_NO_CACHE=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The libraries rarely change, so they have a layer of their own.
COPY --chown=convoy requirements.lock ./
RUN python -m venv $VENV \
    && python -m pip install --no-cache-dir --quiet uv \
    && uv pip sync --python $VENV --quiet --compile-bytecode requirements.lock

COPY --chown=convoy . .
RUN make install
CMD ["convoy", "run"]
