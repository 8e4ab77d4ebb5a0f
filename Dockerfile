# NOT BUILT YET: written without a Docker daemon and without a GPU. What it installs is
# what `make install` installs on a machine with a GPU, which has not been run either.
#
#   docker build -t megatron-apt .
#   docker run --gpus all --ipc host -v "$PWD":/workspace megatron-apt megatron-apt train ...
#
# The devel image is for Triton's compiler and for EXTRAS=gpu, Transformer Engine, which
# compiles its part for torch: docker build --build-arg EXTRAS=gpu ...
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/megatron-apt/bin:$PATH
RUN python3 -m venv /opt/megatron-apt \
    && pip install --no-cache-dir --upgrade pip setuptools wheel

# The version that the Makefile names; its default build is for CUDA, and brings Triton.
ARG TORCH_VERSION=2.13.0
RUN pip install --no-cache-dir "torch==$TORCH_VERSION"

ARG EXTRAS=
WORKDIR /opt/source
COPY setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY megatron_apt megatron_apt
COPY kernels kernels
COPY examples examples
COPY tools tools
RUN pip install --no-cache-dir --no-build-isolation -c constraints.txt ".${EXTRAS:+[$EXTRAS]}"

WORKDIR /workspace
CMD ["megatron-apt"]
