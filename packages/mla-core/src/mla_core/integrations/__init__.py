"""Adapters that run models of other libraries through our ops; each needs its library installed."""
