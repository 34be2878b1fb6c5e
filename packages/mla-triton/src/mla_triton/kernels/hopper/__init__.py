"""Decode kernels for NVIDIA Hopper, in Gluon: TMA, warp specialisation, wgmma.

``wide`` serves more than 32 query rows of a request and ``narrow`` up to 32, ``packed`` any number
over fp8 caches. ``load`` feeds them, ``schedule`` deals out the work and ``merge`` joins what was
cut.
"""
