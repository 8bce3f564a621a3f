"""What the core leaves out: each can be deleted."""

import t2g  # noqa: F401  first, so that Ctrl-C ends the slow imports quietly
