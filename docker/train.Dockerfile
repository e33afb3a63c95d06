# docker build -f docker/train.Dockerfile -t passion-monai-train .
# CUDA 13.0 needs driver 580 or newer. For older ones, the tag exists with cuda12.6 as well.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
# Any user id may run it: MONAI needs a user's name, and caches need a home.
ENV USER=passion HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib
# The image's Python is the system's, which pip refuses to change otherwise.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /opt/passion-monai
COPY LICENSE README.md constraints.txt pyproject.toml setup.cfg package/
COPY passion_monai package/passion_monai
RUN pip install --no-cache-dir -c package/constraints.txt "./package[demo,tracking]"
COPY bundles bundles
USER 1000
