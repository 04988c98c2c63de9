"""Everything a change must pass: lint, format, types, tests. Stops at the first that fails.

uv run python tests/check.py [arguments for pytest]

Tests run in as many processes as there are processors, four at most, a file in one of them: half of them wait for
brokers and workers. `-n 0` runs them in one.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("pytest", "-q", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", *sys.argv[1:]),
)


def main() -> int:
    for check in CHECKS:
        print(f"--- {' '.join(check)}", flush=True)
        start = time.monotonic()
        status = subprocess.run([sys.executable, "-m", *check], cwd=ROOT, check=False).returncode
        if status:
            print(f"--- {check[0]} failed with status {status}", flush=True)
            return status
        if check[0] != "pytest":
            print(f"--- {check[0]} took {time.monotonic() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
