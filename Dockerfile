# The launcher in a container, as an ordinary user:
#   docker build -t registry.example.com/launcher .
FROM python:3.12-slim

# torch.compile needs a C++ compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home trainer

# Largest and rarest to change first: a new version of the launcher is a layer of a few kilobytes.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir torch torchvision

COPY pyproject.toml README.md LICENSE /source/
COPY launcher /source/launcher
RUN pip install --no-cache-dir /source

WORKDIR /workspace
COPY recipes recipes
COPY accelerate_config accelerate_config
RUN mkdir data runs && chown trainer data runs
USER 1000
ENV PYTHONUNBUFFERED=1
CMD ["python", "-m", "launcher", "--help"]
