"""Dependencies and metadata: no release that is known to be malicious, a hash for every file, one version."""

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support.folders import ROOT

from promcse_pl import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
HASHED = re.split(r"\n(?=\S)", (ROOT / "requirements-release.txt").read_text().strip())


def entries() -> dict[str, tuple[str, list[str]]]:
    """Name -> version and hashes, of requirements-release.txt."""
    found = {}
    for entry in HASHED:
        if not entry.startswith("#"):
            requirement = Requirement(entry.partition("\\")[0])
            (pin,) = requirement.specifier
            assert pin.operator == "==", entry
            found[canonicalize_name(requirement.name)] = (
                pin.version,
                re.findall(r"--hash=sha256:([0-9a-f]{64})", entry),
            )
    return found


@pytest.mark.parametrize("name", ["pytorch-lightning", "lightning"])
def test_the_malicious_lightning_releases_cannot_be_installed(name):
    wanted = {Requirement(line).name: Requirement(line).specifier for line in PROJECT["dependencies"]}
    if name in wanted:
        assert not {"2.6.2", "2.6.3"} & set(wanted[name].filter(["2.6.1", "2.6.2", "2.6.3", "2.6.4", "2.6.6"]))
    assert PINS.get(name) not in ("2.6.2", "2.6.3")
    assert entries().get(name, ("", []))[0] not in ("2.6.2", "2.6.3")
    assert "pytorch-lightning" in wanted
    assert Version(PINS["pytorch-lightning"]) >= Version("2.6.4")


def test_the_release_list_has_a_hash_for_every_file_and_the_versions_of_constraints():
    hashed = entries()
    assert {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]} <= set(hashed)
    assert not [name for name, (_, hashes) in hashed.items() if not hashes]
    other = {name: version for name, (version, _) in hashed.items() if PINS.get(name, version) != version}
    assert not other, "run tools/write_hashes.sh after tools/write_constraints.sh"


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])
