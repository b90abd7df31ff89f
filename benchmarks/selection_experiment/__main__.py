# SPDX-License-Identifier: Apache-2.0
"""`python benchmarks/selection_experiment`: see steps.py."""

import sys
from pathlib import Path

if not __package__:  # run as a folder, whose files are then no package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from selection_experiment.steps import main

if __name__ == "__main__":
    main()
