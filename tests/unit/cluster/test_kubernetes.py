"""Manifests that the published schemas accept, and out of which no name can break."""

import os
import random
import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from string import Template
from typing import Any

import kubernetes_validate
import pytest
import yaml

from launcher.cluster.job import BatchJob, Sweep
from launcher.cluster.kubernetes import Kind, Manifest, Site, object_name, read_site, render
from tests.support import forked
from tests.support.helpers import refused
from tests.support.processes import RESUMABLE, ROOT, Run

SITE = Site(image="registry.example.com/launcher:latest", claim="runs")
KINDS: tuple[Kind, ...] = ("job", "jobset")


def job(**fields: Any) -> BatchJob:
    return BatchJob(**({"recipe": "recipes/simplecnn.py", "name": "first"} | fields))


def manifests(given: BatchJob, kind: Kind = "job", site: Site = SITE) -> list[Manifest]:
    return list(yaml.safe_load_all(render(given, site, kind)))


def batch_job(documents: list[Manifest]) -> Manifest:
    """The Job among the manifests, or the one that a JobSet makes of its template."""
    last = documents[-1]
    if last["kind"] == "Job":
        return last
    (template,) = last["spec"]["replicatedJobs"]
    name = {"name": f"{last['metadata']['name']}-{template['name']}-0"}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": name, **template["template"]}


def container(documents: list[Manifest]) -> Manifest:
    (found,) = batch_job(documents)["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fields", "site"),
    [
        ({}, SITE),
        ({"nodes": 2, "gpus": 8, "cpus": 6, "save_before": timedelta(minutes=5)}, SITE),
        ({"nodes": 4, "gpus": 0, "processes": 2, "name": "My_Run.2"}, SITE),
        ({"sweep": Sweep("optimizer.lr", ("0.01", "0.1"))}, SITE),
        ({}, Site(image="a", claim="b", data_claim="1e3", shared_memory="64Gi", wandb_secret="c")),
    ],
)
def test_the_published_schemas_accept_it(fields: dict[str, Any], site: Site, kind: Kind) -> None:
    documents = manifests(job(**fields), kind, site)
    for document in [*documents[:-1], batch_job(documents)]:
        if document["kind"] != "JobSet":  # no schema of it is published with Kubernetes
            kubernetes_validate.validate(document, "1.30", strict=True)


def test_the_check_of_the_schemas_finds_a_misspelt_field() -> None:
    document = batch_job(manifests(job()))
    document["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, "1.30", strict=True)


def test_two_machines_of_eight_gpus_are_two_pods_that_meet_at_the_first() -> None:
    service, batch = manifests(job(nodes=2, gpus=8, cpus=6))
    spec = batch["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert service["spec"]["clusterIP"] == "None"
    labels = {"batch.kubernetes.io/job-name": batch["metadata"]["name"]}  # put on by Kubernetes
    assert service["spec"]["selector"] == labels
    subdomain = spec["template"]["spec"]["subdomain"]
    assert subdomain == service["metadata"]["name"]
    words = container([service, batch])["args"]
    assert f"--master-addr={batch['metadata']['name']}-0.{subdomain}" in words
    assert {"--nnodes=2", "--nproc-per-node=8", "--node-rank=$(JOB_COMPLETION_INDEX)"} <= set(words)
    assert container([service, batch])["resources"] == {
        "requests": {"cpu": "48"},
        "limits": {"nvidia.com/gpu": "8"},
    }


def test_in_a_jobset_the_first_pod_has_the_name_that_jobset_gives_it() -> None:
    (jobset,) = manifests(job(nodes=2, name="first"), "jobset")
    assert "--master-addr=first-node-0-0.first" in container([jobset])["args"]
    assert jobset["spec"]["network"]["enableDNSHostnames"]
    assert batch_job([jobset])["spec"]["backoffLimit"] == 0
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_run_again_and_wrong_input_is_not(kind: Kind) -> None:
    rules = batch_job(manifests(job(), kind))["spec"]["podFailurePolicy"]["rules"]
    actions = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {"values": ["moved"]})["values"]
    }
    assert actions == {2: "FailJob", "moved": "Ignore", 75: "Ignore", 143: "Ignore"}
    pod = batch_job(manifests(job(), kind))["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "a pod failure policy needs it"


def test_the_pod_is_an_ordinary_user_with_time_to_save_and_memory_to_share() -> None:
    site = Site(image="a", claim="mine", data_claim="images", shared_memory="64Gi")
    given = job(save_before=timedelta(minutes=5))
    pod = batch_job(manifests(given, site=site))["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["terminationGracePeriodSeconds"] > 300
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert volumes["runs"] == {"persistentVolumeClaim": {"claimName": "mine"}}
    assert volumes["data"] == {"persistentVolumeClaim": {"claimName": "images", "readOnly": True}}
    assert volumes["shared-memory"] == {"emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}}
    (train,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in train["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    assert mounts["shared-memory"] == "/dev/shm"
    assert not train["securityContext"]["allowPrivilegeEscalation"]


def test_the_key_of_wandb_is_named_and_not_written() -> None:
    environment = {entry["name"]: entry for entry in container(manifests(job()))["env"]}
    reference = {"name": "wandb", "key": "WANDB_API_KEY", "optional": True}
    assert environment["WANDB_API_KEY"]["valueFrom"] == {"secretKeyRef": reference}


def test_a_sweep_is_one_job_per_value() -> None:
    given = job(sweep=Sweep("optimizer.lr", ("0.01", "0.1")))
    first, second = [item for item in manifests(given) if item["kind"] == "Job"]
    assert first["metadata"]["name"] != second["metadata"]["name"]
    for document, value in ((first, "0.01"), (second, "0.1")):
        assert f"optimizer.lr={value}" in container([document])["args"]


def expanded(word: str, environment: dict[str, str]) -> str:
    """What Kubernetes makes of a word of a command."""

    def replaced(found: re.Match[str]) -> str:
        name = found.group(1)
        return "$" if found.group() == "$$" else environment.get(name, found.group())

    return re.sub(r"\$\$|\$\(([^)]*)\)", replaced, word)


def elastic(*words: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "launcher.cluster.torchrun"]
    command = [*program, "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return forked.run([*command, "--no-python", *words], cwd=ROOT, env=environment)


PARTS = ["$(HOME)", "$$", "$", "${rank}", "$local_rank", "\n---\n", ": ", "#", "'", '"', "\\"]
PARTS += ["{}", "[", "&a", "*a", "!!python/object/apply:os.system ", "%", "\t", "\x07", "\x85"]
PARTS += ["\u2028", "é", "😀", "yes", "1e3", "0x1f", "null", "- ", "| ", "`id`", " "]


def test_hostile_jobs_start_the_words_that_were_typed() -> None:
    chance = random.Random(5)
    for _ in range(100):
        text = "".join(chance.choices(PARTS, k=chance.randint(1, 6)))
        given = job(recipe=f"recipes/{text.replace('=', '')}.py", overrides=(f"a.b={text}",))
        kind = chance.choice(KINDS)
        documents = manifests(given, kind)
        assert len(documents) == (2 if kind == "job" else 1)
        words = container(documents)["args"]
        seen = [Template(expanded(word, {"HOME": "/root"})) for word in words]
        started = [word.safe_substitute(rank="0", local_rank="0") for word in seen]  # as torchrun
        assert tuple(started[started.index("launcher") + 1 :]) == given.arguments()


def test_torchrun_hands_hostile_words_on_as_they_were_typed() -> None:
    typed = tuple(f"a.b={part}" for part in PARTS)
    words = container(manifests(job(overrides=typed)))["args"]
    start = words.index("recipes/simplecnn.py") + 1
    seen = [expanded(word, {}) for word in words[start : start + len(typed)]]
    done = elastic("printf", "%s\\0", *seen)
    assert done.stdout == 2 * "".join(f"{word}\0" for word in typed), done.stderr


def test_text_stays_text_for_other_readers_of_yaml() -> None:
    site = Site(image="1e3", claim="0x10", data_claim="1e5", wandb_secret="y")
    text = render(job(), site)
    for value in ("1e3", "0x10", "1e5", "y"):
        assert f': "{value}"' in text
        assert f": {value}\n" not in text


@pytest.mark.parametrize(
    "run", ["first", "First", "a_b", "a.b", "A" * 63, "7", "a-", "9-lives", "x" * 40, "x" * 41]
)
def test_every_name_of_a_run_becomes_one_that_kubernetes_takes(run: str) -> None:
    hostname = f"{object_name(run)}-node-0-127"
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", hostname)
    assert len(hostname) <= 63


def test_different_runs_have_different_names() -> None:
    runs = ["a-b", "a_b", "a.b", "A-b", "a-B", "-".join("ab" * 20), "-".join("ab" * 21)]
    assert len({object_name(run) for run in runs}) == len(runs)


# The site's file


def test_the_shipped_file_of_a_site_is_read() -> None:
    site = read_site(ROOT / "deploy" / "kubernetes.yaml")
    assert site == Site(image="registry.example.com/launcher:latest", claim="runs")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("claim: runs", ("image: None", "container image")),
        ("image: a", ("claim: None", "PersistentVolumeClaim")),
        ("image: a\nclaim: Runs", ("claim: 'Runs'",)),
        ("image: a\nclaim: runs\nqueue: b", ("'queue'", "data_claim")),
        ("image: a\nclaim: runs\nshared_memory: 8", ("shared_memory: 8", "8Gi")),
        ("image: [", ("site.yaml",)),
        ("", ("image: None",)),
    ],
)
def test_a_wrong_file_of_a_site_is_refused(
    tmp_path: Path, text: str, parts: tuple[str, ...]
) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with refused(*parts):
        read_site(tmp_path / "site.yaml")


def test_a_missing_file_of_a_site_is_refused(tmp_path: Path) -> None:
    with refused("no.yaml", "deploy/kubernetes.yaml"):
        read_site(tmp_path / "no.yaml")


def test_run_folders_outside_the_claim_are_refused() -> None:
    with refused("--runs '/scratch'", "leave --runs out"):
        render(job(runs="/scratch"), SITE)


# The words of the container, and its exit code


@pytest.mark.slow
@pytest.mark.parametrize(("script", "code"), [("exit 75", 75), ("kill -9 $$$$", 137)])
def test_the_pod_ends_with_the_exit_code_of_the_first_rank_that_failed(
    script: str, code: int
) -> None:
    later = f'if [ "$RANK" = 1 ]; then {script}; else sleep 5; exit 9; fi'
    done = elastic("sh", "-c", later)  # where torchrun makes $$ of $$$$
    assert done.returncode == code, done.stderr
    assert f"launcher: rank 1 was the first to fail, with exit code {code}" in done.stderr


@pytest.mark.slow
def test_a_pod_whose_ranks_are_done_ends_with_zero() -> None:
    assert elastic("true").returncode == 0


@pytest.mark.slow
def test_the_words_of_two_pods_train_together_and_a_stopped_pod_says_so(tmp_path: Path) -> None:
    """Both pods as processes of this machine: only rank and address are another's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = container(manifests(job(nodes=2, gpus=0, recipe=str(RESUMABLE))))["args"]
    recipe = words.index(str(RESUMABLE))
    assert words[recipe - 3 : recipe] == ["-m", "launcher", "train"]

    def start(*more: str) -> list[Run]:
        runs = []
        for rank in ("0", "1"):
            here = [re.sub(r"(--master-addr=).*", r"\g<1>127.0.0.1", word) for word in words]
            here = [re.sub(r"(--master-port=).*", rf"\g<1>{port}", word) for word in here]
            here = [expanded(word, {"JOB_COMPLETION_INDEX": rank}) for word in here]
            agent = (sys.executable, "-m", "launcher.cluster.torchrun", *here[: recipe - 3])
            runs.append(Run(agent, tmp_path, *here[recipe + 1 :], *more))
        return runs

    first, second = start("epochs=4000")
    first.wait_for("1/4000  train")
    second.process.terminate()
    assert (first.end(), second.end()) == (75, 143), first.text()
    assert "goes on from here" in first.text()
    first, second = start("epochs=4000", "--max-steps", "200")
    assert (first.end(), second.end()) == (0, 0), first.text() + second.text()
    assert "resumed after step" in first.text()
