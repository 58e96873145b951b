"""`python -m spp` is `spp`."""

import sys

from spp.cli import main

sys.exit(main())
