"""What is a run's in its folder, which a stranger may have made."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bayesian_merger.errors import ConfigError

_OURS = re.compile(
    r"\.lock|study\..*|ratings\.jsonl|best\..*|report\.html|result\.json|images|rated|figures|front"
    r"|workers|\.new-study-.*|\..*\.part",
    re.IGNORECASE,  # as some disks have it
)


def require_plain(folder: Path) -> None:
    """ConfigError if what is ours in a run folder is a link, as writing there would harm what it names.

    The folder itself may be one.
    """
    left = [folder]
    while left:
        place = left.pop()
        try:
            entries = list(os.scandir(place))
        except FileNotFoundError:
            continue  # a process that works there has removed it
        except OSError as error:
            raise ConfigError(f"{place}: cannot be read ({error.strerror})") from error
        for entry in entries:
            if place == folder and not _OURS.fullmatch(entry.name):
                continue
            if entry.is_symlink():
                raise ConfigError(
                    f"{entry.path} is a link, and what a run writes there would go elsewhere; put what "
                    f"it leads to in its place if it is yours, or remove it"
                )
            if entry.is_dir():
                left.append(Path(entry.path))
