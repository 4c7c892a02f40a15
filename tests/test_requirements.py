import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
MOST_PACKAGES = 45


def requirements(name):
    """The requirements that a file names itself, without those of the files that it includes."""
    lines = (line.partition("#")[0].strip() for line in (REQUIREMENTS / name).read_text("utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


def closure(roots):
    """Every installed distribution that the roots need on this machine, with themselves, by canonical name."""
    found = set()
    queue = [(canonicalize_name(root.name), frozenset(root.extras)) for root in roots]
    while queue:
        name, extras = queue.pop()
        if (name, extras) in found:
            continue
        found.add((name, extras))
        for text in metadata.distribution(name).requires or ():
            needed = Requirement(text)
            environments = [default_environment() | {"extra": extra} for extra in (*extras, "")]
            if needed.marker is None or any(needed.marker.evaluate(environment) for environment in environments):
                queue.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return {name for name, _ in found}


def test_the_base_is_at_most_45_packages_beyond_torch():
    base = closure(requirements("base.txt"))
    beyond = base - closure([Requirement("torch")])
    assert {"transformers", "tyro", "pydantic"} <= beyond
    assert len(beyond) <= MOST_PACKAGES, sorted(beyond)


@pytest.mark.parametrize("name", ["base.txt", "convert.txt", "dev.txt"])
def test_installed_versions_are_in_the_tested_ranges(name):
    outside = [
        f"{requirement} has {metadata.version(requirement.name)}"
        for requirement in requirements(name)
        if not requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    ]
    assert outside == []


def test_what_the_base_needs_is_installed_in_the_versions_that_it_needs():
    for name in closure(requirements("base.txt")):
        for text in metadata.distribution(name).requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert needed.specifier.contains(metadata.version(needed.name), prereleases=True), f"{name}: {needed}"


def test_every_other_requirement_is_left_to_a_file_of_its_own():
    named = {canonicalize_name(requirement.name) for requirement in requirements("base.txt")}
    for path in REQUIREMENTS.glob("*.txt"):
        if path.name != "base.txt":
            assert not named & {canonicalize_name(requirement.name) for requirement in requirements(path.name)}
    assert not re.search(r"https?://", "".join(path.read_text("utf-8") for path in REQUIREMENTS.glob("*.txt")))
