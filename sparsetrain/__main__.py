"""`python -m sparsetrain` is the command `sparsetrain`."""

import sys

from sparsetrain.cli import main

sys.exit(main())
