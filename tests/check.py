"""Everything a change must pass: lint, format, types, tests. Stops at the first that fails.

uv run python tests/check.py [arguments for pytest]
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
    ("pytest", "-q", *sys.argv[1:]),
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
