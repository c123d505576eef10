"""FloatMetrics: a finished float evaluation, kept for the next start."""
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from mmengine.runner import Runner
from torch import nn

from isvit_det.core.digests import checksum, digest_of
from isvit_det.core.distributed import broadcast_object, world_size
from isvit_det.core.files import write_atomically
from isvit_det.core.plain import plain
from isvit_det.evaluation.data_state import dataset_state, metric_state
from isvit_det.inputs.datasets import unwrap
from isvit_det.report.provenance import versions


def sources_of(runner: Runner, model: nn.Module) -> List[Any]:
    """What a model's predictions depend on, pictures and annotations too.

    Args:
        runner: about to evaluate.
        model: its model, on its device.
    """
    cfg, dataset = runner.cfg, runner.test_loop.dataloader.dataset
    return [
        checksum(model.state_dict()),
        versions(),
        # Processes of a run have GPUs of their own.
        next(model.parameters()).device.type,
        world_size(),
        [cfg.model, cfg.test_dataloader,
         cfg.get('test_cfg')],
        [dataset_state(data) for data in unwrap(dataset)]
    ]


def prediction_key(sources: List[Any]) -> str:
    """One string for all that a model's predictions depend on.

    Args:
        sources: of ``sources_of``.
    """
    return digest_of(plain(sources))


class FloatMetrics:
    """One JSON file that names everything its metrics depend on.

    Args:
        directory: of the file.
        runner: about to evaluate.
        sources: of ``sources_of`` the model with float weights.
    """

    def __init__(self, directory: Path, runner: Runner,
                 sources: List[Any]) -> None:
        self.path = directory / 'float_metrics.json'
        self.logger = runner.logger
        evaluator = runner.cfg.test_evaluator
        self.key = digest_of(
            plain([*sources, evaluator,
                   metric_state(evaluator)]))

    def recall(self) -> Optional[Dict[str, Any]]:
        """What was kept, or None if there is nothing of this key.

        A file that was changed or damaged is told of and not used. All
        processes are given what the first one reads.
        """
        return broadcast_object(self._read())

    def _read(self) -> Optional[Dict[str, Any]]:
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
