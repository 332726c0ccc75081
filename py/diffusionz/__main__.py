"""`python -m diffusionz`."""

import sys

from diffusionz.cli import main

sys.exit(main())
