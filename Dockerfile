# llada2-fast serve in a container. Nobody publishes an image: build your own.
#
#   docker build -t llada2-fast .                                           # torch as pip has it, with CUDA
#   docker build -t llada2-fast --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .   # for CPUs
#   docker run --rm -p 127.0.0.1:8000:8000 llada2-fast                      # the embedded model
#   docker run --rm --gpus all -p 127.0.0.1:8000:8000 -e LLADA2_FAST_API_KEY=... \
#       -v /models/LLaDA2.1-mini:/model:ro llada2-fast /model
#
# A hub id instead of a folder is downloaded into /hub: mount a volume there to keep it.
FROM python:3.12-slim

# Triton compiles a small launcher for each kernel with the system's C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX=
COPY constraints.txt /src/
RUN pip install --no-cache-dir -c /src/constraints.txt ${TORCH_INDEX:+--index-url $TORCH_INDEX} torch
COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt "/src[serve,structured]" && rm -rf /src

RUN useradd --create-home llada2 && mkdir /hub && chown llada2 /hub
USER llada2
# glibc keeps memory apart for each thread and gives little of it back
ENV HF_HOME=/hub MALLOC_ARENA_MAX=2
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
# Inside a container the loopback address is nobody's: who may reach the port is said by `docker run -p`.
ENTRYPOINT ["llada2-fast", "serve", "--host", "0.0.0.0", "--no-progress"]
