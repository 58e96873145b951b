"""`python -m spp`: the same as the command `spp`."""

import sys

from spp.cli.entry_point import main

sys.exit(main())
