"""A batch job as Kubernetes manifests: pure functions from a `BatchJob` and a `Site` to YAML.

One pod per machine, in an Indexed Job behind a headless Service, or the same Job in a JobSet, which
restarts all pods together. The pod's index is the rank of the machine, and pod 0 has a fixed name
in DNS. A pod that saved its state before it ended (exit code 75), or that the cluster evicted, is
run again and does not count as a failure; after wrong input (2) nothing is run again.
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
RESTARTS = 10  # per machine, or of all pods of a JobSet; saved stops are not counted
_GRACE = 30  # seconds beyond `save_before` after which a pod that does not end is killed
_TERMINATED = 128 + 15  # torchrun was told to stop, and its ranks have saved
_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_OBJECT = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_IMAGE = re.compile(r"[A-Za-z0-9][\w./:@-]*", re.ASCII)
_QUANTITY = re.compile(r"[1-9][0-9]*[KMGT]i")


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a cluster offers to a job: image, PersistentVolumeClaims, name of the W&B secret."""

    image: str
    claim: str
    data_claim: str | None = None
    shared_memory: str = "8Gi"
    wandb_secret: str = "wandb"

    def __post_init__(self) -> None:
        """Refuse names that Kubernetes does not accept."""
        claim = "the name of a PersistentVolumeClaim"
        for name, pattern, expected in (
            ("image", _IMAGE, "the name of a container image"),
            ("claim", _OBJECT, claim),
            ("data_claim", _OBJECT, claim),
            ("shared_memory", _QUANTITY, "a size such as 8Gi"),
            ("wandb_secret", _OBJECT, "the name of a Secret"),
        ):
            value = getattr(self, name)
            if name == "data_claim" and value is None:
                continue
            if not isinstance(value, str) or not pattern.fullmatch(value):
                instead = "correct it in the site's file"
                raise UserError(f"{name}: {value!r}", expected=expected, instead=instead)


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
                instead="correct its name or remove the line",
            )
    return Site(**{"image": None, "claim": None, **given})


def render(job: BatchJob, site: Site, kind: Kind = "job") -> str:
    """The manifests of every run of a job, as one YAML stream."""
    if job.runs != "runs":
        raise UserError(
            f"--runs {job.runs!r} with --kubernetes",
            expected="run folders on the PersistentVolumeClaim that the site's file names",
            instead="leave --runs out",
        )
    runs = [_Run(job, site, index) for index in range(len(job.run_names))]
    build = _jobset if kind == "jobset" else _service_and_job
    manifests = [manifest for run in runs for manifest in build(run)]
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, explicit_start=True)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Quotes all text that another YAML parser could read as a number or a boolean."""


def _text(dumper: _Dumper, text: str) -> Any:
    plain = re.fullmatch(r"[A-Za-z/-][\w./=-]+", text, re.ASCII)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def object_name(run: str) -> str:
    """A name that Kubernetes accepts; different runs have different names."""
    if _LABEL.fullmatch(run):
        return run
    words = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[:27].rstrip("-")
    return f"run-{words}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class _Run:
    """One run of a job (a sweep has several), at a site."""

    job: BatchJob
    site: Site
    index: int

    @property
    def name(self) -> str:
        return object_name(self.job.run_names[self.index])

    @property
    def metadata(self) -> Manifest:
        run = self.job.run_names[self.index]
        return {
            "name": self.name,
            "labels": {
                "app.kubernetes.io/name": "launcher",
                "app.kubernetes.io/instance": self.name,
            },
            "annotations": {"launcher/run": run, "launcher/recipe": self.job.recipe},
        }


def _service_and_job(run: _Run) -> list[Manifest]:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": run.metadata,
        "spec": {
            "clusterIP": "None",  # headless: no address of its own, a name for each pod
            "publishNotReadyAddresses": True,  # the pods meet before they are ready
            "selector": {"batch.kubernetes.io/job-name": run.name},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }
    spec = _job_spec(run, f"{run.name}-0.{run.name}", restarts=RESTARTS * run.job.nodes)
    spec["template"]["spec"]["subdomain"] = run.name
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": run.metadata, "spec": spec}
    return [service, job]


def _jobset(run: _Run) -> list[Manifest]:
    """The Job in a JobSet: any failure but wrong input restarts all pods, at the same time."""
    spec = _job_spec(run, f"{run.name}-node-0-0.{run.name}", restarts=0)
    wrong_input = {
        "name": "wrong-input",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return [
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": run.metadata,
            "spec": {
                "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                "failurePolicy": {"maxRestarts": RESTARTS, "rules": [wrong_input]},
                "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": spec}}],
            },
        }
    ]


def _job_spec(run: _Run, first_pod: str, restarts: int) -> Manifest:
    evicted = {"type": "DisruptionTarget", "status": "True"}
    return {
        "completionMode": "Indexed",
        "completions": run.job.nodes,
        "parallelism": run.job.nodes,
        "backoffLimit": restarts,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": _exit_codes(EXIT_USER)},
                {"action": "Ignore", "onPodConditions": [evicted]},
                {"action": "Ignore", "onExitCodes": _exit_codes(EXIT_SAVED, _TERMINATED)},
            ]
        },
        "template": {
            "metadata": {"labels": run.metadata["labels"]},
            "spec": _pod(run, first_pod),
        },
    }


def _exit_codes(*codes: int) -> Manifest:
    return {"containerName": "train", "operator": "In", "values": list(codes)}


def _pod(run: _Run, first_pod: str) -> Manifest:
    return {
        "restartPolicy": "Never",  # the Job decides by the exit code
        "terminationGracePeriodSeconds": _save_seconds(run.job) + _GRACE,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,  # the group of the volumes, so that an ordinary user can write
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(run, first_pod)],
        "volumes": _volumes(run.site),
    }


def _container(run: _Run, first_pod: str) -> Manifest:
    job = run.job
    mounts = {"runs": f"{WORKSPACE}/runs", "data": f"{WORKSPACE}/data"}
    mounts |= {"shared-memory": "/dev/shm", "temporary": "/tmp"}
    resources: Manifest = {"requests": {"cpu": str(job.processes_per_node * job.cpus)}}
    if job.gpus:
        resources["limits"] = {"nvidia.com/gpu": str(job.gpus)}
    launched = map(_literal, job.arguments(run.index))
    return {
        "name": "train",
        "image": run.site.image,
        "workingDir": WORKSPACE,
        "command": ["python", "-m", "launcher.cluster.torchrun"],
        "args": [*_torchrun_options(job, first_pod), "-m", "launcher", *launched],
        "env": _environment(run),
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()],
    }


def _save_seconds(job: BatchJob) -> int:
    return int(job.save_before.total_seconds())


def _literal(word: str) -> str:
    """Quote the dollar signs: Kubernetes replaces `$(NAME)`, and torchrun then `${name}`."""
    return word.replace("$", "$$$$")


def _torchrun_options(job: BatchJob, first_pod: str) -> list[str]:
    return [
        f"--nnodes={job.nodes}",
        f"--nproc-per-node={job.processes_per_node}",
        "--node-rank=$(JOB_COMPLETION_INDEX)",
        f"--master-addr={first_pod}",
        f"--master-port={PORT}",
        f"--rdzv-conf=timeout={RENDEZVOUS_TIMEOUT}",
    ]


def _environment(run: _Run) -> list[Manifest]:
    index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    key = {"name": run.site.wandb_secret, "key": "WANDB_API_KEY", "optional": True}
    on_cpu = [] if run.job.gpus else [{"name": "ACCELERATE_USE_CPU", "value": "true"}]
    return [
        {"name": "JOB_COMPLETION_INDEX", "valueFrom": {"fieldRef": index}},
        {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": key}},
        {"name": "OMP_NUM_THREADS", "value": str(run.job.cpus)},
        {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(_save_seconds(run.job))},
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
