"""Plans: calibrated layers and blocks described in integers.

A plan says what a layer computes, for whatever engine: the runtime packs it
for the kernels of csrc/, and ``export`` writes it for other engines.
"""
