"""FloatMetrics: the metrics of the float model, kept for the next run."""
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
    """Everything that the predictions of a model depend on, in plain values.

    Args:
        runner: of the evaluation.
        model: its model, on its device.
    """
    cfg, dataset = runner.cfg, runner.test_loop.dataloader.dataset
    return [
        checksum(model.state_dict()),
        versions(),
        # The index is left out, because each process may have another GPU.
        next(model.parameters()).device.type,
        world_size(),
        [without_engine(cfg.model), cfg.test_dataloader,
         cfg.get('test_cfg')],
        [dataset_state(data) for data in unwrap(dataset)]
    ]


def without_engine(model: Mapping[str, Any]) -> Dict[str, Any]:
    """A model's config without the engine, which changes no weight."""
    return {key: value for key, value in model.items() if key != 'engine'}


def prediction_key(sources: List[Any]) -> str:
    """A digest of everything that the predictions of a model depend on.

    Args:
        sources: of ``sources_of``.
    """
    return digest_of(plain(sources))


class FloatMetrics:
    """A JSON file with metrics and a digest of what they depend on.

    Args:
        directory: of the file.
        runner: of the evaluation.
        sources: of ``sources_of``, for the model with float weights.
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
        """The metrics in the file, or None if they are not of this run.

        A damaged file is ignored with a warning. All processes get what
        process 0 reads.
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

    def keep(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics to the file."""
        kept = dict(key=self.key, found=plain(metrics))
        kept['checksum'] = digest_of(kept)
        text = json.dumps(kept).encode()
        write_atomically(self.path, lambda file: file.write(text))
