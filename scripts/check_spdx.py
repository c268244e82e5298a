# SPDX-License-Identifier: Apache-2.0
"""Check that each file named on the command line starts with the SPDX header; pre-commit runs it."""

import sys
from pathlib import Path

HEADER = "# SPDX-License-Identifier: Apache-2.0"

missing = [name for name in sys.argv[1:] if (text := Path(name).read_text()) and not text.startswith(HEADER)]
if missing:
    sys.exit("no SPDX header on the first line: " + ", ".join(missing))
