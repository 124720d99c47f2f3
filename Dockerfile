# docker build -t lengthwise . && docker run --rm --gpus all -u "$(id -u):$(id -g)" -v "$PWD:/work" lengthwise
# It runs the workflow in the mounted folder, whose config/config.yaml says what to embed.
FROM python:3.11-slim-bookworm
# A compiler, for the layers that torch compiles for GPUs.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY . /opt/lengthwise
WORKDIR /opt/lengthwise
RUN pip install --no-cache-dir -e '.[workflow]'
# A home that any user may write to: caches of Snakemake, torch and matplotlib.
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["snakemake", "--snakefile", "/opt/lengthwise/workflow/Snakefile"]
CMD ["--cores", "all", "--resources", "gpu=1"]
