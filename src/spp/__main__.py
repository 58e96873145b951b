"""`python -m spp`: the same as the command `spp`."""

import sys

from spp.cli.start import main

sys.exit(main())
