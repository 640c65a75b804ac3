"""Where a run begins: a new folder, or a checkpoint of an old one that fits the recipe."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.checkpoint import checkpoint, run_dir
from launcher.checkpoint.checkpoint import SavedState
from launcher.checkpoint.run_dir import RunDir
from launcher.checkpoint.run_files import Change, RunFiles
from launcher.config import imports
from launcher.config.loader import LoadedRecipe
from launcher.config.options import RunOptions
from launcher.config.plan import START, Progress
from launcher.data.images import Data
from launcher.errors import UserError
from launcher.training.metrics import Best
from launcher.utils.json_text import differing, flatten
from launcher.utils.redaction import cleaned, redacted
from launcher.utils.text import have_changed, is_named

# Where the images lie and how they are read, not what they are.
OF_THE_MACHINE = ("data.root", "data.local_copy", "data.prefetch")
# By which the same weights give other answers, so that those of an earlier epoch are no longer what
# its accuracy says.
OF_ANSWERS = ("model", "data.mean", "data.std")
FILE = "the recipe file"


@dataclass(frozen=True)
class ResumePoint:
    """The run folder, the checkpoint to continue from, and lines for the user.

    `changes` are all that the run has had since it began. With `keeps_description` it has ended
    with other settings than those of this attempt, which trains nothing; and if it `is_tested`, its
    test images are not evaluated once more.
    """

    folder: RunDir
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()
    progress: Progress = START
    best: Best | None = None
    wandb_id: str = ""
    changes: tuple[Change, ...] = ()
    keeps_description: bool = False
    is_tested: bool = False


def resumed_run(
    options: RunOptions, loaded: LoadedRecipe, data: Data, steps_per_epoch: int
) -> ResumePoint:
    """The newest whole checkpoint of the named, or else of the newest, run of this recipe.

    A name that no run has yet begins that run, so a batch script can always say `--resume`. Raises
    `UserError` where settings differ from the checkpoint's that `--resume-changed` does not name.
    Other changes of the recipe file, which may be of a comment or of the network, are noted.
    """
    root, name, changed = options.runs, options.name, options.resume_changed
    folder = run_dir.find(root, name, loaded.name)
    if folder is None:
        if name is None:
            raise UserError(
                f"--resume, but there is no run of {loaded.name} in {root}",
                expected="a run to continue",
                instead="leave --resume out, or type --name NAME or --runs FOLDER",
            )
        _refuse_unknown(changed, flatten(loaded.config))
        note = f"no run is called {name} yet: it begins now"
        return ResumePoint(run_dir.create(root, name, loaded.name), notes=(note,))
    found, complaints = checkpoint.newest(folder.checkpoints)
    if found is None:
        _refuse_finished(folder, has_damaged=bool(complaints))
        refuse_changes(folder.config() or loaded.config, loaded.config, changed)
        _refuse_lost_weights(folder, options)
        return ResumePoint(folder, notes=(*complaints, "no whole checkpoint: from the beginning"))
    state = checkpoint.read_state(found)
    progress = state.progress
    # First what no --resume-changed permits, so that nobody is told to type it.
    _refuse_other_optimizer(folder, state.config, loaded.config)
    _refuse_other_validation(folder, state.config, loaded.config)
    _refuse_past_end(folder, progress.epochs + state.is_within_epoch, loaded.recipe.epochs)
    refuse_changes(state.config, loaded.config, changed)
    _refuse_other_data(folder, state, data, changed)
    notes = [*complaints, f"resumed after step {progress.step}, from {found.name}"]
    before = RunFiles(folder.path)
    files = [FILE] * (state.source != redacted(loaded.source))
    files += imports.changed(before.about.get("neighbours"), loaded.neighbours)
    if files:
        notes.append(f"{have_changed(files)}: what is no setting may differ")
    change = _change_since(state, loaded, data, files)
    _refuse_past_step(folder, progress.step, options.max_steps)
    if state.is_within_epoch:
        _refuse_other_batches(progress.step, state, loaded.config, steps_per_epoch)
    else:
        progress = replace(progress, step=progress.epochs * steps_per_epoch)
    best = state.best
    if change.forgets_best:
        best, progress = None, replace(progress, to_beat=None, epochs_without=0)
        notes.append("the best epoch is one of those to come: until now images or answers differed")
    # Those of attempts that went on from here, or from later on, are undone.
    changes = [one for one in before.changes if one.place < change.place]
    has_waited = progress.has_waited(loaded.recipe.patience)
    is_over = has_waited or progress.epochs >= loaded.recipe.epochs
    if change.what and is_over:
        _refuse_other_end(folder, change)
        why = "patience has ended the run" if has_waited else "nothing is left to train"
        notes.append(f"{why}, so without effect: {', '.join(change.what)}")
    elif change.what:
        changes.append(change)
    return ResumePoint(
        folder,
        found,
        tuple(notes),
        progress,
        best,
        state.wandb_id,
        tuple(changes),
        keeps_description=bool(change.what) and is_over,
        is_tested=bool(change.what and is_over and before.tested),
    )


def _change_since(
    state: SavedState, loaded: LoadedRecipe, data: Data, files: Sequence[str]
) -> Change:
    """What this attempt has otherwise than the checkpoint with which it goes on."""
    settings = described_changes(state.config, loaded.config)
    has_other_images = state.data_digest != data.digest
    what = (*settings.values(), *files, *["the images"] * has_other_images)
    has_other_answers = any(is_named(name, OF_ANSWERS) for name in settings)
    epochs = state.progress.epochs
    steps = state.progress.step - epochs * state.steps_per_epoch
    return Change(epochs, steps, what, has_other_images or has_other_answers)


def initial_weights(root: Path, given: str) -> Path:
    """The file that `--init-from` means: itself, or the last weights of a run or its folder.

    Raises `UserError` where there is none.
    """
    for folder in (Path(given), root / given):
        if os.path.isfile(folder):  # false where Path.is_file raises: the name is too long
            return folder
        for name in ("final.safetensors", "best.safetensors", "weights.safetensors"):
            if os.path.isfile(folder / name):
                return folder / name
        found, _ = checkpoint.newest(folder / "checkpoints")
        if found is not None:
            return found / "weights.safetensors"
    raise UserError(
        f"--init-from {given}",
        expected=f"a run in {root}, a run's folder or a .safetensors, .pth or .pt file",
        instead="see which runs there are: ls " + str(root),
    )


def refuse_changes(
    saved: Mapping[str, Any], present: Mapping[str, Any], changed: Sequence[str]
) -> None:
    """Raise `UserError` for settings that differ, unless `changed` names them as intended.

    And for a word of `changed` that names nothing.
    """
    _refuse_unknown(changed, {**flatten(saved), **flatten(present)})
    changes = described_changes(saved, present)
    surprising = [name for name in changes if not is_named(name, changed)]
    if surprising:
        shown = ", ".join(changes[name] for name in surprising)
        raise UserError(
            f"the recipe changed since the checkpoint: {shown}",
            expected="the settings that the run began with",
            instead=f"type --resume-changed {','.join(surprising)} if that is intended",
        )


def described_changes(saved: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, str]:
    """Each setting that differs, but for those of the machine, as `epochs (1 -> 2)`."""
    # Hidden once more: what is secret follows from the present environment too.
    found = differing([flatten(cleaned(saved)), flatten(present)])
    return {
        name: f"{name} ({before} -> {now})"
        for name, (before, now) in sorted(found.items())
        if name not in OF_THE_MACHINE
    }


def _refuse_unknown(changed: Sequence[str], names: Iterable[str]) -> None:
    known = set(names)
    for word in filter(None, changed):
        if not any(is_named(name, [word]) for name in known):
            raise UserError(
                f"--resume-changed {word}, which names no setting",
                expected="names of settings with commas between, or their beginnings up to a dot",
                instead=f"leave {word} out, or see launcher RECIPE --help",
            )


def _refuse_finished(folder: RunDir, *, has_damaged: bool) -> None:
    """A run that ended is not trained again from the beginning, over what it left.

    One that saves nothing and was ended from outside behind its last step is: it may not have
    looked at the test images yet.
    """
    has_ended = RunFiles(folder.path).end.get("exit_code") == 0
    if folder.final.is_file() and (has_ended or has_damaged):
        raise UserError(
            f"--resume of {folder.path}, which has ended and has no whole checkpoint",
            expected="a checkpoint to go on from",
            instead=f"type another --name; --init-from {folder.path} begins with its weights",
        )


def _refuse_lost_weights(folder: RunDir, options: RunOptions) -> None:
    """A run that begins anew without the weights that it began with would not say so."""
    began = str(RunFiles(folder.path).about.get("weights", ""))
    if began and options.init_from is None:
        raise UserError(
            f"{folder.path}, which began with weights {began} and has no whole checkpoint",
            expected="the same --init-from, with which it begins anew",
            instead="type that as well, or another --name",
        )


def _refuse_past_end(folder: RunDir, begun: int, wanted: int) -> None:
    """A run is not cut short after the fact: its weights are those of all its steps."""
    if begun > wanted:
        raise UserError(
            f"epochs={wanted}, but {folder.path} stands in epoch {begun}",
            expected="at least as many epochs as have begun",
            instead=f"type epochs={begun} or more, or another --name",
        )


def _refuse_past_step(folder: RunDir, step: int, most: int | None) -> None:
    if most is not None and step > most:
        raise UserError(
            f"--max-steps {most}, but {folder.path} stands at step {step}",
            expected="the number of a later step, counted from the beginning of the run",
            instead=f"type a number above {step}, or leave --max-steps out",
        )


def _refuse_other_end(folder: RunDir, change: Change) -> None:
    """The figures and the best weights of an ended run are not to be had by another evaluation."""
    if change.forgets_best:
        raise UserError(
            f"other settings or images than {folder.path} has ended with: {', '.join(change.what)}",
            expected="epochs that are still to be trained, and then evaluated so",
            instead="type more epochs, and --resume-changed epochs as well, or another --name",
        )


def _refuse_other_batches(
    step: int, state: SavedState, present: Mapping[str, Any], steps_per_epoch: int
) -> None:
    """Within an epoch: some of its images would be seen twice and others never."""
    if state.steps_per_epoch != steps_per_epoch:
        raise UserError(
            f"{steps_per_epoch} steps per epoch, where the run stands within an epoch of "
            f"{state.steps_per_epoch}",
            expected="the same images and the same batch size until the end of that epoch",
            instead="leave data.batch_size as it was until the next checkpoint after an epoch",
        )
    before, now = flatten(state.config), flatten(present)
    for name in ("data.batch_size", "data.sampling", "data.validation", "seed"):
        if before.get(name) != now[name]:
            raise UserError(
                f"{name}={now[name]} after step {step}, where the run stands within an epoch",
                expected="the order and the batches of images that the epoch began with",
                instead=f"type {name}={before.get(name)} until the next checkpoint after an epoch",
            )


def _refuse_other_optimizer(
    folder: RunDir, saved: Mapping[str, Any], present: Mapping[str, Any]
) -> None:
    """The state of one optimizer means nothing to another one."""
    before, now = (flatten(config).get("optimizer.call") for config in (saved, present))
    if before != now:
        raise UserError(
            f"the optimizer {now}, but the run began with {before}",
            expected="the same optimizer, whose state the checkpoint holds",
            instead=f"type another --name; --init-from {folder.path} begins with its weights",
        )


def _refuse_other_validation(
    folder: RunDir, saved: Mapping[str, Any], present: Mapping[str, Any]
) -> None:
    """Figures of other images cannot be compared; and those held out now may have been trained."""
    before, now = flatten(saved), flatten(present)
    drawn = ("seed",) if now["data.validation"] is not None else ()
    for name in ("data.validation", *drawn):
        if before.get(name) != now[name]:
            raise UserError(
                f"{name}={now[name]}, but {folder.path} began with {before.get(name)}",
                expected="the same validation images in every part of a run",
                instead=f"type another --name; --init-from {folder.path} begins with its weights",
            )


def _refuse_other_data(
    folder: RunDir, state: SavedState, present: Data, changed: Sequence[str]
) -> None:
    """Files may have come to a folder, or gone; that is fatal within an epoch.

    And where images for training are drawn to validate: those drawn now may have been trained.
    """
    if state.data != present.name:
        raise UserError(
            f"images of {present.name}, but the run began with {state.data}",
            expected="the same images in every part of a run",
            instead="type data.root=FOLDER, or begin another run",
        )
    if state.data_digest == present.digest:
        return
    given = f"other images of {present.name} than those of the checkpoint"
    if state.is_within_epoch:
        raise UserError(
            f"{given}, which is within an epoch",
            expected="the images that the epoch began with, each once",
            instead="put them back as they were, or type data.root=FOLDER, where they are now",
        )
    if present.held_out is not None:
        raise UserError(
            f"{given}, of which others may validate now",
            expected="the same validation images in every part of a run",
            instead="put them back as they were, or type another --name; "
            f"--init-from {folder.path} begins with its weights",
        )
    if not is_named("data.root", changed):
        raise UserError(
            given,
            expected="the same images in every part of a run",
            instead="type --resume-changed data.root if that is intended",
        )
