#!/usr/bin/env python
"""Quantize a detector: from an MMDetection config to AP in low bits."""
import importlib.util
import sys
from pathlib import Path

if __name__ == '__main__':
    if importlib.util.find_spec('isvit_det') is None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from isvit_det.host import check_host, quiet_imports
    try:
        with quiet_imports():
            check_host()
            from isvit_det.commands.quantize_det import main
    except ImportError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    sys.exit(main())
