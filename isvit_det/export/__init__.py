"""Export: calibrated backbones written for other engines.

``graph`` collects the nodes of an ONNX file; ``layers``, ``attention``,
``windows`` and ``blocks`` add those of a plan, and ``swin`` and ``vit`` those
of a whole backbone. ``proof`` compiles the file and checks what the engine
runs in integers, before ``files`` writes it. ``engines`` runs it.
"""

# The values of ``--to``: formats of the files.
FORMATS = ('onnx', 'openvino')
