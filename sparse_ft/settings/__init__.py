"""Every parameter once: what it is called, what it may be, and what it belongs to. Imports no torch."""
