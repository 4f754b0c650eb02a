"""The command line: arguments, progress, exit codes; the only package that prints.

Exit codes: 0 done, 1 the run could not go on, 2 bad input and nothing started, 130 interrupted.
A command's module is imported when the command is called, so that the list of commands comes at once
and a merge does not wait for what only a search needs.
"""

from __future__ import annotations

import _thread
import logging
import os
import signal
import sys
import threading
import time
from importlib import import_module
from typing import NoReturn

# A thread that waits for its turn by spinning starves the others on a busy machine: without this,
# two programs on two cores were seen to take a hundred times as long. Read once, when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
from rich.text import Text

from bayesian_merger import __version__
from bayesian_merger.cli.screen import Diagnostics, err, plain
from bayesian_merger.errors import CheckpointError, ConfigError, MergerError

# Each command's module, where it is called NAME_command, and the first line of its help.
COMMANDS = {
    "demo": (
        "search",
        "Run the embedded example: two small checkpoints, a scorer, a better merge, a report.",
    ),
    "init": (
        "search",
        "Write a commented configuration and example payloads into FOLDER (default: here).",
    ),
    "check": (
        "search",
        "Check all that CONFIG_FILE names, make a merge and a few images, say how long a run takes.",
    ),
    "run": (
        "search",
        "Search the best merge as CONFIG_FILE says; the same command resumes a stopped run.",
    ),
    "fork": (
        "search",
        "Begin the run of CONFIG_FILE with what OLD_RUN has judged, by another panel or other scorers.",
    ),
    "import": (
        "search",
        "Bring the settings, or the log, of sd-webui-bayesian-merger.",
    ),
    "merge": (
        "merging",
        "Merge models A B [C ...], or rebuild the merge of a recipe (best.toml), bit for bit.",
    ),
    "report": (
        "search",
        "Write the report and the figures of RUN_DIR again, from its study alone.",
    ),
    "dashboard": (
        "watching",
        "Show the study of RUN_DIR in optuna-dashboard, running or finished; it changes nothing.",
    ),
    "export": (
        "exporting",
        "Write all that RUN_DIR has judged as two tables: its trials with their weights, its images.",
    ),
    "draw": (
        "drawing",
        "Draw the network with each block in the colour of its weight: of RECIPE, or of --weights.",
    ),
    "rate": (
        "asking",
        "Let your own eye judge the pictures of RUN_DIR: its best merge beside A, B and the even merge.",
    ),
    "score": (
        "scoring",
        "Score IMAGES, files or folders of them, from anywhere; prompts are read from the files.",
    ),
    "scorer-worker": (
        "scoring",
        "Answer lines of JSON with the scores of NAME: a scorer in an environment of its own.",
    ),
    "train-scorer": (
        "scoring",
        "Learn your taste from what you have rated in RUN_DIRS: a scorer of your own, ready to use.",
    ),
    "list": ("lists", "List what can be named in a configuration or on the command line."),
}


# So long after it was stopped the program takes no further signal.
_PATIENCE_S = 5.0


def main() -> NoReturn:
    """Run the command line; every error the user can act on is one line and an exit code."""
    # Cut pipes and old consoles cannot show every character; a "?" is better than a stack trace.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    logging.basicConfig(handlers=[Diagnostics()], format="%(message)s")
    stopped: list[float] = []

    def raise_again(lost: sys.UnraisableHookArgs) -> None:
        """Interrupt anew where Python has dropped an interruption, as it came while it cleaned up."""
        if heard and isinstance(lost.exc_value, KeyboardInterrupt):
            stopped.clear()
            threading.Timer(0.05, _interrupt, heard[:1]).start()
        else:
            sys.__unraisablehook__(lost)

    def stop(*_: object) -> None:
        # Who presses Ctrl-C again and again does not mean to cut the cleaning up.
        if not stopped or time.monotonic() - stopped[-1] > _PATIENCE_S:
            stopped.append(time.monotonic())
            raise KeyboardInterrupt

    # A closed terminal or a shutdown stops the program as Ctrl-C does, which cleans up.
    known = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    heard = [n for n in known if n is not None and signal.getsignal(n) is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, stop)
    sys.unraisablehook = raise_again
    try:
        commands.main(standalone_mode=False)
        sys.exit(0)
    except click.exceptions.Abort:
        _interrupted()
    except KeyboardInterrupt:
        _interrupted()
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (ConfigError, CheckpointError) as error:
        _complain(error, 2)
    except MergerError as error:
        _complain(error, 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}{_goes_on()}", 1)
    except Exception:
        # Compiled code may turn an interruption into an error of its own.
        if stopped:
            _interrupted()
        raise
    finally:
        # What is left is Python's own way out, of which it makes tracebacks.
        for number in heard:
            signal.signal(number, signal.SIG_IGN)


def _interrupt(number: signal.Signals) -> None:
    """Interrupt the main thread by a signal that it hears, also where it waits, if that can be."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        _thread.interrupt_main(number)


def _complain(error: object, code: int) -> NoReturn:
    for line in str(error).splitlines():
        err.print(Text.assemble(("error: ", "bold red"), plain(line)), soft_wrap=True)
    sys.exit(code)


def _interrupted() -> NoReturn:
    err.print(f"stopped{_goes_on()}")
    sys.exit(130)


def _goes_on() -> str:
    resumes = sys.argv[1:2] in (["run"], ["demo"])
    return "; the same command goes on from here" if resumes else ""


class _Commands(click.Group):
    """Commands that are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        # What a run starts itself is not for people.
        found = "working" if cmd_name == "work" else COMMANDS.get(cmd_name, ("",))[0]
        if not found:
            return None
        module = import_module(f"{__name__}.{found}")
        command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, told) for name, (_, told) in COMMANDS.items()])


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="bayesian-merger")
def commands() -> None:
    """Find the merge of Stable Diffusion checkpoints that makes the best images."""
