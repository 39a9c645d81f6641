"""`python -m localgrad` is `localgrad`."""

import sys

from localgrad.cli import main

sys.exit(main())
