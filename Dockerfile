# The command sparse-ft with Ray, submitit, PostgreSQL and S3, every version pinned; in /opt/sparse_ft the project itself.
#     make image               # for CPUs
#     make image TORCH=cu130   # for NVIDIA GPUs: cu126, cu129 or cu130, what their driver runs
FROM python:3.11-slim-bookworm

# The build of torch, an index of https://download.pytorch.org/whl. CUDA builds bring their libraries themselves; the
# driver is the host's.
ARG TORCH=cpu

# gcc: Triton compiles what starts its kernels. git: MLflow asks it for commits. wget: KubeRay's probes call it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev make wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 researcher \
    && install --directory --owner=1000 /opt/sparse_ft

WORKDIR /opt/sparse_ft
COPY requirements/base.txt requirements/lock.txt requirements/
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/$TORCH" \
        "$(grep '^torch==' requirements/base.txt)" \
    && pip install --no-cache-dir --requirement requirements/base.txt

COPY --chown=1000 . .
RUN pip install --no-cache-dir --constraint requirements/lock.txt --editable ".[ray,submitit,postgresql,s3]"

USER 1000
CMD ["sparse-ft", "--help"]
