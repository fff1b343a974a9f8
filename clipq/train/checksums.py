"""Whether the files of a checkpoint are those that were written: their sizes and SHA-256, in a file beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

NAME = "checksums.json"


def checksums(folder: Path) -> str:
    """What the file says of the files in a folder: JSON, {name: {"size": bytes, "sha256": hexadecimal}}.

    SHA-256, since processors have instructions for it, and `sha256sum` compares it too.
    """
    files = sorted(path for path in folder.iterdir() if path.name != NAME)
    return json.dumps({f.name: {"size": f.stat().st_size, "sha256": _sha256(f)} for f in files}, indent=1)


def damage(folder: Path) -> str | None:
    """What is wrong with the first file that is missing, cut or changed since it was written; None for none.

    Raises:
        PermissionError: a file may not be read, which says nothing of what is in it.
    """
    try:
        expected = json.loads((folder / NAME).read_bytes())
        wanted = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in expected.items()}
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        return f"{NAME} cannot be read: {error}"
    for name, (size, digest) in wanted.items():
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes, and {size:,} were written"
            if _sha256(folder / name) != digest:
                return f"{name} has changed since it was written: its SHA-256 is another"
        except FileNotFoundError:
            return f"{name} is missing"
        except PermissionError:
            raise
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
