"""Commands that this package adds to ``mla``."""
