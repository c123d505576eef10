"""The integer runtime: calibrated layers on the native kernels of csrc/.

``plan`` says what a layer computes in integers, ``overflow`` and ``packing``
lay its weights out for the kernels, ``build`` compiles these, ``native`` calls
them on tensors, and ``layers`` has whole linear layers and convolutions.
"""

# What may run a calibrated model's quantized layers.
ENGINES = ('auto', 'native', 'simulation')
# With which the calibrated model is evaluated twice.
BOTH = 'both'
