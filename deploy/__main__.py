"""``python -m deploy`` is ``fedspan``, for places without that script."""

import sys

from deploy.cli import main

sys.exit(main())
