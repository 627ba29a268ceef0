"""The circumstances in which a run begins: versions, device, the code it runs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from trpo import native
from trpo.config import Config
from trpo.runtime.device import training_device

_PACKAGE = Path(__file__).resolve().parent
_PACKAGES = ("trpo", "torch", "numpy", "gymnasium", "mujoco")


def circumstances(config: Config, started: datetime) -> dict[str, Any]:
    """Of a run that begins, as JSON can hold them."""
    return {
        "started": started.isoformat(timespec="seconds"),
        "command": sys.argv,
        "device": str(training_device(config)),
        # torch itself also says which build it is.
        "versions": {name: _version(name) for name in _PACKAGES} | {"torch": torch.__version__},
        "native": native.available(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": _git_state(_PACKAGE),
    }


def changes_since(meta_file: Path, device: torch.device) -> Iterator[str]:
    """What is no longer as `meta_file` says a run began, one line each; nothing where that cannot be read."""
    try:
        began: Any = json.loads(meta_file.read_bytes())
        began_on, began_with = str(began["device"]).partition(":")[0], _commit(began["git"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    code = _commit(_git_state(_PACKAGE))
    if began_on != device.type:
        yield f"this run began on {began_on} and continues on {device.type}, which rounds differently"
    if code and began_with and began_with != code:
        yield f"this run began with the code of commit {began_with} and continues with {code}"


def _commit(state: dict[str, Any] | None) -> str | None:
    return None if state is None else state["revision"][:10] + (" with changes" if state["dirty"] else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(package: Path) -> dict[str, Any] | None:
    """Revision of the checkout the source lies in; None if git does not track it (an installed copy, say)."""
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    revision = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--untracked-files=no")
    if not tracked or not revision or changes is None:
        return None
    return {"revision": revision, "dirty": bool(changes)}


def _git(directory: Path, *arguments: str) -> str | None:
    """Output of a git command that changes nothing; None if there is no git, no repository, or no answer."""
    # In a hook, git's own variables name the repository it runs for, whatever the directory.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "-C", str(directory), *arguments]
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
