"""The exceptions of the launcher and the exit codes they end with.

    LauncherError          the run did not succeed                              exit code 1
    ├── TrainingError      training itself went wrong                           exit code 1
    │   └── NotFiniteError     that is: the loss or a parameter is not finite
    ├── RankError          one rank failed: it prints why, whichever it is      exit code 1
    │   └── StoppedBeforeTrainingError  by a signal                             exit code 75
    ├── OtherRankError     another rank prints why: this one prints nothing     that rank's
    └── UserError          what was typed or given cannot be trained            exit code 2
        ├── SharedUserError     which all ranks know of
        ├── NotExportableError  or trained, but not exported
        └── BrokenPictureError  or a file among others that is no picture

A `LauncherError` is shown as one line without a traceback; rank 0 prints it, since all ranks raise
it alike, unless it says otherwise. A `UserError` that one rank may have alone is shared with the
others before training, and becomes a `RankError` after. Every other exception is a fault of
the launcher or of the recipe's own code and keeps its traceback. Exit code 75 says that a signal
stopped the run with its state saved, or before it began; 130, that a second Ctrl-C ended it at
once.
"""

from typing import Any

EXIT_FAULT = 1
EXIT_USER = 2
EXIT_SAVED = 75  # EX_TEMPFAIL: stopped by a signal, nothing is lost; run it again with --resume
EXIT_INTERRUPTED = 130


class LauncherError(Exception):
    """A run that ends with one line for its user."""

    exit_code = EXIT_FAULT


class TrainingError(LauncherError):
    """Training was possible but failed: for example, the loss is not a number."""


class NotFiniteError(TrainingError):
    """The loss or the gradient of `step`, or what came of it, is not a finite number."""

    def __init__(self, message: str, step: int) -> None:
        self.step = step
        super().__init__(message)


class RankError(LauncherError):
    """A failure that only this rank knows of, and prints."""

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        self.exit_code = self.exit_code if exit_code is None else exit_code
        super().__init__(message)


class StoppedBeforeTrainingError(RankError):
    """A signal came before all ranks were ready; a resume begins where this run was to."""

    exit_code = EXIT_SAVED


class OtherRankError(LauncherError):
    """The run ends because of what another rank prints."""

    def __init__(self, exit_code: int = EXIT_FAULT) -> None:
        self.exit_code = exit_code
        super().__init__("another rank failed")


class UserError(LauncherError):
    """Something given is wrong: says what, what was expected, what to do instead.

    `setting` is the name and the value of a recipe's setting that `instead` says to type, for a
    command that has an option for it.
    """

    exit_code = EXIT_USER

    def __init__(
        self, given: str, *, expected: str, instead: str, setting: tuple[str, str] | None = None
    ) -> None:
        self.given, self.expected, self.instead, self.setting = given, expected, instead, setting
        # One line that a terminal shows as it is, whatever the parts contained.
        line = " ".join(f"{given}; expected {expected}; {instead}".split())
        super().__init__("".join(c if c.isprintable() else "?" for c in line))

    def shared(self) -> "SharedUserError":
        """The same, for all ranks to raise."""
        return SharedUserError(self.given, expected=self.expected, instead=self.instead)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes with all three parts."""
        return _user_error, (type(self), self.given, self.expected, self.instead)


class SharedUserError(UserError):
    """One that all ranks raise alike: nobody has to find out who has it."""


class NotExportableError(UserError):
    """A network that trains, but whose code no exported form can hold."""


class BrokenPictureError(UserError):
    """A file that cannot be decoded, which one rank may meet in the middle of the training."""


def _user_error(kind: type[UserError], given: str, expected: str, instead: str) -> UserError:
    return kind(given, expected=expected, instead=instead)
