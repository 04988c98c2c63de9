"""Makes tests/strategies.py and tests/support.py importable."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# The first call into pyarrow imports pandas, which takes seconds on a busy machine.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
