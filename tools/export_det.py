#!/usr/bin/env python
"""Write a packed detector's backbone for OpenVINO or onnxruntime."""
import importlib.util
import sys
from pathlib import Path

if __name__ == '__main__':
    if importlib.util.find_spec('isvit_det') is None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from isvit_det.__main__ import run
    sys.exit(run('export_det', sys.argv[1:]))
