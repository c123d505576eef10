"""FloatMetrics: a finished float evaluation, kept for the next start."""
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from mmengine.runner import Runner
from torch import nn

from isvit_det.checkpoint import file_hash, plain
from isvit_det.core.files import write_atomically
from isvit_det.engine.images import unwrap
from isvit_det.engine.provenance import versions
from isvit_det.packed_state import checksum


class FloatMetrics:
    """One JSON file that names everything its metrics depend on.

    Args:
        directory: of the file.
        runner: about to evaluate.
        model: its model, with float weights.
    """

    def __init__(self, directory: Path, runner: Runner,
                 model: nn.Module) -> None:
        self.path = directory / 'float_metrics.json'
        cfg = runner.cfg
        depends = plain([
            checksum(model.state_dict()),
            versions(),
            str(next(model.parameters()).device),
            [cfg.model, cfg.test_dataloader, cfg.test_evaluator],
            [
                file_hash(Path(data.ann_file))
                for data in unwrap(runner.test_loop.dataloader.dataset)
            ],
        ])
        self.key = hashlib.sha256(
            json.dumps(depends, sort_keys=True).encode()).hexdigest()

    def recall(self) -> Optional[Dict[str, Any]]:
        """What was kept, or None if there is nothing of this key."""
        try:
            kept = json.loads(self.path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return kept['found'] if kept['key'] == self.key else None

    def keep(self, found: Mapping[str, Any]) -> None:
        """Replace what was kept."""
        text = json.dumps(dict(key=self.key, found=plain(found))).encode()
        write_atomically(self.path, lambda file: file.write(text))
