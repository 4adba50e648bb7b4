"""Errors that the user can mend, and how an entry script reports them."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: the message names the file, row or key and the remedy. Entries print it and exit with status 2.

    Args:
        problems: one message, or several that were found together.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def removed(what: str, instead: str) -> str:
    """The message about something that earlier versions had.

    Args:
        what: as the user has written it. instead: why it went, and what to do.
    """
    return f"{what} was removed before 0.1.0, commit 6926608 is the last that has it; {instead}"


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Around imports of packages that come with an extra of `pip install frugalpath[...]`.

    Args:
        name: of the extra. what: needs them, for the message, such as `reward 'bleu4'`.

    Raises:
        InputError: one is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"{what} needs the package {error.name}: pip install 'frugalpath[{name}]'") from error


def entry(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap the `main` of an entry script: an `InputError` becomes its message on stderr and exit status 2."""

    @functools.wraps(main)
    def run() -> None:
        # TRL sets it by this name, and the oldest transformers that we take knows no other.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing` is deprecated", FutureWarning)
        try:
            main()
        except InputError as error:
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
            sys.exit(2)

    return run
