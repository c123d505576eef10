"""FloatMetrics: a finished float evaluation, kept for the next start."""
import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional

from mmengine.runner import Runner
from torch import nn

from isvit_det.checkpoint import file_hash, plain
from isvit_det.core.files import write_atomically
from isvit_det.core.ranks import num_ranks, of_first
from isvit_det.engine.images import evaluation_paths, unwrap
from isvit_det.engine.provenance import versions
from isvit_det.engine.tasks import metric_configs
from isvit_det.packed_state import checksum


def prediction_key(runner: Runner, model: nn.Module) -> str:
    """One string for all that a model's predictions depend on.

    Args:
        runner: about to evaluate.
        model: its model, on its device.
    """
    cfg, dataset = runner.cfg, runner.test_loop.dataloader.dataset
    return _digest([
        checksum(model.state_dict()),
        versions(),
        next(model.parameters()).device.type,
        num_ranks(),
        [cfg.model, cfg.test_dataloader,
         cfg.get('test_cfg')],
        _hashes(getattr(data, 'ann_file', None) for data in unwrap(dataset)),
        [_state(path) for path in evaluation_paths(dataset)],
    ])


class FloatMetrics:
    """One JSON file that names everything its metrics depend on.

    Args:
        directory: of the file.
        runner: about to evaluate.
        predictions: key of what the metrics are of.
    """

    def __init__(self, directory: Path, runner: Runner,
                 predictions: str) -> None:
        self.path = directory / 'float_metrics.json'
        configs = metric_configs(runner.cfg)
        self.key = _digest([
            predictions, runner.cfg.test_evaluator,
            _hashes(config.get('ann_file') for config in configs)
        ])

    def recall(self) -> Optional[Dict[str, Any]]:
        """What was kept, or None if there is nothing of this key."""
        kept: Dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            kept = json.loads(self.path.read_text())
        return of_first(
            kept.get('found') if kept.get('key') == self.key else None)

    def keep(self, found: Mapping[str, Any]) -> None:
        """Replace what was kept."""
        text = json.dumps(dict(key=self.key, found=plain(found))).encode()
        write_atomically(self.path, lambda file: file.write(text))


def _digest(depends: Any) -> str:
    text = json.dumps(plain(depends), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _hashes(paths: Iterable[Any]) -> List[Optional[str]]:
    """Of the contents of annotation files; None where there is no file."""
    return [
        file_hash(Path(path)) if path and Path(path).is_file() else None
        for path in paths
    ]


def _state(path: Path) -> List[Any]:
    """What tells an image from one that replaces it."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return [path.name, found.st_size, found.st_mtime_ns]
    return [path.name]
