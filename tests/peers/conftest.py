"""What these tests need: the helpers of tests/, and libraries that do not warn of each other."""
import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
transformers.utils.logging.set_verbosity_error()  # a new head is not worth a warning here
transformers.utils.logging.disable_progress_bar()


def pytest_configure(config):
    for kind in ("FutureWarning", "RuntimeWarning", "UserWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{kind}")
