"""What the core leaves out. The core imports none of it, so this folder can be deleted."""

import t2g  # noqa: F401  first, so that Ctrl-C ends the slow imports quietly
