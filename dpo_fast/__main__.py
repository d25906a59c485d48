"""`python -m dpo_fast`, which launchers such as torchrun start."""

import sys

from dpo_fast.cli import main

sys.exit(main())
