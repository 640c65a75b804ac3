"""The exception tree: one line for people, three parts for code, an exit code for scripts."""

import copy
import pickle
from collections.abc import Callable

import pytest

from launcher.errors import EXIT_FAULT, EXIT_USER, LauncherError, TrainingError, UserError


@pytest.fixture
def error() -> UserError:
    return UserError("epochs=0", expected="at least 1", instead="type epochs=1")


def test_a_user_error_says_what_was_given_expected_and_to_be_typed(error: UserError) -> None:
    assert str(error) == "epochs=0; expected at least 1; type epochs=1"


@pytest.mark.parametrize(
    "text", ["two\nlines", "a\r\nb", "tab\tand  spaces", "\n\nend\n", "\x1b[31m\0\udc80"]
)
def test_a_user_error_is_one_line_whatever_its_parts_contain(text: str) -> None:
    message = str(UserError(text, expected=text, instead=text))
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert "  " not in message
    assert message == message.strip()


@pytest.mark.parametrize("travel", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_a_user_error_travels_between_processes_with_all_its_parts(
    error: UserError, travel: Callable[[UserError], UserError]
) -> None:
    arrived = travel(error)
    assert type(arrived) is UserError
    assert str(arrived) == str(error)
    assert (arrived.given, arrived.expected, arrived.instead) == (
        error.given,
        error.expected,
        error.instead,
    )


def test_exit_codes_tell_a_users_mistake_from_a_failed_training(error: UserError) -> None:
    assert (EXIT_FAULT, EXIT_USER) == (1, 2)
    assert error.exit_code == EXIT_USER
    assert TrainingError("the loss is nan").exit_code == EXIT_FAULT


def test_one_except_clause_catches_both_kinds() -> None:
    assert issubclass(UserError, LauncherError)
    assert issubclass(TrainingError, LauncherError)
    assert not issubclass(UserError, TrainingError)


def test_the_training_errors_message_is_kept_as_it_is() -> None:
    assert str(TrainingError("the loss is nan")) == "the loss is nan"
