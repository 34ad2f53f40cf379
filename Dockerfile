# Snakemake and the Python packages of all jobs. The code is not in the image: it is the mounted
# checkout's, so that an image stays valid until constraints.txt or lock.txt changes.
#     docker build --tag moe-routing-study .                        # PyTorch for CPUs
#     docker build --target cuda --tag moe-routing-study:cuda .     # PyTorch for NVIDIA GPUs
#     docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/study" moe-routing-study \
#         snakemake --cores all
# envs/apptainer.def runs the same commands.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm AS packages
# git names the commit of the checkout in the results, whoever owns the mounted folder.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends git && \
    rm -rf /var/lib/apt/lists/* && \
    git config --system --add safe.directory '*'
COPY constraints.txt lock.txt /opt/
RUN pip install --no-cache-dir --no-deps --require-hashes -r /opt/lock.txt
ENV PYTHONPATH=/study/src PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1
# The user of docker run --user has neither a home nor a name in the image.
ENV HOME=/tmp USER=study
WORKDIR /study

FROM packages AS cuda
RUN pip install --no-cache-dir -c /opt/constraints.txt torch && \
    pip check

FROM packages AS cpu
RUN pip install --no-cache-dir -c /opt/constraints.txt --no-deps \
        --index-url https://download.pytorch.org/whl/cpu torch && \
    pip check
