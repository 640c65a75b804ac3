"""A batch job as Kubernetes manifests: pure functions from a job and a site to YAML.

One pod per machine, in an Indexed Job behind a headless Service, or the same Job in a JobSet, which
restarts all pods together. The pod's index is the machine's rank, and pod 0 has a stable name in
DNS. A pod that saved its state before it ended (exit code 75), or that the cluster moved away, is
run again and does not count as a failure; wrong input (2) is not tried twice.
"""

import hashlib
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from launcher.cluster.job import BatchJob
from launcher.errors import EXIT_SAVED, EXIT_USER, UserError

Kind = Literal["job", "jobset"]
Manifest = dict[str, Any]

WORKSPACE = "/workspace"  # the Dockerfile's WORKDIR
USER = 1000  # the Dockerfile's USER
PORT = 29500
RENDEZVOUS_TIMEOUT = 900  # seconds for all pods to be scheduled and their image pulled
RESTARTS = 10  # of all pods together; those that were saved are not counted
_GRACE = 30  # seconds beyond `save_before` until a pod that does not end is killed
_TERMINATED = 128 + 15  # torchrun was told to stop; its ranks saved
_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_OBJECT = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_IMAGE = re.compile(r"[A-Za-z0-9][\w./:@-]*", re.ASCII)
_QUANTITY = re.compile(r"[1-9][0-9]*[KMGT]i")


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a cluster offers to a job: image, claims on storage, the name of the W&B secret."""

    image: str
    claim: str
    data_claim: str | None = None
    shared_memory: str = "8Gi"
    wandb_secret: str = "wandb"

    def __post_init__(self) -> None:
        """Refuse names that Kubernetes does not take."""
        _check("image", self.image, _IMAGE, "the name of a container image")
        _check("claim", self.claim, _OBJECT, "the name of a PersistentVolumeClaim")
        if self.data_claim is not None:
            _check("data_claim", self.data_claim, _OBJECT, "the name of a PersistentVolumeClaim")
        _check("shared_memory", self.shared_memory, _QUANTITY, "a size such as 8Gi")
        _check("wandb_secret", self.wandb_secret, _OBJECT, "the name of a Secret")


def _check(name: str, value: object, pattern: re.Pattern[str], expected: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise UserError(f"{name}: {value!r}", expected=expected, instead="mend the site's file")


def read_site(path: Path) -> Site:
    """Read a site's YAML file, such as `deploy/kubernetes.yaml`."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} ({error})",
            expected="a YAML file that says what the cluster offers",
            instead="begin with deploy/kubernetes.yaml of the launcher",
        ) from None
    known = [field.name for field in fields(Site)]
    given: dict[str, Any] = values if isinstance(values, dict) else {}
    for name in given:
        if name not in known:
            raise UserError(
                f"{name!r} in {path}",
                expected=f"one of {', '.join(known)}",
                instead="mend its name or remove the line",
            )
    return Site(**{"image": None, "claim": None, **given})


def render(job: BatchJob, site: Site, kind: Kind = "job") -> str:
    """The manifests of every run of a job, as one YAML stream."""
    if job.runs != "runs":
        raise UserError(
            f"--runs {job.runs!r} with --kubernetes",
            expected="the run folders on the claim of the site's file",
            instead="leave --runs out",
        )
    build = _jobset if kind == "jobset" else _job_and_service
    documents = [
        manifest for index in range(len(job.run_names)) for manifest in build(job, site, index)
    ]
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, explicit_start=True)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Quotes all text that another YAML reader could take for a number or a truth value."""


def _text(dumper: _Dumper, text: str) -> Any:
    plain = re.fullmatch(r"[A-Za-z/-][\w./=-]+", text, re.ASCII)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def object_name(run: str) -> str:
    """A name that Kubernetes takes; runs of different names have different ones."""
    if _LABEL.fullmatch(run):
        return run
    words = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[:27].rstrip("-")
    return f"run-{words}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"


def _job_and_service(job: BatchJob, site: Site, index: int) -> list[Manifest]:
    name = object_name(job.run_names[index])
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job, index),
        "spec": {
            "clusterIP": "None",  # headless: no address of its own, a name for each pod
            "publishNotReadyAddresses": True,  # the pods meet before they are ready
            "selector": {"batch.kubernetes.io/job-name": name},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }
    spec = _job_spec(job, site, index, first=f"{name}-0.{name}", restarts=RESTARTS * job.nodes)
    spec["template"]["spec"]["subdomain"] = name
    batch = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(job, index),
        "spec": spec,
    }
    return [service, batch]


def _jobset(job: BatchJob, site: Site, index: int) -> list[Manifest]:
    """The Job in a JobSet: any failure but wrong input restarts all pods, at the same time."""
    name = object_name(job.run_names[index])
    spec = _job_spec(job, site, index, first=f"{name}-node-0-0.{name}", restarts=0)
    wrong_input = {
        "name": "wrong-input",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return [
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": _metadata(job, index),
            "spec": {
                "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                "failurePolicy": {"maxRestarts": RESTARTS, "rules": [wrong_input]},
                "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": spec}}],
            },
        }
    ]


def _metadata(job: BatchJob, index: int) -> Manifest:
    name = object_name(job.run_names[index])
    return {
        "name": name,
        "labels": {"app.kubernetes.io/name": "launcher", "app.kubernetes.io/instance": name},
        "annotations": {"launcher/run": job.run_names[index], "launcher/recipe": job.recipe},
    }


def _job_spec(job: BatchJob, site: Site, index: int, first: str, restarts: int) -> Manifest:
    moved = {"type": "DisruptionTarget", "status": "True"}
    return {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": restarts,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": _exit_codes(EXIT_USER)},
                {"action": "Ignore", "onPodConditions": [moved]},
                {"action": "Ignore", "onExitCodes": _exit_codes(EXIT_SAVED, _TERMINATED)},
            ]
        },
        "template": {"metadata": {"labels": _metadata(job, index)["labels"]}}
        | {"spec": _pod(job, site, index, first)},
    }


def _exit_codes(*codes: int) -> Manifest:
    return {"containerName": "train", "operator": "In", "values": list(codes)}


def _pod(job: BatchJob, site: Site, index: int, first: str) -> Manifest:
    return {
        "restartPolicy": "Never",  # the Job decides, by the exit code
        "terminationGracePeriodSeconds": int(job.save_before.total_seconds()) + _GRACE,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,  # the volumes are this group's, so that an ordinary user can write
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(job, site, index, first)],
        "volumes": _volumes(site),
    }


def _container(job: BatchJob, site: Site, index: int, first: str) -> Manifest:
    mounts = {"runs": f"{WORKSPACE}/runs", "data": f"{WORKSPACE}/data"}
    mounts |= {"shared-memory": "/dev/shm", "temporary": "/tmp"}
    resources: Manifest = {"requests": {"cpu": str(job.processes_per_node * job.cpus)}}
    if job.gpus:
        resources["limits"] = {"nvidia.com/gpu": str(job.gpus)}
    return {
        "name": "train",
        "image": site.image,
        "workingDir": WORKSPACE,
        "command": ["python", "-m", "launcher.cluster.torchrun"],
        "args": [*_rendezvous(job, first), "-m", "launcher", *map(_literal, job.words(index))],
        "env": _environment(job, site),
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()],
    }


def _literal(word: str) -> str:
    """Keep a word as it is: Kubernetes replaces `$(NAME)` in it, and torchrun then `${name}`."""
    return word.replace("$", "$$$$")


def _rendezvous(job: BatchJob, first: str) -> list[str]:
    return [
        f"--nnodes={job.nodes}",
        f"--nproc-per-node={job.processes_per_node}",
        "--node-rank=$(JOB_COMPLETION_INDEX)",
        f"--master-addr={first}",
        f"--master-port={PORT}",
        f"--rdzv-conf=timeout={RENDEZVOUS_TIMEOUT}",
    ]


def _environment(job: BatchJob, site: Site) -> list[Manifest]:
    index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    key = {"name": site.wandb_secret, "key": "WANDB_API_KEY", "optional": True}
    seconds = int(job.save_before.total_seconds())
    on_cpu = [] if job.gpus else [{"name": "ACCELERATE_USE_CPU", "value": "true"}]
    return [
        {"name": "JOB_COMPLETION_INDEX", "valueFrom": {"fieldRef": index}},
        {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": key}},
        {"name": "OMP_NUM_THREADS", "value": str(job.cpus)},
        {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(seconds)},
        *on_cpu,
    ]


def _volumes(site: Site) -> list[Manifest]:
    data: Manifest = {"emptyDir": {}}
    if site.data_claim:
        data = {"persistentVolumeClaim": {"claimName": site.data_claim, "readOnly": True}}
    memory = {"medium": "Memory", "sizeLimit": site.shared_memory}
    return [
        {"name": "runs", "persistentVolumeClaim": {"claimName": site.claim}},
        {"name": "data"} | data,
        {"name": "shared-memory", "emptyDir": memory},
        {"name": "temporary", "emptyDir": {}},
    ]
