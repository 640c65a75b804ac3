"""The command line of `launcher submit`, and what it shows of jobs; Slurm itself is elsewhere."""

import errno
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from launcher.cli import main
from launcher.cluster import status, submit
from launcher.cluster.job import BatchJob, Sweep
from tests.support.helpers import RECIPES, ROOT, complaint, refused


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder, and no program on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))


def program(name: str, script: str) -> None:
    """A program on the path."""
    Path(name).write_text(f"#!/bin/sh\n{script}\n")
    Path(name).chmod(0o755)


def script(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", "recipes/a recipe.py", *words, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_a_dry_run_prints_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--nodes", "2", "--gpus", "8", "--time", "4:00:00", "--name", "first")
    text = script(capsys, *options, "epochs=3", "--wandb", "off", "optimizer.lr=0.1")
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=8\n" in text
    assert "#SBATCH --time=0-04:00:00" in text
    assert (
        "launcher_words=(train 'recipes/a recipe.py' epochs=3 optimizer.lr=0.1 --wandb=off "
        "--save-before=120 --runs=runs --name=first --resume)" in text
    )
    assert not list(Path().iterdir())


def test_without_a_name_it_is_the_recipes_and_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = script(capsys), script(capsys)
    assert "--name=a-recipe-20" in first
    assert first != second  # a loop of the shell submits several in a second


def test_weights_to_skip_of_no_others_are_refused_before_a_job_waits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = complaint(capsys, "submit", str(RECIPES / "simplecnn.py"), "--skip", "layers.7")
    assert "--skip needs --init-from" in said


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from launcher.cli import main; code = main(['submit', 'x.py', '--dry-run']);"
        "assert not {'torch', 'wandb', 'rich', 'accelerate'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("30", timedelta(minutes=30)),
        ("90:30", timedelta(minutes=90, seconds=30)),
        ("4:00:00", timedelta(hours=4)),
        ("1-12", timedelta(days=1, hours=12)),
        ("1-12:30", timedelta(days=1, hours=12, minutes=30)),
        ("2-01:02:03", timedelta(days=2, hours=1, minutes=2, seconds=3)),
    ],
)
def test_times_are_written_as_in_slurm(
    text: str, time: timedelta, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.parse_time(text) == time
    hours, seconds = divmod(time.seconds, 3600)
    shown = f"{time.days}-{hours:02}:{seconds // 60:02}:{seconds % 60:02}"
    assert f"#SBATCH --time={shown}\n" in script(capsys, "--time", text)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("no recipe is named", "launcher submit RECIPE")),
        (("x.py", "--nodse", "2"), ("--nodse", "did you mean --nodes?")),
        (("x.py", "--optimizer.lr=1"), ("--optimizer.lr after", "type optimizer.lr=1;")),
        (("x.py", "y.py"), ("'y.py' after the recipe", "name=value")),
        (("x.py", "--time", "soon"), ("'soon' is no time like", "4:00:00")),
        (("x.py", "--time", "0"), ("--time 0:00:00", "at least a minute")),
        (("x.py", "--time", "9" * 20), ("is no time like",)),
        (("x.py", "--nodes", "two"), ("--nodes", "'two'")),
        (("x.py", "--sweep", "lr"), ("--sweep lr=", "--sweep optimizer.lr=0.01,0.03,0.1")),
        (("x.py", "--sweep", "lr=1,,2"), ("--sweep lr=1,,2", "none empty")),
        (
            ("x.py", "--partition", "gpu"),
            ("--partition after", "write #SBATCH --partition=... into"),
        ),
        (("x.py", "--node", "2"), ("--node after launcher submit", "did you mean --nodes?")),
        (("x.py", "--site", "none.sh"), ("--site none.sh (no such file)", "slurm_site.sh")),
        (("x.py", "--site", "."), ("--site .", "a file with #SBATCH lines")),
        (("x.py", "--runs", "", "--dry-run"), ("--runs ''", "a folder")),
        (("x.py",), ("on a machine without sbatch", "--dry-run")),
        (("x.py", "--save-before", "9" * 30), ("--save-before", "no whole number of at most 9")),
        (("x.py", "--nodes", "9" * 5000), ("--nodes", "no whole number of at most 9 digits")),
        (("x.py", "--runs", "a\0b"), ("--runs a?b (", "type --runs FOLDER")),
        (("--status", "--runs", "x" * 300), ("no job was submitted for runs in x",)),
        (("--status",), ("no job was submitted for runs in runs", "--runs FOLDER")),
    ],
)
def test_bad_words_are_refused(words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    with refused(*parts):
        submit.main(words)
    assert main(["submit", *words]) == 2


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("optimizer.lr=0.01,0.1", ("0.01", "0.1")),
        ("model.widths=(64,128),[32,64],none", ("(64,128)", "[32,64]", "none")),
    ],
)
def test_a_tuple_is_one_value_of_a_sweep(words: str, values: tuple[str, ...]) -> None:
    assert submit._sweep(words).values == values


def test_a_job_does_not_inherit_what_describes_the_one_it_is_submitted_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program("sbatch", "export -p >said\necho 18")
    mine = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CPU_BIND": "none", "OTHER": "1"}
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    submit.main(["x.py", "--name", "outside"])
    assert all(name in Path("said").read_text() for name in mine)
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_GPUS_PER_NODE"):
        monkeypatch.setenv(name, "3")
    submit.main(["x.py", "--name", "inside"])
    names = [line.split("=")[0].split()[-1] for line in Path("said").read_text().splitlines()]
    assert [name for name in names if name.startswith("SLURM_")] == ["SLURM_CONF"]
    assert "OTHER" in names


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--nodes", "--sweep", "--status", "--wandb", "--save-before"):
        assert option in shown


def test_the_sites_own_lines_are_found_or_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("deploy").mkdir()
    submit.SLURM_SITE.write_text("#SBATCH --partition=usual\n")
    Path("other.sh").write_text("#SBATCH --partition=other\nmodule load x\n")
    assert "--partition=usual" in script(capsys)
    other = script(capsys, "--site", "other.sh")
    assert "--partition=other" in other
    assert "\nmodule load x\n" in other
    assert "usual" not in other


def test_a_site_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "site.sh").write_bytes("# Universität".encode("latin-1"))
    with refused("--site site.sh (not UTF-8)"):
        submit.main(["x.py", "--site", "site.sh", "--dry-run"])


def test_the_shipped_lines_of_a_site_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shipped = str(ROOT / submit.SLURM_SITE)
    assert (
        script(capsys, "--name", "a", "--site", shipped).split()
        == script(capsys, "--name", "a").split()
    )


def test_a_job_that_sbatch_refuses_is_explained(tmp_path: Path) -> None:
    program("sbatch", "echo 'invalid partition: x' >&2\nexit 1")
    with refused("sbatch refused the job: invalid partition: x"):
        submit.main(["x.py"])
    assert not list(tmp_path.glob("runs/jobs/*.json"))


def test_a_job_that_sbatch_refuses_without_a_word_is_refused_all_the_same() -> None:
    program("sbatch", "exit 3")
    with refused("sbatch refused the job: exit code 3, without a word"):
        submit.main(["x.py"])


@pytest.mark.parametrize("answer", ["", "queued", "job 12 of 3", "\\033[2J", "\\377"])
def test_an_answer_without_a_number_is_refused(
    answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program("sbatch", f"printf '{answer}'")
    with refused("sbatch answered", "type squeue --me"):
        submit.main(["x.py"])
    assert not list(tmp_path.glob("runs/jobs/*.json"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "answer",
    [
        *("12", "12;cluster", "Submitted batch job 12", "warning: 3 jobs wait\n12"),
        "Your project has 100 hours left\n\nSubmitted batch job 12\n",
    ],
)
def test_the_number_of_the_job_is_found_in_what_sbatch_says(
    answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program("sbatch", f"cat >/dev/null; echo '{answer}'")
    submit.main(["x.py", "--name", "first"])
    assert capsys.readouterr().out.startswith("job 12: run runs/first, log ")
    assert [path.name for path in Path("runs/jobs").iterdir()] == ["first-12.json"]


def test_an_sbatch_that_is_no_program_is_named() -> None:
    Path("sbatch").mkdir()
    with refused("sbatch cannot be run (Permission denied)", "command -v sbatch"):
        submit.main(["x.py"])


def test_a_job_that_cannot_be_written_down_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    program("sbatch", "echo 12")
    monkeypatch.setattr(status, "record", full)
    with refused("job 12 is queued, but not written down", "No space left", "scancel 12"):
        submit.main(["x.py"])


RECIPE = str(ROOT / "recipes" / "simplecnn.py")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("nope.py",), "nope.py: no such file"),
        ((RECIPE, "optimizer.lrr=1"), "did you mean optimizer.lr?"),
        ((RECIPE, "epochs=no"), "epochs=no"),
        ((RECIPE, "--sweep", "optimizer.lr=0.1,high"), "optimizer.lr=high"),
        ((RECIPE, "--wandb", "maybe"), "--wandb"),
        ((RECIPE, "--max-steps", "0"), "--max-steps"),
        ((RECIPE, "--timeout", "nan"), "--timeout"),
        ((RECIPE, "--checkpoint-every", "x"), "--checkpoint-every x"),
    ],
)
def test_a_run_that_would_not_begin_is_not_queued(
    words: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program("sbatch", "echo >called; echo 12")
    assert main(["submit", *words]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert part in printed.err
    assert sorted(path.name for path in Path().iterdir()) == ["sbatch"]


def test_a_run_that_would_begin_is_queued(capsys: pytest.CaptureFixture[str]) -> None:
    program("sbatch", "echo 12")
    words = (RECIPE, "epochs=3", "--sweep", "optimizer.lr=0.1,0.2", "--name", "s", "--wandb", "off")
    assert main(["submit", *words]) == 0
    assert capsys.readouterr().out.startswith("job 12: run runs/s-0, log ")


def test_seeds_are_an_array_of_the_runs_that_repeat_knows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    program("sbatch", "echo 12")
    words = (RECIPE, "--seeds", "0-1,7", "--name", "s", "--wandb", "off")
    assert main(["submit", *words]) == 0
    said = capsys.readouterr().out
    assert [line.split()[3] for line in said.splitlines()] == [
        *("runs/s-seed0,", "runs/s-seed1,", "runs/s-seed7,")
    ]
    text = script(capsys, *words[1:])
    assert "#SBATCH --array=0-2\n" in text
    assert text.count("--group=s ") == 3
    assert "seed=7" in text


@pytest.mark.parametrize("words", [("--seeds", "3-1"), ("--seeds", "0-1", "--sweep", "lr=1,2")])
def test_seeds_that_are_none_are_refused(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--seeds" in complaint(capsys, "submit", RECIPE, *words)


def test_runs_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("--runs file", "type --runs FOLDER"):
        submit.main(["x.py", "--runs", "file"])


def write_metrics(run: str, *lines: str) -> None:
    folder = Path("runs", run)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"epochs": 9}')
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def metrics(epoch: int, accuracy: float) -> str:
    return json.dumps({"epoch": epoch, "test/accuracy": accuracy})


def status_rows(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    assert main(["submit", "--status"]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()[1:]]


def test_the_status_of_each_run(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = Path("runs", "jobs")
    jobs.mkdir(parents=True)
    status.record(BatchJob(recipe="x.py", name="s", sweep=Sweep("lr", ("1", "2", "3"))), "17")
    for attempt in (1, 2):
        (jobs / f"s-0-17-{attempt}.log").touch()
    (jobs / "s-0-17-17_0-1.log").touch()  # of a run that is called s-0-17
    (jobs / "s-0-17-5-1.log").touch()
    write_metrics("s-0", metrics(1, 0.25), metrics(2, 0.5), '{"epo')  # the last being written
    write_metrics("s-1", metrics(1, 0.125))
    Path("runs", "s-1", "final.safetensors").touch()
    program("squeue", "echo '17_0 RUNNING None'")
    assert status_rows(capsys) == [
        ["s-0", "17_0", "RUNNING", "2", "2/9", "50.00%", "lr=1"],
        ["s-1", "17_1", "done", "-", "1/9", "12.50%", "lr=2"],
        ["s-2", "17_2", "ended", "-", "0/-", "-", "lr=3"],
    ]


@pytest.mark.parametrize("squeue", [None, "exit 1"], ids=["missing", "silent"])
def test_without_an_answer_of_slurm_the_state_is_unknown(
    squeue: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs", "jobs").mkdir(parents=True)
    status.record(BatchJob(recipe="x.py", name="first"), "17")
    if squeue:
        program("squeue", squeue)
    assert [row[:3] for row in status_rows(capsys)] == [["first", "17", "unknown"]]


def test_the_queue_as_squeue_prints_it() -> None:
    program("squeue", "echo '17 PENDING Resources or so'\necho '18_1 RUNNING None'")
    assert status.ask_queue() == {"17": "PENDING (Resources or so)", "18_1": "RUNNING"}
    program("squeue", "printf 'slurm: \\377\\n\\n19 RUNNING\\n'")
    assert (status.ask_queue() or {})["19"] == "RUNNING"


@pytest.mark.parametrize(
    "record",
    [
        *(
            "",
            "[{",
            "{}x",
            "[1]",
            "3",
            "[" * 9999,
            '[{"run": "first"}]',
            '[{"run": 1, "number": "2"}]',
        ),
        *('[{"run": "../up", "number": "2"}]', '[{"run": "a\\u001b[2J", "number": "2"}]'),
    ],
)
def test_a_damaged_record_is_one_row(record: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs", "jobs").mkdir(parents=True)
    Path("runs", "jobs", "bad\x1b[2J-16.json").write_text(record)
    status.record(BatchJob(recipe="x.py", name="first"), "17")
    rows = sorted(status_rows(capsys))
    assert rows[0][:3] == ["bad?[2J-16", "-", "damaged"]
    assert rows[1][:2] == ["first", "17"]


def test_the_status_waits_for_no_fifo(capsys: pytest.CaptureFixture[str]) -> None:
    status.record(BatchJob(recipe="x.py", name="first"), "17")
    Path("runs", "first").mkdir()
    for name in ("first/config.json", "first/metrics.jsonl", "jobs/other-18.json"):
        os.mkfifo(Path("runs", name))
    Path("runs", "jobs", "third-19.json").symlink_to("nowhere")
    rows = sorted(status_rows(capsys))
    assert [row[:3] for row in rows] == [
        ["first", "17", "unknown"],
        ["other-18", "-", "damaged"],
        ["third-19", "-", "damaged"],
    ]


@pytest.mark.parametrize(
    "line",
    [
        *("[]", "3", "{}", "\x1b", "[" * 10**5, '{"epoch": 3, "test/accuracy": null}'),
        *(f'{{"epoch": 3, "test/accuracy": {value}}}' for value in (10**400, "NaN", -1, 7)),
    ],
)
def test_damaged_metrics_are_passed_over(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs", "jobs").mkdir(parents=True)
    status.record(BatchJob(recipe="x.py", name="first"), "17")
    write_metrics("first", metrics(1, 0.25), line)
    Path("runs", "first", "config.json").write_text('["\\u001b"]')
    assert [row[3:] for row in status_rows(capsys)] == [["-", "1/-", "25.00%"]]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_setting_is_shown_as_typed_without_its_control_characters(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("runs", "jobs").mkdir(parents=True)
    sweep = Sweep("model.widths", ("[red]", "\x1b[2J\n"))
    status.record(BatchJob(recipe="x.py", name="s", sweep=sweep), "17")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["submit", "--status"]) == 0
    shown = capsys.readouterr().out
    assert "model.widths=[red]" in shown
    assert "model.widths=?[2J?" in shown
    assert ("│" in shown) == terminal
    assert "\x1b[2J" not in shown


def test_manifests_for_kubernetes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    site = ROOT / "deploy" / "kubernetes.yaml"
    words = ("--nodes", "2", "--gpus", "8", "--name", "first", "--site", str(site), "--kubernetes")
    service, batch = yaml.safe_load_all(script(capsys, *words))
    assert (service["kind"], batch["kind"]) == ("Service", "Job")
    (train,) = batch["spec"]["template"]["spec"]["containers"]
    assert {"--nnodes=2", "--nproc-per-node=8", "recipes/a recipe.py"} <= set(train["args"])
    assert [item["kind"] for item in yaml.safe_load_all(script(capsys, *words, "jobset"))] == [
        "JobSet"
    ]


@pytest.mark.parametrize("words", [("--kubernetes",), ("--kubernetes", "--dry-run", "--time", "9")])
def test_manifests_are_only_printed_and_have_no_time_limit(words: tuple[str, ...]) -> None:
    with refused("--kubernetes", "kubectl apply"):
        submit.main(["x.py", *words])


def test_without_its_site_kubernetes_is_refused() -> None:
    with refused("kubernetes.yaml", "No such file"):
        submit.main(["x.py", "--kubernetes", "--dry-run"])
