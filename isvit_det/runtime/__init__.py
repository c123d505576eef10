"""The native runtime: calibrated layers in integer arithmetic on the CPU.

Three steps lead from a calibrated layer to its output. A plan of ``plans``
describes what the layer computes in integers; ``overflow`` and ``packing``
arrange its weights for the kernels of csrc/; ``native`` calls these kernels on
tensors, after ``build`` has compiled them. ``layers`` runs single linear
layers and convolutions, and ``blocks`` whole transformer blocks. ``engine``
attaches all of this to a model and decides at every forward whether it is
used.
"""

# The values of ``model.engine``: what runs a model's quantized layers.
ENGINES = ('auto', 'native', 'simulation')
# A value of ``--engine`` only: the model is evaluated in both engines.
BOTH = 'both'
