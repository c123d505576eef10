"""SOSCalibrationHook: calibrates a model after its weights are loaded."""
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner

from isvit_det.calibration.events import UnitRecord
from isvit_det.calibration.store import ActivationPool
from isvit_det.checkpoint import is_packed, save_packed
from isvit_det.core.digests import checksum
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import is_calibrated
from isvit_det.core.plain import plain
from isvit_det.core.settings import SOSConfig
from isvit_det.engine.calibrate import WORKSPACE, calibrate_detector_
from isvit_det.engine.float_metrics import without_engine
from isvit_det.engine.heads import find_products
from isvit_det.engine.images import CalibrationImages, calibration_images
from isvit_det.engine.reported import other_engine
from isvit_det.engine.tested_weights import take_tested_weights_
from isvit_det.evaluation.tasks import metainfo
from isvit_det.inputs.datasets import (dataset_of, evaluation_paths,
                                       refuse_overlap)
from isvit_det.packed.header import check_others
from isvit_det.registry import HOOKS
from isvit_det.report.provenance import describe_origin, fingerprint
from isvit_det.report.tables import count_calls, list_sites_run


@dataclass
class Outcome:
    """Result of a calibration.

    Attributes:
        records: a record for each unit.
        packed: path of the packed file.
        provenance: as in the packed file.
    """
    records: List[UnitRecord]
    packed: Path
    provenance: Dict[str, Any]


@HOOKS.register_module()
class SOSCalibrationHook(Hook):
    """Calibrate the model and write the packed file, in ``before_test``.

    A model that is already calibrated stays as it is, so a packed file can be
    tested with the config of its calibration. The hook calibrates the weights
    that the test would evaluate: other hooks that change the weights (EMA)
    are run once before the calibration, and are disabled from then on.

    Args:
        sos: values of ``SOSConfig``.
        calib_dataloader: config of a data loader, whose data set is the
            calibration set; None draws from the training split with the test
            pipeline.
        out: name of the packed file in the work directory.
        store_gb: memory for activations in GB (1e9 bytes); None takes half
            of the available memory.

    Attributes:
        outcome: None until a calibration has ended.
        teacher: a copy of the float backbone, which stays as it is; None
            makes one.
        left_out: class names of the hooks that are disabled.
    """
    priority = 'VERY_LOW'

    def __init__(self,
                 sos: Optional[Mapping[str, Any]] = None,
                 calib_dataloader: Optional[Mapping[str, Any]] = None,
                 out: str = 'packed.pth',
                 store_gb: Optional[float] = None) -> None:
        self.sos_values = dict(sos or {})
        self.calib_dataloader = calib_dataloader
        self.out = out
        self.store_gb = store_gb
        self.outcome: Optional[Outcome] = None
        self.teacher: Any = None
        self.left_out: List[str] = []
        # Entries of the packed file that was loaded.
        self._packed: Dict[str, Any] = {}
        self._weights: Optional[str] = None
        self._postponed = False
        self._calls: Dict[str, int] = {}
        self._images: Optional[CalibrationImages] = None
        self._image_hashes: List[str] = []

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """Test without calibration in this context: the float evaluation."""
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False

    def before_run(self, runner: Runner) -> None:
        """Check the settings before any work is done.

        Raises:
            QuantError: if one is wrong, or several hooks calibrate.
        """
        ours = [
            hook for hook in runner.hooks
            if isinstance(hook, SOSCalibrationHook)
        ]
        if len(ours) > 1:
            names = [type(hook).__name__ for hook in ours]
            raise QuantError(f'custom_hooks: {len(ours)} hooks calibrate, '
                             f'{names}; keep one.')
        name = Path(str(self.out))
        if name.name != str(self.out) or name.suffix != '.pth':
            raise QuantError(f'SOSCalibrationHook: out={self.out!r}; give the '
                             'name of a .pth file, without a folder: it lies '
                             'in the work directory.')
        self.sos_config(runner)
        # The constructor checks the budget.
        ActivationPool(Path(runner.work_dir), self.store_gb)

    def after_load_checkpoint(self, runner: Runner,
                              checkpoint: Dict[str, Any]) -> None:
        """Check the entries of a packed file that the model does not get.

        Raises:
            QuantError: if they were changed.
        """
        if is_packed(checkpoint):
            check_others(checkpoint)
            self._packed = {
                key: value
                for key, value in checkpoint.items() if key != 'state_dict'
            }

    def sos_config(self, runner: Runner) -> SOSConfig:
        """Settings of the calibration, on top of the method's preset.

        Raises:
            QuantError: if the model is not quantized, or a setting is wrong.
        """
        quant = getattr(bare_model(runner), 'quant_config', None)
        if quant is None:
            raise QuantError(
                'SOSCalibrationHook: model.type is not '
                "'isvit_det.quantized_detector'; build the detector with it.")
        return SOSConfig.from_dict(self.sos_values, quant)

    def settle(self, runner: Runner, is_begun: bool = False) -> None:
        """Let the other hooks change the weights, and note the result.

        Args:
            runner: has loaded the float weights.
            is_begun: whether the runner is in ``before_test`` of this hook.
        """
        if self._weights is None:
            self.left_out = take_tested_weights_(runner, self, is_begun)
            self._note_weights(runner)

    def _note_weights(self, runner: Runner) -> None:
        self._weights = checksum(bare_model(runner).state_dict())

    def _check_weights(self, runner: Runner) -> None:
        """Raise if the weights have changed since they were noted."""
        if self._weights is None:
            return
        if checksum(bare_model(runner).state_dict()) != self._weights:
            kinds = [hook['type'] for hook in runner.cfg['custom_hooks']]
            names = [getattr(kind, '__name__', kind) for kind in kinds]
            raise QuantError(
                f'custom_hooks: one of {names} changes the weights during a '
                'test, whose AP would be of other weights than those that '
                'are calibrated; take it out.')

    def prepare(self, runner: Runner) -> CalibrationImages:
        """Draw the calibration images and check them.

        None of them may be an evaluation image, and the model must be able to
        predict on the first one.

        Raises:
            QuantError: if a check fails.
        """
        if self._images is None:
            source = runner.cfg.get('load_from')
            packed = self.packed(runner)
            if source and packed.exists() and packed.samefile(source):
                raise QuantError(f'--work-dir: {packed} is the float '
                                 'checkpoint itself, which the packed one '
                                 'would replace; give another folder.')
            sos = self.sos_config(runner)
            loader = self.calib_dataloader
            images = calibration_images(
                runner.cfg, None if loader is None else dataset_of(
                    loader, 'calib_dataloader'), sos.num_images, sos.seed)
            dataset = runner.test_loop.dataloader.dataset
            self._image_hashes = refuse_overlap(images.paths(),
                                                evaluation_paths(dataset))
            images.check(bare_model(runner))
            if len(images) < images.asked:
                runner.logger.warning(
                    f'{images.asked} calibration images asked for, there are '
                    f'{len(images)}: all are used')
            model = bare_model(runner)
            model.products = find_products(model, images)
            self._images = images
        return self._images

    def packed(self, runner: Runner) -> Path:
        """Path of the packed file."""
        return Path(runner.work_dir) / self.out

    def before_test(self, runner: Runner) -> None:
        """Calibrate, unless the model is calibrated.

        Raises:
            QuantError: if the model is wrapped for test-time augmentation.
        """
        model = bare_model(runner)
        # The model is in training mode here; DropPath would corrupt the
        # targets.
        model.eval()
        if self._postponed or is_calibrated(model):
            return
        if isinstance(runner.model, BaseTTAModel):
            raise QuantError('SOSCalibrationHook: a model is not calibrated '
                             'with --tta; calibrate it without, and give the '
                             'packed file to --tta.')
        self.settle(runner, is_begun=True)
        model = bare_model(runner)
        model.eval()
        images = self.prepare(runner)
        sos = self.sos_config(runner)
        origin = plain(
            describe_origin(model, runner.cfg.get('load_from'), images, sos))
        key = fingerprint(origin, self._image_hashes, [
            without_engine(runner.cfg.model),
            runner.cfg.test_dataloader['dataset'], self.calib_dataloader
        ], model)
        records = calibrate_detector_(model, images, sos,
                                      Path(runner.work_dir) / WORKSPACE, key,
                                      runner.logger, self.store_gb,
                                      self.teacher)
        if model.float_layers:
            # MMDetection's tools find the config beside the packed file.
            runner.cfg.model['float_layers'] = model.float_layers
            runner.dump_config()
        packed = self.packed(runner)
        if is_main_process():
            save_packed(model, packed, origin,
                        metainfo(runner.test_loop.dataloader.dataset))
            # Relative to the current folder, if the file is below it.
            shown = os.path.relpath(packed)
            where = packed if shown.startswith(os.pardir) else shown
            runner.logger.info(f'packed checkpoint: {where}')
        self.outcome = Outcome(records, packed, origin)
        self._note_weights(runner)

    def before_test_epoch(self, runner: Runner) -> None:
        """Note the number of calls of every quantizer.

        A line tells of a test in another engine than the calibration's.
        """
        model = bare_model(runner)
        self._calls = count_calls(model)
        source = runner.cfg.get('load_from')
        if self._packed and source:
            line = other_engine(model, Path(source), self._packed)
            if line is not None:
                runner.logger.info(line)

    def before_test_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None) -> None:
        """Check before the first image that the weights have not changed.

        Raises:
            QuantError: if another hook has changed them.
        """
        if batch_idx == 0:
            self._check_weights(runner)

    def after_test_iter(self,
                        runner: Runner,
                        batch_idx: int,
                        data_batch: Any = None,
                        outputs: Any = None) -> None:
        """Check on the first image that the backbone ran quantized.

        Raises:
            QuantError: naming sites of the backbone that did not, or if a
                hook has changed the weights.
        """
        model = bare_model(runner)
        if batch_idx != 0:
            return
        self._check_weights(runner)
        if not self._postponed and is_calibrated(model):
            list_sites_run(model, self._calls)

    def after_test_epoch(self,
                         runner: Runner,
                         metrics: Optional[Dict[str, float]] = None) -> None:
        """Check that the weights have not changed during the test.

        Raises:
            QuantError: if a hook has changed them.
        """
        self._check_weights(runner)


def bare_model(runner: Runner) -> Any:
    """The runner's model without wrappers (distributed, augmentation)."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
