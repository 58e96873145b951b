"""`python -m spp` is `spp`."""

import sys

from spp.cli.entry_point import main

sys.exit(main())
