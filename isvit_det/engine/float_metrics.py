"""FloatMetrics: a finished float evaluation, kept for the next start."""
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from mmengine.runner import Runner
from torch import nn

from isvit_det.checkpoint import file_hash, plain
from isvit_det.core.digests import checksum, digest_of
from isvit_det.core.files import write_atomically
from isvit_det.engine.images import unwrap
from isvit_det.engine.provenance import versions


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
        self.logger = runner.logger
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
        """What was kept, or None if there is nothing of this key.

        A file that was changed or damaged is told of and not used.
        """
        try:
            kept = json.loads(self.path.read_text())
            if kept.pop('checksum') != digest_of(kept):
                raise ValueError('its checksum does not match its contents')
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError,
                RecursionError) as error:
            self.logger.warning(f'{self.path} is damaged ({error}): the '
                                'float model is evaluated again')
            return None
        return kept['found'] if kept['key'] == self.key else None

    def keep(self, found: Mapping[str, Any]) -> None:
        """Replace what was kept."""
        kept = dict(key=self.key, found=plain(found))
        kept['checksum'] = digest_of(kept)
        text = json.dumps(kept).encode()
        write_atomically(self.path, lambda file: file.write(text))
