"""The software bill of materials, CycloneDX in JSON: what rgpb was built and tested with, `make sbom`.

A component is a distribution of the environment that runs this: name, version, licence, what it requires, and a digest
of its files (`record`). A version that constraints.txt says otherwise is an error. Given files are the release itself:
each is named with its SHA-256. The same environment and files, and SOURCE_DATE_EPOCH, make the same bits.

    python tools/sbom.py [--out FILE] [dist/*]
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from datetime import datetime, timezone
from hashlib import sha256
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, Property, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def installed() -> dict[str, Distribution]:
    """What pip has put into this environment, by name."""
    found = distributions(path=[sysconfig.get_paths()["purelib"]])
    return dict(sorted((canonicalize_name(each.name), each) for each in found))


def pinned() -> dict[str, str]:
    """The versions of constraints.txt, by name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def record(distribution: Distribution) -> str:
    """SHA-256 of the lines "PATH,sha256=HASH\\n" of a distribution's RECORD, sorted: of its files where they are
    imported from, without what differs from one install to another (scripts, bytecode, what pip notes down)."""
    lines = (distribution.read_text("RECORD") or "").splitlines()
    noted = ("INSTALLER,", "REQUESTED,", "direct_url.json,")
    files = (line.rpartition(",")[0] for line in lines if not line.startswith(("..", "/")))
    kept = (file for file in files if "sha256=" in file and not file.rpartition("/")[2].startswith(noted))
    return sha256("".join(f"{line}\n" for line in sorted(kept)).encode()).hexdigest()


def required(distribution: Distribution, here: dict[str, Distribution]) -> list[str]:
    """Names of what it requires, in any extra, as far as it is installed."""
    named = (Requirement(text) for text in distribution.requires or ())
    applies = (each for each in named if each.marker is None or "extra" in str(each.marker) or each.marker.evaluate())
    return sorted({canonicalize_name(each.name) for each in applies} & set(here))


def component(distribution: Distribution, kind: ComponentType, **more: Any) -> Component:
    """A distribution as CycloneDX has it."""
    name, version, metadata = canonicalize_name(distribution.name), distribution.version, distribution.metadata.json
    said = str(
        metadata.get("license_expression") or metadata.get("license") or ""
    )  # some have the licence's whole text
    licences = [LicenseFactory().make_from_string(said)] if said and "\n" not in said else []
    purl = PackageURL("pypi", None, name, version)
    return Component(name=name, version=version, type=kind, purl=purl, bom_ref=str(purl), licenses=licences, **more)


def bill(files: list[Path]) -> str:
    """The whole document.

    Raises:
        ValueError: the environment has another version than constraints.txt.
    """
    here = installed()
    for name, version in pinned().items():
        if name in here and here[name].version.split("+")[0] != version:
            raise ValueError(f"{name}: expected {version}, as in constraints.txt, got {here[name].version}")
    ours = here.pop("rgpb")
    release = [
        ExternalReference(
            type=ExternalReferenceType.DISTRIBUTION, url=XsUri(file.name),
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256(file.read_bytes()).hexdigest())],
        )
        for file in files
    ]  # fmt: skip
    made = {
        name: component(each, ComponentType.LIBRARY, properties=[Property(name="rgpb:record", value=record(each))])
        for name, each in here.items()
    }
    subject = component(ours, ComponentType.LIBRARY, external_references=release)
    bom = Bom(components=made.values(), serial_number=uuid5(NAMESPACE_URL, str(subject.bom_ref)))
    bom.metadata.component = subject
    bom.metadata.timestamp = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), timezone.utc)
    bom.register_dependency(subject, [made[name] for name in required(ours, here)])
    for name, each in made.items():
        bom.register_dependency(each, [made[other] for other in required(here[name], here) if other != name])
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="a wheel or sdist of the release")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "rgpb.cdx.json")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(bill(sorted(given.files)), encoding="utf-8")
    print(given.out)


if __name__ == "__main__":
    main()
