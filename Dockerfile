# distill in a container. On the CPU this runs the command of the README and writes ./output:
#
#     docker build -t distill .
#     mkdir -p output
#     docker run --rm --user "$(id -u)" -v "$PWD/output:/data/output" distill
#
# With GPUs, whose torch pip takes by itself where constraints.txt is left out (docs/scaling.md has more):
#
#     docker build -t distill --build-arg INSTALL="-e .[s3,wandb]" .
FROM python:3.11-slim-bookworm

# any user may run it: those without an account have no home and no name of their own
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    HOME=/data \
    USER=distill \
    HF_HOME=/data/cache

WORKDIR /opt/distill
COPY . .
ARG INSTALL="-c constraints.txt -e ."
RUN pip install ${INSTALL}

RUN mkdir -p /data/output /data/cache && chmod -R a+rwX /data
WORKDIR /data
USER 1000

ENTRYPOINT ["distill"]
CMD ["run", "--method", "lcm", "--family", "sdxl"]
