"""What can go wrong, and what it means for the run.

MergerError
├── ConfigError        the configuration asks for something impossible; nothing was started
├── CheckpointError    a model file cannot be read, merged or written
├── RunError           the run cannot go on; what was measured is kept
└── TrialError         one trial has no value; it is recorded as failed and the study goes on
    ├── SkippedError           a person has looked at its images, and judged none
    ├── GradientError          a score's gradient is not finite; the image counts by its score
    └── NothingChangedError    different weights made the same images; the run stops as well
"""

import reprlib


class MergerError(Exception):
    """Any error of this program; its message is one line that a user can act on."""


class ConfigError(MergerError):
    """The configuration or a file it names is wrong; raised before time is spent."""


class CheckpointError(MergerError):
    """A checkpoint cannot be read, does not fit the others, or cannot be written."""


class RunError(MergerError):
    """The run cannot go on (a busy folder, a back end that changes nothing, failures in a row)."""


class TakenError(RunError):
    """Another process has taken over what this one was at."""


class TrialError(MergerError):
    """This trial has no value. It is recorded as failed with this reason; it never becomes a number."""


class SkippedError(TrialError):
    """A person has skipped all images of the trial: it has no value, and nothing is wrong."""


class GradientError(TrialError):
    """The gradient of a score is not finite."""


class NothingChangedError(TrialError):
    """Different weights made the very same images: the merge does not reach the back end."""


class _Short(reprlib.Repr):
    """Values in short."""

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out what has some thousand digits.
        return super().repr_int(x, level) if x.bit_length() < 1000 else "a number too long to tell"


_short = _Short()
_short.maxstring = _short.maxother = 60


def shown(value: object) -> str:
    """A value as a message tells it: 60 characters of it at most."""
    text = _short.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(error: BaseException) -> str:
    """An error's whole message in one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
