from __future__ import annotations

import base64
from pathlib import Path

import pytest
from outcomes import a_result

from bayesian_merger import album
from bayesian_merger.errors import TrialError
from bayesian_merger.pictures import decoded

# A PNG of which Pillow says SyntaxError when its pixels are read, as fuzzing has found it.
BROKEN = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR4nGNkZ+Dg4ODg4ODg4ODg4ODg4ODg4ODg4ODg4ODg4ODg"
    "4ODg4ODg4ODg4ODg4ODg4ODg4ODg4ODg4ODg4ODg4ODg4OAACYGihgABHkAQAAAAAAAAAAAASUVORK5CYII="
)


def test_image_of_a_server_that_is_damaged_is_told_in_one_line() -> None:
    with pytest.raises(TrialError, match=r"^the server's image cannot be read \(broken PNG file"):
        decoded(BROKEN, None)


def test_file_of_a_run_that_is_damaged_is_no_picture(tmp_path: Path) -> None:
    folder = album.folder_of(tmp_path, "exploit", "trial 1")
    folder.mkdir(parents=True)
    (folder / "003-x.png").write_bytes(BROKEN)
    result = a_result("trial 1").but(images={3: "0" * 16})
    assert album.read(tmp_path, result, 3) is None
