from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from outcomes import a_result
from PIL import Image
from test_run import folder as folder
from test_run import start

from bayesian_merger import album
from bayesian_merger.data import Prompt, Sample

PROMPT = Prompt(3, "portraits of cats", "a cat", 7)


def sample(shade: int = 0, prompt: Prompt = PROMPT) -> Sample:
    return Sample(Image.new("RGB", (8, 8), (shade,) * 3), prompt)


def test_name_tells_image_payload_and_score(tmp_path: Path) -> None:
    path = album.save(sample(), tmp_path, {"demo": 7.12345})
    assert path.name == "003-portraits_of_cats-7.123.png"
    assert album.find(tmp_path, 3) == path
    assert album.saved(tmp_path) == {3: path}


def test_name_tells_each_of_several_scores(tmp_path: Path) -> None:
    path = album.save(sample(), tmp_path, {"one": 1.0, "two": -2.5})
    assert path.name == "003-portraits_of_cats-1.000--2.500.png"
    assert album.find(tmp_path, 3) == path


@pytest.mark.parametrize(
    "payload", ["../../etc/passwd", "a/b\\c:d*e?", "x" * 300, "...", "", "CON:"]
)
def test_name_of_a_payload_leads_nowhere_else(tmp_path: Path, payload: str) -> None:
    path = album.save(sample(prompt=replace(PROMPT, payload=payload)), tmp_path / "in", {})
    assert path.parent == tmp_path / "in"
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert len(path.name) < 80
    assert album.find(tmp_path / "in", 3) == path


@pytest.mark.parametrize(
    "name", ["../../../x", "/etc", "..", ".", "C:\\x", "a\0b", "\\\\host\\share"]
)
def test_names_of_a_shared_study_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    for found in (
        album.folder_of(tmp_path, "explore", name),
        album.folder_of(tmp_path, name, "trial 3"),
    ):
        assert found.relative_to(tmp_path / "images").parts == (
            found.parent.name,
            found.name,
        )
        assert not {"..", "."} & set(found.parts)
        album.save(sample(), found, {})
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_image_that_was_made_anew_replaces_the_first(tmp_path: Path) -> None:
    album.save(sample(), tmp_path, {"demo": 1.0})
    path = album.save(sample(9), tmp_path, {"demo": 2.0})
    assert list(tmp_path.iterdir()) == [path]


def test_one_image_is_not_taken_for_another(tmp_path: Path) -> None:
    for index in (1, 10, 100, 1000, 1 << 20):
        album.save(sample(prompt=replace(PROMPT, index=index)), tmp_path, {})
    (tmp_path / "note.png").write_bytes(b"mine")
    assert list(album.saved(tmp_path)) == [1, 10, 100, 1000, 1 << 20]
    assert album.find(tmp_path, 2) is None
    found = album.find(tmp_path, 100)
    assert found
    assert found.name == "100-portraits_of_cats.png"


def test_trials_are_sorted_by_the_names_of_their_folders(tmp_path: Path) -> None:
    names = [album.folder_of(tmp_path, "exploit", f"trial {n}").name for n in (2, 10, 100, 1000)]
    assert names == sorted(names)
    assert names[0] == "trial-0002"


def test_picture_that_was_changed_is_not_read(tmp_path: Path) -> None:
    result = a_result("trial 1", value=1.0)
    path = album.save(sample(), album.folder_of(tmp_path, result.stage, result.name), {})
    kept = result.but(images={3: album.digest_of(sample().image)})
    assert album.read(tmp_path, kept, 3)
    path.write_bytes(b"no picture")
    assert album.read(tmp_path, kept, 3) is None
    path.unlink()
    assert album.read(tmp_path, kept, 3) is None


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        ("all", {"baseline", "explore", "exploit", "select", "heldout"}),
        ("best", {"baseline", "heldout"}),
        ("none", set()),
    ],
)
def test_pictures_are_kept_as_the_configuration_says(
    folder: Path, wanted: str, kept: set[str]
) -> None:
    outcome = start(folder, f"output.save_images={wanted}", report=True)
    found = {path.parent.parent.name for path in (folder / "run").glob("images/*/*/*.png")}
    assert found == kept
    assert outcome.finished
    # The page is written all the same.
    assert (folder / "run" / "report.html").exists()


@pytest.mark.parametrize("payload", ["\U0001d41a" * 60, "x" * 500, "é" * 60])
def test_name_of_a_picture_is_no_longer_than_disks_take(tmp_path: Path, payload: str) -> None:
    scores = {str(n): (-1) ** n * 1e99 for n in range(40)}
    name = album.file_name(7, payload, scores)
    (tmp_path / f".{name}.12345678901234567890.part").touch()
    assert album.file_name(7, "", {"a": 1e99, "b": 0.5}) == "007-1e+99-0.500.png"
