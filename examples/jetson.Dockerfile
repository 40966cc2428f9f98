# flashtune on a Jetson, in a container. Build it on the Jetson, in the repository's folder:
#   docker build -f examples/jetson.Dockerfile -t flashtune .
#   docker run --rm --runtime nvidia flashtune
#   docker run --rm --runtime nvidia -v flashtune:/var/lib/flashtune flashtune \
#       flashtune search --shape qwen3-vl-2b
# For Thor (JetPack 7) add these build arguments:
#   --build-arg BASE=nvcr.io/nvidia/cuda:13.0.0-devel-ubuntu24.04
#   --build-arg WHEELS=https://pypi.jetson-ai-lab.io/sbsa/cu130 --build-arg TRITON='triton>=3.7'
# Nothing of this was run on a Jetson. Each step says what of it was run elsewhere; docs/jetson.md
# says where the figures come from.

# not run: NVIDIA's image of JetPack 6.1 and 6.2, with CUDA 12.6
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0
FROM ${BASE}

# not run: a compiler and Python.h, which Triton's launcher and the kernels for CPUs need
RUN apt-get update && apt-get install -y --no-install-recommends \
        build-essential python3-dev python3-pip python3-venv && rm -rf /var/lib/apt/lists/*

# run on x86-64, with Python 3.11 in place of the image's: an environment of its own
RUN python3 -m venv /opt/flashtune
ENV PATH=/opt/flashtune/bin:$PATH

# not run: torch from NVIDIA's index, before anything that would bring PyPI's
ARG WHEELS=https://pypi.jetson-ai-lab.io/jp6/cu126
RUN pip install --no-cache-dir torch --index-url ${WHEELS}

# not run: Triton from PyPI, which has wheels for aarch64
ARG TRITON=triton>=3.6,<3.7
RUN pip install --no-cache-dir "${TRITON}"

# run on x86-64, as a wheel: `make wheel`
COPY . /tmp/source
RUN pip install --no-cache-dir '/tmp/source[hf]' && rm -rf /tmp/source

# run on x86-64: the database and what is compiled, in a folder that a volume keeps
ENV FLASHTUNE_DB=/var/lib/flashtune/tuning.db FLASHTUNE_CACHE=/var/lib/flashtune/cache
RUN mkdir -p -m 700 /var/lib/flashtune

# run on x86-64: says which device this is; on a Jetson whose torch finds no GPU, why
CMD ["flashtune", "devices"]
