# docker build -f docker/inference.Dockerfile -t passion-monai .
FROM python:3.12-slim
# Any user id may run it: MONAI needs a user's name, and caches need a home.
ENV USER=passion HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /opt/passion-monai
COPY LICENSE README.md constraints.txt pyproject.toml setup.cfg package/
RUN pip install --no-cache-dir -c package/constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch
COPY passion_monai package/passion_monai
RUN pip install --no-cache-dir -c package/constraints.txt ./package
COPY bundles/brats_rfnet_passion bundles/brats_rfnet_passion
USER 1000
# No workers: they hand volumes over in shared memory, of which a container has 64 MB.
ENTRYPOINT ["python", "-m", "monai.bundle", "run", \
    "--config_file", "bundles/brats_rfnet_passion/configs/inference.yaml", \
    "--dataset_dir", "/data", "--output_dir", "/results", "--num_workers", "0"]
