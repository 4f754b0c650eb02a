"""What the documentation shows works."""

from __future__ import annotations

import re
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import licences
import pytest
import yaml
from PIL import Image

from bayesian_merger import config, recipes, toml
from bayesian_merger.cli.search import run_command
from bayesian_merger.data import Prompt, Sample
from bayesian_merger.registry import import_file
from bayesian_merger.scorers import scorer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_scorer_of_the_extending_page_scores(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    section = page.split("## A scorer")[1].split("The class's name")[0]
    (tmp_path / "warmth.py").write_text(textwrap.dedent(section))
    import_file(tmp_path / "warmth.py")
    judge = scorer.build("warmth", {"strength": 2.0})
    red = Sample(Image.new("RGB", (8, 8), (200, 0, 50)), Prompt(0, "p", "red", 1))
    assert judge([red]) == [300.0]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_configuration_page_names_every_key() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    for name, field in config.Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, config.Section):
            for key in section.model_fields:
                assert f"`{name}.{key}`" in page, f"{name}.{key}"


def test_recipe_of_the_merging_page_is_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "merging.md").read_text()
    section = page.split("change by hand:\n")[1].split("\n## ")[0]
    (tmp_path / "best.toml").write_text(textwrap.dedent(section))
    recipe = recipes.read(tmp_path / "best.toml")
    assert [model.name for model in recipe.models] == ["a.safetensors", "b.safetensors"]
    assert recipe.weights == {"alpha": {"base": 0.4, "IN00": 0.55}}


def test_program_of_the_python_page_runs() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    program = textwrap.dedent(page.split("uses of it:\n")[1].split("\n`score` is yours")[0])
    found: dict[str, Any] = {"score": lambda weights, item: -((weights["M00"] - 0.4) ** 2) + item}
    exec(program, found)
    assert found["search"].spent == 40
    assert found["best"].weights["M00"] == pytest.approx(0.4, abs=0.2)


def test_job_files_of_the_cluster_page_are_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    (script,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    (tmp_path / "job.sh").write_text(script)
    assert subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], check=False).returncode == 0
    (manifest,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    job = yaml.safe_load(manifest)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    told = [script.splitlines()[-1].split()[2:], container["command"][1:]]
    for command in told:
        with run_command.make_context("run", command[1:]) as context:
            assert context.params["config_file"].name == "config.toml"
            assert context.params["run_dir"].name == "run"


def test_security_page_names_tests_that_there_are() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    written = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    known = set(re.findall(r"^def (test_\w+)\(", "\n".join(written), re.MULTILINE))
    assert named
    assert named <= known, named - known


def test_every_threat_of_the_security_page_has_its_test() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    threats = [row for row in rows if not row.startswith("| threat ")]
    assert len(threats) > 20
    assert [row for row in threats if "`test_" not in row.split("|")[3]] == []


def test_licences_page_lists_every_dependency() -> None:
    page = (ROOT / "docs" / "licences.md").read_text()
    project = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(one for some in extras.values() for one in some)]
    named = {str(found[0]).lower() for one in wanted if (found := re.match(r"[\w-]+", one))}
    assert len(named) > 20
    for name in named | licences.table().keys():
        assert f"\n| {name} | " in page, f"{name}: python tools/licences.py prints the table"
