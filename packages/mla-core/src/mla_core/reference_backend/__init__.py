"""The ``reference`` backend: every op and layout in plain torch, on any device.

It is the embedded default: always installed, used where no faster backend fits, and quick enough
on a laptop to serve small models. The truth that it is tested against lives in
`mla_core.reference`.
"""
