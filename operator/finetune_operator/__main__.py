"""`python -m finetune_operator` is the command line `finetune`."""

from __future__ import annotations

import sys

from finetune_operator.cli import main

if __name__ == "__main__":
    sys.exit(main())
