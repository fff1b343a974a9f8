"""What the commands share that read their command line without Hydra."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Wrong usage is one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def fail(prog: str, message: str) -> int:
    """Prints a message as one line on stderr; the exit code of wrong input."""
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return 2
