"""`python -m mdproof`."""

import sys

from mdproof.cli import main

sys.exit(main())
