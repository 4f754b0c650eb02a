"""Print the licences of all that the program needs, as the table of docs/licences.md.

Of what is installed here: `python tools/licences.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROGRAM = "bayesian-merger"
_PLAIN = re.compile(r"[^\n]{1,60}")


def needed(extra: str) -> Iterator[Distribution]:
    """What the program needs with an extra, or with none for "", and what that needs."""
    asked, known = [(PROGRAM, {extra})], set[str]()
    while asked:
        name, extras = asked.pop()
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if name != PROGRAM:
            yield found
        for text in found.requires or ():
            one = Requirement(text)
            if one.marker and not any(one.marker.evaluate({"extra": e}) for e in extras or {""}):
                continue
            if (key := canonicalize_name(one.name)) not in known:
                known.add(key)
                asked.append((key, set(one.extras)))


def licence(of: Distribution) -> str:
    """What a package says of its licence, in short."""
    told = of.metadata
    if "License-Expression" in told:
        return str(told["License-Expression"])
    classified = [
        line.rpartition(" :: ")[2]
        for line in told.get_all("Classifier") or ()
        if line.startswith("License ::") and not line.endswith("OSI Approved")
    ]
    (text, *_) = told.get_all("License") or [""]
    return ", ".join(classified) or (
        text.strip() if _PLAIN.fullmatch(text.strip()) else "see its files"
    )


def table() -> Mapping[str, tuple[str, list[str]]]:
    """Each package's name -> its licence, and which extras need it; none for the program itself."""
    found: dict[str, tuple[str, list[str]]] = {}
    extras = distribution(PROGRAM).metadata.get_all("Provides-Extra") or ()
    for extra in ("", *extras):
        for one in needed(extra):
            name = canonicalize_name(one.metadata["Name"])
            _, of = found.setdefault(name, (licence(one), []))
            of.append(extra)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    print("| package | licence | needed by |\n|---|---|---|")
    for name, (said, of) in table().items():
        print(f"| {name} | {said} | {'the program' if '' in of else ', '.join(of)} |")
