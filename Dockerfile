# distill in a container. On the CPU this runs the command of the README and writes ./output:
#
#     docker build -t distill .
#     docker run --rm -v "$PWD/output:/data/output" distill
#
# With GPUs, whose torch pip takes by itself where constraints.txt is left out (docs/scaling.md has more):
#
#     docker build -t distill --build-arg INSTALL="-e .[s3,wandb]" .
FROM python:3.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    HF_HOME=/data/cache

WORKDIR /opt/distill
COPY . .
ARG INSTALL="-c constraints.txt -e ."
RUN pip install ${INSTALL}

# runs write below /data: mount folders there that the user with this number may write
RUN useradd --create-home --uid 1000 distill && mkdir -p /data/output /data/cache && chown -R distill /data
USER distill
WORKDIR /data

ENTRYPOINT ["distill"]
CMD ["run", "--method", "lcm", "--family", "sdxl"]
