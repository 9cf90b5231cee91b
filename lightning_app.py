"""Front door of a checkout: `python lightning_app.py fit recipes/quickstart.yaml` is `kit fit ...`.

It runs the code beside it, even where another version of the kit is installed.
"""

import sys
from pathlib import Path


def main() -> int:
    """Hand over to the command line of this checkout."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from kit.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
