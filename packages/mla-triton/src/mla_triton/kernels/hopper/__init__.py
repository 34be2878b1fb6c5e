"""Decode kernels for NVIDIA Hopper, in Gluon: TMA, warp specialisation, wgmma.

``wide`` serves more than 32 query rows of a request, ``narrow`` up to 32; ``load`` feeds both,
``schedule`` deals out the work and ``merge`` joins what was cut.
"""
